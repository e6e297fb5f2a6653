"""Runs with grouped experts have the gradients and checkpoints of ones with a sequence of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn

from pretrain import batches, checkpoint, step
from pretrain.build import Run, build
from pretrain.model import language
from pretrain.model.multimodal import MicroBatch
from pretrain.runtime.faults import Guard
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch


class Sequence(SequentialMLP):
    """megatron-core's experts, built as GroupedExperts is."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(*arguments, submodules=layers, **options)


def compare(folder: str, *overrides: str) -> None:
    """Train and save a run with a sequence of experts; load it with grouped ones, and compare."""
    settings = training.tiny(folder, *overrides)
    here, data = set_up(settings)

    def micro_batches(number: int) -> list[MicroBatch]:
        return batches.for_step(settings, here, data, number)

    def gradients(run: Run) -> dict[str, Tensor]:
        step.forward_backward(run, micro_batches(2))
        return {name: p.grad.clone() for name, p in run.parameters() if p.grad is not None}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "GroupedExperts", Sequence)
        sequence = build(settings, here, data)
    step.train_step(sequence, micro_batches(1), 1)
    with checkpoint.saver(sequence) as saver:
        checkpoint.save(sequence, saver, Guard(settings.faults), 1)
    expected = gradients(sequence)

    grouped = build(settings, here, data)
    assert checkpoint.restore(grouped) == 1
    for name, tensor in sequence.named_tensors.items():
        if isinstance(tensor, nn.Parameter):  # the backward pass updated the routers' biases
            assert torch.equal(tensor, grouped.named_tensors[name]), name
    found = gradients(grouped)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ("expert=2",)),
        (2, ("tensor=2",)),  # each expert is split
        (4, ("tensor=2", "expert=2")),
    ],
)
def test_grouped_experts_replace_a_sequence(
    folder: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    run_dir = f"run_dir={folder}/{world_size}-{'-'.join(layout)}"
    overrides = (f"parallel.{setting}" for setting in layout)
    launch(compare, world_size, str(folder), training.EXACT, run_dir, *overrides)
