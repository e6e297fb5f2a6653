"""Updates that travel in float16 with a power of two for each row."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from muonclip import MatrixLayout, MuonClip
from muonclip.distributed.scaled_float16 import decode_, encode, message_size
from muonclip.orthogonalize import default_ns_dtype
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import random, whole
from tests.distributed.test_plan import Sent

CPU = torch.device("cpu")
LARGEST = 1.875 * 2.0**127


def decoded(tensors: list[Tensor], dims: list[tuple[int, ...]]) -> list[Tensor]:
    message = encode(tensors, dims, CPU)
    assert message.dtype == torch.float16
    sizes = [
        message_size(tensor.shape, shared) for tensor, shared in zip(tensors, dims, strict=True)
    ]
    assert message.numel() == sum(sizes)
    targets = [torch.full_like(tensor, torch.nan) for tensor in tensors]
    decode_(message, targets, dims)
    return targets


# ---------------------------------------------------------------------- functions

ENTRIES = st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=True)


@given(
    rows=st.lists(st.lists(ENTRIES, min_size=4, max_size=4), min_size=1, max_size=4),
    exponent=st.integers(-149, 127),
)
@example(rows=[[0.0, 0.0, 0.0, -0.0], [2.0**-149, 2.0**-130, -(2.0**-140), 0.0]], exponent=0)
@example(rows=[[2.0**-113, 2.0**-112, 2.0**-126, 2.0**-141]], exponent=0)
@example(rows=[[LARGEST, 1.0, 2.0**99, 2.0**-149]], exponent=0)
@example(rows=[[1.5, 1.0, 1.0, 1.0]], exponent=-140)
def test_errors_are_those_of_float16(rows: list[list[float]], exponent: int) -> None:
    x = torch.tensor(rows)
    x = x.double().mul(2.0**exponent).clamp(-LARGEST, LARGEST).float()
    (y,) = decoded([x], [(1,)])
    largest = x.double().abs().amax(1, keepdim=True)
    error = (y.double() - x.double()).abs()
    is_near = x.double().abs() >= largest * 2.0**-28
    assert (error <= x.double().abs() * 2.0**-11)[is_near].all()
    assert (error <= largest * 2.0**-39)[~is_near].all()
    assert torch.equal(y.sign().abs()[is_near], x.sign().abs()[is_near])


@given(
    seed=st.integers(0, 2**16),
    powers=st.lists(st.integers(-100, 100), min_size=3, max_size=3),
)
def test_powers_of_two_for_rows_change_only_exponents(seed: int, powers: list[int]) -> None:
    x = random((3, 5), seed)
    factors = torch.tensor([2.0**power for power in powers])[:, None]
    (expected,), (found,) = decoded([x], [(1,)]), decoded([x * factors], [(1,)])
    assert torch.equal(found, expected * factors)


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    dims=st.sets(st.integers(0, 3), min_size=1),
    seed=st.integers(0, 2**16),
)
def test_several_tensors_of_any_layout(shape: list[int], dims: set[int], seed: int) -> None:
    shared = tuple(sorted(dim for dim in dims if dim < len(shape))) or (0,)
    first = random(shape, seed)
    second = random(shape[::-1], seed, 1).permute(*reversed(range(len(shape))))  # strided
    tensors = [first, second, random((2, 3), seed, 2)]
    found = decoded(tensors, [shared, shared, (1,)])
    for x, y in zip(tensors, found, strict=True):
        assert ((y - x).abs() <= x.abs() * 2.0**-11).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_arrive_and_other_rows_are_unharmed(value: float) -> None:
    x = random((3, 4), 0)
    x[1, 2] = value
    (y,) = decoded([x], [(1,)])
    assert torch.equal(y[1, 2], x[1, 2]) or (y[1, 2].isnan() and x[1, 2].isnan())
    assert ((y - x).abs() <= x.abs() * 2.0**-11)[[0, 2]].all()


def test_messages_of_zeros_and_of_nothing() -> None:
    target = torch.ones(3, 4)
    decode_(torch.zeros(15, dtype=torch.float16), [target], [(1,)])
    assert target.count_nonzero() == 0
    assert encode([], [], CPU).shape == (0,)
    decode_(encode([], [], CPU), [], [])


# ---------------------------------------------------------------------- steps of several ranks

# Aspect ratios from which on the form is Gram's, and square ones.
SHAPES: dict[str, tuple[tuple[int, ...], MatrixLayout | None]] = {
    "matrix": ((24, 40), None),
    "tall": ((80, 36), None),
    "stack": ((5, 12, 40), None),
    "square": ((32, 32), None),
    "fused": ((48, 40), MatrixLayout((24, 24))),
    "heads": ((24, 80), MatrixLayout((20,), 4, separate=True, transposed=True)),
    "kernel": ((16, 8, 3, 3), MatrixLayout(flatten=True)),
    "view": ((24, 5, 8), MatrixLayout(view=(24, 40))),
    # No dimensions are those of the inputs: travels in float32.
    "other view": ((12, 80), MatrixLayout(view=(24, 40))),
    "column": ((8, 12), MatrixLayout(view=(96, 1))),
}


def gradient_of(name: str) -> Tensor:
    """Matrices of a parameter differ by 40 powers of ten, and the rows of one by 20."""
    shape, layout = SHAPES[name]
    gradient = random(shape, 1)
    if name == "matrix":
        gradient[::2] *= 1e-20
    elif name == "stack":
        gradient *= torch.tensor([1e-20, 1.0, 1e20, 0.0, 1e-38])[:, None, None]
    elif name == "tall":
        gradient *= 1e20
    elif layout is not None and layout.blocks is not None:
        for index, block in enumerate(layout.split(gradient)):
            block *= 1e20 if index else 1e-20
            if layout.separate:
                block[1] *= 1e20
                block[2] *= 1e-15
    return gradient


def changes(placements: tuple[str, ...], **options: Any) -> dict[str, Tensor]:
    """The change of each parameter in two steps of learning rate 1; without placements, in one
    process."""
    mesh: Any = None
    if placements:
        size = dist.get_world_size() // (2 if len(placements) == 2 else 1)
        mesh = init_device_mesh("cpu", (2, size) if len(placements) == 2 else (size,))
    kinds = {"R": Replicate(), "S0": Shard(0), "S1": Shard(1)}
    groups = []
    for name, (shape, layout) in SHAPES.items():
        p = torch.zeros(shape)
        gradient = gradient_of(name)
        if placements:
            p, gradient = (
                distribute_tensor(x, mesh, [kinds[kind] for kind in placements])
                for x in (p, gradient)
            )
        p = nn.Parameter(p)
        p.grad = gradient
        group = {"params": [(name, p)], "algorithm": "muon", "layout": layout}
        groups.append(group | ({"variant": "muon"} if name == "other view" else {}))
    optimizer = MuonClip(groups, **{"lr": 1.0, "weight_decay": 0.0, **options})
    for _ in range(2):
        optimizer.step()
    return {name: whole(p.detach()) for g in groups for name, p in g["params"]}


HALF: dict[str, Any] = {"ns_dtype": torch.float16}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": HALF,
    "NorMuon": {**HALF, "variant": "normuon"},
    "large": {**HALF, "update_rms": 1e6},
    "default on a GPU": {},  # some travel in bfloat16
    "int8": {**HALF, "momentum_dtype": torch.int8},
}
PLACEMENTS = {1: [("S0",)], 2: [("S0",), ("S1",)], 4: [("S0",), ("R", "S0"), ("S0", "S1")]}


def all_changes(cases: list[tuple[str, ...]]) -> dict[Any, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        cuda = torch.device("cuda")
        patch.setattr(
            "muonclip.optimizer.default_ns_dtype",
            lambda _, dtype, shapes: default_ns_dtype(cuda, dtype, shapes),
        )
        return _all_changes(cases)


def _all_changes(cases: list[tuple[str, ...]]) -> dict[Any, dict[str, Tensor]]:
    return {
        (placements, name): changes(placements, **options)
        for placements in cases
        for name, options in OPTIONS.items()
        # The scales of a shard of a row are others than those of the row.
        if name != "int8" or placements in ((), ("S0",), ("R", "S0"))
    }


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_steps_equal_those_of_one_process(world_size: int) -> None:
    alone = all_changes([()])
    for found in launch(all_changes, world_size, PLACEMENTS[world_size]):
        for (placements, name), parameters in found.items():
            for key, ours in parameters.items():
                theirs = alone[(), name][key]
                assert ours.isfinite().all()
                # Each matrix by itself: those of a stack differ in scale.
                layout = SHAPES[key][1] or MatrixLayout()
                blocks = zip(layout.split(ours), layout.split(theirs), strict=True)
                for block, expected in blocks:
                    difference = (block - expected).norm(dim=(-2, -1))
                    eps = torch.finfo(torch.float16 if OPTIONS[name] else torch.bfloat16).eps
                    limit = 4 * eps * expected.norm(dim=(-2, -1))
                    assert (difference <= limit).all(), (placements, name, key)


def skipped() -> tuple[list[Tensor], int]:
    """The middle of three steps has a NaN on the last rank only."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.zeros(24, 40), mesh, [Shard(0)]))
    optimizer = MuonClip([p], lr=1.0, weight_decay=0.0, nonfinite="skip", **HALF)
    found = []
    for step in range(3):
        p.grad = distribute_tensor(random((24, 40), step), mesh, [Shard(0)])
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            p.grad.to_local()[0, 0] = torch.nan
        optimizer.step()
        found.append(whole(p.detach()).clone())
    assert isinstance(optimizer.skipped_steps, int)
    return found, optimizer.skipped_steps


