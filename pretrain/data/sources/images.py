"""Sources of images, videos and text: captioned pairs, and documents that mix them."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data import files
from pretrain.data.cache import Stamp, cached, key_of, map_array, siblings, stamp
from pretrain.data.composer import Composer, as_pair
from pretrain.data.files import reason
from pretrain.data.interface import Split
from pretrain.data.media import frames, pixels, video
from pretrain.data.media.frames import Media
from pretrain.data.media.patches import VisionItem
from pretrain.data.media.pixels import Pixels
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip, Skipped
from pretrain.data.sources.indexed import (
    FileSource,
    IndexedDocuments,
    IndexedFile,
    read_files,
    read_lines,
    write_files,
    write_lines,
)
from pretrain.data.sources.interface import Segment, content_hash
from pretrain.data.sources.order import Integers
from pretrain.data.sources.splits import Column
from pretrain.errors import PretrainError
from pretrain.model.geometry import MAX_FRAMES
from pretrain.runtime.progress import counted

CAPTIONS = "captions.jsonl"
_CAPTION_SUFFIX = ".txt"
# Fields with media that documents do not have. A caption's image_url often names its origin.
_LOST = ("images", "videos", "audio", "audios", "input_audio")


@dataclass(frozen=True)
class Mixed:
    """A document of text and images in reading order; a pair is an image and its caption."""

    name: str
    parts: tuple[str | Media, ...]

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def hash(self) -> int:
        parts = ([part] if isinstance(part, str) else part.paths for part in self.parts)
        names = [str(name) for part in parts for name in part]
        root = Path(self.name).parent
        return content_hash(*(name.removeprefix(f"{root}/") for name in names))


class ImageSource(FileSource[Mixed]):
    """JSON lines that name image and video files, or a folder of images with captions."""

    has_images = True

    def find(self) -> list[Path | Skip]:
        return find_images(self.config.path, self.setting)

    def read(self, file: Path) -> Iterator[Mixed | Skip]:
        return read_images(file, self.config.field)

    def companions(self, paths: Sequence[Path]) -> Iterable[Path]:
        return map(caption_of, paths)

    def index(self, composer: Composer) -> "MixedDocuments":
        """Load the index, or build it if it is missing. Only new and changed images are measured.

        Raises:
            PretrainError: more than ``data.max_corrupt`` documents are corrupt, the cache cannot be
                written, or a document has a video file and PyAV is not installed.
        """
        composer.tokenizer.require_media()
        cache = Path(self.data.cache_dir)
        media = (path for file in self.files for path in media_paths(Path(file.name)))
        paths, _ = cached(
            cache / f"media-{self.key}",
            lambda folder: write_lines(folder / "paths", dict.fromkeys(media)),
            lambda folder: list(read_lines(folder / "paths")),
        )
        stamps = {path: stamp(Path(path)) for path in paths}
        settings = (composer.patch_size, *composer.limits, composer.video_fps)
        name = self.index_name("images", composer.tokenizer, *settings)
        folder = cache / f"{name}-{key_of(self.key, stamps=stamps.items())}"

        def build(partial: Path) -> None:
            sizes = _Sizes(stamps, next(siblings(folder, _read_measured), {}), composer.video_fps)
            _build(partial, self, composer, sizes)

        def load(folder: Path) -> MixedDocuments:
            indexed = read_files(folder)
            ends = np.load(folder / "ends.npy", mmap_mode="r")
            hashes = np.load(folder / "hashes.npy", mmap_mode="r")
            sizes = np.load(folder / "sizes.npy", mmap_mode="r")
            lines = map_array(folder / "lines", np.uint8)
            same = len(sizes) == len(ends) == len(hashes) == sum(f.documents for f in indexed)
            if not same or len(lines) != (ends[-1] if len(ends) else 0):
                raise ValueError("descriptions are not what was written")
            film = json.loads((folder / "video").read_text())
            arrays = hashes, indexed, ends, lines, sizes
            return MixedDocuments(self, composer, *arrays, film, index=folder.name)

        documents, was_cached = cached(folder, build, load)
        if documents.video:  # the index may have been built where PyAV was installed
            video.require_av(documents.video)
        return replace(documents, cached=was_cached)


# ---------------------------------------------------------------------- finding


def find_images(path: str, setting: str) -> list[Path | Skip]:
    """The JSON files of a source, or the images of a folder, and what is left out.

    Args:
        setting: the source's name in messages.

    Raises:
        PretrainError: there are none.
    """
    folder = Path(path)
    if not folder.is_dir():
        return files.find_json(path, setting)
    captions = folder / CAPTIONS
    if captions.is_file():
        return [captions, *_unnamed(captions)]
    return list(_images(folder, setting))


def _unnamed(captions: Path) -> Iterator[Skip]:
    """The images of a folder that its captions.jsonl does not name."""
    named = set(map(os.path.normpath, media_paths(captions)))
    for item in files.walk(captions.parent, pixels.suffixes(), "images"):
        if isinstance(item, Path) and os.path.normpath(item) not in named:
            yield Skip(str(item), f"not named in {CAPTIONS}", corrupt=False)


def _images(folder: Path, setting: str) -> Iterator[Path | Skip]:
    """The images of a folder, by content or name, and all other files except their captions."""
    items = list(files.walk(folder, ("",), "files"))
    images = {item for item in items if isinstance(item, Path) and _is_image(item)}
    if not images:
        failed = (item for item in items if isinstance(item, Skip) and item.corrupt)
        why = "".join(f" ({skip.name}: {skip.reason})" for skip in list(failed)[:1])
        raise PretrainError(f"{setting}.path: the folder {folder} has no images in it{why}")
    captions = set(map(caption_of, images))
    for item in sorted(items, key=lambda item: str(item if isinstance(item, Path) else item.name)):
        if isinstance(item, Skip) or item in images:
            yield item
        elif item in captions:
            continue
        elif video.is_video(str(item)):
            yield Skip(str(item), f"a video: name it in {CAPTIONS}", corrupt=False)
        elif item.suffix.lower() == _CAPTION_SUFFIX:
            yield Skip(str(item), "a caption without an image of its name")
        else:
            yield Skip(str(item), "neither an image nor a caption", corrupt=False)


def _is_image(file: Path) -> bool:
    """Whether a file is an image: by its suffix, even if it is damaged, or by its content."""
    if files.ends_with(file, pixels.suffixes()):
        return True
    if file.suffix.lower() == _CAPTION_SUFFIX or video.is_video(str(file)):
        return False
    try:
        with pixels.open_image(file):
            return True
    except ValueError:
        return False


def caption_of(image: Path) -> Path:
    """The path of an image's caption, which may not exist."""
    paths = [image.with_suffix(suffix) for suffix in (_CAPTION_SUFFIX, _CAPTION_SUFFIX.upper())]
    return next((path for path in paths if path.exists()), paths[0])


