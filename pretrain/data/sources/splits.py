"""Splits of indexed documents: the numbers of the documents in each, kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data.cache import cached, key_of, map_array
from pretrain.data.interface import SPLITS, Split
from pretrain.data.sources.order import Integers

# Documents that are looked at together.
_CHUNK = 1 << 20


def held_out_below(data: DataConfig) -> int:
    """Documents with a hash below this number are held out."""
    return int(data.held_out * 2**64)


@dataclass(frozen=True)
class Subset:
    """Some of the numbers 0, 1, 2, …, in ascending order.

    Attributes:
        count: how many.
        listed: int64, the numbers; or, for a subset that leaves few out, how many numbers precede
            each one that is left out. Mapped into memory: a process needs only what it reads.
        leaves_out: whether ``listed`` has those that are left out.
    """

    count: int
    listed: Integers
    leaves_out: bool

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.count, _CHUNK):
            yield from self[np.arange(start, min(start + _CHUNK, self.count))].tolist()

    def __getitem__(self, indices: npt.ArrayLike) -> Integers:
        """The numbers at these indices, which must be in ``0..count-1``."""
        places = np.asarray(indices)
        if not self.leaves_out:
            numbers: Integers = self.listed[places]
        else:
            numbers = places + np.searchsorted(self.listed, places, side="right")
        return numbers


class Column(Protocol):
    """A value of each document: an array, or values that are computed when they are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: slice, /) -> npt.NDArray[Any]: ...


class Indexed(Protocol):
    """The part of indexed documents that decides their splits.

    Attributes:
        index: name of the index; another one if the documents change.
        hashes: uint64 [n], a hash of the content of each document.
        whole: whether documents are never cut. Those that do not fit a sequence are then left out.
        removed: int64, ascending, the documents that are left out as duplicates.
        removed_by: digest of the search that found them; empty: none has been made.
    """

    @property
    def index(self) -> str: ...

    @property
    def hashes(self) -> Column: ...

    @property
    def whole(self) -> bool: ...

    @property
    def removed(self) -> Integers: ...

    @property
    def removed_by(self) -> str: ...

    @property
    def identity(self) -> Sequence[Column]:
        """Values of all documents, whose bytes identify them."""

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        """See :meth:`pretrain.data.sources.interface.Documents.sizes_of`."""


@dataclass(frozen=True)
class Splits:
    """The splits of a source, and totals over its documents.

    Attributes:
        numbers: the documents of each split.
        token_counts: (tokens, image placeholders among them) of each split.
        too_long: int64, documents that do not fit a sequence.
        fingerprint: digest of all documents.
    """

    numbers: dict[Split, Subset]
    token_counts: dict[Split, tuple[int, int]]
    too_long: Integers
    fingerprint: str


def open_splits(documents: Indexed, data: DataConfig, split: str) -> Splits:
    """Load the splits from the cache, or read all hashes and sizes once to make them.

    Args:
        split: ``split`` of the source.

    Raises:
        PretrainError: the cache cannot be written.
    """
    search = [documents.removed_by] if documents.removed_by else []
    key = key_of("splits", documents.index, data.held_out, split, data.seq_length, *search)
    folder = Path(data.cache_dir) / f"splits-{key}"
    splits, _ = cached(folder, lambda partial: _build(partial, documents, data, split), _load)
    return splits


def _build(folder: Path, documents: Indexed, data: DataConfig, split: str) -> None:
    masks = _Masks(documents, data, split)
    totals: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for _, chosen in masks:
        for name, mask in chosen.items():
            totals[name] += int(mask.sum())
    if split == "hash" and not totals["train"]:  # such as a single document
        masks.split = "train"
        totals = {"train": totals["held_out"], "held_out": 0}
    count = len(documents.hashes)
    files = {name: _Listed(folder / name, 2 * totals[name] > count) for name in SPLITS}
    too_long = _Listed(folder / "too_long", leaves_out=False)
    counts = {name: np.zeros(2, np.int64) for name in SPLITS}
    for start, chosen in masks:
        for name, mask in chosen.items():
            files[name].add(mask, start)
            sizes = documents.sizes_of(start + np.flatnonzero(mask))
            counts[name] += [values.sum() for values in sizes]
        left_out = ~(chosen["train"] | chosen["held_out"])
        left_out[masks.removed(start)] = False
        too_long.add(left_out, start)
    for listed in (*files.values(), too_long):
        listed.close()
    described: dict[str, Any] = {
        name: [totals[name], listed.leaves_out, counts[name].tolist()]
        for name, listed in files.items()
    }
    described |= {"documents": count, "fingerprint": _digest(documents.identity)}
    described |= {"removed": len(documents.removed)}
    (folder / "splits.json").write_text(json.dumps(described))


@dataclass
class _Masks:
    """The documents of each split, bool by split, a chunk at a time with its first number."""

    documents: Indexed
    data: DataConfig
    split: str

    def __iter__(self) -> Iterator[tuple[int, dict[Split, npt.NDArray[np.bool_]]]]:
        below = np.uint64(held_out_below(self.data))
        hashes = self.documents.hashes
        for start in range(0, len(hashes), _CHUNK):
            part = np.asarray(hashes[start : start + _CHUNK])
            held_out = part < below
            if self.split != "hash":
                held_out[:] = self.split == "held_out"
            usable = np.ones_like(held_out)
            if self.documents.whole:
                sizes, _ = self.documents.sizes_of(np.arange(start, start + len(part)))
                usable = sizes <= self.data.seq_length
            usable[self.removed(start)] = False
            yield start, {"train": usable & ~held_out, "held_out": usable & held_out}

    def removed(self, start: int) -> Integers:
        """The duplicates among a chunk that begins with the number ``start``, counted from it."""
        first, after = np.searchsorted(self.documents.removed, (start, start + _CHUNK))
        return self.documents.removed[first:after] - start


class _Listed:
    """Writes the file of a :class:`Subset`."""

    def __init__(self, path: Path, leaves_out: bool) -> None:
        self.leaves_out = leaves_out
        self._file: IO[bytes] = path.open("wb")
        self._written = 0

    def add(self, mask: npt.NDArray[np.bool_], start: int) -> None:
        """Append the numbers of a chunk that begins with the number ``start``."""
        numbers = start + np.flatnonzero(~mask if self.leaves_out else mask)
        if self.leaves_out:  # less those that are left out before it
            numbers -= np.arange(self._written, self._written + len(numbers))
        self._written += len(numbers)
        self._file.write(numbers.astype(np.int64).tobytes())

    def close(self) -> None:
        self._file.close()


def _load(folder: Path) -> Splits:
    described = json.loads((folder / "splits.json").read_text())
    numbers: dict[Split, Subset] = {}
    counts: dict[Split, tuple[int, int]] = {}
    for name in SPLITS:
        count, leaves_out, (tokens, placeholders) = described[name]
        listed = map_array(folder / name, np.int64)
        if len(listed) != (described["documents"] - count if leaves_out else count):
            raise ValueError("splits are not what was written")
        numbers[name], counts[name] = Subset(count, listed, leaves_out), (tokens, placeholders)
    too_long = map_array(folder / "too_long", np.int64)
    usable = described["documents"] - described.get("removed", 0)
    if len(too_long) != usable - sum(map(len, numbers.values())):
        raise ValueError("splits are not what was written")
    return Splits(numbers, counts, too_long, str(described["fingerprint"]))


def _digest(columns: Iterable[Column]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        for start in range(0, len(column), _CHUNK):
            digest.update(column[start : start + _CHUNK].tobytes())
    return digest.hexdigest()[:16]
