"""The shapes of published models train alike on every layout of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import batches, step
from pretrain.build import build
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_training import _merged

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Gradients]:
    shapes = list(training.SHAPES.values())
    (outcomes,) = launch(training.gradients_of_each, 1, str(folder), shapes, training.EXACT)
    return {name: _merged([o]) for name, o in zip(training.SHAPES, outcomes, strict=True)}


@pytest.mark.parametrize(
    ("setting", "without"),
    [
        ("parallel.tensor=2", ()),
        ("parallel.expert=2", ("dense",)),
        ("parallel.pipeline=2", ("dense",)),  # its embedding is tied to the output head
        ("micro_batch_size=1", ()),  # data parallel
        ("recompute.granularity=full", ()),
    ],
)
def test_every_layout_gives_the_gradients_of_one_process(
    folder: Path, alone: dict[str, Gradients], setting: str, without: tuple[str, ...]
) -> None:
    shapes = {name: shape for name, shape in training.SHAPES.items() if name not in without}
    ranks = launch(
        training.gradients_of_each, 2, str(folder), list(shapes.values()), setting, training.EXACT
    )
    for name, outcomes in zip(shapes, zip(*ranks, strict=True), strict=True):
        together = _merged(outcomes)
        assert together.keys() == alone[name].keys()
        for weight, expected in alone[name].items():
            difference = (together[weight] - expected).norm()
            assert difference <= 1e-10 * expected.norm(), (name, weight)


def first_steps(folder: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """Metrics of a first step of each shape."""
    here, data = set_up(training.tiny(folder, *overrides))
    metrics = {}
    for name, shape in training.SHAPES.items():
        settings = training.tiny(folder, *overrides, *shape)
        run = build(settings, here, data)
        metrics[name] = step.train_step(run, batches.for_step(settings, here, data, 1), 1)
    return metrics


@pytest.fixture(scope="module")
def steps(folder: Path) -> dict[str, dict[str, Any]]:
    return launch(first_steps, 2, str(folder), "optimizer.qk_clip_threshold=1e-3")[0]


def test_routers_have_metrics_where_there_are_experts(steps: dict[str, dict[str, Any]]) -> None:
    for name, metrics in steps.items():
        if name == "dense":
            assert not metrics.keys() & {"expert_load", "expert_loads", "dropped_tokens"}
        else:
            assert len(metrics["expert_loads"]) == 1
            assert metrics["dropped_tokens"] == 0
            assert 1 <= metrics["expert_load"] <= 4


def test_the_load_balancing_loss_is_reported_where_it_is_used(
    steps: dict[str, dict[str, Any]],
) -> None:
    reported = {name for name, metrics in steps.items() if "load_balancing_loss" in metrics}
    assert reported == {"softmax router"}
    assert 0.9 < steps["softmax router"]["load_balancing_loss"] < 4


def test_heads_are_clipped_unless_their_queries_and_keys_are_normalized(
    steps: dict[str, dict[str, Any]],
) -> None:
    vision_heads = 2
    for name, metrics in steps.items():
        assert all(logit is not None for logit in metrics["language_max_logits"]), name
        if "language.qk_norm=true" in training.SHAPES[name]:
            assert metrics["heads_clipped"] <= vision_heads
        else:
            assert metrics["heads_clipped"] > vision_heads, name