# ---------------------------------------------------------------------- reading


def read_images(file: Path, field: str) -> Iterator[Mixed | Skip]:
    """The documents of a JSON file, or an image with its caption.

    JSON objects are ``{"image": "a.jpg", "caption": "…"}``, ``{"video": "a.mp4", "caption": "…"}``
    (also an animated GIF, PNG or WebP, or a list of frames), or ``{"parts": [{"text": "…"},
    {"image": "a.jpg"}, …]}``. Paths are relative to the file's folder and must stay within it. In a
    folder without ``captions.jsonl``, the caption of ``a.jpg`` is ``a.txt``.

    Args:
        field: name of the caption; ``caption`` is read, too.
    """
    if not files.is_json(file):
        yield _captioned(file)
        return
    for name, value in files.read_objects(file):
        yield value if isinstance(value, Skip) else _mixed(name, value, file, field)


def _captioned(image: Path) -> Mixed | Skip:
    caption = caption_of(image)
    try:
        text = files.read_plain(caption).strip()
    except FileNotFoundError:
        return Skip(str(image), f"no caption {caption.name} in its folder")
    except files.UNREADABLE as error:
        return Skip(str(caption), reason(error))
    if not text:
        return Skip(str(caption), "no text in it")
    return Mixed(str(image), (Media((str(image),), moving=False), text))


