"""Parameters, gradients, and training in one process, which training on several must equal.

Weights and gradients are functions of seeds, so every process creates all of them and takes its
part; only the optimizer communicates.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muonclip import MatrixLayout, MuonClip
from muonclip.distributed.sharded_state import ShardedState, local_values
from muonclip.distributed.sharding import local_tensor

# Newton-Schulz in float64: what is left between one process and several is rounding of weights.
EXACT: dict[str, Any] = {"ns_dtype": torch.float64, "lr": 0.05, "adamw_lr": 0.01, "momentum": 0.9}
TOLERANCE = 1e-6

# Options of a step that differ from their defaults.
EVERY_OPTION: dict[str, Any] = {
    "nesterov": False,
    "ns_coefficients": "polar_express",
    "adjust_lr": "spectral",
    "weight_decay_mode": "cautious",
    "momentum_warmup_steps": 3,
    "maximize": True,
    "variant": "normuon",
    "normuon_beta2": 0.8,
}


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
        steps: numbers of the steps, which decide on gradients.
        dtype: of the parameters.
    """

    specs: tuple[Spec, ...]
    mesh: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    without_gradient: frozenset[tuple[int, int]] = frozenset()
    steps: Sequence[int] = (0, 1, 2)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Outcome:
    """Whole weights and state after training (None: has none).

    Attributes:
        weights, momenta, steps, masters: of each parameter; steps are those of AdamW.
        neurons: NorMuon's averages.
    """

    weights: list[Tensor]
    momenta: list[Tensor | None]
    steps: list[Tensor | None]
    masters: list[Tensor | None]
    neurons: list[Tensor | None] = field(default_factory=list)


Place: TypeAlias = Callable[[Spec, Tensor], Tensor]  # the part of a whole that this rank has


def keep(_: Spec, whole: Tensor) -> Tensor:
    return whole


def random(shape: Sequence[int], *seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def build(case: Case, place: Place = keep, **options: Any) -> tuple[list[Any], MuonClip]:
    """The parameters as they lie on this rank, and their optimizer."""
    params = [
        nn.Parameter(place(spec, random(spec.shape, index, dtype=case.dtype)))
        for index, spec in enumerate(case.specs)
    ]
    groups: list[dict[str, Any]] = []  # one for neighbours with the same options
    for index, (spec, param) in enumerate(zip(case.specs, params, strict=True)):
        own: dict[str, Any] = {"layout": spec.layout}
        if spec.algorithm is not None:
            own["algorithm"] = spec.algorithm
        if not groups or {k: v for k, v in groups[-1].items() if k != "params"} != own:
            groups.append({"params": [], **own})
        groups[-1]["params"].append((f"p{index}", param))
    return params, MuonClip(groups, **{**EXACT, **case.options, **options})


def give_gradients(case: Case, params: Sequence[Any], step: int, place: Place = keep) -> None:
    for index, (spec, param) in enumerate(zip(case.specs, params, strict=True)):
        gradient = random(spec.shape, index, 100 + step, dtype=case.dtype)
        missing = (step, index) in case.without_gradient
        param.grad = None if missing else place(spec, gradient)


def outcome_of(params: Sequence[Any], optimizer: MuonClip) -> Outcome:
    states = [optimizer.state[p] for p in params]
    return Outcome(
        [whole(p.detach()) for p in params],
        [whole(s["momentum_buffer"]) if "momentum_buffer" in s else None for s in states],
        [s.get("step") for s in states],
        [whole(s["master"]) if "master" in s else None for s in states],
        [whole(s["neuron_square"]) if "neuron_square" in s else None for s in states],
    )


def train(case: Case, place: Place = keep, **options: Any) -> Outcome:
    """Train a case in one process, or with tensors distributed by ``place``."""
    params, optimizer = build(case, place, **options)
    for step in case.steps:
        give_gradients(case, params, step, place)
        optimizer.step()
    return outcome_of(params, optimizer)


def train_past_a_bad_gradient(
    case: Case, spoil: Callable[[list[Any]], None], place: Place = keep, **options: Any
) -> tuple[str, Outcome, int]:
    """A step, one whose gradients ``spoil`` gets at and that must change nothing, and another.

    Returns:
        What the middle step raised ("" if nothing), the outcome, and how many steps were skipped.
    """
    params, optimizer = build(case, place, **options)
    message = ""
    for step in range(3):
        give_gradients(case, params, step, place)
        if step == 1:
            spoil(params)
        before = copy.deepcopy((params, optimizer.state_dict()))
        try:
            optimizer.step()
        except RuntimeError as error:
            message = str(error)
        if step == 1:
            weights, state = before
            assert all(map(torch.equal, map(local_tensor, params), map(local_tensor, weights)))
            now = optimizer.state_dict()
            assert now["param_groups"] == state["param_groups"]
            for key, entries in state["state"].items():
                for name, value in entries.items():
                    found = local_values(now["state"][key][name])
                    assert all(map(torch.equal, found, local_values(value)))
    assert isinstance(optimizer.skipped_steps, int)
    return message, outcome_of(params, optimizer), optimizer.skipped_steps


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, (DTensor, ShardedState)) else tensor


def assert_equal(found: Outcome, expected: Outcome, case: Case) -> None:
    """Weights and NorMuon's averages to ``TOLERANCE``, momenta bit for bit: their sums have the
    same order."""
    for index, spec in enumerate(case.specs):
        difference = (found.weights[index] - expected.weights[index]).abs().max()
        assert difference < TOLERANCE, f"{spec}, mesh {case.mesh}: weights differ by {difference}"
        for what in ("momenta", "steps"):
            ours, theirs = getattr(found, what)[index], getattr(expected, what)[index]
            assert (ours is None) == (theirs is None), spec
            if ours is not None:
                assert torch.equal(ours, theirs), f"{spec}, mesh {case.mesh}: {what} differ"
        ours, theirs = found.neurons[index], expected.neurons[index]
        assert (ours is None) == (theirs is None), spec
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < TOLERANCE, f"{spec}, mesh {case.mesh}: averages"


class Block(nn.Module):
    """A small model of everything: float64, the same weights every time."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 14)
        self.down = nn.Linear(14, width, bias=False)
        self.experts = nn.Parameter(torch.empty(3, width, width))
        self.last = nn.Linear(width, 1, bias=False)  # [1, width]: most ranks have an empty shard
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.last(torch.einsum("bn,enm->bm", x, self.experts))  # type: ignore[no-any-return]


def train_block(model: nn.Module, optimizer: MuonClip, steps: range) -> None:
    """Every rank has the whole batch, so that its mean is the same everywhere."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        model(random((8, 8), step, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_and_state(model: nn.Module, optimizer: MuonClip) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = {name: whole(p.detach()) for name, p in named.items()}
    for name, entries in optimizer.named_state(named.items()).items():
        found |= {f"{name}.{key}": whole(value) for key, value in entries.items()}
    return found
