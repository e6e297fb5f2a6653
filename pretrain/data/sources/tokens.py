"""Indexes of tokens: files of Megatron's format, and a file for each further column."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.data import megatron_format
from pretrain.data.cache import Stamp, cached, key_of, map_array, siblings, stamp
from pretrain.data.composer import Composer
from pretrain.data.megatron_format import IndexedTokens
from pretrain.data.skipped import Skip, Skipped
from pretrain.data.sources import parts
from pretrain.data.sources.indexed import (
    IndexedDocuments,
    IndexedFile,
    IndexedSource,
    R,
    read_files,
    write_files,
)
from pretrain.data.sources.order import Integers
from pretrain.data.sources.parts import HASHES, LENGTHS, Encoded, Known, Merger, Parts
from pretrain.errors import PretrainError
from pretrain.runtime.progress import Progress

PREFIX = "tokens"
"""The name of the pair of files in an index, without its suffixes."""
DESCRIPTION = f"{PREFIX}.json"
"""Names the tokenizer and the columns of an index."""
# Elements of a column that are copied at once.
_PIECE = 1 << 22


@dataclass(frozen=True)
class TokenDocuments(IndexedDocuments):
    """Documents whose tokens are in the index."""

    stored: IndexedTokens

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """The tokens of all documents."""
        return self.stored.tokens

    def extent(self, number: int) -> slice:
        """The range of a document in :attr:`tokens` and in every other column."""
        return self.stored.extent(number)

    def content(self, number: int) -> npt.NDArray[Any]:
        return self.tokens[self.extent(number)]

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        start, stop = self.stored.extents(numbers)
        return stop - start, np.zeros_like(numbers)


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

    Files that have not changed are copied from the latest index of the same name. If this process
    is killed, the next call continues (see :mod:`pretrain.data.sources.parts`).

    Args:
        name: name of the index, from :meth:`IndexedSource.index_name`.
        columns: the dtype of each column; the first is ``tokens``, the others are arguments of
            ``make``.
        make: the class of the documents.
        encode: tokenizes the records of a file.

    Raises:
        PretrainError: more than ``data.max_corrupt`` documents are corrupt, the files are too large
            to be tokenized inside a job, or the cache cannot be written.
    """

    def load(folder: Path) -> D:
        files, stored = read_files(folder), IndexedTokens.open(folder / PREFIX)
        hashes = map_array(folder / HASHES, np.uint64)
        others = {
            name: map_array(megatron_format.column_path(folder / PREFIX, name), dtype)
            for name, dtype in columns.items()
            if name != PREFIX
        }
        if not len(stored) == len(hashes) == sum(file.documents for file in files):
            raise ValueError("documents are not what was written")
        if any(len(values) != len(stored.tokens) for values in others.values()):
            raise ValueError("tokens are not what was written")
        return make(source, composer, hashes, files, stored, **others, index=folder.name)

    def build(folder: Path) -> None:
        source.check()
        source.require_small()
        description, work = folder / DESCRIPTION, folder / "work"
        if not description.exists():
            earlier = next(siblings(final, load), None)
            files = _tokenize(folder, work, source, dict(columns), encode, earlier)
            lengths = map_array(work / LENGTHS, np.int32)
            megatron_format.write_index(
                megatron_format.idx_path(folder / PREFIX), lengths, columns[PREFIX]
            )
            write_files(folder, files)
            values = {"tokenizer": composer.tokenizer.digest, "columns": list(columns)}
            with parts.written(description) as path:  # last: the rest is complete
                path.write_text(json.dumps(values))
        shutil.rmtree(work, ignore_errors=True)

    final = Path(source.data.cache_dir) / f"{name}-{source.key}"
    documents, was_cached = cached(final, build, load, resumable=True)
    return replace(documents, cached=was_cached)


def _file(column: str) -> str:
    prefix = Path(PREFIX)
    path = megatron_format.bin_path(prefix)
    return (path if column == PREFIX else megatron_format.column_path(prefix, column)).name


def _tokenize(
    folder: Path,
    work: Path,
    source: IndexedSource[R],
    columns: Columns,
    encode: Callable[[Iterator[R | Skip]], Iterator[Encoded | Skip]],
    earlier: TokenDocuments | None,
) -> list[IndexedFile]:
    """Write the columns and the documents' lengths, and return the files.

    Raises:
        PretrainError: too many documents are corrupt, or a file has changed meanwhile.
    """
    files = [IndexedFile(file.name, file.stamp, 0, []) for file in source.files]
    known = _known(earlier, files, columns) if earlier else []
    copied = {file.number for file in known}
    new = [(number, file) for number, file in enumerate(source.files) if number not in copied]
    part_size = parts.part_size(file for _, file in new)
    units = parts.units(new, part_size)
    steps: list[Known | int] = [*known, *range(len(units))]
    steps.sort(key=lambda s: s.number if isinstance(s, Known) else units[s].files[0][0])
    plan = key_of(part_size, sorted(copied), [len(unit.files) for unit in units])
    if not (work / plan).exists():  # none yet, or those of another plan
        for path in folder.iterdir():
            parts.remove(path)
        (work / plan).mkdir(parents=True)
    targets = {name: (work if name == LENGTHS else folder) / name for name in (LENGTHS, HASHES)}
    targets |= {_file(column): folder / _file(column) for column in columns}
    dtypes = {_file(column): dtype for column, dtype in columns.items()}
    pending = Parts(work / plan, units, dtypes, encode, source.data.max_corrupt, part_size)
    skipped = Skipped(source.data.max_corrupt)
    with Progress(f"tokenizing {source.setting}") as progress:
        merger = Merger(targets, pending, steps, files, skipped, progress)
        parts.run(pending, merger, source.workers)
    for file in source.files:
        if file.name and stamp(Path(file.name)) != file.stamp:
            raise PretrainError(
                f"{source.setting}.path: {file.name} has changed while it was tokenized: repeat it"
            )
    return files


def _known(earlier: TokenDocuments, files: list[IndexedFile], columns: Columns) -> list[Known]:
    """The files that have not changed since an earlier index."""
    ranges: dict[tuple[str, Stamp], tuple[IndexedFile, slice]] = {}
    first = 0
    for file in earlier.files:
        ranges[file.name, file.stamp] = file, slice(first, first + file.documents)
        first += file.documents
    known = []
    for number, (name, mark) in enumerate((file.name, file.stamp) for file in files):
        if mark and (name, mark) in ranges:
            file, documents = ranges[name, mark]
            values = _values(earlier, documents, columns)
            sizes = {column: array.nbytes for column, array in values.items()}
            known.append(Known(number, file, sizes, partial(_pieces, values)))
    return known


def _values(
    index: TokenDocuments, documents: slice, columns: Columns
) -> dict[str, npt.NDArray[Any]]:
    """The content of consecutive documents in every column."""
    tokens = slice(0, 0)
    if documents.start < documents.stop:
        first, last = index.extent(documents.start), index.extent(documents.stop - 1)
        tokens = slice(first.start, last.stop)
    values = {_file(column): getattr(index, column)[tokens] for column in columns}
    return values | {
        LENGTHS: index.stored.lengths[documents],
        HASHES: index.hashes[documents],
    }


def _pieces(values: Mapping[str, npt.NDArray[Any]], column: str) -> Iterable[bytes]:
    array = values[column]
    for start in range(0, len(array), _PIECE):
        yield array[start : start + _PIECE].tobytes()
