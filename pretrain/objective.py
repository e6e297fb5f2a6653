"""The training objective: next-token cross entropy, weighted label by label.

Every label has a weight (0: not learned; 1: the default) and a category under which its loss is
reported. The loss of a global batch is

    sum(weight * loss) / sum(weight)    over the labels of all ranks.

Ranks and micro-batches add up numerator and denominator separately: the result does not depend on
how the batch is distributed. The data sets the weights (``Document.add_tokens`` in
:mod:`pretrain.data.packing`): masked prompts, or turns that count more than others, need no other
code.
"""

import torch
from torch import Tensor

from pretrain.data.packing import Category


def weighted_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """The numerator of a micro-batch, a scalar to differentiate.

    Args:
        losses: [b, s], the cross entropy of each label.
        weights: [b, s] float32.
    """
    return (losses * weights).sum()


def loss_sums(
    losses: Tensor,
    weights: Tensor,
    categories: Tensor,
    sources: Tensor | None = None,
    num_sources: int = 0,
) -> Tensor:
    """Numerator and denominator of a micro-batch by category and by source, for reports.

    Args:
        losses, weights: see :func:`weighted_loss`.
        categories: [b, s] uint8, a :class:`Category` for each label.
        sources: [b, s] int16, the index in ``data.sources`` of each label's source.
        num_sources: number of sources.

    Returns:
        [categories + num_sources, 2] float64: the weighted sum of the losses, and the sum of the
        weights.
    """
    weights = weights.double()
    weighted = losses.detach().double() * weights
    groups = [categories == category for category in Category]
    if sources is not None:
        groups += [sources == source for source in range(num_sources)]
    return torch.stack(
        [torch.stack([(weighted * group).sum(), (weights * group).sum()]) for group in groups]
    )


def no_losses(device: torch.device | None = None, num_sources: int = 0) -> Tensor:
    """The :func:`loss_sums` of no labels."""
    return torch.zeros(len(Category) + num_sources, 2, dtype=torch.float64, device=device)


def total_weight(sums: Tensor) -> Tensor:
    """The denominator, a scalar: the sum of all weights; 1 if nothing is learned.

    Args:
        sums: the :func:`loss_sums` of the global batch.
    """
    total = sums[: len(Category), 1].sum()
    return total.where(total > 0, 1.0)


def mean_losses(sums: Tensor) -> dict[str, float | None]:
    """Mean loss of all labels (``loss``) and of each category (``text_loss``, …).

    Args:
        sums: summed :func:`loss_sums`.

    Returns:
        Each mean, weighted; None where all weights are 0.
    """
    rows = sums[: len(Category)].tolist()
    means = {f"{c.name.lower()}_loss": _ratio(*rows[c]) for c in Category}
    return {"loss": _ratio(*map(sum, zip(*rows, strict=True))), **means}


def source_losses(sums: Tensor) -> list[float | None]:
    """Mean loss of each source, weighted; None where all weights are 0.

    Args:
        sums: summed :func:`loss_sums`.
    """
    return [_ratio(*row) for row in sums[len(Category) :].tolist()]


def _ratio(losses: float, weights: float) -> float | None:
    return losses / weights if weights else None
