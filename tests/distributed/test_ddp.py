"""Ranks with copies of parameters (DDP) share the orthogonalization and equal one process."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from muonclip import MatrixLayout, MuonClip, param_groups
from muonclip.distributed import muon
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    EVERY_OPTION,
    EXACT,
    TOLERANCE,
    Case,
    Outcome,
    Spec,
    assert_equal,
    random,
    train,
    train_past_a_bad_gradient,
)

CASES = {
    "different shapes": Case(
        (Spec((8, 8)), Spec((4, 16)), Spec((16, 4)), Spec((8, 8)), Spec((1, 7)), Spec((7, 1)))
    ),
    "one matrix": Case((Spec((6, 10)),)),
    "fewer matrices than ranks": Case((Spec((6, 10)), Spec((5, 5)))),
    "stacks": Case((Spec((5, 4, 6)), Spec((1, 4, 6)), Spec((2, 6, 4)), Spec((8, 3, 3)))),
    "fused": Case(
        (
            Spec((10, 6), MatrixLayout((4, 6))),
            Spec((3, 10, 6), MatrixLayout((4, 6))),
            Spec((12, 6), MatrixLayout.per_head(12, 3)),
            Spec((12, 6), MatrixLayout((2, 1, 1), repeats=3)),
            Spec((6, 12), MatrixLayout((4,), 3, separate=True, transposed=True)),
            Spec((8, 3, 2, 2), MatrixLayout(flatten=True), "muon"),
            Spec((8, 3, 2), MatrixLayout((4,), 2, separate=True, flatten=True), "muon"),
        )
    ),
    "AdamW between": Case((Spec((8,)), Spec((4, 6)), Spec((3, 4), None, "adamw"), Spec((5, 5)))),
    "AdamW alone": Case((Spec((8,)), Spec((3, 3), None, "adamw"))),
    "gradients that come and go": Case(
        (Spec((4, 6)), Spec((6, 4)), Spec((5,)), Spec((3, 4, 4))),
        without_gradient=frozenset({(0, 0), (1, 0), (1, 1), (2, 2)}),
        steps=range(4),
    ),
    "every option": Case(
        (Spec((4, 6)), Spec((3, 6, 4)), Spec((5, 5))),
        options=EVERY_OPTION,
    ),
    "NorMuon, fused": Case(
        (
            Spec((10, 6), MatrixLayout((4, 6))),
            Spec((3, 10, 6), MatrixLayout((4, 6))),
            Spec((12, 6), MatrixLayout((2, 1, 1), repeats=3)),
            Spec((6, 12), MatrixLayout((4,), 3, separate=True, transposed=True)),
            Spec((6, 3, 4), MatrixLayout(view=(6, 12), transposed=True)),
            Spec((8, 3, 2, 2), MatrixLayout(flatten=True), "muon"),
            Spec((5, 7)),
        ),
        options={"variant": "normuon"},
        without_gradient=frozenset({(0, 0), (1, 0), (1, 1), (2, 2)}),
        steps=range(4),
    ),
    "decay in the gradient": Case(
        (Spec((4, 6)), Spec((5,))), options={"weight_decay_mode": "l2", "weight_decay": 0.5}
    ),
}


def train_shared() -> dict[str, Outcome]:
    return {name: train(case, process_group=dist.group.WORLD) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=[1, 2, 4])
def on_ranks(request: pytest.FixtureRequest) -> list[dict[str, Outcome]]:
    return launch(train_shared, request.param)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(on_ranks: list[dict[str, Outcome]], name: str) -> None:
    expected = train(CASES[name])
    for outcomes in on_ranks:
        assert_equal(outcomes[name], expected, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_ranks_stay_bit_identical(on_ranks: list[dict[str, Outcome]], name: str) -> None:
    """Copies that drift apart would be trained on gradients of other weights."""
    first = on_ranks[0][name]
    for outcomes in on_ranks[1:]:
        assert all(map(torch.equal, outcomes[name].weights, first.weights))


def shapes_orthogonalized(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes of the updates that this rank orthogonalizes in one step."""
    taken: list[tuple[int, ...]] = []
    original = muon.orthogonalize_updates

    def count(items: Any, updates: Any, found_inf: Any) -> list[Tensor]:
        taken.extend(tuple(update.shape) for update in updates)
        return original(items, updates, found_inf)

    muon.orthogonalize_updates = count
    params = [nn.Parameter(random(shape, i)) for i, shape in enumerate(shapes)]
    for p in params:
        p.grad = torch.ones_like(p)
    MuonClip(params, process_group=dist.group.WORLD).step()
    return taken


