"""Sharded state (``shard_state``) equals replicated state and takes its share of the memory."""

import pytest
import torch
import torch.distributed as dist

from muonclip import MatrixLayout
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    Case,
    Outcome,
    Spec,
    train,
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
