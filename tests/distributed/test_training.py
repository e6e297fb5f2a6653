"""A run depends on configuration and seed, not on processes, DEP, or interruptions."""

import contextlib
import io
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.storage import LocalShard
from pretrain.metrics import read
from tests.distributed import training
from tests.distributed.launch import launch, launch_and_kill
from tests.distributed.training import EXACT


def _merged(ranks: Sequence[dict[str, LocalShard]]) -> dict[str, torch.Tensor]:
    """The gradients of all ranks by name; shards are put together."""
    merged: dict[str, torch.Tensor] = {}
    for gradients in ranks:
        for name, part in gradients.items():
            whole = merged.setdefault(
                name, torch.full(tuple(part.shape), torch.nan, dtype=torch.float64)
            )
            for offsets, values in part.blocks:
                place = whole[
                    tuple(
                        slice(first, first + size)
                        for first, size in zip(offsets, values.shape, strict=True)
                    )
                ]
                if not place.isnan().any():  # another rank has it too
                    torch.testing.assert_close(place, values, rtol=1e-9, atol=1e-12)
                place.copy_(values)
    return merged


LAYOUTS = [
    (1, ()),
    (2, ("expert=2",)),
    (2, ("tensor=2",)),
    (2, ("tensor=2", "expert=2")),
    (2, ("pipeline=2",)),
    (2, ("pipeline=2", "interleave=2")),
    (4, ("expert=2",)),
    (4, ("expert=4",)),
    (4, ("tensor=2", "pipeline=2", "expert=2")),
    (4, ("tensor=2", "expert=2")),
    (4, ("pipeline=2", "interleave=2", "expert=2")),
    (4, ("pipeline=4",)),
]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, torch.Tensor]:
    return _merged(
        launch(training.all_gradients, 1, str(folder), "encoder_process.enabled=false", *EXACT_FOUR)
    )


FOUR_LAYERS = ("language.num_layers=4",)
EXACT_FOUR = (EXACT, *FOUR_LAYERS)


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process(
    folder: Path, alone: dict[str, torch.Tensor], world_size: int, parallel: tuple[str, ...]
) -> None:
    overrides = [f"parallel.{setting}" for setting in parallel]
    every = [(f"encoder_process.enabled={enabled}",) for enabled in ("true", "false")]
    ranks = launch(
        training.gradients_of_each, world_size, str(folder), every, *overrides, *EXACT_FOUR
    )
    for outcomes in zip(*ranks, strict=True):
        together = _merged(outcomes)
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            assert (together[name] - expected).norm() <= 1e-10 * expected.norm(), name


def assert_same(mine: dict[str, Any], reference: dict[str, Any], *keys: str) -> None:
    """The metrics ``keys`` of two float64 runs agree, where both have them."""
    for key in keys:
        if reference.get(key) is not None:
            # The largest logits are kept in float32.
            tolerance = 1e-6 if key == "max_logit" else 1e-9
            assert mine[key] == pytest.approx(reference[key], rel=tolerance), (mine["step"], key)


def test_two_processes_have_the_losses_of_one(folder: Path) -> None:
    run, settings = training.train_and_read, (str(folder), EXACT)
    one = launch(run, 1, *settings, f"run_dir={folder}/one")[0]
    two = launch(run, 2, *settings, f"run_dir={folder}/two", "parallel.expert=2")[0]
    assert [record["step"] for record in two] == list(range(21))
    for mine, reference in zip(two[1:], one[1:], strict=True):
        assert_same(mine, reference, "loss", "text_loss", "caption_loss", "grad_norm", "max_logit")
    assert two[-1]["loss"] < two[1]["loss"] - 0.5


def test_a_thread_prepares_the_same_batches(folder: Path) -> None:
    """The thread plans the encoder's work by collectives, during those of the step."""
    settings = ("parallel.expert=2", "steps=10", "optimizer.decay_steps=0")
    alone, thread = (
        launch(
            training.train_and_prefetch, 2, in_background, str(folder),
            f"run_dir={folder}/background-{in_background}", *settings,
        )[0]
        for in_background in (False, True)
    )  # fmt: skip
    assert thread == alone


# Six steps with the optimizer's shared work, QK-Clip, evaluation and transcription.
SHORT = (*EXACT_FOUR, "steps=6", "optimizer.warmup_steps=2", "optimizer.decay_steps=2",
         "evaluation.every=6")  # fmt: skip


@pytest.fixture(scope="module")
def single(folder: Path) -> list[dict[str, Any]]:
    return launch(training.train_and_read, 1, str(folder), f"run_dir={folder}/single", *SHORT)[0]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, ("pipeline=2",)),
        (2, ("tensor=2", "expert=2")),
        (4, ("pipeline=2", "interleave=2", "expert=2")),
        (4, ("tensor=2", "pipeline=2", "expert=2")),
        (4, ("context=2", "pipeline=2", "interleave=2", "expert=2")),
        (3, ("pipeline=3", "layout=[0,4,0]")),
    ],
)
def test_every_layout_has_the_metrics_of_one_process(
    folder: Path, single: list[dict[str, Any]], world_size: int, parallel: tuple[str, ...]
) -> None:
    run_dir = folder / f"spread-{world_size}-{'-'.join(parallel)}"
    overrides = (f"run_dir={run_dir}", *(f"parallel.{setting}" for setting in parallel), *SHORT)
    spread = launch(training.train_and_read, world_size, str(folder), *overrides)[0]
    for reference, mine in zip(single, spread, strict=True):
        assert mine.keys() == reference.keys()
        keys = ("loss", "caption_loss", "grad_norm", "max_logit", "held_out_text_loss")
        assert_same(mine, reference, *keys)
        assert mine.get("heads") == reference.get("heads")
    transcribed = [
        (path / "transcriptions.json").read_text() for path in (run_dir, folder / "single")
    ]
    assert transcribed[0] == transcribed[1]