def test_each_rank_takes_a_share() -> None:
    """Every matrix once, a stack in pieces, by the cost of Newton-Schulz."""
    matrices = [(8, 8)] * 3 + [(32, 32), (4, 8, 8)]
    first, second = launch(shapes_orthogonalized, 2, matrices)
    alone, others = (first, second) if (32, 32) in first else (second, first)
    assert alone == [(32, 32)]  # costs more than all the rest
    assert sorted(others) == [(2, 8, 8), (2, 8, 8), (8, 8), (8, 8), (8, 8)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.experts = nn.Parameter(torch.empty(3, 16, 16))
        self.last = nn.Linear(16, 4, bias=False)
        for p in self.parameters():
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.einsum("bn,enm->bm", x, self.experts))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def train_ddp(micro_batches: int) -> list[Tensor]:
    """Three steps on a batch of 8 rows, cut over ranks and micro-batches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Model())
    optimizer = MuonClip(param_groups(model), process_group=dist.group.WORLD, **EXACT)
    for step in range(3):
        mine = random((8, 6), step, dtype=torch.float64).chunk(size)[rank]
        for index, part in enumerate(mine.chunk(micro_batches)):
            model.require_backward_grad_sync = index == micro_batches - 1
            (loss_of(model, part) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def train_one(micro_batches: int) -> list[Tensor]:
    model = Model()
    optimizer = MuonClip(param_groups(model), **EXACT)
    for step in range(3):
        for part in random((8, 6), step, dtype=torch.float64).chunk(micro_batches):
            (loss_of(model, part) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all((a - b).abs().max() < TOLERANCE for a, b in zip(ours, theirs, strict=True))


def test_muon_runs_per_batch_and_not_per_micro_batch() -> None:
    """DeepSpeed#8600: the mean of orthogonalized gradients is not that of the mean."""
    assert close(train_one(4), train_one(1))


def test_ddp_and_accumulation_equal_the_whole_batch() -> None:
    """DeepSpeed#8600, over ranks."""
    for weights in launch(train_ddp, 4, 2):
        assert close(weights, train_one(1))


