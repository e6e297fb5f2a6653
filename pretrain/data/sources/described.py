"""Sources whose documents have images: the index has their descriptions and sizes."""

import contextlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data.cache import Stamp, cached, key_of, map_array, siblings, stamp
from pretrain.data.composer import Composer
from pretrain.data.files import reason
from pretrain.data.interface import Split
from pretrain.data.media import frames, video
from pretrain.data.media.frames import Media
from pretrain.data.media.patches import VisionItem
from pretrain.data.media.pixels import Pixels
from pretrain.data.media.span import Place, Span
from pretrain.data.packing import Document
from pretrain.data.remote import MediaDownloads
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
from pretrain.data.sources.interface import Record, Segment
from pretrain.data.sources.order import Integers
from pretrain.data.sources.splits import Column
from pretrain.model.geometry import MAX_FRAMES
from pretrain.runtime.progress import counted

Shape = tuple[int, int, int]
"""(frames, height, width) of an image or video in pixels, before it is fitted."""


class Described(Record, Protocol):
    """A document with images and videos, before they are read."""

    @property
    def media(self) -> Sequence[Media]:
        """Its images and videos in reading order."""

    @property
    def pair(self) -> tuple[Media, str] | None:
        """The image or video and its caption, if it consists of these two."""

    def described(self) -> Any:
        """Everything but the name, in values that JSON has."""

    def size(self, composer: Composer, shapes: Sequence[Shape]) -> tuple[int, int]:
        """(tokens, image placeholders among them).

        Raises:
            ValueError: it cannot be composed.
        """

    def document(self, composer: Composer, media: Sequence[Pixels | Shape]) -> Document:
        """Compose the document.

        Args:
            media: the fitted pixels of each image and video, or the shape if its patches are left
                out.
        """


R = TypeVar("R", bound=Described)


class DescribedSource(FileSource[R]):
    """A source of files whose documents name images and videos."""

    has_images = True
    may_download = True
    kind: ClassVar[str]
    """Beginning of the names of indexes."""

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        super().__init__(number, data, seed)
        hosts = self.config.media_urls
        self.downloads = MediaDownloads(hosts, data.cache_dir, self.setting)
        if hosts:
            self.key = key_of(self.key, hosts)

    @property
    def documents(self) -> "type[DescribedDocuments]":
        """The class of the documents."""
        return DescribedDocuments

    @abstractmethod
    def restore(self, name: str, described: Any) -> R:
        """The document of :meth:`Described.described`."""

    def media_files(self) -> Iterator[str]:
        """The files of all images and videos, even if they are missing."""
        yield from self.files_named_by(self.records())

    def files_named_by(self, records: Iterable[R | Skip]) -> Iterator[str]:
        """The files of the images and videos of documents."""
        for record in records:
            if not isinstance(record, Skip):
                yield from (file_of(place) for media in record.media for place in media.paths)

    def index(self, composer: Composer) -> "DescribedDocuments":
        """Load the index, or build it if it is missing. Only new and changed images are measured,
        and those that are ranges of files.

        Raises:
            PretrainError: more than ``data.max_corrupt`` documents are corrupt, the cache cannot be
                written, or a document has a video file and PyAV is not installed.
        """
        composer.tokenizer.require_media()
        cache = Path(self.data.cache_dir)
        paths, _ = cached(
            cache / f"media-{self.key}",
            lambda folder: write_lines(folder / "paths", dict.fromkeys(self.media_files())),
            lambda folder: list(read_lines(folder / "paths")),
        )
        # For each file of an image, 300 bytes and some microseconds at every start: shards and
        # tables have few files.
        stamps = {path: stamp(Path(path)) for path in paths}
        settings = (composer.patch_size, *composer.limits, composer.video_fps)
        name = self.index_name(self.kind, composer.tokenizer, *settings)
        folder = cache / f"{name}-{key_of(self.key, stamps=stamps.items())}"

        def build(partial: Path) -> None:
            sizes = _Sizes(stamps, next(siblings(folder, _read_measured), {}), composer.video_fps)
            _build(partial, self, composer, sizes)

        def load(folder: Path) -> DescribedDocuments:
            indexed = read_files(folder)
            ends = map_array(folder / "ends", np.int64)
            hashes = map_array(folder / "hashes", np.uint64)
            sizes = map_array(folder / "sizes", np.int32).reshape(-1, 2)
            lines = map_array(folder / "lines", np.uint8)
            same = len(sizes) == len(ends) == len(hashes) == sum(f.documents for f in indexed)
            if not same or len(lines) != (ends[-1] if len(ends) else 0):
                raise ValueError("descriptions are not what was written")
            film = json.loads((folder / "video").read_text())
            arrays = hashes, indexed, ends, lines, sizes
            return self.documents(self, composer, *arrays, film, index=folder.name)

        documents, was_cached = cached(folder, build, load)
        if documents.video:  # the index may have been built where PyAV was installed
            video.require_av(documents.video)
        return replace(documents, cached=was_cached)


