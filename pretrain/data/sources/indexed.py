"""Sources whose documents are indexed on disk: numbered, with known sizes, cached between runs.

The text of all files, compressed or not, becomes a single row of tokens that is mapped into memory,
so that any document can be read at any time. For documents with images, the index has their sizes,
for packing, and the names of the image files, which are read when a sequence needs them.
"""

import json
import os
import shlex
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data import skipped
from pretrain.data.cache import Stamp, key_of, stamp
from pretrain.data.composer import Composer
from pretrain.data.interface import SPLITS, RankShare, Split
from pretrain.data.skipped import Skip, within_limit
from pretrain.data.sources.interface import Documents, Record, Segment, Source
from pretrain.data.sources.order import Integers, shuffled
from pretrain.data.sources.splits import Column, Splits, Subset, open_splits
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError

R = TypeVar("R", bound=Record)

# Documents whose order and sizes a cursor looks up together.
_LOOK_AHEAD = 512


# ---------------------------------------------------------------------- files and indexes


@dataclass(frozen=True)
class InputFile(Generic[R]):
    """A file of a source, the unit that is indexed again if it has changed.

    A source without files is a single one.

    Attributes:
        name: path of the file.
        stamp: changes whenever the file does.
        records: reads its documents.
        size: its size in bytes.
    """

    name: str
    stamp: Stamp
    records: Callable[[], Iterator[R | Skip]]
    size: int = 0


@dataclass
class IndexedFile:
    """The entry of a file in an index: its number of documents, and those left out."""

    name: str
    stamp: Stamp
    documents: int
    skips: list[Skip]


def too_long(name: str, size: int, length: int) -> Skip:
    return Skip(name, f"its {size} tokens do not fit data.seq_length={length}", corrupt=False)


# ---------------------------------------------------------------------- sources


class IndexedSource(Source, Generic[R]):
    """A source whose documents are indexed.

    Attributes:
        files: the files to index.
        skips: files and folders that are left out.
        workers: number of processes that tokenize; None inside a job, where only this process
            tokenizes, and only files up to ``data.max_untokenized_mb``.
    """

    files: Sequence[InputFile[R]]
    skips: Sequence[Skip] = ()
    workers: int | None = None

    @abstractmethod
    def index(self, composer: Composer) -> "IndexedDocuments":
        """Load the index of :attr:`files`, or build it if it is missing; raises as :meth:`open`."""

    def records(self) -> Iterator[R | Skip]:
        records = (record for file in self.files for record in file.records())
        return within_limit(records, self.data.max_corrupt)

    def open(self, composer: Composer) -> "IndexedDocuments":
        documents = self.index(composer)
        if not any(documents.token_counts(split)[0] for split in SPLITS):
            why = skipped.first(documents.skips)
            raise PretrainError(
                f"{self.setting}.path: none of the documents in {self.location} can be used{why}"
            )
        return documents

    def check(self) -> None:
        """Check all files, before any of them is tokenized.

        Raises:
            PretrainError: the settings do not fit a file.
        """

    def require_small(self) -> None:
        """
        Raises:
            PretrainError: this is a job, and the files are too large to be tokenized in it.
        """
        size, limit = sum(file.size for file in self.files) / 1e6, self.data.max_untokenized_mb
        if self.workers is None and size > limit:
            raise PretrainError(
                f"{self.setting}: {self.location} is not tokenized yet, and its {size:,.1f} MB are "
                f"more than data.max_untokenized_mb={limit:g}, the limit inside a job. Tokenize it "
                f"first: {_command()}"
            )

    def index_name(self, kind: str, tokenizer: Tokenizer, *settings: object) -> str:
        """The name of an index in the cache, up to the digest of the files."""
        config = self.config
        digest = key_of(config.type, config.path, config.field, tokenizer.digest)
        return "-".join(map(str, (kind, digest, *settings)))


def _command() -> str:
    """The command that tokenizes the data of the running one."""
    command, arguments = sys.argv[1:2], sys.argv[2:]
    if command not in (["train"], ["eval"]):
        arguments = ["CONFIG"]
    command = ["python", "-m", "pretrain", "data", "tokenize", *arguments]
    return f"{shlex.join(command)} --workers {os.cpu_count()}"


class FileSource(IndexedSource[R]):
    """A source of files. A subclass finds them, reads one, and chooses the index."""

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        super().__init__(number, data, seed)
        path = self.config.path
        if path and os.path.realpath(path) == os.path.realpath(data.cache_dir):
            raise PretrainError(
                f"data.cache_dir={data.cache_dir} is also the folder of {self.setting}, where the "
                "cache's files would be read as data: set it to another folder"
            )
        items = self.find()
        paths = [item for item in items if isinstance(item, Path)]
        self.skips = [item for item in items if isinstance(item, Skip)]
        stamps = {str(path): stamp(path) for path in (*paths, *self.companions(paths))}
        self.key = key_of(self.config.type, self.config.field, stamps=stamps.items())
        self.files = [
            InputFile(name, mark, partial(self.read, path), mark[0] if mark else 0)
            for path, (name, mark) in zip(paths, stamps.items(), strict=False)
        ]

    @abstractmethod
    def find(self) -> list[Path | Skip]:
        """The files, in a fixed order, and what is left out.

        Raises:
            PretrainError: there are none.
        """

    @abstractmethod
    def read(self, file: Path) -> Iterator[R | Skip]:
        """Read every document of a file; a document that cannot be used is a :class:`Skip`."""

    def companions(self, paths: Sequence[Path]) -> Iterable[Path]:
        """Other files that the documents of these are read from."""
        return ()


# ---------------------------------------------------------------------- documents


