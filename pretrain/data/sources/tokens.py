"""Indexes of tokens: the columns of all documents, one after the other, in a file each."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.data.cache import Progress, Stamp, cached, map_array, siblings
from pretrain.data.composer import Composer
from pretrain.data.skipped import Skip, Skipped
from pretrain.data.sources.indexed import (
    IndexedDocuments,
    IndexedFile,
    IndexedSource,
    R,
    read_index,
    write_index,
)
from pretrain.data.sources.order import Integers

Encoded = tuple[int, tuple[npt.ArrayLike, ...]]
"""A document: the hash of its content, and its values in each column."""


@dataclass(frozen=True)
class TokenDocuments(IndexedDocuments):
    """Documents whose tokens are in the index, in the column ``tokens``."""

    tokens: npt.NDArray[Any]

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        before = np.where(numbers > 0, self.ends[numbers - 1], 0)
        return self.ends[numbers] - before, np.zeros_like(numbers)


Columns = Mapping[str, npt.DTypeLike]
D = TypeVar("D", bound=TokenDocuments)


def index_tokens(
    source: IndexedSource[R],
    composer: Composer,
    name: str,
    columns: Columns,
    make: Callable[..., D],
    encode: Callable[[Iterator[R | Skip]], Iterator[Encoded | Skip]],
) -> D:
    """Load the index of a source, or build it if it is missing.

    Files that have not changed are copied from the latest index of the same name.

    Args:
        name: name of the index, from :meth:`IndexedSource.index_name`.
        columns: the dtype of each column, by its name in the class.
        make: the class of the documents.
        encode: tokenizes the records of a file.

    Raises:
        PretrainError: more than ``data.max_corrupt`` documents are corrupt, or the cache cannot be
            written.
    """

    def load(folder: Path) -> D:
        hashes, ends, files = read_index(folder)
        mapped = {column: map_array(folder / column, columns[column]) for column in columns}
        if any(len(values) != (ends[-1] if len(ends) else 0) for values in mapped.values()):
            raise ValueError("tokens are not what was written")
        return make(source, composer, hashes, ends, files, **mapped, index=folder.name)

    def build(partial: Path) -> None:
        earlier = next(siblings(folder, load), None)
        known: dict[tuple[str, Stamp], tuple[IndexedFile, int]] = {}
        first = 0
        for known_file in earlier.files if earlier else ():
            known[known_file.name, known_file.stamp] = known_file, first
            first += known_file.documents
        with contextlib.ExitStack() as stack:
            streams = {c: stack.enter_context((partial / c).open("wb")) for c in columns}
            writer = _Writer(columns, streams, Skipped(source.data.max_corrupt))
            for file in source.files:
                match = known.get((file.name, file.stamp))
                if earlier is not None and match and file.stamp:
                    writer.copy(earlier, *match)
                else:
                    writer.add(IndexedFile(file.name, file.stamp, 0, []), encode(file.records()))
        write_index(partial, writer.files, writer.ends[1:], writer.hashes)

    folder = Path(source.data.cache_dir) / f"{name}-{source.key}"
    documents, was_cached = cached(folder, build, load)
    return replace(documents, cached=was_cached)


@dataclass
class _Writer:
    """Writes the columns of an index file by file, and collects the rest."""

    columns: Columns
    streams: Mapping[str, IO[bytes]]
    skipped: Skipped
    files: list[IndexedFile] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=lambda: [0])
    progress: Progress = field(default_factory=lambda: Progress("indexing text"))

    def add(self, file: IndexedFile, documents: Iterator[Encoded | Skip]) -> None:
        """Append the documents of a file."""
        self.files.append(file)
        for document in documents:
            if isinstance(document, Skip):
                self.skipped.add([document])
                file.skips.append(document)
                continue
            hash, values = document
            rows = [np.asarray(v, d) for v, d in zip(values, self.columns.values(), strict=True)]
            for stream, row in zip(self.streams.values(), rows, strict=True):
                stream.write(row.tobytes())
            self.ends.append(self.ends[-1] + len(rows[0]))
            self.hashes.append(hash)
            file.documents += 1
            self.progress(len(self.hashes))

    def copy(self, index: TokenDocuments, file: IndexedFile, first: int) -> None:
        """Append a file of an earlier index, in which ``first`` is its first document."""
        self.skipped.add(file.skips)
        self.files.append(file)
        last = first + file.documents
        start, stop = (int(index.ends[n - 1]) if n else 0 for n in (first, last))
        for name, stream in self.streams.items():
            stream.write(getattr(index, name)[start:stop].tobytes())
        self.ends += (index.ends[first:last] - start + self.ends[-1]).tolist()
        self.hashes += index.hashes[first:last].tolist()
