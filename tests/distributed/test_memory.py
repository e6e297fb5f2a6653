"""Options that save memory, on shards: int8 momentum, remainders, and computing elsewhere."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from muonclip import MatrixLayout, adamw, muon
from muonclip.distributed.sharding import local_tensor
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import Case, Outcome, Spec, build, give_gradients, whole
from tests.distributed.test_fsdp2 import placing

SHAPES = (
    Spec((7, 5)),
    Spec((4, 6, 3)),
    Spec((10, 6), MatrixLayout((4, 6))),
    Spec((1, 9)),
    Spec((5,)),
    Spec((3, 5), None, "adamw"),
)


def case(placements: tuple[str, ...], dtype: torch.dtype, **options: Any) -> Case:
    specs = tuple(
        replace(spec, placements=placements) for spec in SHAPES if len(spec.shape) > 1 or dtype
    )
    vector = tuple("R" if p == "S1" else p for p in placements)
    specs = tuple(
        replace(spec, placements=vector) if len(spec.shape) == 1 else spec for spec in specs
    )
    return Case(specs, (2, 2), options, steps=range(6), dtype=dtype)


BFLOAT16 = torch.bfloat16
PLACEMENTS = (("S0", "S0"), ("S0", "S1"), ("R", "S0"), ("R", "S1"))


def train_on_mesh(of_case: Case, **options: Any) -> tuple[Outcome, dict[str, Tensor]]:
    """The outcome, and the float32 values of momenta and masters in a saved state."""
    place = placing(init_device_mesh("cpu", of_case.mesh))
    params, clip = build(of_case, place, **options)
    for step in of_case.steps:
        give_gradients(of_case, params, step, place)
        clip.step()
    saved = clip.state_dict()["state"]
    state = {f"{k}.{n}": whole(v) for k, entries in saved.items() for n, v in entries.items()}
    weights = [whole(p.detach()) for p in params]
    return Outcome(weights, [], [], []), state


def copy_to_device(tensor: Tensor, _: torch.device) -> Tensor:
    return tensor.clone()


def train_all() -> dict[str, list[tuple[Outcome, dict[str, Tensor]]]]:
    found: dict[str, list[tuple[Outcome, dict[str, Tensor]]]] = {}
    for placements in PLACEMENTS:
        masters = case(placements, BFLOAT16, master_weights=True, variant="normuon")
        found[f"remainders {placements}"] = [
            train_on_mesh(masters),
            train_on_mesh(masters, master_weights="remainder"),
        ]
        exact = case(placements, torch.float64)
        found[f"int8 {placements}"] = [
            train_on_mesh(exact),
            train_on_mesh(exact, momentum_dtype=torch.int8),
        ]
        fetch = muon.fetch
        for name, of_case in (("float64", exact), ("masters", masters)):
            here = train_on_mesh(of_case, momentum_dtype=torch.int8)
            muon.fetch = adamw.fetch = copy_to_device  # type: ignore[attr-defined]
            elsewhere = train_on_mesh(of_case, momentum_dtype=torch.int8, compute_device="cpu")
            muon.fetch = adamw.fetch = fetch  # type: ignore[attr-defined]
            found[f"elsewhere, {name} {placements}"] = [here, elsewhere]
    return found


def test_on_two_by_two_ranks() -> None:
    """Remainders and computing elsewhere are exact; int8 is as near as its rounding."""
    for found in launch(train_all, 4):
        for name, ((expected, values), (outcome, other_values)) in found.items():
            for key, value in values.items():
                difference = (other_values[key] - value).abs().max()
                if name.startswith("int8") and key.endswith("momentum_buffer"):
                    # A shard of a row has a separate scale, of at most the row's largest value.
                    assert difference <= 3 * value.abs().max() / 127, (name, key)
                else:
                    assert difference == 0 or name.startswith("int8"), (name, key)
            for weights, other in zip(expected.weights, outcome.weights, strict=True):
                if name.startswith("int8"):
                    assert (weights - other).norm() <= 0.2 * weights.norm(), name
                elif name.startswith("remainders"):  # ties round otherwise
                    assert torch.allclose(weights.float(), other.float(), rtol=2**-7, atol=0), name
                else:
                    assert torch.equal(weights, other), name


def copies_are_equal() -> list[Tensor]:
    """Codes and scales of replicated parameters."""
    of_case = case(("R", "R"), BFLOAT16, momentum_dtype=torch.int8, master_weights="remainder")
    place = placing(init_device_mesh("cpu", of_case.mesh))
    params, clip = build(of_case, place)
    for step in of_case.steps:
        give_gradients(of_case, params, step, place)
        clip.step()
    saved = clip.named_state([(str(index), param) for index, param in enumerate(params)])
    entries = [value for values in saved.values() for value in values.values()]
    return [local_tensor(value) for value in [*entries, *clip.momentum_scales.values()]]


def test_copies_on_several_ranks_stay_equal() -> None:
    first, *others = launch(copies_are_equal, 4)
    for other in others:
        assert all(map(torch.equal, other, first))
