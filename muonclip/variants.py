"""Variants of Muon: rules that scale orthogonalized updates, with state for each neuron.

A variant is a pure function and an entry of ``VARIANTS``; its options are arguments of
``MuonClip``. It is always called with whole matrices and their state, however they are sharded.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

VariantName = Literal["muon", "normuon"]
State = dict[str, Tensor]
Options = Mapping[str, Any]


class Variant(NamedTuple):
    """A rule that scales orthogonalized updates.

    Attributes:
        factor: a function of matrices [b, n, m], as Newton-Schulz returns them, before their scale
            by shape; of their state; and of the options of their group. Returns the factor to
            multiply the matrices by, broadcastable to [b, n, m], and the new state. None: one. It
            does not change its arguments. In a skipped step neither result is used.
        state: names of its tensors of state [b, n, 1], a number for each neuron (row of a matrix)
            in float32, or in float64 for float64 parameters; initially zero.
        options: names of the options that it reads.
    """

    factor: Callable[[Tensor, State, Options], tuple[Tensor, State]] | None = None
    state: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def normuon(matrices: Tensor, state: State, options: Options) -> tuple[Tensor, State]:
    """NorMuon: divide each row by the root of a moving average of its mean square.

    Newton-Schulz equalizes singular values, but the rows of its result differ in size. The factor
    keeps the Frobenius norm of each matrix, and with it the learning rate of Muon. Zeros stay zero.

    Source: Li et al., "NorMuon" (arXiv 2510.05491), algorithm 1. There the norm becomes that of a
    full-rank update; keeping the norm instead, as Emerging-Optimizers does, leaves the size of
    updates of lower rank as it is without NorMuon.
    """
    before = state["neuron_square"]
    dtype = torch.promote_types(matrices.dtype, before.dtype)
    squares = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True, dtype=dtype).square_()
    weight = 1 - options["normuon_beta2"]
    average = torch.lerp(before.to(dtype), squares / matrices.size(-1), weight)
    factor = 1 / (average.sqrt() + _NORMUON_EPS)
    scaled = (factor.square() * squares).sum(-2, keepdim=True)
    norm = squares.sum(-2, keepdim=True) / scaled.clamp_(min=torch.finfo(dtype).tiny)
    return factor * norm.sqrt_(), {"neuron_square": average.to(before.dtype)}


# As in the paper. Singular values are about one, so it only guards rows of zeros.
_NORMUON_EPS = 1e-8

VARIANTS: dict[str, Variant] = {
    "muon": Variant(),
    "normuon": Variant(normuon, ("neuron_square",), ("normuon_beta2",)),
}


def variant_of(group: Options) -> Variant:
    """The variant of a group's updates."""
    return VARIANTS[group["variant"]]


def neuron_state() -> set[str]:
    """Names of the state with a number for each neuron, of all variants."""
    return {name for variant in VARIANTS.values() for name in variant.state}
