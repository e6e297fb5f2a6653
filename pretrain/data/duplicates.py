"""Duplicates among the documents of a run: exact ones, and near ones of text by MinHash.

Documents are compared as they are trained on: text by its tokens, documents with images by their
text and the content of the files. Near duplicates have sets of five consecutive tokens whose
Jaccard similarity is estimated to be at least a threshold (Broder, "On the resemblance and
containment of documents", 1997). Candidates share a band of their signatures (locality-sensitive
hashing); datasketch chooses the bands so that few pairs above the threshold are missed.

Held-out documents come first in the order of comparison: of a held-out and a training document,
the one to train on is the duplicate.

For each document, the search needs about 100 bytes of memory, and for near duplicates a signature
of 512 bytes in a temporary file in ``data.cache_dir``. The result, which remains, has 17 bytes for
each duplicate. One process computes it (10^6 tokens in about a second), and all ranks read it from
the cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig
from pretrain.data.cache import cached, key_of, map_array
from pretrain.data.skipped import Skip
from pretrain.data.sources.indexed import IndexedDocuments
from pretrain.data.sources.interface import Documents
from pretrain.data.sources.order import Integers, Words, mixed
from pretrain.errors import PretrainError
from pretrain.runtime.progress import counted

_SHINGLE = 5  # tokens
_PERMUTATIONS = 128
# How bad it is to find pairs below the threshold, which are compared and rejected, and to miss
# pairs above it.
_WEIGHTS = (0.03, 0.97)
# Documents of a band that are compared with the others of it, while they are not similar.
_ROUNDS = 32
# Duplicates in the list of skipped documents.
_MAX_LISTED = 1000
# Documents whose signatures are in memory at once.
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Duplicates:
    """The duplicates among documents, which are numbered across the sources in order.

    Attributes:
        documents: the sources that are compared.
        others: the sources that cannot be compared: those that are read in one pass.
        numbers: int64 [n], ascending, the duplicates.
        originals: int64 [n], the document that each is a duplicate of.
        near: bool [n], whether it is a near duplicate, not an exact one.
        key: digest of everything that they depend on.
    """

    documents: Sequence[IndexedDocuments]
    others: Sequence[Documents]
    numbers: Integers
    originals: Integers
    near: npt.NDArray[np.bool_]
    key: str

    @cached_property
    def firsts(self) -> Integers:
        """The number of each source's first document, and one after the last."""
        return _firsts(self.documents)

    def of(self, place: int) -> slice:
        """The range of a source's duplicates in :attr:`numbers`."""
        return slice(*np.searchsorted(self.numbers, self.firsts[place : place + 2]).tolist())

    def locate(self, number: int) -> tuple[IndexedDocuments, int]:
        """The source of a document, and its number there."""
        place = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.documents[place], number - int(self.firsts[place])

    def name(self, number: int) -> str:
        """The name of a document in messages."""
        documents, local = self.locate(number)
        return documents.name(local)

    @property
    def total(self) -> int:
        """Number of documents that were compared."""
        return int(self.firsts[-1])

    def overlap(self) -> tuple[int, int]:
        """Number of held-out documents that documents of the training split are duplicates of, and
        of all held-out documents."""
        held_out = [
            first + one.numbers["held_out"][np.arange(len(one.numbers["held_out"]))]
            for first, one in zip(self.firsts.tolist(), self.documents, strict=False)
        ]
        numbers = np.concatenate([np.empty(0, np.int64), *held_out])
        trained = ~np.isin(self.numbers, numbers)
        originals = np.unique(self.originals[trained])
        return int(np.isin(originals, numbers).sum()), len(numbers)

    def skips(self) -> list[Skip]:
        """The first duplicates: a list of all would grow with the number of documents."""
        columns = (self.numbers, self.originals, self.near)
        rows = zip(*(column[:_MAX_LISTED].tolist() for column in columns), strict=True)
        return [
            Skip(
                self.name(number),
                f"a{' near' if near else 'n exact'} duplicate of {self.name(original)}",
                corrupt=False,
            )
            for number, original, near in rows
        ]

    def describe(self, skipped_file: str) -> str:
        """Lines for the start of a run whose data is without them."""
        listed = f"the first {_MAX_LISTED:,} are in " if len(self.numbers) > _MAX_LISTED else "see "
        see = f"; {listed}{skipped_file}" if len(self.numbers) else ""
        lines = [f"{self.summary()}; they are left out{see}"]
        lines += [
            f"{one.source.setting}: read in one pass, not searched for duplicates"
            for one in self.others
        ]
        return "\n".join(lines)

    def summary(self) -> str:
        """A line with the number and share of duplicates."""
        count, near = len(self.numbers), int(self.near.sum())
        share = count / max(1, self.total)
        return (
            f"{count:,} of {self.total:,} documents ({share:.1%}) are duplicates: {count - near:,} "
            f"exact, {near:,} near"
        )