def file_of(place: Place) -> str:
    """The file of an image or video, or the file that contains it."""
    return place if isinstance(place, str) else place.file


def restore_media(paths: Sequence[Any], moving: bool) -> Media:
    """A medium from values that JSON has."""
    return Media(tuple(p if isinstance(p, str) else Span(*p) for p in paths), moving)


@dataclass(frozen=True)
class DescribedDocuments(IndexedDocuments):
    """Documents with images, of which the index has descriptions.

    Attributes:
        ends: int64 [n], where the description of each document ends in ``lines``.
        lines: descriptions in JSON, one after the other.
        sizes: int32 [n, 2], tokens and image placeholders of each document.
        video: the first video file, which requires PyAV; empty if there is none.
    """

    source: DescribedSource[Any]
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
        return str(self._line(number)[0])

    def content(self, number: int) -> bytes:
        record, _ = self.describe(number)
        return str(record.text).encode("utf-8", "surrogatepass") + frames.digest(record.media)

    def _line(self, number: int) -> list[Any]:
        start = int(self.ends[number - 1]) if number else 0
        line: list[Any] = json.loads(self.lines[start : self.ends[number]].tobytes())
        return line

    def describe(self, number: int) -> tuple[Any, list[Shape]]:
        """A document before its images are read, and the shape of each image."""
        name, described, shapes = self._line(number)
        return self.source.restore(name, described), [tuple(shape) for shape in shapes]

    def document(self, segment: Segment, *, pixels: bool = True) -> Document | Skip:
        record, shapes = self.describe(segment.number)
        media: Sequence[Pixels | Shape] = shapes
        try:
            media = self.read(record, shapes) if pixels else shapes
            document: Document = record.document(self.composer, media)
            return document
        except ValueError as error:
            return Skip(record.name, str(error))

    def pairs(self, split: Split) -> Iterator[VisionItem]:
        for number in self.numbers[split]:
            record, shapes = self.describe(number)
            if (pair := record.pair) and shapes[0][0] <= MAX_FRAMES:
                try:
                    pixels = self.composer.read(pair[0], shapes[0])
                except ValueError:
                    continue  # it is reported when a sequence contains it
                yield VisionItem(pixels, pair[1])

    def read(self, record: Described, shapes: Sequence[Shape]) -> list[Pixels]:
        """Read and fit the images and videos of a document.

        Raises:
            ValueError: one cannot be read any more.
        """
        pairs = zip(record.media, shapes, strict=True)
        return [self.composer.read(media, shape) for media, shape in pairs]


# The stamps of an image's or video's files, and its shape or the reason why it cannot be read.
Measured = tuple[tuple[Stamp, ...], Shape | str]


@dataclass
class _Sizes:
    """Sizes of images and videos. Files with the stamps of an earlier index are not opened."""

    stamps: dict[str, Stamp]
    known: dict[Media, Measured]
    fps: float
    measured: dict[Media, Measured] = field(default_factory=dict)

    def measure(self, media: Media) -> Shape:
        if any(isinstance(place, Span) for place in media.paths):
            return frames.measure(media, self.fps)  # nothing is kept: there may be 10^9 of them
        if media not in self.measured:
            stamps = tuple(self.stamps.get(file_of(place), ()) for place in media.paths)
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


def _build(folder: Path, source: DescribedSource[Any], composer: Composer, sizes: _Sizes) -> None:
    skipped = Skipped(source.data.max_corrupt)
    film, count = "", 0
    with contextlib.ExitStack() as stack:
        columns = ("lines", "ends", "hashes", "sizes")
        lines, *others = (stack.enter_context((folder / name).open("wb")) for name in columns)
        for record in counted(source.records(), "indexing images"):
            if isinstance(record, Skip):
                skipped.add([record])
                continue
            try:
                shapes = [sizes.measure(media) for media in record.media]
                size = record.size(composer, shapes)
            except ValueError as error:
                skipped.add([Skip(record.name, reason(error))])
                continue
            names = (str(place) for media in record.media for place in media.paths)
            film = film or next(filter(video.is_video, names), "")
            lines.write(json.dumps([record.name, record.described(), shapes]).encode())
            row = np.int64(lines.tell()), np.uint64(record.hash), np.array(size, np.int32)
            for file, value in zip(others, row, strict=True):
                file.write(value.tobytes())
            count += 1
    (folder / "video").write_text(json.dumps(film))
    write_lines(
        folder / "measured",
        ([media.paths, media.moving, *known] for media, known in sizes.measured.items()),
    )
    write_files(folder, [IndexedFile("", (), count, list(skipped))])


def _read_measured(folder: Path) -> dict[Media, Measured]:
    measured: dict[Media, Measured] = {}
    for paths, moving, stamps, shape in read_lines(folder / "measured"):
        size = shape if isinstance(shape, str) else tuple(shape)
        measured[restore_media(paths, moving)] = tuple(map(tuple, stamps)), size
    return measured
