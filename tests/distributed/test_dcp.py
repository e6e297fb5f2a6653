"""torch.distributed.checkpoint: saved at one world size and loaded at another without loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonclip import MatrixLayout, MuonClip, param_groups
from muonclip.distributed.sharding import local_tensor
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    EXACT,
    TOLERANCE,
    Block,
    random,
    train_block,
    weights_and_state,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masters": {"master_weights": True},
    "int8": {"momentum_dtype": torch.int8},
    "remainders": {"master_weights": "remainder"},
    "warm-up": {"momentum_warmup_steps": 5, "momentum_dtype": torch.float32, "variant": "normuon"},
}


def make(sharded: bool, name: str, seed: int = 0) -> tuple[nn.Module, MuonClip]:
    model = Block()
    if "master_weights" in OPTIONS[name]:
        model.bfloat16()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    layouts = {"up.weight": MatrixLayout((4, 10)), "experts": MatrixLayout.per_head(8, 2)}
    groups = param_groups(model, layouts=layouts)
    return model, MuonClip(groups, **{**EXACT, **OPTIONS[name]})


CHECKPOINTS = [(name, flatten) for name in OPTIONS for flatten in (False, True)]


def save(folder: Path) -> None:
    for name, flatten in CHECKPOINTS:
        model, optimizer = make(True, name)
        train_block(model, optimizer, range(3))
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        path = folder / f"{name}-{flatten}"
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)


def load_and_go_on(folder: Path) -> dict[tuple[str, bool], dict[str, Tensor]]:
    found = {}
    for name, flatten in CHECKPOINTS:
        model, optimizer = make(True, name)
        spoil(model)
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
        saved: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(saved, checkpoint_id=folder / f"{name}-{flatten}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
        train_block(model, optimizer, range(3, 6))
        found[name, flatten] = weights_and_state(model, optimizer)
    return found


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            local_tensor(p).fill_(0.123)


def uninterrupted(name: str) -> dict[str, Tensor]:
    model, optimizer = make(False, name)
    train_block(model, optimizer, range(6))
    return weights_and_state(model, optimizer)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < TOLERANCE, name


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Results on each of 1 and of 4 ranks, from a checkpoint of 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    launch(save, 2, folder)
    return {size: launch(load_and_go_on, size, folder) for size in (1, 4)}


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(("name", "flatten"), CHECKPOINTS)
def test_saved_at_two(resumed: dict[int, Any], world_size: int, name: str, flatten: bool) -> None:
    """The steps that follow are those of one process that never stopped."""
    for found in resumed[world_size]:
        assert_close(found[name, flatten], uninterrupted(name))


def gather_scatter_and_go_on(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Full state on rank 0, broadcast from there; rank 0 also continues alone."""
    model, optimizer = make(True, name)
    train_block(model, optimizer, range(3))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    of_model = get_model_state_dict(model, options=full)
    of_optimizer = get_optimizer_state_dict(model, optimizer, options=full)
    kept = copy.deepcopy((of_model, of_optimizer))

    again, fresh = make(True, name)
    spoil(again)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, of_model, options=spread)
    set_optimizer_state_dict(again, fresh, of_optimizer, options=spread)
    train_block(again, fresh, range(3, 6))
    sharded = weights_and_state(again, fresh)

    alone: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        model, optimizer = make(False, name)
        model.load_state_dict(kept[0])
        set_optimizer_state_dict(model, optimizer, kept[1])
        train_block(model, optimizer, range(3, 6))
        alone = weights_and_state(model, optimizer)
    return sharded, alone


@pytest.mark.parametrize("name", OPTIONS)
def test_full_state(name: str) -> None:
    """The one file that Accelerate and others write for sharded optimizers."""
    expected = uninterrupted(name)
    for rank, (sharded, alone) in enumerate(launch(gather_scatter_and_go_on, 2, name)):
        assert_close(sharded, expected)
        if rank == 0:
            assert_close(alone, expected)


