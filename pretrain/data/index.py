"""A source's documents by number: tokens on disk, sizes known, made once and cached.

Whatever a text file is (JSONL, packed, plain), its tokens come to lie one document after the other
in a file that is mapped into memory, so that any document can be read at once. Of documents with
images the sizes are kept, for packing, and where their parts are; images are read when needed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.data import chat
from pretrain.data.cache import Progress, Stamp, cached, key_of, siblings, stamp
from pretrain.data.composer import Composer
from pretrain.data.files import reason
from pretrain.data.media import frames
from pretrain.data.media.pixels import Pixels
from pretrain.data.media.video import is_video, require_av
from pretrain.data.skipped import Skip, Skipped
from pretrain.data.sources import Chat, Media, Mixed, Text
from pretrain.data.tokenizer import Tokenizer

R = TypeVar("R")

# Texts tokenized at once.
_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Part(Generic[R]):
    """A file of a source, or a whole built-in one: indexed again only if it has changed.

    Attributes:
        name: the file.
        stamp: what tells that it has changed.
        records: reads its documents.
    """

    name: str
    stamp: Stamp
    records: Callable[[], Iterator[R | Skip]]


@dataclass(frozen=True)
class Index:
    """The base of all kinds of index.

    Attributes:
        hashes: uint64 [n], a hash of each document's content.
        skips: everything that was left out.
        parts: the share of each file.
        cached: whether it was made before, of files that have not changed since.
    """

    hashes: npt.NDArray[np.uint64]
    skips: list[Skip]
    parts: "list[_PartOfIndex]"
    cached: bool = field(default=False, kw_only=True)

    @property
    def fingerprint(self) -> str:
        """Digest of the documents and their order, independent of the files' location."""
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
        weights: float32, of each token, its weight as a label.
        categories: uint8, of each token, the category its loss is reported under.
        ends: int64 [n], where each conversation ends.
        sizes: int32 [n, 2], tokens of each, and placeholders: none.
    """

    tokens: npt.NDArray[Any]
    weights: npt.NDArray[np.float32]
    categories: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]

    def read(self, document: int) -> tuple[list[int], list[float], list[int]]:
        """A conversation's tokens, weights and categories."""
        stop = int(self.ends[document])
        here = slice(stop - int(self.sizes[document, 0]), stop)
        columns = self.tokens[here], self.weights[here], self.categories[here]
        tokens, weights, categories = (column.tolist() for column in columns)
        return tokens, weights, categories


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
        """Includes the sizes: with other settings, images have other tokens and clips other frames,
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


class _Writer:
    """An index of token sequences in the making: documents part by part, in columns.

    Args:
        folder: an empty folder.
        columns: dtype of each column, by the name of its file.
        limit: more corrupt documents are an error.
    """

    def __init__(self, folder: Path, columns: Mapping[str, np.dtype[Any]], limit: int) -> None:
        self._skipped = Skipped(limit)
        self._folder, self._columns = folder, columns
        self._files = {name: (folder / name).open("wb") for name in columns}
        self._ends: list[int] = []
        self._hashes: list[int] = []
        self._parts: list[_PartOfIndex] = []
        self._progress = Progress("indexing text")

    def begin(self, name: str, stamp: Stamp) -> None:
        """Start a part: documents added from now on belong to it."""
        self._parts.append(_PartOfIndex(name, stamp, 0, []))

    def skip(self, skip: Skip) -> None:
        self._skipped.add([skip])
        self._parts[-1].skips.append(skip)

    def add(self, hash: int, *columns: npt.ArrayLike) -> None:
        """A document, by its values in each column."""
        size = 0
        for (name, dtype), values in zip(self._columns.items(), columns, strict=True):
            row = np.asarray(values, dtype)
            self._files[name].write(row.tobytes())
            size = len(row)
        self._ends.append((self._ends[-1] if self._ends else 0) + size)
        self._hashes.append(hash)
        self._parts[-1].documents += 1
        self._progress(len(self._ends))

    def copy(self, index: "TextIndex | ChatIndex", part: "_PartOfIndex", first: int) -> None:
        """A part of an earlier index, whose first document has this number."""
        self._skipped.add(part.skips)
        last = first + part.documents
        start, stop = (int(index.ends[n - 1]) if n else 0 for n in (first, last))
        for name in self._columns:
            self._files[name].write(getattr(index, name)[start:stop].tobytes())
        before = self._ends[-1] if self._ends else 0
        self._ends += (index.ends[first:last] - start + before).tolist()
        self._hashes += index.hashes[first:last].tolist()
        self._parts.append(part)

    def finish(self) -> None:
        for file in self._files.values():
            file.close()
        _write(self._folder, self._parts, self._ends, self._hashes)


@dataclass
class _PartOfIndex:
    """The share of a part in an index: its number of documents, and what was left out."""

    name: str
    stamp: Stamp
    documents: int
    skips: list[Skip]


Sequential = TypeVar("Sequential", "TextIndex", "ChatIndex")


def _index_parts(
    folder: Path,
    parts: Sequence[Part[Any]],
    columns: Mapping[str, np.dtype[Any]],
    load: Callable[[Path], Sequential],
    add: Callable[[_Writer, Iterator[Any]], None],
    limit: int,
) -> Sequential:
    """The index in ``folder``, built where there is none; unchanged parts of an earlier one are
    copied.

    Args:
        add: puts the documents of a part, and what is left out of it, into the index.
    """

    def build(partial: Path) -> None:
        earlier = next(siblings(folder, load), None)
        known: dict[tuple[str, Stamp], tuple[_PartOfIndex, int]] = {}
        first = 0
        for known_part in earlier.parts if earlier else ():
            known[known_part.name, known_part.stamp] = known_part, first
            first += known_part.documents
        writer = _Writer(partial, columns, limit)
        for part in parts:
            match = known.get((part.name, part.stamp))
            if earlier is not None and match and part.stamp:
                writer.copy(earlier, *match)
                continue
            writer.begin(part.name, part.stamp)
            add(writer, part.records())
        writer.finish()

    index, was_cached = cached(folder, build, load)
    return replace(index, cached=was_cached)


def text_index(
    folder: Path, parts: Sequence[Part[Text]], tokenizer: Tokenizer, limit: int
) -> TextIndex:
    """The index in ``folder``, built where there is none.

    Args:
        limit: more corrupt documents are an error.

    Raises:
        PretrainError: there are more, or the folder cannot be written.
    """
    dtype = np.dtype(tokenizer.dtype)

    def add(writer: _Writer, records: Iterator[Text | Skip]) -> None:
        for chunk in _chunks(records):
            encoded = iter(_encoded(tokenizer, [r.text for r in chunk if isinstance(r, Text)]))
            for record in chunk:
                if isinstance(record, Skip):
                    writer.skip(record)
                    continue
                tokens = next(encoded)
                if isinstance(tokens, str):
                    writer.skip(Skip(record.name, tokens))
                else:
                    writer.add(record.hash, np.append(tokens, tokenizer.eos))

    def load(folder: Path) -> TextIndex:
        parts, ends, hashes = _read(folder)
        tokens = _mapped(folder / "tokens", dtype)
        if len(tokens) != (ends[-1] if len(ends) else 0):
            raise ValueError("tokens are not what was written")
        return TextIndex(hashes, _skips(parts), parts, tokens, ends)

    return _index_parts(folder, parts, {"tokens": dtype}, load, add, limit)


def _chunks(records: Iterator[Text | Skip]) -> Iterator[list[Text | Skip]]:
    """Records together, to be tokenized at once: neither many nor large in all."""
    chunk: list[Text | Skip] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.text) if isinstance(record, Text) else 0
        if len(chunk) == _AT_ONCE or size > _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> list[npt.NDArray[np.int64] | str]:
    """The tokens of each text, or why it has none."""
    try:
        encoded: list[npt.NDArray[np.int64] | str] = list(tokenizer.encode_many(texts))
    except ValueError as error:
        if len(texts) == 1:
            return [reason(error)]
        return [tokens for text in texts for tokens in _encoded(tokenizer, [text])]
    return [tokens if len(tokens) else "the tokenizer makes no tokens of it" for tokens in encoded]


def chat_index(
    folder: Path, parts: Sequence[Part[Chat]], tokenizer: Tokenizer, longest: int, limit: int
) -> ChatIndex:
    """The index in ``folder``, built where there is none.

    Args:
        longest: conversations of more tokens are skipped.
        limit: more corrupt conversations are an error.

    Raises:
        PretrainError: there are more, or the folder cannot be written.
    """
    columns = {
        "tokens": np.dtype(tokenizer.dtype),
        "weights": np.dtype(np.float32),
        "categories": np.dtype(np.uint8),
    }

    def add(writer: _Writer, records: Iterator[Chat | Skip]) -> None:
        for record in records:
            if isinstance(record, Skip):
                writer.skip(record)
                continue
            try:
                document = chat.render(tokenizer, record.messages)
            except ValueError as error:
                writer.skip(Skip(record.name, reason(error)))
                continue
            if len(document) > longest:
                writer.skip(_too_long(record.name, len(document), longest))
            else:
                writer.add(record.hash, document.tokens, document.weights, document.categories)

    def load(folder: Path) -> ChatIndex:
        parts, ends, hashes = _read(folder)
        tokens, weights, categories = (_mapped(folder / name, columns[name]) for name in columns)
        count = ends[-1] if len(ends) else 0
        if not len(tokens) == len(weights) == len(categories) == count:
            raise ValueError("conversations are not what was written")
        lengths = np.diff(ends, prepend=0).astype(np.int32)
        sizes = np.stack([lengths, np.zeros_like(lengths)], axis=1)
        return ChatIndex(hashes, _skips(parts), parts, tokens, weights, categories, ends, sizes)

    return _index_parts(folder, parts, columns, load, add, limit)


def _too_long(name: str, size: int, length: int) -> Skip:
    return Skip(name, f"its {size} tokens do not fit data.seq_length={length}", corrupt=False)


def too_long(index: MixedIndex, length: int) -> list[Skip]:
    """The documents that do not fit a sequence."""
    sizes = index.sizes[:, 0]
    return [
        _too_long(index.describe(int(number))[0], int(sizes[number]), length)
        for number in np.flatnonzero(sizes > length)
    ]


@dataclass(frozen=True)
class Measured:
    """The size of an image or video, as it was when its files had these stamps.

    Attributes:
        shape: (frames, height, width) in pixels; or why it cannot be read.
    """

    stamps: tuple[Stamp, ...]
    shape: tuple[int, int, int] | str


def mixed_index(
    cache: Path,
    name: str,
    key: str,
    records: Callable[[], Iterator[Mixed | Skip]],
    media: Callable[[], Iterator[str]],
    composer: Composer,
    limit: int,
) -> MixedIndex:
    """The index of a source, built where there is none; unchanged images are not measured again.

    Args:
        cache: where indexes are kept.
        name: stands for the source and its settings.
        key: stands for the files that the records are read from. Whether the images and videos
            that they name have changed is found out here.
        media: lists the paths of these.
        limit: more corrupt documents are an error.

    Raises:
        PretrainError: there are more, the cache cannot be written, or a record has a video file
            and PyAV is not installed.
    """
    named, _ = cached(cache / f"media-{key}", partial(_write_media, media), _read_media)
    stamps = {path: stamp(Path(path)) for path in named}
    folder = cache / f"{name}-{key_of(key, stamps=stamps.items())}"

    def build(partial: Path) -> None:
        earlier = next(siblings(folder, _read_measured), {})
        measured: dict[Media, Measured] = {}

        def measure(part: Media) -> tuple[int, int, int]:
            now = tuple(stamps.get(path, ()) for path in part.paths)
            if part not in measured:
                known = earlier.get(part)
                unchanged = known is not None and known.stamps == now and all(now)
                measured[part] = known if known and unchanged else _measured(part, now, composer)
            shape = measured[part].shape
            if isinstance(shape, str):
                raise ValueError(shape)
            return shape

        skipped = Skipped(limit)
        ends: list[int] = []
        hashes: list[int] = []
        sizes: list[tuple[int, int]] = []
        total, film = 0, ""
        progress = Progress("indexing images")
        with (partial / "lines").open("wb") as file:
            for record in records():
                progress(len(ends))
                if isinstance(record, Skip):
                    skipped.add([record])
                    continue
                shown = [part for part in record.parts if isinstance(part, Media)]
                try:
                    shapes = [measure(part) for part in shown]
                    remaining = iter(shapes)
                    parts = [p if isinstance(p, str) else next(remaining) for p in record.parts]
                    size = composer.size(parts)
                except ValueError as error:
                    skipped.add([Skip(record.name, reason(error))])
                    continue
                sizes.append(size)
                film = film or next((p for m in shown for p in m.paths if is_video(p)), "")
                described = [p if isinstance(p, str) else [p.paths, p.moving] for p in record.parts]
                total += file.write(json.dumps([record.name, described, shapes]).encode())
                ends.append(total)
                hashes.append(record.hash)
        np.save(partial / "sizes.npy", np.array(sizes, np.int32).reshape(-1, 2))
        (partial / "video").write_text(json.dumps(film))
        _write_lines(
            partial / "measured",
            ([m.paths, m.moving, found.stamps, found.shape] for m, found in measured.items()),
        )
        _write(partial, [_PartOfIndex("", (), len(ends), list(skipped))], ends, hashes)

    def load(folder: Path) -> MixedIndex:
        parts, ends, hashes = _read(folder)
        sizes = np.load(folder / "sizes.npy", mmap_mode="r")
        lines = _mapped(folder / "lines", np.dtype(np.uint8))
        if len(sizes) != len(ends) or len(lines) != (ends[-1] if len(ends) else 0):
            raise ValueError("descriptions are not what was written")
        film = json.loads((folder / "video").read_text())
        return MixedIndex(hashes, _skips(parts), parts, lines, ends, sizes, film)

    index, was_cached = cached(folder, build, load)
    if index.video:  # measured where it was indexed, and PyAV may be missing here
        require_av(index.video)
    return replace(index, cached=was_cached)


def _measured(media: Media, stamps: tuple[Stamp, ...], composer: Composer) -> Measured:
    try:
        return Measured(stamps, frames.measure(media, composer.video_fps))
    except ValueError as error:
        return Measured(stamps, reason(error))


def _read_measured(folder: Path) -> dict[Media, Measured]:
    found = {}
    for paths, moving, stamps, shape in _read_lines(folder / "measured"):
        kept = shape if isinstance(shape, str) else tuple(shape)
        found[Media(tuple(paths), moving)] = Measured(tuple(map(tuple, stamps)), kept)
    return found


def _write_media(media: Callable[[], Iterator[str]], folder: Path) -> None:
    _write_lines(folder / "paths", dict.fromkeys(media()))


def _read_media(folder: Path) -> list[str]:
    return list(_read_lines(folder / "paths"))


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    with path.open("w") as file:
        count = sum(1 for value in values if file.write(json.dumps(value) + "\n"))
        file.write(json.dumps({"lines": count}) + "\n")


def _read_lines(path: Path) -> Iterator[Any]:
    """
    Raises:
        ValueError: it is not what was written.
    """
    *lines, last = path.read_text().splitlines()
    if json.loads(last) != {"lines": len(lines)}:
        raise ValueError(f"{path.name} is not what was written")
    return map(json.loads, lines)


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _write(folder: Path, parts: Iterable[_PartOfIndex], ends: list[int], hashes: list[int]) -> None:
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, np.uint64))
    _write_lines(folder / "parts", ([p.name, p.stamp, p.documents, p.skips] for p in parts))


def _read(
    folder: Path,
) -> tuple[list[_PartOfIndex], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    parts = [
        _PartOfIndex(name, tuple(numbers), documents, [Skip(*skip) for skip in skips])
        for name, numbers, documents, skips in _read_lines(folder / "parts")
    ]
    ends = np.load(folder / "ends.npy", mmap_mode="r")
    hashes = np.load(folder / "hashes.npy", mmap_mode="r")
    if ends.ndim != 1 or not ends.shape == hashes.shape == (sum(p.documents for p in parts),):
        raise ValueError("documents are not what was written")
    return parts, ends, hashes


def _skips(parts: Iterable[_PartOfIndex]) -> list[Skip]:
    return [skip for part in parts for skip in part.skips]
