"""Own times exclude waiting in collectives, and the slowest rank of a stage is named."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.metrics import scalars
from pretrain.runtime import stragglers
from pretrain.runtime.stragglers import CommunicationClock, StepClock, report, slowest_rank
from tests.distributed import training
from tests.distributed.launch import launch

CPU = torch.device("cpu")


class FakeTime:
    """A clock that advances by ``step`` seconds in each call of monotonic, and by hand."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def perf_counter(self) -> float:
        return self.now


def _seconds_in_collectives() -> tuple[float, float, bool]:
    fake: Any = FakeTime()
    stragglers.time = fake
    wait = dist.Work.wait

    def late(work: dist.Work, *arguments: Any) -> bool:
        fake.now += 3.0
        return wait(work, *arguments)

    dist.Work.wait = late  # type: ignore[method-assign]
    clock = CommunicationClock(CPU)
    clock.start()
    fake.now += 10.0  # computation
    dist.all_reduce(torch.ones(2))
    fake.now += 10.0
    work = dist.all_reduce(torch.ones(2), async_op=True)
    fake.now += 10.0  # overlaps with the collective
    work.wait()
    first = clock.stop()
    clock.start()
    second = clock.stop()
    fake.now += 1.0
    dist.all_reduce(torch.ones(2))  # no longer measured
    return first, second, dist.Work.wait is late


def test_only_waiting_counts_as_communication() -> None:
    assert launch(_seconds_in_collectives, 1) == [(6.0, 0.0, True)]


def _train_with_a_slow_rank(folder: str) -> list[dict[str, Any]]:
    fake: Any = FakeTime(step=3.0 if dist.get_rank() == 1 else 2.0)
    stragglers.time, training._MACHINE_DEPENDENT = fake, ()
    return training.train_and_read(folder, "steps=12", "log_every=6", "parallel.expert=2")


def test_a_slow_rank_is_named_at_log_steps(tmp_path: Path, prepared: Path) -> None:
    training.tiny_file(tmp_path, prepared)
    first, second = launch(_train_with_a_slow_rank, 2, str(tmp_path))
    assert first == second
    for record in first[1:]:
        if record["step"] % 6:
            assert "slowest_ratio" not in record
        else:
            assert (record["own_seconds"], record["slowest_ratio"]) == (2.0, 1.5)
            assert record["slowest_rank"] == 1
            assert record["slowest_host"] == socket.gethostname()[:64]
            line = report(record, 1.5)
            assert line is not None and f"rank 1 on {socket.gethostname()[:64]} is slow" in line
            assert report(record, 1.6) is None
            assert "slowest_host" not in scalars(record)


def test_ranks_are_compared_within_their_pipeline_stage() -> None:
    hosts = [f"node{rank}" for rank in range(8)]
    times = [1.0, 1.0, 1.0, 1.2, 4.0, 4.0, 4.4, 3.0]
    assert slowest_rank(times, 2, hosts) == {
        "own_seconds": 1.0, "slowest_ratio": 1.2, "slowest_rank": 3, "slowest_host": "node3"
    }  # fmt: skip
    assert slowest_rank(times, 1, hosts)["slowest_rank"] == 6


def _collectives_of_many_ranks(size: int) -> list[int]:
    """Collectives at the start, in steps that are not compared, and in one that is."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in dir(dist) if callable(getattr(dist, name))}
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather_object", "gather"):

        def counted(*arguments: Any, name: str = name) -> Any:
            calls.append(name)
            return originals[name](*arguments)

        setattr(dist, name, counted)
    stragglers.slowest_rank = lambda *_arguments: {}  # other ranks have no times
    clock = StepClock(CPU, stages=1, every=10)
    counts = [len(calls)]
    for step in range(1, 11):
        clock.start(step)
        clock.stop()
        if step in (9, 10):
            counts.append(len(calls))
    return counts


@pytest.mark.parametrize("size", [2, 4096])
def test_collectives_do_not_grow_with_the_ranks(size: int) -> None:
    assert launch(_collectives_of_many_ranks, 1, size) == [[1, 1, 2]]


def _alone() -> dict[str, Any]:
    clock = StepClock(CPU, stages=1, every=1)
    clock.start(1)
    return clock.stop()[1]


def test_a_single_rank_is_not_compared() -> None:
    assert launch(_alone, 1) == [{}]