def _mixed(name: str, value: dict[str, Any], file: Path, field: str) -> Mixed | Skip:
    try:
        fields = (*_LOST, "image", "video") if "parts" in value else _LOST
        if lost := files.lost_field(value, fields):
            raise ValueError(f"its {lost!r} would be lost: name it in 'parts'")
        if "parts" in value:
            if not isinstance(value["parts"], list):
                raise ValueError("'parts' is not a list")
            parts = [_part(part, file.parent) for part in value["parts"]]
        else:
            caption = value.get(field, value.get("caption"))
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"no caption in {field!r} or 'caption'")
            media = {kind: value[kind] for kind in ("image", "video") if kind in value}
            parts = [_part(media, file.parent), caption.strip()]
        parts = [part for part in parts if part]
        if not parts:
            raise ValueError("nothing in it")
        if not all(files.is_unicode(part) for part in parts if isinstance(part, str)):
            raise ValueError("half a surrogate pair in its text")
    except ValueError as error:
        return Skip(name, reason(error))
    return Mixed(name, tuple(parts))


def _part(part: Any, root: Path) -> str | Media:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and len(part) == 1:
        ((kind, value),) = part.items()
        if kind == "text" and isinstance(value, str):
            return value
        if kind in ("image", "video") and isinstance(value, str):
            return Media((_inside(value, root),), moving=kind == "video")
        if kind == "video" and isinstance(value, list) and value:
            return Media(tuple(_inside(str(frame), root) for frame in value), moving=True)
    raise ValueError("neither an image, a video nor text: " + json.dumps(part)[:80])


def _inside(name: str, root: Path) -> str:
    path = root / name
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # a cycle of links
        raise ValueError(f"{name}: {reason(error)}") from error
    if not inside:
        raise ValueError(f"{name} lies outside {root}")
    return str(path)


def media_paths(file: Path) -> Iterator[str]:
    """Every image and video that a JSON file names, even if it is missing; or the image itself."""
    if not files.is_json(file):
        yield str(file)
        return
    for _, value in files.read_objects(file):
        if isinstance(value, Skip):
            continue
        parts = value.get("parts")
        for part in (value, *(parts if isinstance(parts, list) else ())):
            for kind in ("image", "video") if isinstance(part, dict) else ():
                named = part.get(kind)
                for path in named if isinstance(named, list) else [named]:
                    if isinstance(path, str):
                        yield str(file.parent / path)


# ---------------------------------------------------------------------- indexing


@dataclass(frozen=True)
class MixedDocuments(IndexedDocuments):
    """Documents with images, of which the index has descriptions.

    Attributes:
        ends: int64 [n], where the description of each document ends in ``lines``.
        lines: descriptions in JSON, one after the other.
        sizes: int32 [n, 2], tokens and image placeholders of each document.
        video: the first video file, which requires PyAV; empty if there is none.
    """

    ends: npt.NDArray[np.int64]
    lines: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    video: str

    @property
    def identity(self) -> Sequence[Column]:
        """Includes the sizes, in which a checkpoint counts its position in the data: they depend on
        settings such as ``data.max_image_tokens``."""
        return self.hashes, self.sizes

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        tokens, placeholders = self.sizes[numbers].astype(np.int64).T
        return tokens, placeholders

    def name(self, number: int) -> str:
        return self.describe(number)[0]

    def describe(self, number: int) -> tuple[str, list[str | Media], list[list[int]]]:
        """A document's name, its parts, and the [frames, height, width] of each image."""
        start = int(self.ends[number - 1]) if number else 0
        name, parts, shapes = json.loads(self.lines[start : self.ends[number]].tobytes())
        media = [p if isinstance(p, str) else Media(tuple(p[0]), moving=p[1]) for p in parts]
        return name, media, shapes

    def document(self, segment: Segment, *, pixels: bool = True) -> Document | Skip:
        name, parts, shapes = self.describe(segment.number)
        rest = iter(shapes)

        def read(media: Media, shape: list[int]) -> Pixels | tuple[int, int, int]:
            frames, height, width = shape
            return self.composer.read(media, shape) if pixels else (frames, height, width)

        try:
            document = [p if isinstance(p, str) else read(p, next(rest)) for p in parts]
        except ValueError as error:
            return Skip(name, str(error))
        return self.composer.document(document)

    def pairs(self, split: Split) -> Iterator[VisionItem]:
        for number in self.numbers[split]:
            _, parts, shapes = self.describe(number)
            if (pair := as_pair(parts)) and shapes[0][0] <= MAX_FRAMES:
                try:
                    pixels = self.composer.read(pair[0], shapes[0])
                except ValueError:
                    continue  # it is reported when a sequence contains it
                yield VisionItem(pixels, pair[1])