def test_a_measured_cost_is_stored_with_the_run(folder: Path) -> None:
    """A resumed run plans with the same cost."""
    settings = ("encoder_process.cost=measured", "steps=5", "optimizer.decay_steps=0")
    run_dir = f"run_dir={folder}/measured"
    records = launch(training.train_and_read, 2, str(folder), run_dir, *settings)[0]
    assert (folder / "measured" / "encoder_cost.json").exists()
    for record in records[1:]:
        assert 1 <= record["encoder_least_balance"] <= record["encoder_balance"] + 1e-9


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[dict[str, Any]]:
    """15 steps at EP 2, with checkpoints of steps 5 and 10."""
    return launch(
        training.train_and_read, 2, *(str(folder), f"run_dir={folder}/whole", "parallel.expert=2"),
        *MOVING,
    )[0]  # fmt: skip


# Without a decay, the rate of a run that ends earlier is that of the whole run.
MOVING = (EXACT, "steps=15", "checkpoint.every=5", "checkpoint.keep=9", "optimizer.decay_steps=0",
          "evaluation.every=15", "evaluation.sequences=1", "evaluation.captions=2",
          "evaluation.transcriptions=0")  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ()),
        (2, ("pipeline=2", "layout=[0,2]")),
        (2, ("tensor=2",)),
        (2, ("context=2",)),
    ],
)
def test_a_run_resumes_with_other_parallel_sizes(
    folder: Path,
    uninterrupted: list[dict[str, Any]],
    world_size: int,
    parallel: tuple[str, ...],
) -> None:
    """From EP 2 after five steps, five at another layout, and five at EP 2 again."""
    run_dir = folder / f"moved-{'-'.join(parallel)}"
    first = Path("checkpoints", "step-00000005")
    shutil.copytree(folder / "whole" / first, run_dir / first)
    settings = (str(folder), f"run_dir={run_dir}", *MOVING)
    layout = [f"parallel.{size}" for size in parallel]
    launch(training.train_and_read, world_size, *settings, *layout, "steps=10")
    back = launch(training.train_and_read, 2, *settings, "parallel.expert=2")[0]
    assert [record["step"] for record in back] == list(range(6, 16))
    for mine, reference in zip(back, uninterrupted[6:], strict=True):
        assert_same(mine, reference, "loss", "grad_norm", "max_logit")


def _train_and_print(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        training.train_and_read(*arguments)
    return output.getvalue()


def test_a_run_with_more_steps_says_that_nothing_is_left(
    folder: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    last = Path("checkpoints", "step-00000015")
    shutil.copytree(folder / "whole" / last, folder / "ended" / last)
    settings = (str(folder), f"run_dir={folder}/ended", *MOVING)
    for steps, said in ((10, True), (15, True), (16, False)):
        (output,) = launch(_train_and_print, 1, *settings, f"steps={steps}")
        assert ("nothing is left to train after step 15: to continue, raise " in output) == said
        assert ("resuming after step 15" in output) != said


SCALED = (
    "language.rope_scaling.factor=4",
    "language.rope_scaling.original_max_position_embeddings=24",
    "language.rope_scaling.mscale=2",
)


@pytest.mark.parametrize(("world_size", "positions"), [(1, ()), (2, ()), (1, SCALED)])
def test_qk_clip_reduces_max_logits_to_the_threshold(
    folder: Path, world_size: int, positions: tuple[str, ...]
) -> None:
    """In the first layer of language model (MLA) and encoder (MHA), where inputs do not change."""
    threshold = 0.03
    (before, clipped), (after, _) = launch(
        training.max_logits_before_and_after_a_clip,
        world_size,
        *(str(folder), f"parallel.expert={world_size}", f"optimizer.qk_clip_threshold={threshold}"),
        *positions,
    )[0]
    names = ("language.decoder.layers.0.self_attention", "vision.encoder.blocks.0.attention")
    for name in names:
        expected = before[name].clamp(max=threshold)
        torch.testing.assert_close(after[name], expected, rtol=1e-2, atol=0)
    every = torch.cat(list(before.values()))
    assert clipped == (every > threshold).sum() > 0


def test_resuming_after_a_kill_is_bit_exact(folder: Path) -> None:
    expert = "parallel.expert=2"
    calm = launch(training.train_and_read, 2, str(folder), f"run_dir={folder}/calm", expert)[0]

    fatal_step = random.Random(os.urandom(4)).randrange(6, 19)
    killed = (str(folder), f"run_dir={folder}/killed", expert)
    metrics = folder / "killed" / "metrics.jsonl"

    def reached() -> bool:
        return bool(records := read(metrics)) and records[-1]["step"] >= fatal_step

    # All processes of the run, in the middle of whatever they do.
    launch_and_kill(training.train_and_read, 2, reached, *killed)
    assert launch(training.train_and_read, 2, *killed)[0] == calm