class Partly(Block):
    """A layer is frozen, or not reached by any input, until ``used`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(8, 8).double()
        self.used = False
        with torch.no_grad():
            for index, p in enumerate(self.late.parameters()):
                p.copy_(0.3 * random(p.shape, index, 9))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.late(x) if self.used else x)


def make_partly(sharded: bool, masters: bool) -> tuple[Partly, MuonClip]:
    model = Partly()
    if masters:
        model.bfloat16()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.late, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, MuonClip(param_groups(model), **EXACT, master_weights=masters)


WAYS = [(masters, flatten) for masters in (False, True) for flatten in (False, True)]


def save_before_the_late_layer_is_used(folder: Path) -> None:
    for masters, flatten in WAYS:
        model, optimizer = make_partly(True, masters)
        train_block(model, optimizer, range(2))
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        weights, state = get_state_dict(model, optimizer, options=options)
        dcp.save({"w": weights, "o": state}, checkpoint_id=folder / f"{masters}-{flatten}")


def load_and_use_the_late_layer(folder: Path, trained: bool) -> list[dict[str, Tensor]]:
    """Into a fresh optimizer, or one that has trained (without the late layer)."""
    found = []
    for masters, flatten in WAYS:
        model, optimizer = make_partly(True, masters)
        if trained:
            train_block(model, optimizer, range(5, 6))
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        weights, state = get_state_dict(model, optimizer, options=options)
        saved: dict[str, Any] = {"w": weights, "o": state}
        dcp.load(saved, checkpoint_id=folder / f"{masters}-{flatten}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["w"],
            optim_state_dict=saved["o"],
            options=options,
        )
        model.used = True
        train_block(model, optimizer, range(2, 4))
        found.append(weights_and_state(model, optimizer))
    return found


def test_parameters_without_a_gradient_so_far_resume(tmp_path: Path) -> None:
    """dion#89, prime-rl#3252: a checkpoint had no state for them, and nothing could load it."""
    launch(save_before_the_late_layer_is_used, 2, tmp_path)
    for size, trained in ((1, False), (4, True)):  # means that bfloat16 has exactly
        for outcomes in launch(load_and_use_the_late_layer, size, tmp_path, trained):
            for (masters, _), found in zip(WAYS, outcomes, strict=True):
                model, optimizer = make_partly(False, masters)
                train_block(model, optimizer, range(2))
                model.used = True
                train_block(model, optimizer, range(2, 4))
                assert_close(found, weights_and_state(model, optimizer))


@pytest.mark.parametrize("flatten", [False, True])
def test_a_checkpoint_loads_more_than_once(tmp_path: Path, flatten: bool) -> None:
    """Loading must not add options to the groups, which the checkpoint would lack."""
    model, optimizer = make(False, "plain")
    train_block(model, optimizer, range(2))
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"w": weights, "o": state}, checkpoint_id=tmp_path)
    keys = [set(group) for group in optimizer.param_groups]
    for _ in range(3):
        weights, state = get_state_dict(model, optimizer, options=options)
        saved: dict[str, Any] = {"w": weights, "o": state}
        dcp.load(saved, checkpoint_id=tmp_path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["w"],
            optim_state_dict=saved["o"],
            options=options,
        )
        assert [set(group) for group in optimizer.param_groups] == keys
        optimizer.add_param_group({"params": [("extra", nn.Parameter(torch.ones(3)))]})
        assert set(optimizer.param_groups.pop()) in keys


def looked_at_before_training(looks: int) -> list[dict[str, Tensor]]:
    found = []
    for options in (
        {"momentum_warmup_steps": 5, "nonfinite": "ignore"},
        {"stochastic_rounding": True},
        {"master_weights": True, "weight_decay_mode": "independent"},
    ):
        model = Block().bfloat16()
        if dist.get_world_size() > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = MuonClip(param_groups(model), **{**EXACT, **options})
        for _ in range(looks):
            get_optimizer_state_dict(model, optimizer)
        train_block(model, optimizer, range(3))
        found.append(weights_and_state(model, optimizer))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_reading_the_state_before_training_changes_nothing(world_size: int) -> None:
    """torch makes it by a step, which must not count as an update: to the bit."""
    looked, expected = (launch(looked_at_before_training, world_size, n) for n in (2, 0))
    for ours, theirs in zip(looked[0], expected[0], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_a_first_step_with_a_rate_of_zero_counts_unless_its_gradients_are_zero(
    gradient: float,
) -> None:
    """A warm-up may begin at zero."""
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = MuonClip([("p", p)], lr=0.0)
    p.grad = torch.full((4, 4), gradient)
    optimizer.step()
    assert optimizer.param_groups[0]["updates"] == gradient
    assert bool(optimizer.state[p]["momentum_buffer"].any()) == bool(gradient)


@pytest.mark.parametrize("mode", ["decoupled", "cautious", "independent", "l2"])
@pytest.mark.parametrize("precision", ["full", "masters", "stochastic"])
def test_creating_state_for_loading_changes_no_weight(mode: str, precision: str) -> None:
    """A fresh optimizer gets its state by a step with learning rate zero and gradients zero."""
    model = Block().to(torch.float32 if precision == "full" else torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    options: dict[str, Any] = {
        "weight_decay_mode": mode,
        "master_weights": precision == "masters",
        "stochastic_rounding": precision == "stochastic",
    }
    optimizer = MuonClip(param_groups(model), weight_decay=0.5, **options)
    state: Any = get_optimizer_state_dict(model, optimizer)["state"]
    assert all(map(torch.equal, model.parameters(), before))
    assert state["up.weight"].keys() - {"master"} == {"momentum_buffer"}
    assert state["norm.weight"].keys() - {"master"} == {"step", "exp_avg", "exp_avg_sq"}
