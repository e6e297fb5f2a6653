"""A checkpoint loads exactly on any number of ranks, or one line says why not."""

import dataclasses
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.variants import VARIANTS
from pretrain import batches, checkpoint, parallel
from pretrain.build import build
from pretrain.checkpoint import storage
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.storage import Checkpoint, Copy, LocalShard, _checksum
from pretrain.config import ParallelConfig
from pretrain.errors import PretrainError
from pretrain.model.weights import Split, Weight
from pretrain.runtime.faults import Guard
from pretrain.startup import set_up
from pretrain.step import train_step
from tests.distributed import training
from tests.distributed.launch import launch

EXPERTS = 4


def _shared(value: Tensor) -> LocalShard:
    """A tensor that all ranks have."""
    copy = Copy("all", dist.get_rank(), dist.get_world_size())
    return LocalShard(value.shape, [((0,) * value.ndim, value)], copy)


def _tensors(fill: float | None = None) -> dict[str, Tensor]:
    """Tensors that all ranks have, and this rank's share of the experts."""
    share = EXPERTS // dist.get_world_size()
    mine = range(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    values = {"shared": torch.arange(6.0).view(2, 3)}
    values |= {f"experts.{i}": torch.full((3,), float(i)) for i in mine}
    values["step"] = torch.tensor(7.0)
    if fill is not None:
        values = {name: torch.full_like(value, fill) for name, value in values.items()}
    return values


def _to_save() -> dict[str, Tensor | LocalShard]:
    return {n: v if n.startswith("experts") else _shared(v) for n, v in _tensors().items()}


def _save(folder: str, steps: list[int], keep: int = 9) -> None:
    for step in steps:
        storage.save(Path(folder), step, _to_save(), {"fact": step}, keep)


def _load(folder: str, step: int) -> bool:
    saved = Checkpoint.open(storage.path_of(Path(folder), step))
    saved.verify()
    loaded = _tensors(fill=-1.0)
    saved.load(loaded)
    expected = _tensors()
    return (
        saved.facts == {"fact": step}
        and saved.step == step
        and all(torch.equal(loaded[name], expected[name]) for name in expected)
    )


def _load_error(folder: str, tensors: dict[str, Tensor]) -> str:
    try:
        saved = Checkpoint.open(storage.path_of(Path(folder), 1))
        saved.verify()
        saved.load(tensors)
    except PretrainError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 2), (2, 4), (4, 1), (2, 2)])
def test_a_checkpoint_loads_on_another_number_of_ranks(
    tmp_path: Path, saved_at: int, loaded_at: int
) -> None:
    launch(_save, saved_at, str(tmp_path), [3])
    assert launch(_load, loaded_at, str(tmp_path), 3) == [True] * loaded_at


def _wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "rows": torch.randn(8, 6, generator=generator),
        "columns": torch.randn(6, 8, generator=generator),
        "gate_and_up": torch.randn(16, 3, generator=generator),
    }


def _local_shards(values: dict[str, Tensor]) -> dict[str, storage.LocalShard]:
    """This rank's shard of each tensor, as tensor parallelism splits them."""
    rank, parallel = dist.get_rank(), ParallelConfig(tensor=dist.get_world_size())
    shards = {}
    for name, whole in values.items():
        split = Split(1 if name == "columns" else 0, 2 if name == "gate_and_up" else 1)
        weight = Weight(name, tuple(whole.shape), "", "muon", {}, split)
        # Copies, not views of the whole: they are filled in place.
        blocks = [(b.offsets, whole[b.slices].clone()) for b in weight.blocks(parallel, rank)]
        shards[name] = storage.LocalShard(whole.shape, blocks)
    return shards


def _save_shards(folder: str) -> None:
    storage.save(Path(folder), 1, _local_shards(_wholes()), {}, 9)


