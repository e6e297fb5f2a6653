"""The trainer's sharded optimizer state: equal to replicated state, and moved to any layout."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from muonclip.distributed import ShardedState
from pretrain import batches, checkpoint, parallel
from pretrain.build import Run, build
from pretrain.checkpoint import storage
from pretrain.runtime.faults import Guard
from pretrain.startup import set_up
from pretrain.step import train_step
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_simulated_ranks import Allocated
from tests.distributed.training import EXACT

BFLOAT16 = "precision=bfloat16"
# Clips heads in the first steps.
COMMON = ("optimizer.qk_clip_threshold=0.002", "global_batch_size=8", "micro_batch_size=2")
LAYOUTS = [
    (1, ()),
    (2, ("expert=2",)),
    (2, ("tensor=2",)),
    (2, ("context=2",)),
    (4, ("pipeline=2", "layout=[0,2]", "expert=2")),
    (4, ("tensor=2", "expert=2")),
]


def held_bytes(run: Run) -> int:
    """Bytes of this rank's state, without step counts."""
    return sum(
        part.nbytes
        for entries in run.optimizer.state.values()
        for value in entries.values()
        for part in (value.parts if isinstance(value, ShardedState) else [value])
        if value.ndim
    )


def _save(run: Run, step: int) -> None:
    guard = Guard(run.config.faults)
    with checkpoint.saver(run) as saver:
        checkpoint.save(run, saver, guard, step)
        saver.wait()


def compare_and_move(folder: str, name: str, layout: Sequence[str]) -> dict[str, Any]:
    """Train with and without sharded state; then load the checkpoint ``base`` and save it again."""
    sizes = [f"parallel.{size}" for size in layout]
    held = {}
    here = data = None
    for precision, steps in ((EXACT, 3), (BFLOAT16, 1)):
        for shard in ("null", "false"):
            settings = training.tiny(
                folder, *COMMON, *sizes, precision, f"optimizer.shard_state={shard}",
                f"run_dir={folder}/{name}-{precision}-{shard}",
            )  # fmt: skip
            if here is None:
                here, data = set_up(settings)
            run = build(settings, here, data)
            for number in range(1, steps + 1):
                metrics = train_step(run, batches.for_step(settings, here, data, number), number)
            held[precision, shard] = held_bytes(run), metrics
            _save(run, steps)
            if precision != BFLOAT16 or not Path(folder, "base").exists():
                continue
            moved = Path(folder, f"moved-{name}-{shard}")
            if here.is_main:
                shutil.copytree(Path(folder, "base"), moved)
            torch.distributed.barrier()
            settings = training.tiny(
                folder, *COMMON, *sizes, precision, f"optimizer.shard_state={shard}",
                f"run_dir={moved}",
            )  # fmt: skip
            run = build(settings, here, data)
            checkpoint.restore(run)
            _save(run, 2)
    parallel.stop()
    return held


class Long(NamedTuple):
    """A run of ten steps, or its second half.

    Attributes:
        name: of its folder.
        source: the run whose checkpoint of step 5 it starts from; None: it starts from nothing.
    """

    name: str
    shard: str
    source: str | None = None


def train_long(
    folder: str, layout: Sequence[str], runs: Sequence[Long]
) -> dict[str, list[dict[str, Any]]]:
    """Train each of ``runs``, saving after steps 5 and 10; the metrics of their steps.

    The last step also has the bytes of the state and of the update's buffers on this rank.
    """
    sizes = [f"parallel.{size}" for size in layout]
    found = {}
    here = data = None
    for name, shard, source in runs:
        settings = training.tiny(
            folder, *COMMON, "global_batch_size=4", "micro_batch_size=1", *sizes, EXACT,
            f"optimizer.shard_state={shard}", f"run_dir={folder}/{name}",
        )  # fmt: skip
        if here is None:
            here, data = set_up(settings)
        run = build(settings, here, data)
        done = 0
        if source is not None:
            if here.is_main:
                saved = storage.path_of(Path(folder, source, "checkpoints"), 5)
                shutil.copytree(saved, storage.path_of(checkpoint.folder(run), 5))
            torch.distributed.barrier()
            done = checkpoint.restore(run)
            assert done == 5
        found[name] = []
        counted = Allocated()
        for step in range(done + 1, 11):
            if step == 10:
                _count(run, counted)
            found[name].append(train_step(run, batches.for_step(settings, here, data, step), step))
            if step % 5 == 0:
                _save(run, step)
        found[name][-1] |= {"state_bytes": held_bytes(run), "buffer_bytes": counted.most}
    parallel.stop()
    return found


