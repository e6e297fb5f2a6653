"""The objective is the weighted mean of the losses; weights 0 and 1 are a mask."""

import math
from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.data import Category
from pretrain.objective import (
    loss_sums,
    mean_losses,
    no_losses,
    source_losses,
    total_weight,
    weighted_loss,
)

NOTHING = {"loss": None, "text_loss": None, "caption_loss": None}
losses = st.floats(0, 100, width=32)
categories = st.sampled_from(Category)


def labels(weights: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[Tensor, Tensor, Tensor]]:
    """Losses, weights and categories of 1 to 20 labels."""
    rows = st.lists(st.tuples(losses, weights, categories), min_size=1, max_size=20)
    return rows.map(
        lambda rows: (
            torch.tensor([[loss for loss, _, _ in rows]], requires_grad=True),
            torch.tensor([[weight for _, weight, _ in rows]], dtype=torch.float32),
            torch.tensor([[category for _, _, category in rows]], dtype=torch.uint8),
        )
    )


masks = labels(st.sampled_from([0.0, 1.0]))
fractions = labels(st.just(0.0) | st.floats(2**-10, 2**10, width=32))


def gradient(losses: Tensor, weights: Tensor, categories: Tensor) -> Tensor:
    """The gradient of the objective by each loss, as the trainer computes it."""
    (by_loss,) = torch.autograd.grad(weighted_loss(losses, weights), losses)
    return by_loss / total_weight(loss_sums(losses, weights, categories))


@given(masks)
def test_weights_of_0_and_1_are_a_mask(made: tuple[Tensor, Tensor, Tensor]) -> None:
    losses, weights, categories = made
    learned = weights > 0
    masked = losses.detach() * learned
    assert weighted_loss(losses, weights) == masked.sum()
    expected = {}
    for name, chosen in (
        ("loss", learned),
        ("text_loss", learned & (categories == Category.TEXT)),
        ("caption_loss", learned & (categories == Category.CAPTION)),
    ):
        count = int(chosen.sum())
        sums = ((masked * (chosen & (categories == c))).double().sum() for c in Category)
        total = sum(map(float, sums))
        expected[name] = total / count if count else None
    assert mean_losses(loss_sums(*made)) == expected
    assert torch.equal(gradient(*made), learned / max(1, int(learned.sum())))


@given(fractions)
def test_the_objective_is_the_weighted_mean(made: tuple[Tensor, Tensor, Tensor]) -> None:
    losses, weights, categories = ([x[0].tolist() for x in made] for made in zip(made, strict=True))
    means = mean_losses(loss_sums(*made))
    for name, chosen in (
        ("loss", list(Category)),
        ("text_loss", [Category.TEXT]),
        ("caption_loss", [Category.CAPTION]),
    ):
        rows = [row for row in zip(losses[0], weights[0], categories[0], strict=True)]
        rows = [row for row in rows if row[2] in chosen]
        total = math.fsum(weight for _, weight, _ in rows)
        mean = math.fsum(loss * weight for loss, weight, _ in rows) / total if total else None
        assert means[name] is mean or math.isclose(means[name], mean, rel_tol=1e-12)  # type: ignore[arg-type]


@given(fractions)
def test_doubling_all_weights_changes_nothing(made: tuple[Tensor, Tensor, Tensor]) -> None:
    losses, weights, categories = made
    doubled = losses, 2 * weights, categories
    assert mean_losses(loss_sums(*doubled)) == mean_losses(loss_sums(*made))
    assert torch.equal(gradient(*doubled), gradient(*made))


@given(fractions)
def test_labels_of_weight_0_contribute_nothing(made: tuple[Tensor, Tensor, Tensor]) -> None:
    losses, weights, categories = made
    assert not gradient(*made)[weights == 0].any()
    others = torch.where(weights > 0, losses, 7.0)
    assert mean_losses(loss_sums(others, weights, categories)) == mean_losses(loss_sums(*made))
    nothing = loss_sums(losses, 0 * weights, categories)
    assert torch.equal(nothing, no_losses())
    assert mean_losses(nothing) == NOTHING
    assert total_weight(nothing) == 1


@given(fractions, st.integers(1, 4), st.randoms())
def test_sources_change_no_other_sum(
    made: tuple[Tensor, Tensor, Tensor], count: int, random: Random
) -> None:
    losses, weights, _ = made
    sources = torch.tensor([[random.randrange(count) for _ in losses[0]]], dtype=torch.int16)
    sums = loss_sums(*made, sources, count)
    assert sums.shape == no_losses(num_sources=count).shape
    assert mean_losses(sums) == mean_losses(loss_sums(*made))
    assert total_weight(sums) == total_weight(loss_sums(*made))
    for source, mean in enumerate(source_losses(sums)):
        alone = loss_sums(losses, weights * (sources == source), torch.zeros_like(sources))
        assert mean == mean_losses(alone)["text_loss"]


def test_the_sums_of_micro_batches_add_up() -> None:
    halves = [
        loss_sums(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), torch.tensor([[0, 0]])),
        loss_sums(torch.tensor([[4.0, 9.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 1]])),
    ]
    assert mean_losses(sum(halves, no_losses())) == {
        "loss": 7 / 3,
        "text_loss": 1.5,
        "caption_loss": 4.0,
    }
