"""Parameters, gradients and the single process that training over several must equal.

Weights and gradients are functions of seeds, so every process makes the whole of each by itself and
takes its part; nothing but the optimizer communicates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from muonclip import MatrixLayout, MuonClip

# Newton-Schulz in float64: what is left between one process and several is rounding of weights.
EXACT = {"ns_dtype": torch.float64, "lr": 0.05, "adamw_lr": 0.01, "momentum": 0.9}
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Spec:
    """A parameter of a case: what it is, and how it lies on the ranks.

    Attributes:
        shape: of the whole parameter.
        layout, algorithm: options of its group; by default the shape decides.
        placements: for DTensors, one a mesh dimension: ``"S0"``, ``"S1"``, ``"S2"``, ``"R"``.
    """

    shape: tuple[int, ...]
    layout: MatrixLayout | None = None
    algorithm: str | None = None
    placements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """Some parameters, trained for some steps.

    Attributes:
        specs: the parameters.
        mesh: shape of the device mesh, for DTensors.
        options: of the optimizer, over ``EXACT``.
        without_gradient: pairs (step, index of a parameter) that have none.
    """

    specs: tuple[Spec, ...]
    mesh: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    without_gradient: frozenset[tuple[int, int]] = frozenset()
    steps: int = 3
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Outcome:
    """Whole weights and momenta after training (None: no state)."""

    weights: list[Tensor]
    momenta: list[Tensor | None]


def random(shape: Sequence[int], *seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def groups(case: Case, params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """A group for each parameter, or one for neighbours that need the same options."""
    result: list[dict[str, Any]] = []
    for index, (spec, param) in enumerate(zip(case.specs, params, strict=True)):
        options = {"layout": spec.layout}
        if spec.algorithm is not None:
            options["algorithm"] = spec.algorithm
        if not result or {k: v for k, v in result[-1].items() if k != "params"} != options:
            result.append({"params": [], **options})
        result[-1]["params"].append((f"p{index}", param))
    return result


def train(
    case: Case,
    place: Callable[[Spec, Tensor], Tensor] = lambda _, whole: whole,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    **options: Any,
) -> Outcome:
    """Train a case; by itself on one process, or as ``place`` lays the tensors on ranks.

    Args:
        case: what to train.
        place: from a whole tensor to the one that this rank has.
        gather: back.
        options: more of the optimizer's.
    """
    params = [
        nn.Parameter(place(spec, random(spec.shape, index, dtype=case.dtype)))
        for index, spec in enumerate(case.specs)
    ]
    optimizer = MuonClip(groups(case, params), **{**EXACT, **case.options, **options})
    for step in range(case.steps):
        for index, (spec, param) in enumerate(zip(case.specs, params, strict=True)):
            gradient = random(spec.shape, index, 100 + step, dtype=case.dtype)
            missing = (step, index) in case.without_gradient
            param.grad = None if missing else place(spec, gradient)
        optimizer.step()
    momenta = [optimizer.state[p].get("momentum_buffer") for p in params]
    return Outcome(
        [gather(p.detach()) for p in params], [None if m is None else gather(m) for m in momenta]
    )


def assert_equal(found: Outcome, expected: Outcome, case: Case) -> None:
    """Weights to ``TOLERANCE``, momenta to the bit: nothing is summed anew in them."""
    for index, spec in enumerate(case.specs):
        difference = (found.weights[index] - expected.weights[index]).abs().max()
        assert difference < TOLERANCE, f"{spec}, mesh {case.mesh}: weights differ by {difference}"
        ours, theirs = found.momenta[index], expected.momenta[index]
        assert (ours is None) == (theirs is None), spec
        if ours is not None and theirs is not None:
            assert torch.equal(ours, theirs), f"{spec}, mesh {case.mesh}: momenta differ"
