"""Sharded state (``shard_state``) equals replicated state and has its share of the memory."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from muonclip import AttentionLayout, MatrixLayout, MuonClip, QKClip, param_groups
from muonclip.integrations import megatron_core
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    EVERY_OPTION,
    EXACT,
    Case,
    Outcome,
    Spec,
    keep,
    random,
    train,
    whole,
)
from tests.distributed.test_fsdp2 import placing
from tests.distributed.test_megatron_muon import Layout, give_gradients, pieces, results, start
from tests.distributed.test_megatron_muon import build as build_megatron

SPECS = (
    Spec((8, 8)),
    Spec((5, 4, 6)),
    Spec((7,)),
    Spec((10, 6), MatrixLayout((4, 6))),
    Spec((3, 5), None, "adamw"),
    Spec((2, 3, 7), None, "adamw"),
    Spec((6, 4)),
    Spec((6, 3, 2), MatrixLayout(flatten=True), "muon"),
)
STEPS = range(20)
PLAIN = {
    "float64": Case(SPECS, steps=STEPS, dtype=torch.float64),
    "masters": Case(SPECS, steps=STEPS, dtype=torch.bfloat16, options={"master_weights": True}),
    "every option": Case(SPECS, dtype=torch.float64, options=EVERY_OPTION),
    "int8": Case(SPECS, steps=STEPS, dtype=torch.float64, options={"momentum_dtype": torch.int8}),
    "NorMuon": Case(
        SPECS,
        steps=range(5),
        dtype=torch.bfloat16,
        options={"master_weights": True, "variant": "normuon"},
        without_gradient=frozenset({(0, 0), (1, 0), (1, 1)}),
    ),
    "decay in the gradient": Case(
        SPECS,
        dtype=torch.bfloat16,
        options={"master_weights": True, "weight_decay_mode": "l2", "weight_decay": 0.5},
    ),
    "stochastic rounding": Case(SPECS, dtype=torch.bfloat16, options={"stochastic_rounding": True}),
    "gradients that come and go": Case(
        SPECS,
        dtype=torch.float64,
        steps=range(5),
        without_gradient=frozenset({(0, 0), (0, 4), (1, 0), (1, 1), (2, 2), (3, 4), (3, 5)}),
    ),
}


def on_mesh(
    mesh: tuple[int, ...], *placements: tuple[str, ...], dtype: torch.dtype = torch.float64
) -> Case:
    """Every parameter in each of the placements; without flattened kernels, which cannot be cut."""
    options: dict[str, Any] = {"variant": "normuon"}
    if dtype == torch.bfloat16:
        options = {"master_weights": True}
    placed = tuple(replace(spec, placements=p) for p in placements for spec in SPECS[:-1])
    return Case(placed, mesh, options, steps=STEPS, dtype=dtype)


def meshes(world_size: int) -> dict[str, Case]:
    """Shards without copies (FSDP2), copies alone, and shards with copies (HSDP)."""
    line = (world_size,)
    cases = {"FSDP2": on_mesh(line, ("S0",)), "copies": on_mesh(line, ("R",))}
    if world_size == 4:
        cases["HSDP"] = on_mesh((2, 2), ("R", "S0"), ("S0", "R"))
        cases["HSDP, masters"] = on_mesh((2, 2), ("R", "S0"), dtype=torch.bfloat16)
    return cases


def train_both(cases: dict[str, Case]) -> dict[str, tuple[Outcome, Outcome]]:
    found = {}
    for name, case in cases.items():
        place, options = keep, {"process_group": dist.group.WORLD}
        if case.mesh:
            place, options = placing(init_device_mesh("cpu", case.mesh)), {}
        found[name] = (
            train(case, place, shard_state=True, **options),
            train(case, place, **options),
        )
    return found


def check(outcomes: dict[str, tuple[Outcome, Outcome]], cases: dict[str, Case]) -> None:
    """Exact in float64; vector instructions may round the last float32 of a part differently."""
    for name, (sharded, replicated) in outcomes.items():
        if name == "stochastic rounding":  # by other random numbers
            continue
        tolerance = 1e-12 if cases[name].dtype == torch.float64 else 1e-6
        for what in ("momenta", "masters", "neurons", "steps", "weights"):
            pairs = zip(getattr(sharded, what), getattr(replicated, what), strict=True)
            for index, (ours, theirs) in enumerate(pairs):
                assert (ours is None) == (theirs is None), (name, what, index)
                if ours is None:
                    continue
                difference = (ours.double() - theirs.double()).abs().max()
                # A weight may be rounded to the next bfloat16 where the master copy is halfway.
                if what != "weights" or tolerance == 1e-12:
                    assert difference <= tolerance, (name, what, index)
                else:
                    assert difference <= theirs.abs().max() / 64, (name, index)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_replicated_state(world_size: int) -> None:
    cases = PLAIN | meshes(world_size)
    ranks = launch(train_both, world_size, cases)
    for outcomes in ranks:
        check(outcomes, cases)
        for name, (sharded, _) in outcomes.items():  # copies are equal to the bit
            assert all(map(torch.equal, sharded.weights, ranks[0][name][0].weights)), name


def make_attention(dtype: torch.dtype, **options: Any) -> tuple[nn.ParameterDict, MuonClip, QKClip]:
    """Query and key projections with biases, and a value projection that is not clipped."""
    shapes = {"q": (8, 6), "k": (8, 6), "v": (8, 6), "qb": (8,), "kb": (8,)}
    model = nn.ParameterDict(
        {n: nn.Parameter(random(s, i, dtype=dtype)) for i, (n, s) in enumerate(shapes.items())}
    )
    query, key = nn.Linear(6, 8), nn.Linear(6, 8)
    query.weight, query.bias = model["q"], model["qb"]
    key.weight, key.bias = model["k"], model["kb"]
    optimizer = MuonClip(
        model.named_parameters(), process_group=dist.group.WORLD, **EXACT, **options
    )
    layout = AttentionLayout.separate(query, key, num_heads=2)
    return model, optimizer, QKClip({"attention": layout}, threshold=1.0)


def clip_both() -> list[dict[str, Tensor]]:
    found = []
    for shard_state in (True, False):
        model, optimizer, clip = make_attention(
            torch.bfloat16, master_weights=True, shard_state=shard_state
        )
        for step in range(6):
            for index, p in enumerate(model.values()):
                p.grad = random(p.shape, index, step, dtype=p.dtype)
            if step == 4:  # replaces entries of the master copies
                model["q"].data[:2] = 0.5
                model["kb"].data[3] = -0.25
            optimizer.step()
            # On rank 0 alone, and not in every step.
            value = 1.5 + step if step % 2 and dist.get_rank() == 0 else 0.5
            clip.observe("attention", torch.tensor([value, 0.7]))
            clip.step()
        found.append(
            {
                **{name: p.detach() for name, p in model.items()},
                **{f"{n} master": whole(optimizer.state[p]["master"]) for n, p in model.items()},
            }
        )
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_qk_clip_scales_the_owners_master_copies(world_size: int) -> None:
    """And all ranks have the rounded master copy, as with replicated state."""
    for sharded, replicated in launch(clip_both, world_size):
        for name, value in replicated.items():
            assert (sharded[name] - value).abs().max() <= 1e-6, name
        for name in ("q", "k", "v", "qb", "kb"):
            assert torch.equal(sharded[name], sharded[f"{name} master"].bfloat16()), name


def convert_both() -> list[list[Tensor]]:
    """Steps in bfloat16 with master copies, in float32 without, and in bfloat16 again."""
    found = []
    for shard_state in (True, False):
        model, optimizer, _ = make_attention(
            torch.bfloat16, master_weights=True, shard_state=shard_state
        )
        for step, dtype in enumerate((torch.bfloat16, torch.float32, torch.bfloat16)):
            model.to(dtype)
            for index, p in enumerate(model.values()):
                p.grad = random(p.shape, index, step, dtype=dtype)
            optimizer.step()
        found.append([whole(optimizer.state[p]["master"]) for p in model.values()])
    return found


def test_a_model_that_is_converted_between_steps() -> None:
    for sharded, replicated in launch(convert_both, 2):
        for ours, theirs in zip(sharded, replicated, strict=True):
            assert (ours - theirs).abs().max() <= 1e-2  # a bfloat16 may be the next one


# ---------------------------------------------------------------------- megatron-core


def megatron_optimizer(model: Any, shard_state: bool) -> MuonClip:
    placed = megatron_core.shardings(model)
    layouts = megatron_core.matrix_layouts(model)
    return MuonClip(
        param_groups(model, layouts=layouts, shardings=placed),
        **{**EXACT, "adamw_eps": 1e-4},
        shardings=placed,
        master_weights=True,
        variant="normuon",
        shard_state=shard_state,
    )


def megatron_both(layout: Layout) -> dict[str, list[dict[Any, Tensor]]]:
    """Twenty steps with each of three optimizers; what this rank then has.

    The third is unsharded and gets the state of the sharded one after ten steps, which gets its own
    state in one file after fifteen.
    """
    found = {}
    for kind in ("gqa", "mla"):
        found[kind] = []
        saved: list[tuple[dict[Any, Tensor], dict[str, Any]]] = []
        for shard_state in (True, False, None):
            model = build_megatron(kind, layout).bfloat16()
            start(model)
            optimizer = megatron_optimizer(model, bool(shard_state))
            first = 0
            if shard_state is None:
                weights, state = saved[0]
                for _, values, part in pieces(model):
                    values.copy_(weights[part.key, part.global_offset])
                optimizer.load_state_dict(state)
                first = 10
            for step in range(first, 20):
                give_gradients(model, step)
                optimizer.step()
                if shard_state and step == 9:
                    saved.append((results(model), copy.deepcopy(optimizer.state_dict())))
                if shard_state and step == 14:
                    full = pickle.dumps(optimizer.full_state_dict(rank=None))
                    optimizer = megatron_optimizer(model, True)
                    optimizer.load_state_dict(pickle.loads(full))
            found[kind].append(results(model))
    return found


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(4, Layout(tensor=2), id="tp-dp"),
        pytest.param(4, Layout(pipeline=2, expert=2), id="pp-ep"),
        pytest.param(4, Layout(tensor=2, expert=2, expert_tensor=1), id="tp-ep-dp"),
    ],
)
def test_megatron(ranks: int, layout: Layout) -> None:
    """Weights are rounded from master copies, which may differ in their last bit."""
    for outcome in launch(megatron_both, ranks, layout):
        for sharded, replicated, moved in outcome.values():
            for place, expected in replicated.items():
                for found in (sharded, moved):
                    error = (found[place].float() - expected.float()).norm()
                    assert error <= 1e-3 * expected.float().norm(), place
