"""The cores of a process are those it may use, shared with the processes of its machine."""

import os

import pytest
import torch

from pretrain import train
from pretrain.config import Config, load
from pretrain.runtime.machine import cores_per_process

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _allow(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(8, 2, 4), (8, 3, 2), (2, 2, 1), (1, 4, 1)]
)
def test_processes_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, expected: int
) -> None:
    _allow(monkeypatch, cores, processes)
    assert cores_per_process() == expected


def test_a_process_that_is_bound_to_cores_has_these(monkeypatch: pytest.MonkeyPatch) -> None:
    _allow(monkeypatch, 96, 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert cores_per_process() == 12
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3}, raising=False)
    assert cores_per_process() == 2


def test_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    _allow(monkeypatch, 6, 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores_per_process() == 6
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores_per_process() == 6


def _config(*overrides: str) -> Config:
    return load("benchmarks/trainer.yaml", list(overrides))


def test_a_thread_prepares_batches_unless_it_takes_the_cores_of_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_background = train._prefetches_in_background
    threads = torch.get_num_threads()
    _allow(monkeypatch, threads, 1)
    assert not in_background(_config(), CPU)
    assert in_background(_config(), GPU)
    assert in_background(_config("data.sources=[{path: somewhere}]"), CPU)  # which may be slow
    _allow(monkeypatch, threads + 1, 1)
    assert in_background(_config(), CPU)
