"""Ranks with the same sequences agree which documents they leave out."""

import threading
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain import batches

RANKS, STEPS = 3, (1, 2)

Number = tuple[int, int]


class Together:
    """:class:`pretrain.batches.SkippedSamples` of ranks that are threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=60)
        self.sets: list[set[Number]] = [set() for _ in range(RANKS)]

    def rank(self, rank: int) -> Any:
        def synchronize(failure: Exception | None, left_out: Iterable[Number]) -> set[Number]:
            self.sets[rank] = set(left_out)
            self.barrier.wait()
            union = set().union(*self.sets)
            one.found = bool(union)
            self.barrier.wait()
            return union

        one = SimpleNamespace(found=False, synchronize=synchronize)
        return one


@given(
    st.sets(
        st.tuples(
            st.integers(0, RANKS - 1), st.sampled_from(STEPS), st.integers(0, 2), st.integers(0, 4)
        ),
        max_size=8,
    ),
    st.lists(st.booleans(), min_size=RANKS, max_size=RANKS),
)
def test_reading_again_may_fail_again(
    failures: set[tuple[int, int, int, int]], in_background: list[bool]
) -> None:
    """Documents fail by (rank, step, reading, number), such as on a file system with outages."""
    readings: dict[tuple[int, int], int] = {}

    def for_step(
        config: Any, rank: Any, data: Any, step: int, left_out: Iterable[Number] = ()
    ) -> list[Any]:
        reading = readings[rank, step] = readings.get((rank, step), -1) + 1
        failed = {(0, n) for n in range(5) if (rank, step, reading, n) in failures}
        return [SimpleNamespace(left_out=tuple(failed | set(left_out)))]

    together = Together()
    read: dict[tuple[int, int], tuple[set[Number], Any]] = {}

    def run(rank: Any) -> None:
        none: Any = None
        for step, (batch,), plan in batches.prefetch(
            none, rank, none, STEPS, together.rank(rank), lambda made, error: none or "plan",
            in_background=in_background[rank],
        ):  # fmt: skip
            read[rank, step] = set(batch.left_out), plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "for_step", for_step)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for step in STEPS:
        left_out, plan = read[0, step]
        assert all(read[rank, step] == (left_out, plan) for rank in range(RANKS))
        assert plan == (None if left_out else "plan")
        first = {(0, n) for _, s, reading, n in failures if s == step and reading == 0}
        assert first <= left_out


@pytest.mark.parametrize("in_background", [False, True])
def test_an_error_while_a_batch_is_prepared_ends_the_run_at_once(
    monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """Such as one of the collective in which the ranks plan, when another rank has ended."""

    def plan(made: Any, error: Any) -> Any:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(batches, "for_step", lambda *_: [])
    none: Any = None
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="closed by peer"):
        list(batches.prefetch(none, none, none, STEPS, none, plan, in_background=in_background))
    assert time.monotonic() - start < batches._END_SECONDS
