"""Fixtures and settings for the tests of all folders."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from muonclip.kernels import support

# A busy machine is slow without being wrong.
settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slow")

# Ranks have one thread (see ``launch.py``), and sums depend on the number of threads.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all runs of the tiny configuration; the first of them fills it."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(autouse=True)
def newton_schulz_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MuonClip choose float32 on every CPU: results must not depend on the processor.

    ``launch.py`` does the same; tests that run programs give them ``ns_dtype``.
    """
    monkeypatch.setattr(support, "_prefers_bfloat16", lambda: False)


@pytest.fixture(autouse=True)
def no_process_group_left_behind() -> Iterator[None]:
    """Fail the test that leaves a process group standing, not a later one in the same process."""
    yield
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    initialized = parallel_state is not None and parallel_state.model_parallel_is_initialized()
    assert not dist.is_initialized() and not initialized


def pytest_configure() -> None:
    """Let the processes that tests start be interrupted.

    A suite that runs in the background, or under nohup, ignores these signals, and so would they.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Spare the garbage collector of every test the objects of all imported modules."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(
                pytest.mark.skip(reason="needs an NVIDIA GPU; `make gpu` runs it there")
            )