def find_duplicates(
    documents: Sequence[Documents], data: DataConfig, mode: Literal["exact", "near"]
) -> Duplicates:
    """Find the duplicates in both splits of all sources, or load them from the cache.

    Args:
        documents: those of each source, with duplicates.
        data: ``duplicate_threshold`` is the least Jaccard similarity of near duplicates.

    Raises:
        PretrainError: datasketch is needed and not installed, a file of an image cannot be read,
            or the cache cannot be written.
    """
    if mode == "near":
        require_datasketch()
    compared = [one for one in documents if isinstance(one, IndexedDocuments)]
    others = [one for one in documents if not isinstance(one, IndexedDocuments)]
    splits = [(one.index, one.source.config.split) for one in compared]
    threshold = data.duplicate_threshold
    settings = (mode, threshold if mode == "near" else 1.0, data.held_out, data.seq_length)
    key = key_of("duplicates", splits, *settings)

    def load(folder: Path) -> Duplicates:
        count = json.loads((folder / "count.json").read_text())
        arrays = [map_array(folder / name, dtype) for name, dtype in _COLUMNS.items()]
        if any(len(array) != count for array in arrays):
            raise ValueError("duplicates are not what was written")
        numbers, originals, near = arrays
        return Duplicates(compared, others, numbers, originals, near.astype(bool), key)

    def build(folder: Path) -> None:
        found = _find(folder, compared, mode, threshold)
        for values, (name, dtype) in zip(found, _COLUMNS.items(), strict=True):
            values.astype(dtype).tofile(folder / name)
        (folder / "count.json").write_text(json.dumps(len(found[0])))

    return cached(Path(data.cache_dir) / f"duplicates-{key}", build, load)[0]


_COLUMNS: dict[str, Any] = {"numbers": np.int64, "originals": np.int64, "near": np.uint8}


def without_duplicates(
    documents: Sequence[Documents], data: DataConfig
) -> tuple[list[Documents], Duplicates | None]:
    """The documents without the duplicates that ``data.deduplicate`` names, and these.

    Raises:
        PretrainError: as :func:`find_duplicates`; or all documents of a source are duplicates.
    """
    if data.deduplicate == "none":
        return list(documents), None
    found = find_duplicates(documents, data, data.deduplicate)
    kept: list[Documents] = []
    place = -1
    for one in documents:
        if not isinstance(one, IndexedDocuments):
            kept.append(one)
            continue
        place += 1
        numbers = found.numbers[found.of(place)] - found.firsts[place]
        changed = replace(one, removed=numbers, removed_by=found.key)
        if not sum(map(len, changed.numbers.values())):
            raise PretrainError(
                f"{one.source.setting}: every document of {one.source.location} is a duplicate, "
                "such as of another source: remove the source, or set data.deduplicate=none"
            )
        kept.append(changed)
    return kept, found


def require_datasketch() -> Any:
    """
    Raises:
        PretrainError: datasketch is not installed.
    """
    try:
        import datasketch
    except ImportError as error:
        raise PretrainError(
            "near duplicates need datasketch, which is not installed: pip install '.[data]', or "
            "look for exact ones (data.deduplicate=exact)"
        ) from error
    return datasketch


# ---------------------------------------------------------------------- the search


def _firsts(documents: Sequence[IndexedDocuments]) -> Integers:
    return np.cumsum([0, *(len(one.hashes) for one in documents)])


def _find(
    folder: Path, documents: Sequence[IndexedDocuments], mode: str, threshold: float
) -> tuple[Integers, Integers, npt.NDArray[np.bool_]]:
    """Numbers, originals and kinds of the duplicates; see :class:`Duplicates`."""
    order = _order(documents)
    signatures = _Signatures(folder / "signatures", len(order)) if mode == "near" else None
    hashes = np.empty(len(order), np.uint64)
    comparable = np.zeros(len(order), np.bool_)
    contents = _Contents(documents, _firsts(documents), order)
    for place, content in enumerate(counted(contents, "looking for duplicates")):
        tokens = None if isinstance(content, bytes) else content
        data = content if isinstance(content, bytes) else content.astype(np.int64).tobytes()
        hashes[place] = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        if signatures is not None and tokens is not None:
            comparable[place] = True
            signatures.write(place, tokens)
    originals = np.full(len(order), -1)
    _link(originals, np.arange(len(order)), hashes, lambda first, other: np.ones(len(other), bool))
    exact = originals >= 0
    if signatures is not None:
        bands, rows = _bands(threshold)
        for band in range(bands):
            alive = np.flatnonzero(comparable & (originals < 0))
            keys = signatures.keys(alive, slice(band * rows, (band + 1) * rows))
            _link(
                originals,
                alive,
                keys,
                lambda first, other: signatures.similarity(first, other) >= threshold,
            )
        signatures.remove()
    places = np.flatnonzero(originals >= 0)
    numbers = order[places]
    by_number = np.argsort(numbers)
    places = places[by_number]
    return numbers[by_number], order[originals[places]], ~exact[places]