# The stamps of an image's or video's files, and its (frames, height, width) in pixels or the reason
# why it cannot be read.
Measured = tuple[tuple[Stamp, ...], tuple[int, int, int] | str]


@dataclass
class _Sizes:
    """Sizes of images and videos. Files with the stamps of an earlier index are not opened."""

    stamps: dict[str, Stamp]
    known: dict[Media, Measured]
    fps: float
    measured: dict[Media, Measured] = field(default_factory=dict)

    def measure(self, media: Media) -> tuple[int, int, int]:
        if media not in self.measured:
            stamps = tuple(self.stamps.get(str(path), ()) for path in media.paths)
            self.measured[media] = known = self.known.get(media, ((), ""))
            if known[0] != stamps or not all(stamps):
                try:
                    self.measured[media] = stamps, frames.measure(media, self.fps)
                except ValueError as error:
                    self.measured[media] = stamps, reason(error)
        _, shape = self.measured[media]
        if isinstance(shape, str):
            raise ValueError(shape)
        return shape


def _build(folder: Path, source: ImageSource, composer: Composer, sizes: _Sizes) -> None:
    skipped = Skipped(source.data.max_corrupt)
    ends, hashes, token_counts = list[int](), list[int](), list[tuple[int, int]]()
    film = ""
    with (folder / "lines").open("wb") as file:
        for record in counted(source.records(), "indexing images"):
            if isinstance(record, Skip):
                skipped.add([record])
                continue
            media = [part for part in record.parts if not isinstance(part, str)]
            try:
                measured = [p if isinstance(p, str) else sizes.measure(p) for p in record.parts]
                size = composer.size(measured)
            except ValueError as error:
                skipped.add([Skip(record.name, reason(error))])
                continue
            token_counts.append(size)
            names = (str(path) for one in media for path in one.paths)
            film = film or next(filter(video.is_video, names), "")
            parts = [p if isinstance(p, str) else [p.paths, p.moving] for p in record.parts]
            shapes = [shape for shape in measured if not isinstance(shape, str)]
            file.write(json.dumps([record.name, parts, shapes]).encode())
            ends.append(file.tell())
            hashes.append(record.hash)
    np.save(folder / "sizes.npy", np.array(token_counts, np.int32).reshape(-1, 2))
    (folder / "video").write_text(json.dumps(film))
    write_lines(
        folder / "measured",
        ([media.paths, media.moving, *known] for media, known in sizes.measured.items()),
    )
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, np.uint64))
    write_files(folder, [IndexedFile("", (), len(ends), list(skipped))])


def _read_measured(folder: Path) -> dict[Media, Measured]:
    measured: dict[Media, Measured] = {}
    for paths, moving, stamps, shape in read_lines(folder / "measured"):
        size = shape if isinstance(shape, str) else tuple(shape)
        measured[Media(tuple(paths), moving)] = tuple(map(tuple, stamps)), size
    return measured
