"""Joining the processes of a run."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pretrain import parallel
from pretrain.config import ParallelConfig
from pretrain.errors import PretrainError
from pretrain.runtime import without_cuda
from tests.distributed.launch import launch


def test_a_process_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(without_cuda, "USE_CUDA", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(PretrainError, match="LOCAL_RANK=1 needs 2 GPUs on its node, which has 1"):
        parallel.join()


def timeouts_of_groups(collective_seconds: float) -> set[timedelta]:
    dist.destroy_process_group()
    context = parallel.start(ParallelConfig(), seed=1, collective_seconds=collective_seconds)
    groups = list(dist.distributed_c10d._world.pg_map)
    return {
        group._get_backend(torch.device("cpu")).options._timeout
        for group in groups
        if group != context.patient_group
    }


@pytest.mark.parametrize("seconds", [45.0, 0.0])
def test_all_groups_have_the_configured_time_limit(seconds: float) -> None:
    """By default, collectives end after ten minutes (NCCL) or thirty (gloo)."""
    (timeouts,) = launch(timeouts_of_groups, 1, seconds)
    assert timeouts == {timedelta(seconds=seconds) if seconds else timedelta(days=365)}
