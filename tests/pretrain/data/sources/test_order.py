"""Every epoch is a permutation of all documents, which looks random."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.sources.order import shuffled


def epoch(number: int, count: int, seed: int = 3, source: int = 0) -> list[int]:
    return shuffled(np.arange(number * count, (number + 1) * count), count, seed, source).tolist()


def test_epochs_of_few_documents_are_permutations() -> None:
    for count in range(1, 400):
        assert sorted(epoch(count % 5, count)) == list(range(count))


@given(
    count=st.integers(1, 5000),
    number=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
    source=st.integers(0, 100),
)
def test_epochs_are_permutations(count: int, number: int, seed: int, source: int) -> None:
    assert sorted(epoch(number, count, seed, source)) == list(range(count))


@given(count=st.integers(1, 10**12), places=st.lists(st.integers(0, 10**15), max_size=20))
def test_places_do_not_depend_on_each_other(count: int, places: list[int]) -> None:
    together = shuffled(np.array(places, np.int64), count, 3, 0).tolist()
    alone = [int(shuffled(np.array([place]), count, 3, 0)[0]) for place in places]
    assert together == alone and all(0 <= number < count for number in together)


def test_documents_are_equally_likely_at_every_place() -> None:
    count, epochs = 16, 20_000
    numbers = shuffled(np.arange(count * epochs), count, 7, 1).reshape(epochs, count)
    table = np.stack([np.bincount(column, minlength=count) for column in numbers.T])
    expected = epochs / count
    freedom = (count - 1) ** 2
    statistic = ((table - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("count", [10_000, 65_536, 99_991])
def test_neighbours_are_unrelated(count: int) -> None:
    numbers = np.array(epoch(0, count))
    for other in (np.arange(count), np.roll(numbers, 1), np.array(epoch(1, count))):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 5 / math.sqrt(count)
    others = [epoch(0, count, seed=4), epoch(0, count, source=1)]
    assert all(np.mean(numbers == np.array(other)) < 20 / count for other in others)
