"""Megatron's files of tokens: ``PREFIX.bin`` has the tokens, ``PREFIX.idx`` where documents are.

The format is that of ``megatron.core.datasets.indexed_dataset``, whose own writer collects Python
lists of all documents, and whose import takes seconds. The index consists of

- a header: magic bytes, version (uint64), code of the tokens' dtype (uint8), the number of
  sequences and the length of the last array (uint64 each);
- int32 [sequences], the tokens of each sequence;
- int64 [sequences], where each sequence begins in ``PREFIX.bin``, in bytes;
- int64 [documents + 1], the sequence with which each document begins, ended by ``sequences``.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_MAGIC, _VERSION = b"MMIDIDX\0\0", 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, npt.DTypeLike] = {
    **{1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64},
    **{7: np.float32, 8: np.uint16},
}
# Elements of an array that are in memory at once.
_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The dtype that Megatron chooses for the tokens of a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.idx")


DESCRIPTION, HASHES = "json", "hashes"
"""Files that ``pretrain data`` writes next to a pair: its tokenizer and its columns, and a hash of
each document."""


def column_path(prefix: Path, name: str) -> Path:
    """A file next to a pair, such as one with another value of each token."""
    return prefix.with_name(f"{prefix.name}.{name}")


@dataclass(frozen=True, eq=False)
class IndexedTokens:
    """Documents in a pair of files, which are mapped into memory.

    Attributes:
        prefix: the path of the files without their suffixes.
        tokens: the tokens of all documents.
        lengths: int32 [sequences], the tokens of each sequence.
        starts: int64 [sequences], where each sequence begins in ``tokens``, in bytes.
        documents: int64 [documents + 1], the first sequence of each document.
    """

    prefix: Path
    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    @classmethod
    def open(cls, prefix: Path) -> "IndexedTokens":
        """Map ``prefix``.bin and ``prefix``.idx into memory.

        Raises:
            ValueError: the files are damaged, incomplete, or contain something else; the message
                names the file.
            OSError: a file cannot be read.
        """
        index, data = idx_path(prefix), bin_path(prefix)
        with index.open("rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise ValueError(f"{index} is not the index of Megatron's tokens")
        _, version, code, sequences, boundaries = _HEADER.unpack(head)
        dtype = np.dtype(_DTYPES.get(code, np.float64))
        if version != _VERSION or dtype.kind == "f":
            raise ValueError(
                f"{index} has version {version} and dtype {code}, not version 1 and integers"
            )
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        size = index.stat().st_size
        if sequences and size == expected + sequences:
            raise ValueError(f"{index} has sequences of several modalities, which are not read")
        if size != expected:
            raise ValueError(f"{index} has {size:,} bytes instead of {expected:,}")

        def mapped(dtype: npt.DTypeLike, offset: int, count: int) -> npt.NDArray[Any]:
            if not count:  # nothing cannot be mapped
                return np.empty(0, dtype)
            return np.memmap(index, dtype, "r", offset, (count,)).view(np.ndarray)

        place = _HEADER.size
        lengths = mapped(np.int32, place, sequences)
        starts = mapped(np.int64, place + 4 * sequences, sequences)
        documents = mapped(np.int64, place + 12 * sequences, boundaries)
        if not boundaries or documents[0] != 0 or documents[-1] != sequences:
            raise ValueError(f"{index} has documents that are not made of its sequences")
        end = int(starts[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
        if (size := data.stat().st_size) != end:
            raise ValueError(f"{data} has {size:,} bytes, but {index.name} describes {end:,}")
        tokens = np.memmap(data, dtype, "r").view(np.ndarray) if end else np.empty(0, dtype)
        return cls(prefix, tokens, lengths, starts, documents)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    def extent(self, number: int) -> slice:
        """The range of a document in :attr:`tokens`."""
        first, after = self.documents[number : number + 2].tolist()
        itemsize, count = self.tokens.dtype.itemsize, len(self.starts)
        return slice(
            *(
                int(self.starts[n]) // itemsize if n < count else len(self.tokens)
                for n in (first, after)
            )
        )

    def extents(
        self, numbers: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First token of documents, and the one after the last, in :attr:`tokens`; int64 [n]."""
        first, after = self.documents[numbers], self.documents[numbers + 1]
        return self._place(first), self._place(after)

    def _place(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """First token of sequences in :attr:`tokens`; of the number after the last: their end."""
        places = np.full(len(sequences), len(self.tokens))
        inside = sequences < len(self.starts)
        places[inside] = self.starts[sequences[inside]] // self.tokens.dtype.itemsize
        return places


def write_index(path: Path, lengths: npt.NDArray[np.int32], dtype: npt.DTypeLike) -> None:
    """Write the index of documents of one sequence each, which follow each other without gaps.

    Args:
        lengths: int32 [documents], the tokens of each; may be mapped into memory.
        dtype: of the tokens.
    """
    size = np.dtype(dtype).itemsize
    code = next(code for code, known in _DTYPES.items() if np.dtype(known) == np.dtype(dtype))
    count = len(lengths)
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, count, count + 1))
        for block in _blocks(count):
            file.write(lengths[block].tobytes())
        end = 0
        for block in _blocks(count):
            ends = end + size * np.cumsum(lengths[block], dtype=np.int64)
            file.write(np.concatenate([[end], ends[:-1]]).astype(np.int64).tobytes())
            end = int(ends[-1])
        for block in _blocks(count + 1):
            file.write(np.arange(block.start, block.stop, dtype=np.int64).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(count, start + _BLOCK))
