"""Splits divide all documents that fit, are kept on disk, and are read a chunk at a time."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import DataConfig, SourceConfig
from pretrain.data.sources import splits
from pretrain.data.sources.order import Integers
from pretrain.data.sources.splits import held_out_below, open_splits

LENGTH = 100
SOURCES = (SourceConfig(path="not read"),)  # held_out is refused without sources


@dataclass
class Listed:
    """Documents with these hashes and sizes."""

    hashes: npt.NDArray[np.uint64]
    tokens: Integers
    whole: bool
    index: str
    removed: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    removed_by: str = ""

    @property
    def identity(self) -> tuple[npt.NDArray[Any], ...]:
        return self.hashes, self.tokens

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        return self.tokens[numbers], self.tokens[numbers] // 3


@given(
    documents=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 120), st.booleans()), max_size=60
    ),
    whole=st.booleans(),
    held_out=st.sampled_from([0.0, 0.02, 0.5, 0.98]),
    split=st.sampled_from(["hash", "train", "held_out"]),
    chunk=st.integers(1, 70),
)
def test_splits_equal_their_definition(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[tuple[int, int, bool]],
    whole: bool,
    held_out: float,
    split: str,
    chunk: int,
) -> None:
    hashes = np.array([hash for hash, *_ in documents], np.uint64)
    tokens = np.array([size for _, size, _ in documents], np.int64)
    removed = np.flatnonzero([duplicate for *_, duplicate in documents])
    listed = Listed(hashes, tokens, whole, "an index", removed, "a search")
    data = DataConfig(
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        held_out=held_out,
        seq_length=LENGTH,
        sources=SOURCES,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_CHUNK", chunk)
        made, again = (open_splits(listed, data, split) for _ in range(2))
    left = sorted({*range(len(tokens))} - {*removed.tolist()})
    fits = [n for n in left if tokens[n] <= LENGTH or not whole]
    below = held_out_below(data)
    expected = {
        "train": [n for n in fits if split == "train" or (split == "hash" and hashes[n] >= below)],
        "held_out": [
            n for n in fits if split == "held_out" or (split == "hash" and hashes[n] < below)
        ],
    }
    if split == "hash" and not expected["train"]:
        expected = {"train": expected["held_out"], "held_out": []}
    for found in (made, again):
        for name, numbers in expected.items():
            subset = found.numbers[name]  # type: ignore[index]
            assert list(subset) == numbers and len(subset) == len(numbers)
            assert subset[np.arange(len(numbers))].tolist() == numbers
            counts = [int(values.sum()) for values in listed.sizes_of(np.array(numbers, np.int64))]
            assert list(found.token_counts[name]) == counts  # type: ignore[index]
        assert found.too_long.tolist() == sorted({*left} - {*fits})
    assert made.fingerprint == again.fingerprint


def test_splits_are_made_once_for_each_setting(tmp_path: Path) -> None:
    hashes = np.arange(1000, dtype=np.uint64) << np.uint64(54)
    listed = Listed(hashes, np.ones(1000, np.int64), True, "an index")
    data = DataConfig(cache_dir=str(tmp_path), held_out=0.1, seq_length=LENGTH, sources=SOURCES)
    made = open_splits(listed, data, "hash")
    # Nearly all documents are in this split: the file has those that are not.
    assert made.numbers["train"].leaves_out and len(made.numbers["train"].listed) < 150
    listed.hashes = hashes[::-1]
    assert list(open_splits(listed, data, "hash").numbers["train"]) == list(made.numbers["train"])
    listed.index = "another index"
    assert list(open_splits(listed, data, "hash").numbers["train"]) != list(made.numbers["train"])