def _load_shards(folder: str) -> bool:
    parts = _local_shards({name: torch.full_like(whole, -1) for name, whole in _wholes().items()})
    saved = Checkpoint.open(storage.path_of(Path(folder), 1))
    saved.load(parts)
    expected = _local_shards(_wholes())
    whole = {name: torch.full_like(value, -1) for name, value in _wholes().items()}
    saved.load(whole)
    return all(
        torch.equal(mine, theirs)
        for name in parts
        for (_, mine), (_, theirs) in zip(parts[name].blocks, expected[name].blocks, strict=True)
    ) and all(torch.equal(whole[name], value) for name, value in _wholes().items())


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 2), (2, 4), (4, 2), (4, 1)])
def test_split_tensors_load_with_another_tensor_parallel_size(
    tmp_path: Path, saved_at: int, loaded_at: int
) -> None:
    """Split along rows, columns, and the halves of gate and up; bit-exact."""
    launch(_save_shards, saved_at, str(tmp_path))
    assert launch(_load_shards, loaded_at, str(tmp_path)) == [True] * loaded_at


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    launch(_save, 2, str(tmp_path), [1, 2, 3, 4], 2)
    assert storage.steps(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_an_unfinished_checkpoint_is_ignored_and_removed(tmp_path: Path) -> None:
    launch(_save, 1, str(tmp_path), [1])
    (tmp_path / "step-00000002.partial").mkdir()
    assert storage.steps(tmp_path) == [1]
    launch(_save, 1, str(tmp_path), [2])
    assert storage.steps(tmp_path) == [1, 2]
    assert launch(_load, 1, str(tmp_path), 2) == [True]


def test_errors_distinguish_damage_foreign_folders_and_other_models(tmp_path: Path) -> None:
    launch(_save, 1, str(tmp_path), [1])
    path = storage.path_of(tmp_path, 1)
    other_shape = {"shared": torch.zeros(3, 2)}
    other_name = {"missing": torch.zeros(1)}
    (error,) = launch(_load_error, 1, str(tmp_path), other_shape)
    assert "is of another model: shared has shape (2, 3) in it, not (3, 2)" in error
    (error,) = launch(_load_error, 1, str(tmp_path), other_name)
    assert "is of another model: it has no missing" in error

    data = next(path.glob("*.safetensors"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert (
        f"is damaged: {data.name} differs from its checksum"
        in launch(_load_error, 1, str(tmp_path), {})[0]
    )
    data.unlink()
    assert f"is damaged: {data.name} is missing" in launch(_load_error, 1, str(tmp_path), {})[0]
    (path / "manifest.json").write_text("{}")
    assert "is not a checkpoint of this program" in launch(_load_error, 1, str(tmp_path), {})[0]


def _save_over_a_file(folder: str) -> str:
    try:
        storage.save(Path(folder), 2, _to_save(), {}, 9)
    except PretrainError as error:
        return str(error)
    return "no error"


def test_a_write_error_stops_all_ranks_and_keeps_earlier_checkpoints(
    tmp_path: Path,
) -> None:
    launch(_save, 2, str(tmp_path), [1])
    (tmp_path / "step-00000002.partial").write_text("a file, where a folder has to be made")
    errors = launch(_save_over_a_file, 2, str(tmp_path))
    assert all("cannot write the checkpoint" in error for error in errors)
    assert storage.steps(tmp_path) == [1]
    assert launch(_load, 2, str(tmp_path), 1) == [True, True]


def _train_while_writing(folder: str) -> bool:
    tensors = {"weight": torch.zeros(1 << 20)}
    saver = Saver(Path(folder), keep=9, asynchronous=True)
    for step in (1, 2):
        saver.save(step, {"weight": _shared(tensors["weight"])}, {})
        for _ in range(20):  # the run's own collectives, and updates in place
            dist.all_reduce(torch.ones(()))
            tensors["weight"] += 1
    saver.wait()
    for step, value in ((1, 0.0), (2, 20.0)):
        loaded = {"weight": torch.full((1 << 20,), -1.0)}
        Checkpoint.open(storage.path_of(Path(folder), step)).load(loaded)
        if not torch.equal(loaded["weight"], torch.full((1 << 20,), value)):
            return False
    return True


def test_a_background_save_stores_the_values_at_the_time_of_the_call(
    tmp_path: Path,
) -> None:
    assert launch(_train_while_writing, 2, str(tmp_path)) == [True, True]


def _save_to_a_full_disk(folder: str, asynchronous: bool) -> tuple[int, str]:
    """Limit files of rank 1 to 64 KiB; the step of the error, and its message."""
    saver = Saver(Path(folder), keep=9, asynchronous=asynchronous)
    saver.save(1, _to_save(), {"fact": 1})
    saver.wait()
    if dist.get_rank() == 1:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    step = 1
    try:
        saver.save(2, {f"big.{dist.get_rank()}": torch.zeros(1 << 18)}, {})
        while True:  # training
            step += 1
            (failed,) = parallel.max_over_ranks(saver.failed())
            if failed:
                saver.wait()
    except PretrainError as error:
        return step, str(error)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_one_line_on_all_ranks_at_the_same_step(
    tmp_path: Path, asynchronous: bool
) -> None:
    (step, error), (other_step, other_error) = launch(
        _save_to_a_full_disk, 2, str(tmp_path), asynchronous
    )
    assert (step, error) == (other_step, other_error)
    assert step > 1 or not asynchronous
    assert "cannot write the checkpoint" in error and "File too large" in error
    assert "earlier checkpoints are intact" in error and "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert launch(_load, 2, str(tmp_path), 1) == [True, True]


def _refusal(folder: str, tensors: dict[str, Any], keep: int) -> str:
    """The error of saving a second step."""
    try:
        storage.save(Path(folder), 2, tensors, {}, keep)
    except PretrainError as error:
        return str(error)
    return "no error"


def _save_different_lists(folder: str) -> str:
    missing = {} if dist.get_rank() else {"other": _shared(torch.ones(5))}
    return _refusal(folder, _to_save() | missing, 9)


def _save_parts_with_a_gap(folder: str) -> str:
    """Halves of a tensor, of which rank 1 lists one row less."""
    rank = dist.get_rank()
    half = torch.ones(2 - rank, 3)
    parts = LocalShard((4, 3), [((2 * rank, 0), half)], parts=2)
    return _refusal(folder, {"state": parts}, 1)


def _save_a_tensor_twice(folder: str) -> str:
    """A tensor of all ranks, each of which takes itself for the only one."""
    return _refusal(folder, {"twice": torch.ones(2, 3)}, 1)


def test_a_tensor_that_would_be_stored_twice_is_refused(tmp_path: Path) -> None:
    """Before the checkpoint, which could not be opened, replaces the one before it."""
    launch(_save, 2, str(tmp_path), [1])
    first, second = launch(_save_a_tensor_twice, 2, str(tmp_path))
    assert first == second and "'twice' has 12 elements in it, not 6" in first
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("save", [_save_different_lists, _save_parts_with_a_gap])
def test_ranks_that_disagree_stop_with_one_line(tmp_path: Path, save: Callable[[str], str]) -> None:
    """About copies or parts, and before the checkpoint replaces the one before it."""
    launch(_save, 2, str(tmp_path), [1])
    first, second = launch(save, 2, str(tmp_path))
    assert first == second and "list different ones" in first and "\n" not in first
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# Every kind of state of the optimizer.
STATES = [
    (f"optimizer.variant={variant}", *options)
    for variant in VARIANTS
    for options in (
        ("optimizer.shard_state=true",),
        ("optimizer.shard_state=false",),
        ("optimizer.momentum_dtype=int8", "precision=bfloat16"),
    )
]


def _differences_after_a_restart(folder: str, *layout: str) -> list[tuple[int, str]]:
    """(number in STATES, tensor) of the tensors on this rank that a restart does not restore."""
    context, data = set_up(training.tiny(folder, *layout))
    different = []
    for number, options in enumerate(STATES):
        run_dir = f"run_dir={folder}/{'-'.join(layout)}-{number}"
        config = training.tiny(folder, *layout, *options, run_dir)
        run, resumed = build(config, context, data), build(config, context, data)
        train_step(run, batches.for_step(config, context, data, 1), 1)
        with checkpoint.saver(run) as saver:
            checkpoint.save(run, saver, Guard(config.faults), 1)
        checkpoint.restore(resumed)
        restored = training.local_tensors(resumed)
        for name, tensor in training.local_tensors(run).items():
            if not torch.equal(tensor, restored[name]):
                different.append((number, name))
    return different


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ("parallel.tensor=2",)),
        (2, ("parallel.tensor=2", "parallel.expert=2")),
        (2, ("parallel.pipeline=2",)),
        (4, ("parallel.tensor=2",)),
    ],
)
def test_every_state_of_the_optimizer_is_restored_in_every_layout(
    folder: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    ranks = launch(_differences_after_a_restart, world_size, str(folder), *layout)
    assert ranks == [[]] * world_size


def _restart(folder: str, *overrides: str) -> dict[str, Any]:
    """The files that this rank hashes in some restarts of a run, and other facts about them."""
    config = training.tiny(folder, "parallel.expert=2", *overrides)
    context, data = set_up(config)
    run = build(config, context, data)
    train_step(run, batches.for_step(config, context, data, 1), 1)
    with checkpoint.saver(run) as saver:
        checkpoint.save(run, saver, Guard(config.faults), 1)
    checkpoint.keep_tokenizer(run)
    saved = {n: t.detach().clone() for n, t in training.local_tensors(run).items()}
    train_step(run, batches.for_step(config, context, data, 2), 2)
    hashed: list[str] = []

    def checksum(path: Path) -> str:
        hashed.append(path.name)
        return _checksum(path)

    def restore_with(**changes: Any) -> list[str]:
        hashed.clear()
        checkpoint.restore(dataclasses.replace(run, config=dataclasses.replace(config, **changes)))
        return list(hashed)

    before = training.local_tensors(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_checksum", checksum)
        outcome = {"restart": restore_with()}
        after = training.local_tensors(run)
        outcome["equal"] = all(torch.equal(after[name], saved[name]) for name in saved)
        outcome["in_place"] = after.keys() == before.keys() and all(
            after[name].data_ptr() == before[name].data_ptr() for name in before
        )
        unverified = dataclasses.replace(config.checkpoint, verify=False)
        outcome["unverified"] = restore_with(checkpoint=unverified)
        outcome["start_from"] = restore_with(run_dir=f"{folder}/new", start_from=config.run_dir)
    return outcome


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _flip_a_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGE = {"truncated": _truncate, "changed": _flip_a_bit, "missing": Path.unlink}


def _restore_damaged(folder: str) -> dict[tuple[str, bool], str]:
    """The error of a restart with a damaged file, by kind of damage and checkpoint.verify."""
    config = training.tiny(folder, "parallel.expert=2", f"run_dir={folder}/whole")
    context, data = set_up(config)
    run = build(config, context, data)
    train_step(run, batches.for_step(config, context, data, 1), 1)
    with checkpoint.saver(run) as saver:
        checkpoint.save(run, saver, Guard(config.faults), 1)
        saver.wait()
    errors = {}
    for kind, damage in DAMAGE.items():
        for verify in (True, False):
            run_dir = f"{folder}/{kind}-{verify}"
            if context.is_main:
                shutil.copytree(config.run_dir, run_dir)
                damage(next(Path(run_dir).rglob("rank-00001-0.safetensors")))
            dist.barrier()
            options = dataclasses.replace(config.checkpoint, verify=verify)
            other = dataclasses.replace(config, run_dir=run_dir, checkpoint=options)
            errors[kind, verify] = ""
            try:
                checkpoint.restore(dataclasses.replace(run, config=other))
            except PretrainError as error:
                errors[kind, verify] = str(error)
    return errors


def test_a_damaged_file_is_one_line_on_all_ranks_of_a_restart(folder: Path) -> None:
    """One rank verifies the file, and another one may need it. Unverified, values are not known to
    be wrong, but a file that cannot be read is still one line."""
    first, second = launch(_restore_damaged, 2, str(folder))
    assert first == second
    for (kind, verify), error in first.items():
        if (kind, verify) == ("changed", False):
            assert not error
            continue
        assert "is damaged" in error and "rank-00001-0.safetensors" in error, (kind, verify)
        assert "remove that folder to resume from the checkpoint before it" in error
        assert "\n" not in error


def test_a_restart_hashes_every_byte_once_and_fills_the_tensors_that_exist(folder: Path) -> None:
    """At a trillion parameters, ranks that each hash everything never come to train; a roll-back
    has no memory for a second optimizer state."""
    ranks = launch(_restart, 4, str(folder))
    path = storage.path_of(folder / "run" / "checkpoints", 1)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    for kind in ("restart", "start_from"):
        hashed = [name for rank in ranks for name in rank[kind]]
        assert sorted(hashed) == files, kind
        loads = [sum((path / n).stat().st_size for n in rank[kind]) for rank in ranks]
        assert max(loads) <= sum(loads) / 4 + max((path / n).stat().st_size for n in files), kind
    assert all(rank["equal"] and rank["in_place"] and not rank["unverified"] for rank in ranks)