def _count(run: Run, counted: Allocated) -> None:
    """Count the buffers of the optimizer's steps."""
    step = run.optimizer.step

    def counted_step() -> None:
        with counted:
            step()

    run.optimizer.step = counted_step  # type: ignore[method-assign]


def tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    saved = storage.Checkpoint.open(storage.path_of(run_dir / "checkpoints", step))
    saved.verify()
    found = {n: torch.empty(x.shape, dtype=x.dtype) for n, x in saved.tensors.items()}
    saved.load(found)
    return found


def test_ten_steps_in_layouts_that_continue_each_other(folder: Path) -> None:
    """With and without sharded state, from 1 process to 4 and from 4 to 2, to rounding."""
    ranks = [
        launch(train_long, 1, str(folder), (), [Long("1", "false")]),
        launch(
            train_long, 4, str(folder), ("pipeline=2", "layout=[0,2]", "expert=2"),
            [Long("4", "null"), Long("1 to 4", "null", "1")],
        ),
        launch(
            train_long, 2, str(folder), ("tensor=2",),
            [Long("2", "null"), Long("4 to 2", "false", "4")],
        ),
    ]  # fmt: skip
    expected = ranks[0][0]["1"]
    assert sum(metrics["heads_clipped"] for metrics in expected) > 0
    whole = tensors(folder / "1", 10)
    for found in ranks:
        for name, steps in found[0].items():
            for ours, theirs in zip(steps, expected[-len(steps) :], strict=True):
                assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9), name
                assert ours["heads_clipped"] == theirs["heads_clipped"], name
            moved = tensors(folder / name, 10)
            assert moved.keys() == whole.keys()
            for tensor, value in whole.items():
                difference = (moved[tensor].double() - value.double()).norm()
                assert difference <= 1e-9 * value.double().norm() + 1e-12, (name, tensor)
    sharded, replicated = (
        max(sum(rank[name][-1][f"{what}_bytes"] for what in ("state", "buffer")) for rank in found)
        for name in ("2", "4 to 2")
    )
    assert sharded < 0.85 * replicated  # matrices of which each rank has a part are most of it


@pytest.fixture(scope="module")
def base(folder: Path) -> dict[str, Tensor]:
    """A checkpoint in bfloat16 with sharded state, of two ranks with different experts."""
    launch(compare_and_move, 2, str(folder), "first", ["expert=2"])
    shutil.copytree(folder / f"first-{BFLOAT16}-null", folder / "base")
    return tensors(folder / "base", 1)


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS)
def test_sharded_state_equals_replicated_state_and_moves_to_every_layout(
    folder: Path, base: dict[str, Tensor], world_size: int, layout: tuple[str, ...]
) -> None:
    name = f"{world_size}-{'-'.join(layout)}"
    ranks = launch(compare_and_move, world_size, str(folder), name, layout)
    for precision, step, tolerance in ((EXACT, 3, 1e-9), (BFLOAT16, 1, 1e-5)):
        read = partial(tensors, step=step)
        sharded, replicated = (read(folder / f"{name}-{precision}-{s}") for s in ("null", "false"))
        assert sharded.keys() == replicated.keys()
        for tensor in sharded:
            ours, theirs = sharded[tensor].double(), replicated[tensor].double()
            limit = tolerance if sharded[tensor].dtype.itemsize > 2 else 2**-7
            assert (ours - theirs).norm() <= limit * theirs.norm() + 1e-12, (precision, tensor)
        both = [[held[precision, s] for s in ("null", "false")] for held in ranks]
        assert both[0][0][1]["heads_clipped"] == both[0][1][1]["heads_clipped"] > 0
        if step == 1:  # later only in every log_every-th step
            for algorithm in ("muon", "adamw"):  # other entries of large weights are sampled
                ours, theirs = (both[0][i][1][f"update_rms_{algorithm}"] for i in (0, 1))
                assert ours == pytest.approx(theirs, rel=0.02), algorithm
        if world_size > 1:
            assert sum(ours for (ours, _), _ in both) < 0.8 * sum(full for _, (full, _) in both)
    for shard in ("null", "false"):
        moved = tensors(folder / f"moved-{name}-{shard}", 2)
        assert moved.keys() == base.keys()
        for tensor, value in base.items():
            assert torch.equal(moved[tensor], value), (shard, tensor)
