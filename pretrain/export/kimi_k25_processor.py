"""Image and video processor of an exported Kimi-K2.5 model: the same processing as in training.

``export`` copies this file and pretrain/data/media/pixels.py, which decodes images, into the
exported folder, where preprocessor_config.json names it in ``auto_map``. ``AutoProcessor`` and
SGLang load it with ``trust_remote_code=True``, and so does vLLM if numba is not installed. It needs
transformers, NumPy, Pillow, and PyAV for video files, but not torchvision or this package.

For the model, a group of up to four frames is an image, and a video is a sequence of groups.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import BatchFeature, Kimi_K25Processor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image

from pretrain.data.media.pixels import ImageFile, Pixels, decode, open_image

_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_OF_IMAGES = ("crop_to_patches", "do_rescale", "do_normalize")
# Arguments of transformers' processors that are ignored: videos are sampled as in training.
_WITHOUT_EFFECT = (
    *("images_kwargs", "videos_kwargs", "common_kwargs", "device", "return_metadata"),
    *("do_sample_frames", "fps", "num_frames", "video_metadata", "do_convert_rgb", "do_resize"),
)


class Group(NamedTuple):
    """Frames that the model sees as an image: one of an image, or up to four of a video.

    Attributes:
        frames: RGB images of one size.
        max_patches: of a frame before padding; larger frames are shrunk.
    """

    frames: Sequence[Image.Image]
    max_patches: int


class KimiImageProcessor(BaseImageProcessor):
    """Shrinks large images, pads them with black to whole tokens, and cuts them into patches.

    Args:
        media_proc_cfg: settings of the published processor: ``patch_size`` in pixels,
            ``merge_kernel_size`` in patches, ``in_patch_limit`` of an image,
            ``in_patch_limit_each_frame`` of a video, ``patch_limit_on_one_side``,
            ``temporal_merge_kernel_size`` (frames of a group), ``sample_fps`` of video files,
            ``image_mean`` and ``image_std`` of the three channels.
        kwargs: the same settings under transformers' names; not used.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_grid_thw"]

    def __init__(self, media_proc_cfg: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.media_proc_cfg = dict(media_proc_cfg)
        self.patch_size = int(media_proc_cfg["patch_size"])
        self.merge_size = int(media_proc_cfg["merge_kernel_size"])
        self.num_frames_per_chunk = int(media_proc_cfg["temporal_merge_kernel_size"])

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        *,
        do_rescale: bool = True,
        do_normalize: bool = True,
        crop_to_patches: bool | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Convert images to patches.

        Args:
            images: an image or a (nested) list of images: Pillow images, arrays, tensors, file
                names or URLs; or a list of media in the format of servers,
                ``{"type": "image", "image": …}`` or
                ``{"type": "video_chunk", "video_chunk": [frame, …]}``.
            return_tensors: default: torch tensors.
            do_rescale, do_normalize: unless both are true, pixels are 0 to 255.
            crop_to_patches: if given, ``num_patches`` of each image is also returned, which TRL
                needs. Images are never cropped.

        Returns:
            ``pixel_values`` [patches, 3, patch_size, patch_size], and [images, 3] with the frames,
            rows and columns of patches: ``image_grid_thw``, or ``grid_thws`` of media.

        Raises:
            ValueError: the images are in another format.
        """
        media = isinstance(images, list | tuple) and images and isinstance(images[0], Mapping)
        groups = [self._group(one) for one in images] if media else self.image_groups(images)
        patches, grids = self.patches(groups, normalize=do_rescale and do_normalize)
        data = {"pixel_values": patches, "grid_thws" if media else "image_grid_thw": grids}
        if crop_to_patches is not None:
            data["num_patches"] = grids.prod(-1)
        return BatchFeature(data, tensor_type=return_tensors)

    def patches(
        self, groups: Sequence[Group], *, normalize: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert groups of frames to patches.

        Args:
            normalize: by ``image_mean`` and ``image_std``; otherwise pixels are 0 to 255.

        Returns:
            float32 [patches, 3, patch_size, patch_size], and int64 [groups, 3]: frames, rows and
            columns of patches.
        """
        side = self.patch_size
        made, grids = [np.empty((0, 3, side, side), np.uint8)], []
        for group in groups:
            pixels = np.stack([self._fit(frame, group.max_patches) for frame in group.frames])
            count, height, width, _ = pixels.shape
            grids.append([count, height // side, width // side])
            cut = pixels.reshape(count, height // side, side, width // side, side, 3)
            made.append(cut.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3, side, side))
        values: npt.NDArray[Any] = np.concatenate(made).astype(np.float32)
        if normalize:
            mean, deviation = (
                np.asarray(self.media_proc_cfg[name], np.float32).reshape(3, 1, 1)
                for name in ("image_mean", "image_std")
            )
            values = (values / 255 - mean) / deviation
        return torch.from_numpy(values), torch.tensor(grids, dtype=torch.int64).view(-1, 3)

    def media_tokens_calculator(self, media: Mapping[str, Any]) -> int:
        """Number of tokens of a medium of :meth:`preprocess`."""
        return self.num_tokens(self._group(media))

    def num_tokens(self, group: Group) -> int:
        """Number of tokens of a group, which depends on its size only."""
        width, height = group.frames[0].size
        return self._num_patches(height, width, group.max_patches) // self.merge_size**2

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """Number of patches of an image, given its size in pixels."""
        return self._num_patches(height, width, self.media_proc_cfg["in_patch_limit"])

    def image_groups(self, images: Any) -> list[Group]:
        """One group for each image of a nested list."""
        if images is None:
            return []
        if isinstance(images, list | tuple):
            return [group for one in images for group in self.image_groups(one)]
        if getattr(images, "ndim", 3) == 4:
            return [group for one in images for group in self.image_groups(one)]
        return [Group([_rgb(images)], self.media_proc_cfg["in_patch_limit"])]

    def video_groups(self, video: Any) -> list[Group]:
        """Groups of a video.

        Args:
            video: name or bytes of a video file, which is sampled at ``sample_fps``; name of an
                animation, all frames of which are used; or frames: a list, or an array
                [frames, height, width, 3] or [frames, 3, height, width].

        Raises:
            ValueError: there are no frames, or they differ in size.
        """
        frames = list(_frames(video, self.media_proc_cfg["sample_fps"]))
        if not frames or len({frame.size for frame in frames}) > 1:
            raise ValueError("a video needs frames, all of one size")
        one = len(frames) == 1
        limit = self.media_proc_cfg["in_patch_limit" if one else "in_patch_limit_each_frame"]
        size = self.num_frames_per_chunk
        return [Group(frames[at : at + size], limit) for at in range(0, len(frames), size)]

    def split_video_chunks(self, video: Any) -> list[dict[str, Any]]:
        """Groups of a video as media, each with the text that surrounds it."""
        prompt = "<|media_begin|><|media_pad|><|media_end|>"
        return [
            {"type": "video_chunk", "video_chunk": list(group.frames), "prompt": prompt}
            for group in self.video_groups(video)
        ]

    def _group(self, media: Mapping[str, Any]) -> Group:
        kind, settings = media.get("type"), self.media_proc_cfg
        if kind == "image":
            return Group([_rgb(media["image"])], settings["in_patch_limit"])
        if kind == "video_chunk":
            frames = [_rgb(frame) for frame in media["video_chunk"]]
            return Group(frames, settings["in_patch_limit_each_frame"])
        raise ValueError(f"a medium is of type image or video_chunk, not {kind!r}")

    def _sizes(
        self, height: int, width: int, max_patches: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) in pixels after shrinking, and after padding."""
        side, cell = self.patch_size, self.merge_size * self.patch_size
        longest = self.media_proc_cfg["patch_limit_on_one_side"] * side
        patches = max(1, height // side) * max(1, width // side)
        scale = min(1.0, math.sqrt(max_patches / patches), longest / height, longest / width)
        shrunk = [min(max(1, int(length * scale)), longest) for length in (height, width)]
        padded = [-(-length // cell) * cell for length in shrunk]
        return (shrunk[0], shrunk[1]), (padded[0], padded[1])

    def _num_patches(self, height: int, width: int, max_patches: int) -> int:
        _, (height, width) = self._sizes(height, width, max_patches)
        return (height // self.patch_size) * (width // self.patch_size)

    def _fit(self, frame: Image.Image, max_patches: int) -> Pixels:
        """uint8 [height, width, 3], shrunk and padded."""
        width, height = frame.size
        shrunk, padded = self._sizes(height, width, max_patches)
        if shrunk != (height, width):
            frame = frame.resize(shrunk[::-1], Image.Resampling.BICUBIC)
        pixels = np.zeros((*padded, 3), np.uint8)
        pixels[: shrunk[0], : shrunk[1]] = np.asarray(frame)
        return pixels


class KimiProcessor(Kimi_K25Processor):
    """Processor of texts with images and videos, for transformers and servers.

    The placeholders in a text are those of the chat template: ``<|media_pad|>`` for an image,
    ``<|kimi_k25_video_placeholder|>`` for a video. Videos are returned in ``pixel_values``, too.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.image_token = "<|media_pad|>"
        self.video_token = "<|kimi_k25_video_placeholder|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)

    @property
    def media_processor(self) -> Any:
        """The image processor, under the name that servers expect."""
        return self.image_processor

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        *,
        medias: Sequence[Mapping[str, Any]] | None = None,
        return_tensors: str | None = None,
        return_mm_token_type_ids: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Convert texts, images and videos to tokens and patches.

        Args:
            images, videos: one for each placeholder in the texts, in the same order.
            text: a text or a list of texts.
            medias: media instead of images and videos, as SGLang passes them: the text has a
                ``<|media_pad|>`` for each of their tokens.
            kwargs: of the tokenizer (also in ``text_kwargs``) and of the image processor.

        Raises:
            ValueError: the numbers of images or videos and of placeholders differ, or there is
                audio.
        """
        if audio is not None:
            raise ValueError("this model reads text, images and videos, not audio")
        texts = [text] if isinstance(text, str) else None if text is None else list(text)
        of_images = dict(kwargs.get("images_kwargs", {}))
        of_images |= {name: kwargs.pop(name) for name in _OF_IMAGES if name in kwargs}
        of_text = {**kwargs.pop("text_kwargs", {}), **kwargs}
        of_text = {name: of_text[name] for name in of_text if name not in _WITHOUT_EFFECT}

        data: dict[str, Any] = {}
        if medias is not None:
            data |= self.image_processor.preprocess(list(medias), **of_images)
        else:
            shown = self.image_processor.image_groups(images)
            films = [self.image_processor.video_groups(video) for video in _videos(videos)]
            groups = [*shown, *(group for film in films for group in film)]
            if texts is not None:
                texts, groups = self._expand(texts, shown, films)
            if groups:
                patches, grids = self.image_processor.patches(groups)
                data |= {"pixel_values": patches, "image_grid_thw": grids}
        if texts is not None:
            tokens = self.tokenizer(texts, **of_text)
            if return_mm_token_type_ids:
                tokens["mm_token_type_ids"] = self.create_mm_token_type_ids(tokens["input_ids"])
            data = {**tokens, **data}
        return BatchFeature(data, tensor_type=return_tensors)

    def _expand(
        self, texts: Sequence[str], images: Sequence[Group], films: Sequence[Sequence[Group]]
    ) -> tuple[list[str], list[Group]]:
        """Texts with one placeholder for each token, and all groups in the order of the texts."""
        for token, given in ((self.image_token, images), (self.video_token, films)):
            found = sum(text.count(token) for text in texts)
            if found != len(given):
                kind = "images" if given is images else "videos"
                raise ValueError(f"the text has {found} {token} and there are {len(given)} {kind}")
        next_image, next_film = iter(images), iter(films)
        expanded, ordered = [], []
        for text in texts:
            parts = []
            for number, part in enumerate(text.split(self.image_token)):
                if number:
                    ordered.append(next(next_image))
                    parts.append(self._placeholders(ordered[-1]))
                before, *others = part.split(self.video_token)
                parts.append(before)
                for after in others:
                    film = next(next_film)
                    ordered += film
                    parts += [
                        f"<|media_begin|>{self._placeholders(group)}<|media_end|>" for group in film
                    ]
                    parts.append(after)
            expanded.append("".join(parts))
        return expanded, ordered

    def _placeholders(self, group: Group) -> str:
        return self.image_token * int(self.image_processor.num_tokens(group))


def _rgb(image: Any) -> Image.Image:
    """Convert an image to what a viewer shows: upright, sRGB, on white, 8 bits per channel.

    Args:
        image: a Pillow image, array or tensor, the name or bytes of a file, a URL or base64.
    """
    if isinstance(image, bytes | Path):
        return Image.fromarray(decode(image))
    if isinstance(image, str):
        if Path(image[:4096]).is_file():
            return Image.fromarray(decode(image))
        image = load_image(image)
    elif not isinstance(image, Image.Image):
        image = to_pil_image(image)
    return Image.fromarray(ImageFile(image).rgb())


def _videos(videos: Any) -> list[Any]:
    """Videos of a nested list."""
    if videos is None:
        return []
    if getattr(videos, "ndim", 4) == 5:
        return list(videos)
    if not isinstance(videos, list | tuple):
        return [videos]
    if videos and all(_is_frame(one) for one in videos):
        return [videos]
    return [video for one in videos for video in _videos(one)]


def _is_frame(one: Any) -> bool:
    if isinstance(one, str | Path):
        return not str(one).lower().endswith((*_VIDEO_SUFFIXES, ".gif", ".webp", ".apng"))
    return isinstance(one, Image.Image) or getattr(one, "ndim", 0) == 3


def _frames(video: Any, fps: float) -> Iterator[Image.Image]:
    if isinstance(video, bytes | io.BytesIO):
        yield from _file_frames(io.BytesIO(video) if isinstance(video, bytes) else video, fps)
    elif not isinstance(video, str | Path):
        yield from (_rgb(frame) for frame in video)
    elif str(video).lower().endswith(_VIDEO_SUFFIXES):
        yield from _file_frames(str(video), fps)
    else:
        with open_image(video) as image:
            for number in range(image.num_frames):
                yield Image.fromarray(image.rgb(number))


def _file_frames(file: Any, fps: float) -> Iterator[Image.Image]:
    """Decode the frame shown at each time k / fps after the first frame, with PyAV."""
    try:  # transformers requires every package that is imported outside a try
        import av
    except ImportError as error:
        raise ImportError("video files need PyAV: pip install av") from error

    with av.open(file) as container:
        stream = container.streams.video[0]
        step = 1 / (Fraction(str(fps)) * (stream.time_base or 1))
        count = max(1, math.ceil(stream.duration / step)) if stream.duration else None
        shown, start, end, taken = None, 0, 0, 0
        for frame in container.decode(stream):
            time = frame.pts or 0
            start = time if shown is None else start
            while shown is not None and taken != count and taken * step < time - start:
                yield _upright(shown)
                taken += 1
            shown, end = frame, time - start + (frame.duration or 0)
    if shown is None:
        raise ValueError("no frame of the video can be decoded")
    for _ in range((count or max(1, math.ceil(end / step))) - taken):
        yield _upright(shown)


def _upright(frame: Any) -> Image.Image:
    """Convert a frame to RGB, rotated and mirrored by the display matrix of its file."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:  # x' = a x + c y, y' = b x + d y
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return Image.fromarray(np.ascontiguousarray(pixels))