def train_zero1() -> list[Tensor]:
    """Each rank's MuonClip has different whole parameters; torch broadcasts the results."""
    model = Model()
    groups = [  # ZeroRedundancyOptimizer knows no names
        {**group, "params": [p for _, p in group["params"]]} for group in param_groups(model)
    ]
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=MuonClip, **EXACT)
    for step in range(3):
        loss_of(model, random((8, 6), step, dtype=torch.float64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_zero_redundancy_optimizer() -> None:
    for weights in launch(train_zero1, 2):
        assert close(weights, train_one(1))


def wrap_plain_parameters() -> str:
    model = Model()
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer") as error:
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=MuonClip, **EXACT)
    return str(error.value)


@pytest.mark.parametrize("world_size", [1, 3])
def test_zero_redundancy_optimizer_refuses_plain_parameters(world_size: int) -> None:
    """On every rank, also one whose share is all matrices, or nothing."""
    for message in launch(wrap_plain_parameters, world_size):
        assert "process_group=group" in message and "without names" in message


def train_in_buckets() -> Outcome:
    """Each bucket goes to its owners while the one before is worked on."""
    muon.BUCKET_ELEMENTS = 8
    return train(MANY, process_group=dist.group.WORLD)


def train_with_changing_layouts(process_group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Stacks, which ranks share, and kernels of convolutions, which they do not."""
    shapes = (6, 4, 5), (3, 4, 4), (12, 8, 2)
    params = [nn.Parameter(random(shape, *shape, dtype=torch.float64)) for shape in shapes]
    groups = [{"params": params, "algorithm": "muon"}]
    optimizer = MuonClip(groups, process_group=process_group, **EXACT)
    layouts = (None, MatrixLayout(flatten=True), None, MatrixLayout(transposed=True))
    for step, layout in enumerate(layouts):
        optimizer.param_groups[0]["layout"] = layout
        for number, p in enumerate(params):
            p.grad = random(p.shape, step, number, dtype=torch.float64)
        optimizer.step()
    return [p.detach() for p in params]


def train_groups_with_changing_layouts() -> list[Tensor]:
    return train_with_changing_layouts(dist.group.WORLD)


def test_layouts_that_change_between_steps() -> None:
    """The ranks divide the work again."""
    for weights in launch(train_groups_with_changing_layouts, 4):
        assert close(weights, train_with_changing_layouts())


MANY = Case((*(Spec((4 + i % 3, 5)) for i in range(17)), Spec((9, 4, 5))))


def test_many_small_buckets_equal_one_process() -> None:
    for outcome in launch(train_in_buckets, 4):
        assert_equal(outcome, train(MANY), MANY)


ONE_BAD = Case((Spec((4, 6)), Spec((6, 4)), Spec((5,))))


def with_one_bad_gradient(nonfinite: str) -> tuple[str, Outcome, int]:
    """Rank 0 alone has a NaN in the second of three steps."""

    def spoil(params: list[Any]) -> None:
        if dist.get_rank() == 0:
            params[1].grad[2, 1] = torch.nan

    group = dist.group.WORLD
    return train_past_a_bad_gradient(ONE_BAD, spoil, process_group=group, nonfinite=nonfinite)


def with_one_bad_gradient_both_ways() -> list[tuple[str, Outcome, int]]:
    return [with_one_bad_gradient("raise"), with_one_bad_gradient("skip")]


def test_a_nonfinite_gradient_on_one_rank_changes_no_rank() -> None:
    """And nobody waits for a rank that raised: the next step runs on all."""
    expected = train(replace(ONE_BAD, steps=(0, 2)))
    for rank, both in enumerate(launch(with_one_bad_gradient_both_ways, 4)):
        for _, outcome, skipped in both:
            assert skipped == 1
            assert_equal(outcome, expected, ONE_BAD)
        (raised, _, _), (quiet, _, _) = both
        assert ("'p1'" if rank == 0 else "on another rank") in raised
        assert quiet == ""


def step_with_different_parameters(missing: int, steps_before: int) -> str:
    params = [nn.Parameter(random((4, 4 + i), i)) for i in range(2)]
    optimizer = MuonClip(params, process_group=dist.group.WORLD)
    for _ in range(steps_before):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    for p in params[dist.get_rank() * missing :]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="ranks 0 and 1 of the group") as error:
        optimizer.step()
    return str(error.value)


@pytest.mark.parametrize(("missing", "steps_before"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_ranks_with_different_gradients_are_refused(missing: int, steps_before: int) -> None:
    """Also one that has none, or fewer than before: the others would wait for it for ever."""
    for message in launch(step_with_different_parameters, 2, missing, steps_before):
        assert f"2 and {2 - missing} of them" in message


def copy_it() -> None:
    optimizer = MuonClip([nn.Parameter(torch.ones(2, 2))], process_group=dist.group.WORLD)
    with pytest.raises(TypeError, match="save its state_dict"):
        copy.deepcopy(optimizer)


def test_cannot_be_copied() -> None:
    launch(copy_it, 1)
