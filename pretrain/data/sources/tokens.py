"""Indexes of tokens: the columns of all documents, one after the other, in a file each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.data.cache import Progress, Stamp, cached, siblings
from pretrain.data.composer import Composer
from pretrain.data.skipped import Skip, Skipped
from pretrain.data.sources.indexed import (
    IndexedDocuments,
    IndexedFile,
    IndexedSource,
    R,
    map_array,
    read_index,
    write_index,
)


@dataclass(frozen=True)
class TokenDocuments(IndexedDocuments):
    """Documents whose tokens are in the index, in the column ``tokens``."""

    tokens: npt.NDArray[Any]

    def size(self, number: int) -> tuple[int, int]:
        tokens = self.extent(number)
        return tokens.stop - tokens.start, 0


D = TypeVar("D", bound=TokenDocuments)
Columns = Mapping[str, np.dtype[Any]]


class TokenWriter:
    """An index of tokens while it is written, file by file.

    Args:
        folder: an empty folder.
        columns: the dtype of each column, by its name.
        limit: more corrupt documents are an error.
    """

    def __init__(self, folder: Path, columns: Columns, limit: int) -> None:
        self._skipped = Skipped(limit)
        self._folder, self._columns = folder, columns
        self._streams = {name: (folder / name).open("wb") for name in columns}
        self._ends: list[int] = []
        self._hashes: list[int] = []
        self._files: list[IndexedFile] = []
        self._progress = Progress("indexing text")

    def begin(self, name: str, stamp: Stamp) -> None:
        """Begin a file; following documents belong to it."""
        self._files.append(IndexedFile(name, stamp, 0, []))

    def skip(self, skip: Skip) -> None:
        """Leave a document out."""
        self._skipped.add([skip])
        self._files[-1].skips.append(skip)

    def add(self, hash: int, *columns: npt.ArrayLike) -> None:
        """Append a document: its values in each column."""
        size = 0
        for (name, dtype), values in zip(self._columns.items(), columns, strict=True):
            row = np.asarray(values, dtype)
            self._streams[name].write(row.tobytes())
            size = len(row)
        self._ends.append((self._ends[-1] if self._ends else 0) + size)
        self._hashes.append(hash)
        self._files[-1].documents += 1
        self._progress(len(self._ends))

    def copy(self, index: TokenDocuments, file: IndexedFile, first: int) -> None:
        """Append a file of another index, in which ``first`` is its first document."""
        self._skipped.add(file.skips)
        last = first + file.documents
        start, stop = (int(index.ends[n - 1]) if n else 0 for n in (first, last))
        for name in self._columns:
            self._streams[name].write(getattr(index, name)[start:stop].tobytes())
        before = self._ends[-1] if self._ends else 0
        self._ends += (index.ends[first:last] - start + before).tolist()
        self._hashes += index.hashes[first:last].tolist()
        self._files.append(file)

    def finish(self) -> None:
        for stream in self._streams.values():
            stream.close()
        write_index(self._folder, self._files, self._ends, self._hashes)


def index_tokens(
    source: IndexedSource[R],
    composer: Composer,
    name: str,
    columns: Columns,
    make: Callable[..., D],
    add: Callable[[TokenWriter, Iterator[R | Skip]], None],
) -> D:
    """Load the index of a source, or build it if it is missing.

    Files that have not changed are copied from the latest index of the same name.

    Args:
        name: name of the index, from :meth:`IndexedSource.index_name`.
        columns: the dtype of each column, by its name in the class.
        make: the class of the documents.
        add: tokenizes the records of a file and passes them to the writer.

    Raises:
        PretrainError: more than ``data.max_corrupt`` documents are corrupt, or the cache cannot be
            written.
    """

    def load(folder: Path) -> D:
        hashes, ends, files = read_index(folder)
        mapped = {column: map_array(folder / column, columns[column]) for column in columns}
        if any(len(values) != (ends[-1] if len(ends) else 0) for values in mapped.values()):
            raise ValueError("tokens are not what was written")
        return make(source, composer, hashes, ends, files, **mapped)

    def build(partial: Path) -> None:
        earlier = next(siblings(folder, load), None)
        known: dict[tuple[str, Stamp], tuple[IndexedFile, int]] = {}
        first = 0
        for known_file in earlier.files if earlier else ():
            known[known_file.name, known_file.stamp] = known_file, first
            first += known_file.documents
        writer = TokenWriter(partial, columns, source.data.max_corrupt)
        for file in source.files:
            match = known.get((file.name, file.stamp))
            if earlier is not None and match and file.stamp:
                writer.copy(earlier, *match)
                continue
            writer.begin(file.name, file.stamp)
            add(writer, file.records())
        writer.finish()

    folder = Path(source.data.cache_dir) / f"{name}-{source.key}"
    index, was_cached = cached(folder, build, load)
    return replace(index, cached=was_cached)
