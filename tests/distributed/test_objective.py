"""The gradients of a weighted batch are those of the weighted mean, on one rank and on two."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import batches, objective, step
from pretrain.build import Run, build
from pretrain.model import multimodal
from pretrain.model.multimodal import MicroBatch
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.training import EXACT

Change = Callable[[MicroBatch], MicroBatch]
Gradients = dict[str, Tensor]


def _draw(batch: MicroBatch, seed: int) -> Tensor:
    """[b, s] pseudo-random numbers in [0, 1), by tokens alone: the same on any number of ranks."""
    return torch.frac(torch.sin(batch.tokens * 12.9898 + batch.labels * 78.233 + seed) * 43758.5)


def _masked(batch: MicroBatch) -> MicroBatch:
    """Half of the labels have weight 0."""
    return dataclasses.replace(batch, weights=batch.weights * (_draw(batch, 1) > 0))


def _fractional(batch: MicroBatch) -> MicroBatch:
    """Weights between 0 and 3; some documents are not learned."""
    weights = (3 * _draw(batch, 2).abs()).float() * batch.weights
    return dataclasses.replace(batch, weights=weights * (batch.documents % 2))


def _doubled(batch: MicroBatch) -> MicroBatch:
    batch = _fractional(batch)
    return dataclasses.replace(batch, weights=2 * batch.weights)


def _other_text(batch: MicroBatch) -> MicroBatch:
    """As :func:`_fractional`, with other tokens in the text of documents that are not learned."""
    weighted = _fractional(batch)
    text = (batch.documents % 2 == 0) & (batch.weights > 0)
    text &= (batch.labels > 20) & (batch.tokens > 20)
    return dataclasses.replace(weighted, tokens=torch.where(text, 21, batch.tokens))


CHANGES: dict[str, Change] = {
    "all": lambda batch: batch,
    "masked": _masked,
    "fractional": _fractional,
    "doubled": _doubled,
    "other text": _other_text,
}


def _reference(run: Run, micro_batches: list[MicroBatch]) -> tuple[Gradients, float]:
    """Gradients and loss by definition: of sum(weight * loss) / sum(weight), without DEP and
    without megatron-core's schedule."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for batch in micro_batches:
        features = run.tower(batch.patches, batch.grids)
        (model,) = run.language
        losses = multimodal.forward(model.module, batch, features, run.data.tokenizer.media_pad)
        learned = batch.weights > 0  # labels are taken out, not multiplied by 0
        total = total + (losses[learned] * batch.weights[learned].double()).sum()
        weight += float(batch.weights.double().sum())
    names, parameters = zip(*run.parameters(), strict=True)
    # Routers compute in float32: a loss divided by the weight would round differently.
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    zeros = map(torch.zeros_like, parameters)
    by_name = {
        name: zero if grad is None else grad / weight
        for name, grad, zero in zip(names, grads, zeros, strict=True)
    }
    return by_name, total.item() / weight


def weighted_gradients(folder: str, *overrides: str) -> dict[str, Any]:
    """Gradients and losses of the first step under each of CHANGES; by definition, too, on one
    rank."""
    settings = training.tiny(folder, EXACT, *overrides)
    context, data = set_up(settings)
    run = build(settings, context, data)
    made = batches.for_step(settings, context, data, 1)
    saved = {name: tensor.detach().clone() for name, tensor in run.named_tensors.items()}
    outcomes: dict[str, Any] = {}
    for name, change in CHANGES.items():
        changed = [change(batch) for batch in made]
        reference = _reference(run, changed) if context.world_size == 1 else None
        losses = objective.mean_losses(step.forward_backward(run, changed))
        grads = {n: p.grad.clone() for n, p in run.parameters() if p.grad is not None}
        outcomes[name] = losses, grads, reference
        run.optimizer.zero_grad(set_to_none=True)
        for key, value in saved.items():  # the backward pass moves the routers' biases
            run.named_tensors[key].detach().copy_(value)
    return outcomes


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return launch(weighted_gradients, 1, str(folder))[0]


def assert_close(gradients: Gradients, expected: Gradients) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm()
        assert error <= 1e-9 * expected[name].norm() + 1e-14, name


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_and_loss_are_those_of_the_weighted_mean(
    alone: dict[str, Any], change: str
) -> None:
    losses, gradients, (expected, loss) = alone[change]
    assert losses["loss"] == pytest.approx(loss, rel=1e-12)
    assert_close(gradients, expected)


def test_two_ranks_compute_the_gradients_and_losses_of_one(
    folder: Path, alone: dict[str, Any]
) -> None:
    for outcomes in launch(weighted_gradients, 2, str(folder)):
        for change, (losses, gradients, _) in outcomes.items():
            assert losses == pytest.approx(alone[change][0], rel=1e-12)
            assert_close(gradients, alone[change][1])


def test_doubling_all_weights_is_bit_exact(alone: dict[str, Any]) -> None:
    losses, gradients, _ = alone["fractional"]
    doubled_losses, doubled, _ = alone["doubled"]
    assert doubled_losses == losses
    assert all(torch.equal(doubled[name], gradients[name]) for name in gradients)


def test_documents_of_weight_0_contribute_no_gradient(alone: dict[str, Any]) -> None:
    losses, gradients, _ = alone["fractional"]
    other_losses, others, _ = alone["other text"]
    assert other_losses == pytest.approx(losses, rel=1e-12)
    assert_close(others, gradients)
