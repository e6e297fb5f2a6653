"""Sharded state is saved and loaded whole, in any layout, and no part passes for the whole."""

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonclip import MatrixLayout, MuonClip, param_groups
from muonclip.distributed.sharded_state import ShardedState, flat_boxes
from muonclip.distributed.sharding import Sharding, TensorShard
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    EXACT,
    Block,
    random,
    train_block,
    train_past_a_bad_gradient,
    weights_and_state,
    whole,
)
from tests.distributed.test_ddp import ONE_BAD


def make(layout: str, masters: bool) -> tuple[nn.Module, MuonClip]:
    """A model alone, with copies (DDP), or with copies of shards (HSDP), and its optimizer."""
    model: Any = Block()
    if masters:
        model.bfloat16()
    options: dict[str, Any] = {
        "shard_state": layout.startswith("sharded"),
        "variant": "normuon",  # whose state has one element in place of a row
    }
    if layout.endswith("HSDP"):
        copies = 2 if dist.get_world_size() == 4 else 1
        shape = (copies, dist.get_world_size() // copies)
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")))
    elif layout != "alone":
        options["process_group"] = dist.group.WORLD
    layouts = {"up.weight": MatrixLayout((4, 10)), "experts": MatrixLayout.per_head(8, 2)}
    groups = param_groups(model, layouts=layouts)
    return model, MuonClip(groups, **EXACT, master_weights=masters, **options)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], masters: bool) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs().max()
        assert difference <= (2e-2 if masters else 1e-9), name


def save(folder: Path) -> None:
    for masters in (False, True):
        for layout in ("sharded DDP", "DDP"):
            model, optimizer = make(layout, masters)
            train_block(model, optimizer, range(3))
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"w": weights, "o": state}, checkpoint_id=folder / f"{layout}-{masters}")
            full = optimizer.full_state_dict()
            assert bool(full) == (dist.get_rank() == 0)
            if full:
                torch.save((model.state_dict(), full), folder / f"{layout}-{masters}.pt")


def load_everywhere(folder: Path) -> None:
    """Continue from each checkpoint in each layout."""
    for masters in (False, True):
        model, optimizer = make("alone", masters)
        train_block(model, optimizer, range(6))
        expected = weights_and_state(model, optimizer)
        for source in ("sharded DDP", "DDP"):
            for layout in ("alone", "DDP", "sharded DDP", "sharded HSDP"):
                model, optimizer = make(layout, masters)
                with torch.no_grad():
                    for p in model.parameters():
                        p.fill_(0.1)
                weights, state = get_state_dict(model, optimizer)
                saved: dict[str, Any] = {"w": weights, "o": state}
                dcp.load(saved, checkpoint_id=folder / f"{source}-{masters}")
                set_state_dict(
                    model, optimizer, model_state_dict=saved["w"], optim_state_dict=saved["o"]
                )
                train_block(model, optimizer, range(3, 6))
                assert_close(weights_and_state(model, optimizer), expected, masters)
                if layout == "sharded HSDP":
                    continue
                model, optimizer = make(layout, masters)
                weights, full = torch.load(folder / f"{source}-{masters}.pt")
                model.load_state_dict(weights)
                optimizer.load_state_dict(full)
                train_block(model, optimizer, range(3, 6))
                assert_close(weights_and_state(model, optimizer), expected, masters)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sharded")
    launch(save, 2, folder)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_saved_at_two(saved: Path, world_size: int) -> None:
    """By torch.distributed.checkpoint, and in one file; also into and from unsharded state."""
    launch(load_everywhere, world_size, saved)


