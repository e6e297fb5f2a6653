"""A source's documents by number: tokens on disk, sizes known, made once and cached.

Whatever a text file is (JSONL, packed, plain), its tokens come to lie one document after the other
in a file that is mapped into memory, so that any document can be read at once. Of documents with
images the sizes are kept, for packing, and where their parts are; images are read when needed.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data import chat, sources
from pretrain.data.fit import Limits, fit, fitted_size, frame_groups, limits
from pretrain.data.images import MERGE, VisionItem
from pretrain.data.packing import TEXT, Document
from pretrain.data.pixels import Pixels
from pretrain.data.skipped import Skip
from pretrain.data.sources import Chat, Media, Mixed, Text
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.video import is_video, require_av

logger = logging.getLogger(__name__)
T = TypeVar("T", bound="Index")

# Part of the cache's key: to be raised when what is cached changes.
FORMAT = 2
_AT_ONCE = 256


@dataclass(frozen=True)
class Composer:
    """Makes documents of text and pixels, and knows beforehand how long they become.

    Attributes:
        limits: larger images and frames are shrunk.
        video_fps: frames a second that are taken of a video file.
    """

    tokenizer: Tokenizer
    patch_size: int
    limits: Limits
    video_fps: float

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer, patch_size: int) -> "Composer":
        """With a run's own settings."""
        largest = limits(config.seq_length, config.max_image_tokens)
        return cls(tokenizer, patch_size, largest, config.video_fps)

    def _max_patches(self, frames: int) -> int:
        return self.limits.image if frames == 1 else self.limits.frame

    def fit(self, pixels: Pixels, frames: int = 1) -> Pixels:
        """Frames of an image or a clip, which has so many in all."""
        return fit(
            pixels,
            self.patch_size,
            max_patches=self._max_patches(frames),
            max_side=self.limits.side,
        )

    def read(self, media: Media, shape: tuple[int, int, int]) -> Pixels:
        """Its frames, fitted.

        Args:
            shape: (frames, height, width), as :func:`pretrain.data.sources.measure` found it.

        Raises:
            ValueError: a file is missing, damaged or another one than when it was measured.
            PretrainError: PyAV is needed and not installed.
        """
        count, *size = shape
        fitted = []
        # One at a time: before they are shrunk, those of a film may be more than memory holds.
        for frame in sources.frames(media, self.video_fps):
            if list(frame.shape[:2]) != size:
                raise ValueError(f"{media.paths[0]} has changed since its size was noted")
            fitted.append(self.fit(frame[None], count))
        if len(fitted) != count:
            raise ValueError(f"{media.paths[0]} has changed since its frames were counted")
        return np.concatenate(fitted)

    def add(self, document: Document, pixels: Pixels) -> None:
        """An image or a clip (fitted) at the document's end."""
        for group in frame_groups(len(pixels)):
            document.add_image(VisionItem(pixels[group], ""), self.patch_size)

    def document(self, parts: Sequence[str | Pixels]) -> Document:
        """Text and pixels (fitted) in order; an image and one text are a pair, with a caption."""
        document = Document(self.tokenizer)
        pair = is_pair(parts)
        for part in parts:
            if not isinstance(part, str):
                self.add(document, part)
            elif pair:
                document.add_caption(part)
            else:
                document.add_tokens(self.tokenizer.encode(part))
        return document.add_tokens([self.tokenizer.eos], TEXT)

    def size(self, parts: Sequence[str | tuple[int, int, int]]) -> tuple[int, int]:
        """(tokens, placeholders among them) of the document that these would be.

        Args:
            parts: text, and (frames, height, width) of what is to be fitted.
        """
        length, placeholders = 2, 0
        pair = is_pair(parts)
        for part in parts:
            if isinstance(part, str):
                length += len(self.tokenizer.encode(part)) + pair
                continue
            frames, height, width = part
            _, (rows, columns) = fitted_size(
                height,
                width,
                self.patch_size,
                max_patches=self._max_patches(frames),
                max_side=self.limits.side,
            )
            groups = len(frame_groups(frames))
            each = (rows // self.patch_size // MERGE) * (columns // self.patch_size // MERGE)
            length += groups * (each + 2)
            placeholders += groups * each
        return length, placeholders


def is_pair(parts: Sequence[Any]) -> bool:
    """An image or a video, and then a text that is of it."""
    return len(parts) == 2 and not isinstance(parts[0], str) and isinstance(parts[1], str)


def key_of(files: Iterable[Path], *settings: object) -> str:
    """What an index depends on: files by name, size and time, and settings."""
    digest = hashlib.sha256(repr((FORMAT, settings)).encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Index:
    """What all kinds know.

    Attributes:
        hashes: uint64 [n], of what is in each document.
        skips: what could not be taken in.
    """

    hashes: npt.NDArray[np.uint64]
    skips: list[Skip]

    @property
    def fingerprint(self) -> str:
        """Of the documents and their order, wherever the files lie."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class TextIndex(Index):
    """Documents of text, each ended by the token that ends a document.

    Attributes:
        tokens: all of them in a row.
        ends: int64 [n], where each document's end.
    """

    tokens: npt.NDArray[Any]
    ends: npt.NDArray[np.int64]

    def length(self, document: int) -> int:
        first = int(self.ends[document - 1]) if document else 0
        return int(self.ends[document]) - first

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens ``start`` to ``stop`` of a document."""
        first = int(self.ends[document - 1]) if document else 0
        return self.tokens[first + start : first + stop]


@dataclass(frozen=True)
class ChatIndex(Index):
    """Conversations as they are rendered, each whole or not at all.

    Attributes:
        tokens: all of them in a row.
        kinds: uint8, of each token, what it is as a label.
        ends: int64 [n], where each conversation ends.
        sizes: int32 [n, 2], tokens of each, and placeholders: none.
    """

    tokens: npt.NDArray[Any]
    kinds: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]

    def read(self, document: int) -> tuple[list[int], list[int]]:
        """A conversation's tokens and kinds."""
        stop = int(self.ends[document])
        here = slice(stop - int(self.sizes[document, 0]), stop)
        return self.tokens[here].tolist(), self.kinds[here].tolist()


@dataclass(frozen=True)
class MixedIndex(Index):
    """Documents with images.

    Attributes:
        lines: descriptions in JSON, one after the other.
        ends: int64 [n], where each description ends.
        sizes: int32 [n, 2], tokens and placeholders of each.
        video: the first video file, which is read with PyAV; empty without any.
    """

    lines: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    video: str

    @property
    def fingerprint(self) -> str:
        """Of the sizes too: by settings the same image may have other tokens, a clip other frames,
        and a checkpoint's place in the data is counted in them."""
        return hashlib.sha256(self.hashes.tobytes() + self.sizes.tobytes()).hexdigest()[:16]

    def describe(self, document: int) -> tuple[str, list[str | Media], list[Any]]:
        """Its name, its parts, and for each image the (frames, height, width) it had."""
        first = int(self.ends[document - 1]) if document else 0
        name, parts, shapes = json.loads(self.lines[first : int(self.ends[document])].tobytes())
        media = [p if isinstance(p, str) else Media(tuple(p[0]), moving=p[1]) for p in parts]
        return name, media, shapes

    def load(self, document: int, composer: Composer) -> list[str | Pixels]:
        """Its parts, images read and fitted.

        Raises:
            ValueError: an image is missing, damaged or another one than when it was indexed.
        """
        _, parts, shapes = self.describe(document)
        sizes = iter(shapes)
        return [
            part if isinstance(part, str) else composer.read(part, next(sizes)) for part in parts
        ]


def text_index(
    folder: Path, records: Callable[[], Iterator[Text | Skip]], tokenizer: Tokenizer
) -> TextIndex:
    """The index in ``folder``, built from the records where there is none."""
    dtype = np.dtype(tokenizer.dtype)

    def build(partial: Path) -> None:
        skips: list[Skip] = []
        ends, hashes, total = [], [], 0
        with (partial / "tokens").open("wb") as file:
            stream = records()
            while chunk := list(itertools.islice(stream, _AT_ONCE)):
                skips += [record for record in chunk if isinstance(record, Skip)]
                found = [record for record in chunk if isinstance(record, Text)]
                encoded = tokenizer.encode_many([record.text for record in found])
                for record, tokens in zip(found, encoded, strict=True):
                    file.write(tokens.astype(dtype).tobytes())
                    file.write(np.array([tokenizer.eos], dtype).tobytes())
                    total += len(tokens) + 1
                    ends.append(total)
                    hashes.append(record.hash)
        _write(partial, skips, ends, hashes)

    def load() -> TextIndex:
        skips, ends, hashes = _read(folder)
        tokens = _mapped(folder / "tokens", dtype)
        if len(tokens) != (ends[-1] if len(ends) else 0):
            raise ValueError("tokens are not what was written")
        return TextIndex(hashes, skips, tokens, ends)

    return _cached(folder, build, load)


def chat_index(
    folder: Path, records: Callable[[], Iterator[Chat | Skip]], tokenizer: Tokenizer, longest: int
) -> ChatIndex:
    """The index in ``folder``, built from the records where there is none.

    Args:
        longest: conversations of more tokens are skipped.
    """
    dtype = np.dtype(tokenizer.dtype)

    def build(partial: Path) -> None:
        skips: list[Skip] = []
        ends, hashes, total = [], [], 0
        with (partial / "tokens").open("wb") as tokens, (partial / "kinds").open("wb") as kinds:
            for record in records():
                if isinstance(record, Skip):
                    skips.append(record)
                    continue
                document = chat.render(tokenizer, record.messages)
                if len(document) > longest:
                    skips.append(_too_long(record.name, len(document), longest))
                    continue
                tokens.write(np.array(document.tokens, dtype).tobytes())
                kinds.write(np.array(document.kinds, np.uint8).tobytes())
                total += len(document)
                ends.append(total)
                hashes.append(record.hash)
        _write(partial, skips, ends, hashes)

    def load() -> ChatIndex:
        skips, ends, hashes = _read(folder)
        tokens = _mapped(folder / "tokens", dtype)
        kinds = _mapped(folder / "kinds", np.dtype(np.uint8))
        if not len(tokens) == len(kinds) == (ends[-1] if len(ends) else 0):
            raise ValueError("conversations are not what was written")
        lengths = np.diff(ends, prepend=0).astype(np.int32)
        sizes = np.stack([lengths, np.zeros_like(lengths)], axis=1)
        return ChatIndex(hashes, skips, tokens, kinds, ends, sizes)

    return _cached(folder, build, load)


def _too_long(name: str, size: int, length: int) -> Skip:
    return Skip(name, f"its {size} tokens do not fit data.seq_length={length}", corrupt=False)


def too_long(index: MixedIndex, length: int) -> list[Skip]:
    """The documents that do not fit a sequence."""
    sizes = index.sizes[:, 0]
    return [
        _too_long(index.describe(int(number))[0], int(sizes[number]), length)
        for number in np.flatnonzero(sizes > length)
    ]


def mixed_index(
    folder: Path, records: Callable[[], Iterator[Mixed | Skip]], composer: Composer
) -> MixedIndex:
    """The index in ``folder``, built from the records where there is none.

    Raises:
        PretrainError: a record has a video file, and PyAV is not installed.
    """

    def build(partial: Path) -> None:
        skips: list[Skip] = []
        ends, hashes, sizes, total, film = [], [], [], 0, ""
        with (partial / "lines").open("wb") as file:
            for record in records():
                if isinstance(record, Skip):
                    skips.append(record)
                    continue
                try:
                    media = [part for part in record.parts if isinstance(part, Media)]
                    shapes = [sources.measure(part, composer.video_fps) for part in media]
                    measured = iter(shapes)
                    parts = [p if isinstance(p, str) else next(measured) for p in record.parts]
                    sizes.append(composer.size(parts))
                except ValueError as error:
                    skips.append(Skip(record.name, str(error)))
                    continue
                film = film or next((p for m in media for p in m.paths if is_video(p)), "")
                described = [p if isinstance(p, str) else [p.paths, p.moving] for p in record.parts]
                total += file.write(json.dumps([record.name, described, shapes]).encode())
                ends.append(total)
                hashes.append(record.hash)
        np.save(partial / "sizes.npy", np.array(sizes, np.int32).reshape(-1, 2))
        (partial / "video").write_text(film)
        _write(partial, skips, ends, hashes)

    def load() -> MixedIndex:
        skips, ends, hashes = _read(folder)
        sizes = np.load(folder / "sizes.npy", mmap_mode="r")
        lines = _mapped(folder / "lines", np.dtype(np.uint8))
        if len(sizes) != len(ends) or len(lines) != (ends[-1] if len(ends) else 0):
            raise ValueError("descriptions are not what was written")
        return MixedIndex(hashes, skips, lines, ends, sizes, (folder / "video").read_text())

    index = _cached(folder, build, load)
    if index.video:  # measured where it was indexed, and PyAV may be missing here
        require_av(index.video)
    return index


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _write(folder: Path, skips: list[Skip], ends: list[int], hashes: list[int]) -> None:
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, np.uint64))
    (folder / "skipped.json").write_text(json.dumps([skip._asdict() for skip in skips]))


def _read(folder: Path) -> tuple[list[Skip], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    skips = [Skip(**skip) for skip in json.loads((folder / "skipped.json").read_text())]
    ends = np.load(folder / "ends.npy", mmap_mode="r")
    hashes = np.load(folder / "hashes.npy", mmap_mode="r")
    if ends.shape != hashes.shape or ends.ndim != 1:
        raise ValueError("documents are not what was written")
    return skips, ends, hashes


def _cached(folder: Path, build: Callable[[Path], None], load: Callable[[], T]) -> T:
    if folder.is_dir():
        try:
            return load()
        except Exception as error:  # a damaged cache costs time; it must not cost the run
            logger.warning("rebuilding the damaged cache %s (%s)", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, build)
    return load()


def make_folder(folder: Path, build: Callable[[Path], None]) -> None:
    """Make a folder aside and rename it: whoever else makes it too, or is killed, leaves nothing
    half-made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="partial-"))
    try:
        build(partial)
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