def test_a_step_with_nan_on_one_rank_is_skipped() -> None:
    for (first, second, third), count in launch(skipped, 2):
        assert count == 1
        assert torch.equal(first, second)
        assert third.isfinite().all() and not torch.equal(third, second)


def ignored() -> list[bool]:
    """Whether each of two matrices is finite after a step with a NaN in the first."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.zeros(24, 40), mesh, [Shard(0)])) for _ in "ab"]
    for index, p in enumerate(params):
        p.grad = distribute_tensor(random((24, 40), index), mesh, [Shard(0)])
    if dist.get_rank() == 0:
        params[0].grad.to_local()[0, 0] = torch.nan  # type: ignore[union-attr]
    MuonClip(params, lr=1.0, nonfinite="ignore", **HALF).step()
    return [bool(whole(p.detach()).isfinite().all()) for p in params]


def test_an_ignored_nan_arrives() -> None:
    assert launch(ignored, 2) == [[False, True]] * 2


def sent_bytes(dtype: torch.dtype) -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(torch.zeros(64, 96), mesh, [Shard(0)])) for _ in "abc"]
    optimizer = MuonClip(params, ns_dtype=dtype)
    for index, p in enumerate(params):
        p.grad = distribute_tensor(random((64, 96), index), mesh, [Shard(0)])
    optimizer.step()
    with Sent() as sent:
        optimizer.step()
    return sent.sent["all_to_all"] + sent.sent["gather"]


def sent_of_each() -> list[float]:
    return [sent_bytes(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]


def test_a_step_sends_the_bytes_of_bfloat16_and_one_more_element_for_each_row() -> None:
    half, brain, single = (sum(sent) for sent in zip(*launch(sent_of_each, 2), strict=True))
    assert brain < half <= brain * (1 + 1 / 96)
    assert single == 2 * brain
