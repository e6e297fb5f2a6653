"""Prompts of a batch are drawn by the shares of the tasks, and depend on the seed alone."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.prompts import PromptSampler, counts

shares = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)
offsets = st.floats(0, 1, exclude_max=True)


@given(shares, st.integers(1, 200), offsets)
def test_every_task_has_its_part_of_a_batch(
    shares: list[float], prompts: int, offset: float
) -> None:
    found = counts(shares, prompts, offset)
    assert sum(found) == prompts
    for share, count in zip(shares, found, strict=True):
        assert abs(count - prompts * share / math.fsum(shares)) < 1 + 1e-9


@given(shares, st.integers(1, 20))
def test_the_mean_over_offsets_is_exact(shares: list[float], prompts: int) -> None:
    steps = 500
    drawn = [counts(shares, prompts, (step + 0.5) / steps) for step in range(steps)]
    for task, share in enumerate(shares):
        mean = sum(found[task] for found in drawn) / steps
        assert mean == pytest.approx(prompts * share / math.fsum(shares), abs=2 / steps)


def test_by_hand() -> None:
    assert counts([0.5, 0.5], 8, 0.3) == [4, 4]
    assert counts([1, 3], 2, 0.4) == [0, 2]
    assert counts([1, 3], 2, 0.5) == [1, 1]


tasks = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0.05, 10)), min_size=1, max_size=4
)  # problems and share
numbers = st.integers(1, 4)


def sampler(tasks: list[tuple[int, float]], seed: int, batches: int, **sizes: int) -> PromptSampler:
    chosen = {"prompts": 5, "group_size": 2, "updates": 2} | sizes
    return PromptSampler(
        [size for size, _ in tasks],
        [share for _, share in tasks],
        batches=batches,
        seed=seed,
        **chosen,
    )


@given(tasks, st.integers(0, 1000), numbers, numbers, numbers)
def test_groups_follow_each_other_and_batches_are_repeated(
    tasks: list[tuple[int, float]], seed: int, prompts: int, group_size: int, updates: int
) -> None:
    drawn = sampler(tasks, seed, 3, prompts=prompts, group_size=group_size, updates=updates)
    rows = list(drawn)
    assert len(rows) == len(drawn) == 3 * updates * prompts * group_size
    size = prompts * group_size
    batches = [tuple(rows[start : start + size]) for start in range(0, len(rows), size)]
    for start, expected in zip(range(0, len(batches), updates), drawn.prompts(), strict=True):
        assert len(set(batches[start : start + updates])) == 1
        assert list(batches[start]) == [row for row in expected for _ in range(group_size)]


@given(tasks, st.integers(0, 1000))
def test_a_task_passes_through_its_problems_before_it_repeats_one(
    tasks: list[tuple[int, float]], seed: int
) -> None:
    rows = list(itertools.chain(*sampler(tasks, seed, 20).prompts()))
    starts = list(itertools.accumulate((size for size, _ in tasks), initial=0))
    for start, end in itertools.pairwise(starts):
        own, size = [row for row in rows if start <= row < end], end - start
        for first in range(0, len(own), size):
            once = own[first : first + size]
            assert len(set(once)) == len(once)


@given(tasks, st.integers(0, 1000), st.integers(1, 10))
def test_a_longer_run_begins_like_a_shorter_one(
    tasks: list[tuple[int, float]], seed: int, batches: int
) -> None:
    short, long = list(sampler(tasks, seed, batches)), list(sampler(tasks, seed, 10))
    assert short == long[: len(short)] == list(sampler(tasks, seed, batches))