@dataclass(frozen=True)
class IndexedDocuments(Documents):
    """Documents by number, in an index on disk.

    Attributes:
        hashes: uint64 [n], a hash of the content of each document.
        index: name of the index in the cache, which changes with the documents.
        files: the indexed files in order.
        cached: whether the index existed, and no file has changed since it was made.
        removed: int64, ascending, the documents that are left out as duplicates.
        removed_by: digest of the search that found them; empty: none has been made.
    """

    source: IndexedSource[Any]
    composer: Composer
    hashes: Column
    files: list[IndexedFile]
    index: str = field(kw_only=True)
    cached: bool = field(default=False, kw_only=True)
    removed: Integers = field(default_factory=lambda: np.empty(0, np.int64), kw_only=True)
    removed_by: str = field(default="", kw_only=True)

    @cached_property
    def splits(self) -> Splits:
        """The splits, from the cache; all documents are read once to make them."""
        return open_splits(self, self.source.data, self.source.config.split)

    @property
    def numbers(self) -> dict[Split, Subset]:
        """The numbers of the documents of each split."""
        return self.splits.numbers

    @property
    def identity(self) -> Sequence[Column]:
        """Values of all documents, whose bytes identify them in the fingerprint."""
        return (self.hashes,)

    @abstractmethod
    def content(self, number: int) -> npt.NDArray[Any] | bytes:
        """The content of a document, which equals that of its duplicates: its tokens, or a digest
        of its text and its images."""

    def name(self, number: int) -> str:
        """The file of a document, and the line or element in it, for messages."""
        return f"{self.source.location}: document {number}"

    @cached_property
    def skips(self) -> list[Skip]:
        indexed = [skip for file in self.files for skip in file.skips]
        numbers, length = self.splits.too_long, self.source.data.seq_length
        sizes, _ = self.sizes_of(numbers)
        long = zip(numbers.tolist(), sizes.tolist(), strict=True)
        skips = [too_long(self.name(number), size, length) for number, size in long]
        return [*self.source.skips, *indexed, *skips]

    @property
    def fingerprint(self) -> str:
        """Independent of where the files are."""
        return self.splits.fingerprint

    def token_counts(self, split: Split) -> tuple[int, int]:
        return self.splits.token_counts[split]

    def count(self, split: Split) -> int:
        return len(self.numbers[split])

    def cursor(self, split: Split, share: RankShare) -> "DocumentCursor":
        return DocumentCursor(self, self.numbers[split], share)


@dataclass
class DocumentCursor:
    """A position in numbered documents; the seed decides their order in each epoch.

    Attributes:
        numbers: the documents of the split.
        share: the cursors of all ranks together read every document once per epoch.
        position: documents taken.
        offset: tokens taken of the current document, which is cut.
        taken: tokens taken.
    """

    documents: Documents
    numbers: Subset | Integers
    share: RankShare
    position: int = 0
    offset: int = 0
    taken: int = 0

    def __post_init__(self) -> None:
        self.source, self.whole = self.documents.source, self.documents.whole
        # The number, tokens and placeholders of the next documents, the last one first.
        self._next: list[tuple[int, int, int]] = []

    def _look_ahead(self) -> None:
        """Find the next documents: many at once cost hardly more than one."""
        places = np.arange(self.position, self.position + _LOOK_AHEAD)
        places = places * self.share.ranks + self.share.rank
        source, count = self.source, len(self.numbers)
        numbers = self.numbers[shuffled(places, count, source.seed, source.number)]
        columns = (numbers, *self.documents.sizes_of(numbers))
        self._next = list(zip(*(column[::-1].tolist() for column in columns), strict=True))

    def peek(self) -> tuple[int, int]:
        if not self._next:
            self._look_ahead()
        _, tokens, placeholders = self._next[-1]
        # A range of a cut document also gets the token that begins a document.
        return tokens - self.offset + (not self.whole), placeholders

    def take(self, room: int) -> Segment | None:
        if not self._next:
            self._look_ahead()
        number, tokens, _ = self._next[-1]
        start, stop = self.offset, tokens
        if self.whole:
            if tokens > room:
                return None
        elif tokens - start >= room:
            stop = start + room - 1
        self.taken += stop - start
        if stop == tokens:
            self.position, self.offset = self.position + 1, 0
            self._next.pop()
        else:
            self.offset = stop
        return Segment(self.source.number, number, start, stop)

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "offset": self.offset, "taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        self.position, self.offset = state["position"], state["offset"]
        self.taken = state["taken"]
        self._next = []


# ---------------------------------------------------------------------- files of an index


def write_files(folder: Path, files: Iterable[IndexedFile]) -> None:
    """Write the files of an index."""
    write_lines(folder / "files", ([f.name, f.stamp, f.documents, f.skips] for f in files))


def read_files(folder: Path) -> list[IndexedFile]:
    """Read the files of an index.

    Raises:
        ValueError: they are damaged.
    """
    return [
        IndexedFile(name, tuple(numbers), documents, [Skip(*skip) for skip in skips])
        for name, numbers, documents, skips in read_lines(folder / "files")
    ]


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write JSON lines, ended by their count."""
    with path.open("w") as file:
        count = sum(1 for value in values if file.write(json.dumps(value) + "\n"))
        file.write(json.dumps({"lines": count}) + "\n")


def read_lines(path: Path) -> Iterator[Any]:
    """Read JSON lines of :func:`write_lines`.

    Raises:
        ValueError: they are damaged.
    """
    *lines, last = path.read_text().splitlines()
    if json.loads(last) != {"lines": len(lines)}:
        raise ValueError(f"{path.name} is not what was written")
    return map(json.loads, lines)
