"""Image and video files as frames: their sizes without decoding, and their pixels."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from pretrain.data.media import pixels, video
from pretrain.data.media.pixels import ImageFile, Pixels, open_image
from pretrain.data.media.span import Place

# Pillow warns of damaged metadata, which changes no pixel, and of large images below its own limit.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Media:
    """An image, or the frames of a video.

    Attributes:
        paths: the file of each frame; or one path of an image, an animation or a video file. In
            place of a path, the range of a file (:class:`~pretrain.data.media.span.Span`).
        moving: whether it is a video.
    """

    paths: tuple[Place, ...]
    moving: bool


def digest(media: Iterable[Media]) -> bytes:
    """A digest of the content of files; of one that cannot be read, its name counts."""
    found = hashlib.blake2b()
    for place in (place for one in media for place in one.paths):
        try:
            with open(place, "rb") if isinstance(place, str) else place.open() as file:
                content = hashlib.blake2b()
                while block := file.read(1 << 20):
                    content.update(block)
            found.update(content.digest())
        except OSError:
            found.update(str(place).encode("utf-8", "surrogatepass"))
    return found.digest()


def measure(media: Media, fps: float) -> tuple[int, int, int]:
    """(frames, height, width) in pixels. Only the first frame of a video file is decoded.

    Args:
        fps: frames per second to sample from a video file; animations have all their frames.

    Raises:
        ValueError: a file is missing or not an image, or its frames together exceed
            :data:`pretrain.data.media.pixels.MAX_FILM_PIXELS` pixels.
        PretrainError: PyAV is needed and not installed.
    """
    frames, height, width = _measure(media, fps)
    if frames * height * width > pixels.MAX_FILM_PIXELS:
        raise ValueError(
            f"{media.paths[0]}: {frames:,} frames of {width} x {height} pixels, in all more than "
            f"the {pixels.MAX_FILM_PIXELS:,} that are read"
        )
    return frames, height, width


def _measure(media: Media, fps: float) -> tuple[int, int, int]:
    sizes = []
    for path in media.paths:
        if video.is_video(str(path)):
            if not media.moving:
                raise ValueError(f"{path} is a video: write 'video', not 'image'")
            if len(media.paths) > 1:
                raise ValueError("a frame of it is a video")
            return video.measure(path, fps)
        with _opened(path) as image:
            sizes.append((image.num_frames if media.moving else 1, *image.size))
    if len({size[1:] for size in sizes}) > 1:
        raise ValueError("its frames differ in size")
    if len(media.paths) > 1 and any(frames > 1 for frames, _, _ in sizes):
        raise ValueError("a frame of it is a video")
    return sum(size[0] for size in sizes), *sizes[0][1:]


def read(media: Media, fps: float) -> Iterator[Pixels]:
    """Decode each frame: uint8 [height, width, 3].

    Args:
        fps: as for :func:`measure`.

    Raises:
        ValueError: a file is missing or damaged.
        PretrainError: PyAV is needed and not installed.
    """
    for path in media.paths:
        if video.is_video(str(path)):
            yield from video.frames(path, fps)
            continue
        with _opened(path) as image:
            for number in range(image.num_frames) if media.moving else (None,):
                yield image.rgb(number)


def _opened(place: Place) -> AbstractContextManager[ImageFile]:
    """Open an image as :func:`open_image` does; the place is a file or a range of one.

    Raises:
        ValueError: also where entering it does.
    """
    if isinstance(place, str):
        return open_image(place)
    try:
        return open_image(place.open(), place.name)
    except OSError as error:
        raise ValueError(f"{place}: {error.strerror or error}") from error