def fused(parts: int) -> tuple[nn.Module, MuonClip, Any]:
    """Megatron's gate and up, and a bias: each tensor-parallel rank has its rows of both.

    Returns:
        The model, its optimizer, and a function that returns this rank's part of the whole [8, 5].
    """
    rows, number = 8 // parts, dist.get_rank() % parts
    layout = MatrixLayout((rows // 2, rows // 2), parts)

    def part(whole: Tensor) -> Tensor:
        return layout.join(MatrixLayout((4, 4)).split(whole), (8, 5)).chunk(parts)[number].clone()

    model = nn.Module()
    model.fc1 = nn.Parameter(part(random((8, 5), 0, dtype=torch.float64)))
    model.bias = nn.Parameter(torch.full((rows,), 1.0 + number, dtype=torch.float64))
    shardings: dict[Tensor, Sharding] = {}
    if dist.get_world_size() > 1:
        for parameter, columns in ((model.fc1, (5,)), (model.bias, ())):
            shards = tuple(
                TensorShard((rank % parts * rows, *(0 for _ in columns)), (rows, *columns))
                for rank in range(dist.get_world_size())
            )
            sharding = Sharding((8, *columns), dist.group.WORLD, shards)  # type: ignore[arg-type]
            shardings[parameter] = sharding
    groups = [
        {"params": [("fc1", model.fc1)], "algorithm": "muon", "layout": layout},
        {"params": [("bias", model.bias)], "algorithm": "adamw"},
    ]
    options: dict[str, Any] = {**EXACT, "variant": "normuon"}
    return model, MuonClip(groups, **options, shardings=shardings, shard_state=True), part


def train_fused(model: Any, optimizer: MuonClip, part: Any, steps: range) -> None:
    for step in steps:
        model.fc1.grad = part(random((8, 5), 1, step, dtype=torch.float64))
        model.bias.grad = torch.full_like(model.bias, 1.0 + step) * model.bias.detach().sign()
        optimizer.step()


def save_fused(folder: Path, parts: int) -> None:
    model, optimizer, part = fused(parts)
    train_fused(model, optimizer, part, range(3))
    dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "dcp")
    if full := optimizer.full_state_dict():
        torch.save(full, folder / "full.pt")


def load_fused(folder: Path, parts: int) -> list[bool]:
    model, optimizer, part = fused(parts)
    train_fused(model, optimizer, part, range(3))
    weights = copy.deepcopy(model.state_dict())
    train_fused(model, optimizer, part, range(3, 5))
    rearranged = []
    for source in ("dcp", "full"):
        fresh_model, fresh, _ = fused(parts)
        fresh_model.load_state_dict(weights)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if source == "full":
                fresh.load_state_dict(torch.load(folder / "full.pt"))
            else:
                saved = {"o": get_optimizer_state_dict(fresh_model, fresh)}
                dcp.load(saved, checkpoint_id=folder / "dcp")
                set_optimizer_state_dict(fresh_model, fresh, optim_state_dict=saved["o"])
        rearranged.append(any("was rearranged" in str(w.message) for w in caught))
        train_fused(fresh_model, fresh, part, range(3, 5))
        assert_close(
            weights_and_state(fresh_model, fresh), weights_and_state(model, optimizer), False
        )
    return rearranged


@pytest.mark.parametrize(("ranks", "parts"), [(2, 2), (4, 2), (1, 1)])
def test_fused_rows_at_another_number_of_tensor_parallel_ranks(
    tmp_path: Path, ranks: int, parts: int
) -> None:
    """Also where each rank has another shard."""
    launch(save_fused, ranks, tmp_path, parts)
    for other, other_parts in ((1, 1), (2, 2), (4, 2)):
        for rearranged in launch(load_fused, other, tmp_path, other_parts):
            assert rearranged == [parts != other_parts] * 2


def pickle_alone() -> bool:
    model, optimizer = make("sharded DDP", True)
    train_block(model, optimizer, range(1))
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    optimizer.load_state_dict(saved)
    return any(isinstance(v, ShardedState) for s in saved["state"].values() for v in s.values())


def test_the_state_of_one_rank_is_whole() -> None:
    assert launch(pickle_alone, 1) == [False]


def save_in_the_background(folder: Path) -> None:
    """Train, save while training continues, and load what was saved."""
    model, optimizer = make("sharded DDP", True)
    train_block(model, optimizer, range(2))
    expected = copy.deepcopy(weights_and_state(model, optimizer))
    weights, state = get_state_dict(model, optimizer)
    # Threads that save must not share a group with the steps.
    group = dist.new_group(backend="gloo")
    saving = dcp.async_save({"w": weights, "o": state}, checkpoint_id=folder, process_group=group)
    train_block(model, optimizer, range(2, 4))
    saving.result()
    weights, state = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"w": weights, "o": state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["w"], optim_state_dict=saved["o"])
    found = weights_and_state(model, optimizer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_saved_in_the_background(tmp_path: Path) -> None:
    """By dcp.async_save, which copies the attributes of tensors: to the bit."""
    launch(save_in_the_background, 2, tmp_path)


def within_a_run() -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, optimizer = make("sharded DDP", True)
    train_block(model, optimizer, range(2))
    weights, snapshot = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(TypeError) as error:
        torch.save(optimizer.state_dict(), io.BytesIO())
    found["message"] = str(error.value)
    # torch gathers tensors of the types that it knows: parts of others must not pass for the whole.
    gathered = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    with pytest.raises(TypeError, match="in place of get_optimizer_state_dict"):
        torch.save(gathered, io.BytesIO())
    train_block(model, optimizer, range(2, 4))
    expected = weights_and_state(model, optimizer)
    for layout in ("DDP", "sharded DDP"):  # another layout object, or none
        other, fresh = make(layout, True)
        other.load_state_dict(weights)
        fresh.load_state_dict(snapshot)
        train_block(other, fresh, range(2, 4))
        assert_close(weights_and_state(other, fresh), expected, True)

    # By name, as the trainer's checkpoints do: into new tensors, which are read piece by piece.
    other, fresh = make("sharded DDP", True)
    fresh.create_state()
    named = fresh.named_state(other.named_parameters())
    other.load_state_dict(weights)
    source = make("alone", True)
    source[1].load_state_dict(pickle.loads(pickle.dumps(_full(optimizer, snapshot))))
    for name, entries in source[1].named_state(source[0].named_parameters()).items():
        for key, value in entries.items():
            target = named[name][key]
            if not isinstance(target, ShardedState):
                target.copy_(value)
                continue
            for position, values in target.pieces():
                values.copy_(value[position.slices])
    fresh.load_named_state(named, other.named_parameters())
    for group, saved_group in zip(fresh.param_groups, snapshot["param_groups"], strict=True):
        group["updates"] = saved_group["updates"]
    train_block(other, fresh, range(2, 4))
    assert_close(weights_and_state(other, fresh), expected, True)

    # A group that is added later leaves the owners of others as they are.
    before = {p: [x for x, _ in s["master"].pieces()] for p, s in optimizer.state.items()}
    late = nn.Parameter(random((8, 8), 9).bfloat16())
    optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.ones_like(late)
    train_block(model, optimizer, range(4, 5))
    for p, positions in before.items():
        assert [x for x, _ in optimizer.state[p]["master"].pieces()] == positions
    assert isinstance(optimizer.state[late]["master"], ShardedState)
    return found


def _full(optimizer: MuonClip, snapshot: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {name: whole(value) for name, value in entries.items()}
        for key, entries in snapshot["state"].items()
    }
    return {**snapshot, "state": state}


def test_within_a_run() -> None:
    for found in launch(within_a_run, 4):
        assert "full_state_dict()" in found["message"]


def bytes_of_state(shard_state: bool) -> int:
    """Bytes of state on this rank, for matrices and embeddings in bfloat16 with master copies."""
    params = [(f"w{i}", nn.Parameter(random((32, 32), i).bfloat16())) for i in range(16)]
    params += [("embedding", nn.Parameter(random((999, 16), 0).bfloat16()))]
    groups = [{"params": params[:-1], "algorithm": "muon"}]
    groups.append({"params": params[-1:], "algorithm": "adamw"})
    optimizer = MuonClip(
        groups, master_weights=True, process_group=dist.group.WORLD, shard_state=shard_state
    )
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    stored = [
        values.untyped_storage()
        for entries in optimizer.state.values()
        for value in entries.values()
        for values in (value.parts if isinstance(value, ShardedState) else [value])
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())


def bytes_of_both() -> tuple[int, int]:
    return bytes_of_state(True), bytes_of_state(False)


@pytest.mark.parametrize("world_size", [2, 4])
def test_state_is_divided_by_the_number_of_ranks(world_size: int) -> None:
    matrices, embedding, steps = 16 * 32 * 32 * 8, 999 * 16 * 12, 4
    found, replicated = zip(*launch(bytes_of_both, world_size), strict=True)
    assert replicated == (matrices + embedding + steps,) * world_size
    assert sum(found) == matrices + embedding + world_size * steps
    assert max(found) - min(found) <= world_size * 12


def with_one_bad_gradient(nonfinite: str) -> tuple[Any, ...]:
    def spoil(params: list[Any]) -> None:
        if dist.get_rank() == 0:
            params[1].grad[2, 1] = torch.nan

    return train_past_a_bad_gradient(
        ONE_BAD, spoil, process_group=dist.group.WORLD, nonfinite=nonfinite, shard_state=True
    )


def test_a_nonfinite_gradient_on_one_rank_changes_no_rank() -> None:
    for rank, (message, _, skipped) in enumerate(launch(with_one_bad_gradient, 2, "raise")):
        assert skipped == 1
        assert ("'p1'" if rank == 0 else "on another rank") in message


def test_a_warning_that_no_rank_has_copies() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    with pytest.warns(UserWarning, match="shard_state=True has no effect"):
        MuonClip([("p", p)], shard_state=True).step()


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 4, 3), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_of_every_range(shape: tuple[int, ...]) -> None:
    """In order, without gaps, and no more than two for each dimension."""
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(numbers.numel()):
        for stop in range(start + 1, numbers.numel() + 1):
            boxes = flat_boxes(shape, start, stop)
            found = torch.cat([numbers[box.slices].reshape(-1) for box in boxes])
            assert found.tolist() == list(range(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