def _order(documents: Sequence[IndexedDocuments]) -> Integers:
    """Numbers of all documents that are not too long, the held-out ones first."""
    pairs = list(zip(_firsts(documents).tolist(), documents, strict=False))
    return np.concatenate(
        [
            first + one.numbers[split][np.arange(len(one.numbers[split]))]
            for split in ("held_out", "train")
            for first, one in pairs
        ]
        or [np.empty(0, np.int64)]
    )


@dataclass(frozen=True)
class _Contents:
    """The content of each document in an order."""

    documents: Sequence[IndexedDocuments]
    firsts: Integers
    order: Integers

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[npt.NDArray[Any] | bytes]:
        for start in range(0, len(self.order), _CHUNK):
            numbers = self.order[start : start + _CHUNK]
            places = np.searchsorted(self.firsts, numbers, side="right") - 1
            local = (numbers - self.firsts[places]).tolist()
            for place, number in zip(places.tolist(), local, strict=True):
                yield self.documents[place].content(number)


def _link(
    originals: Integers,
    members: Integers,
    keys: Words,
    same: Callable[[Integers, Integers], npt.NDArray[np.bool_]],
) -> None:
    """Note the original of each member that is the same as an earlier one with an equal key.

    In each round, the first member with a key is compared with all others; the next rounds are
    about those that are not the same. The work is therefore linear in the number of members: those
    that come after ``_ROUNDS`` different ones with their key are not compared with each other.

    Args:
        originals: int64, of all documents; -1: none.
        members: int64 [n], documents in the order of comparison.
        keys: uint64 [n], one of each member.
        same: whether each of the second documents is the same as the first.
    """
    by_key = np.argsort(keys, kind="stable")
    members, keys = members[by_key], keys[by_key]
    for _ in range(_ROUNDS):
        begins = np.ones(len(keys), np.bool_)
        begins[1:] = keys[1:] != keys[:-1]
        first = members[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
        others = np.flatnonzero(~begins)
        if not len(others):
            return
        matches = same(first[others], members[others])
        originals[members[others[matches]]] = first[others[matches]]
        members, keys = members[others[~matches]], keys[others[~matches]]


# ---------------------------------------------------------------------- signatures


def _bands(threshold: float) -> tuple[int, int]:
    """Number of bands of a signature, and their length, for a threshold."""
    lsh = require_datasketch().MinHashLSH(
        threshold=threshold, num_perm=_PERMUTATIONS, weights=_WEIGHTS
    )
    return lsh.b, lsh.r


class _Signatures:
    """The MinHash signatures of documents, in a file."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        shape = (max(1, count), _PERMUTATIONS)  # nothing cannot be mapped
        self._values = np.memmap(path, np.uint32, "w+", shape=shape)
        self._empty = require_datasketch().MinHash(_PERMUTATIONS, hashfunc=_itself)

    def write(self, place: int, tokens: npt.NDArray[Any]) -> None:
        minhash = self._empty.copy()
        minhash.update_batch(shingles(tokens))
        self._values[place] = minhash.hashvalues

    def keys(self, places: Integers, columns: slice) -> Words:
        """uint64 [n]: a hash of some columns of signatures."""
        keys = np.empty(len(places), np.uint64)
        for start in range(0, len(places), _CHUNK):
            key = np.zeros(1, np.uint64)
            for column in self._values[places[start : start + _CHUNK], columns].T:
                key = mixed(key + column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
            keys[start : start + _CHUNK] = key
        return keys

    def similarity(self, first: Integers, second: Integers) -> npt.NDArray[np.float64]:
        """[n]: the estimated Jaccard similarity of documents."""
        similarity = np.empty(len(first))
        for start in range(0, len(first), _CHUNK):
            part = slice(start, start + _CHUNK)
            similarity[part] = (self._values[first[part]] == self._values[second[part]]).mean(1)
        return similarity

    def remove(self) -> None:
        del self._values
        self._path.unlink()


def _itself(value: int) -> int:
    """The hash function of datasketch, for values that are hashes already."""
    return value


def shingles(tokens: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Hashes of all sequences of five tokens; of fewer tokens, of all of them together."""
    words = tokens.astype(np.int64).astype(np.uint64)
    width = min(_SHINGLE, max(1, len(words)))
    hashes = np.zeros(max(0, len(words) - width + 1), np.uint64)
    for offset in range(width):
        shifted = words[offset : offset + len(hashes)]
        hashes = mixed(hashes + shifted + np.uint64(0x9E3779B97F4A7C15))
    return np.unique(hashes >> np.uint64(32)).astype(np.uint32)
