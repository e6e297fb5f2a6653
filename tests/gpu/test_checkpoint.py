"""Asynchronous saving from the memory of a GPU."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.storage import Checkpoint, path_of
from tests.distributed import launch
from tests.gpu.devices import DEVICES


def saved_and_expected(folder: str, device: str) -> list[tuple[bool, ...]]:
    """Whether each of three checkpoints, read again, has the values at the time of its save."""
    tensors = {
        "weight": torch.randn(512, 1024, device=device),
        "half": torch.randn(256, 1024, device=device).to(torch.bfloat16),
        "step": torch.zeros((), device=device),
    }
    expected = []
    with Saver(Path(folder), keep=3, asynchronous=True) as saver:
        for step in (1, 2, 3):
            expected.append({name: tensor.clone() for name, tensor in tensors.items()})
            saver.save(step, tensors, {})
            for tensor in tensors.values():  # training continues
                tensor.add_(1)
        saver.wait()
    outcomes = []
    for step, values in enumerate(expected, 1):
        read = {name: torch.empty_like(value) for name, value in values.items()}
        Checkpoint.open(path_of(Path(folder), step)).load(read)
        outcomes.append(tuple(torch.equal(read[name], values[name]) for name in values))
    return outcomes


@DEVICES
def test_a_checkpoint_has_the_values_at_the_time_of_its_save(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA cannot be used in a fork of a process that has imported what asks for GPUs.
    monkeypatch.setattr(launch, "_context", multiprocessing.get_context("spawn"))
    (outcomes,) = launch.launch(saved_and_expected, 1, str(tmp_path), device)
    assert outcomes == [(True, True, True)] * 3
