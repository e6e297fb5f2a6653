"""The trainer's sharded optimizer state: equal to replicated state, and moved to any layout."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

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


def tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    saved = storage.Checkpoint.open(storage.path_of(run_dir / "checkpoints", step))
    saved.verify()
    found = {n: torch.empty(x.shape, dtype=x.dtype) for n, x in saved.tensors.items()}
    saved.load(found)
    return found


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
        if world_size > 1:
            assert sum(ours for (ours, _), _ in both) < 0.8 * sum(full for _, (full, _) in both)
    for shard in ("null", "false"):
        moved = tensors(folder / f"moved-{name}-{shard}", 2)
        assert moved.keys() == base.keys()
        for tensor, value in base.items():
            assert torch.equal(moved[tensor], value), (shard, tensor)
