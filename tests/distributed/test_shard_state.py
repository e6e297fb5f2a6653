"""Sharded state (``shard_state``) equals replicated state and takes its share of the memory."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip import AttentionLayout, MatrixLayout, MuonClip, QKClip
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    EXACT,
    Case,
    Outcome,
    Spec,
    random,
    train,
    whole,
)

SPECS = (
    Spec((8, 8)),
    Spec((5, 4, 6)),
    Spec((7,)),
    Spec((10, 6), MatrixLayout((4, 6))),
    Spec((3, 5), None, "adamw"),
    Spec((2, 3, 7), None, "adamw"),
    Spec((6, 4)),
)
STEPS = range(20)
CASES = {
    "float64": Case(SPECS, steps=STEPS, dtype=torch.float64),
    "masters": Case(SPECS, steps=STEPS, dtype=torch.bfloat16, options={"master_weights": True}),
}


def train_both() -> dict[str, tuple[Outcome, Outcome]]:
    group = dist.group.WORLD
    return {
        name: (
            train(case, process_group=group, shard_state=True),
            train(case, process_group=group),
        )
        for name, case in CASES.items()
    }


def differences(found: Outcome, expected: Outcome) -> dict[str, float]:
    largest = {}
    for what in ("weights", "momenta", "steps", "masters"):
        for ours, theirs in zip(getattr(found, what), getattr(expected, what), strict=True):
            assert (ours is None) == (theirs is None), what
            if ours is not None:
                difference = float((ours.double() - theirs.double()).abs().max())
                largest[what] = max(largest.get(what, 0.0), difference)
    return largest


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_replicated_state(world_size: int) -> None:
    for outcomes in launch(train_both, world_size):
        for name, (sharded, replicated) in outcomes.items():
            largest = differences(sharded, replicated)
            # Vector instructions may round the last elements of a part in another way.
            tolerances = {"masters": 1e-6} if name == "masters" else {}
            for what, difference in largest.items():
                assert difference <= tolerances.get(what, 1e-12), (name, largest)


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
