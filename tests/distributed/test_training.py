"""A run is a function of configuration and seed: not of processes, DEP, or interruptions."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.runtime.metrics import read
from tests.distributed import training
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: the cache is made once; each test has a run_dir of its own."""
    folder = tmp_path_factory.mktemp("runs")
    training.tiny_file(folder)
    return folder


def _merged(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The gradients of all ranks by name; parts of cut ones put together."""
    merged: dict[str, torch.Tensor] = {}
    for gradients in ranks:
        for name, gradient in gradients.items():
            if name in merged:
                torch.testing.assert_close(merged[name], gradient, rtol=1e-4, atol=1e-6)
            merged[name] = gradient
    cut = sorted(name for name in merged if name.endswith("]"))
    for name in {name.rpartition("[")[0] for name in cut}:
        parts = [merged.pop(part) for part in cut if part.rpartition("[")[0] == name]
        # Rows and columns are cut by what a layer is called in megatron-core.
        dim = 1 if ".linear_proj." in name or ".linear_fc2." in name else 0
        if ".linear_fc1." in name:  # a part of gate, then a part of up, on each rank
            halves = [part.chunk(2) for part in parts]
            parts = [half[side] for side in (0, 1) for half in halves]
        merged[name] = torch.cat(parts, dim)
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
    return launch(
        training.all_gradients, 1, str(folder), "encoder_process.enabled=false", *FOUR_LAYERS
    )[0]


FOUR_LAYERS = ("language.num_layers=4",)


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process_with_dep_and_without(
    folder: Path, alone: dict[str, torch.Tensor], world_size: int, parallel: tuple[str, ...]
) -> None:
    for enabled in ("true", "false"):
        overrides = [f"parallel.{setting}" for setting in parallel]
        overrides += [f"encoder_process.enabled={enabled}", *FOUR_LAYERS]
        together = _merged(launch(training.all_gradients, world_size, str(folder), *overrides))
        assert together.keys() == alone.keys()
        for name, expected in alone.items():
            assert (together[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_two_processes_follow_the_curve_of_one(folder: Path) -> None:
    """The tolerance is fp32's rounding (1e-7) grown over 20 updates of a training run."""
    one = launch(training.train_and_read, 1, str(folder), f"run_dir={folder}/one")[0]
    two = launch(
        training.train_and_read, 2, str(folder), f"run_dir={folder}/two", "parallel.expert=2"
    )[0]
    assert [record["step"] for record in two] == list(range(21))
    for mine, reference in zip(two[1:], one[1:], strict=True):
        for key in ("loss", "text_loss", "caption_loss", "grad_norm", "max_logit"):
            assert mine[key] == pytest.approx(reference[key], rel=2e-5), (mine["step"], key)
    assert two[-1]["loss"] < two[1]["loss"] - 0.5


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, ("pipeline=2",)),
        (2, ("tensor=2", "expert=2")),
        (4, ("pipeline=2", "interleave=2", "expert=2")),
        (4, ("tensor=2", "pipeline=2", "expert=2")),
    ],
)
def test_every_layout_trains_evaluates_and_reads_as_one_process_does(
    folder: Path, world_size: int, parallel: tuple[str, ...]
) -> None:
    """Ten steps with the optimizer's shared work, QK-Clip, evaluation and transcription."""
    short = (*FOUR_LAYERS, "steps=10", "optimizer.warmup_steps=2", "optimizer.decay_steps=2")
    runs = []
    for name, size, settings in (("single", 1, ()), ("spread", world_size, parallel)):
        run_dir = folder / f"{name}-{world_size}-{'-'.join(parallel)}"
        overrides = [f"parallel.{setting}" for setting in settings]
        runs.append(
            launch(
                training.train_and_read, size, str(folder), f"run_dir={run_dir}", *short, *overrides
            )[0]
        )
    for reference, mine in zip(*runs, strict=True):
        assert mine.keys() == reference.keys()
        for key in ("loss", "caption_loss", "grad_norm", "max_logit", "held_out_text_loss"):
            if reference.get(key) is not None:
                assert mine[key] == pytest.approx(reference[key], rel=1e-4), (mine["step"], key)
        assert mine.get("heads") == reference.get("heads")


def test_a_measured_cost_is_kept_with_the_run(folder: Path) -> None:
    """What is planned by it is then planned alike when the run goes on."""
    settings = ("encoder_process.cost=measured", "steps=5", "optimizer.decay_steps=0")
    run_dir = f"run_dir={folder}/measured"
    records = launch(training.train_and_read, 2, str(folder), run_dir, *settings)[0]
    assert (folder / "measured" / "encoder_cost.json").exists()
    for record in records[1:]:
        assert 1 <= record["encoder_least_balance"] <= record["encoder_balance"] + 1e-9


def test_a_checkpoint_of_two_processes_goes_on_in_one(folder: Path) -> None:
    whole = launch(training.train_and_read, 1, str(folder), f"run_dir={folder}/whole")[0]
    run_dir = f"run_dir={folder}/moved"
    shorter = ["steps=10", "optimizer.decay_steps=0"]  # the rate is the whole run's up to there
    launch(training.train_and_read, 2, str(folder), run_dir, "parallel.expert=2", *shorter)
    moved = launch(training.train_and_read, 1, str(folder), run_dir)[0]
    assert [record["step"] for record in moved] == list(range(21))
    for mine, reference in zip(moved[11:], whole[11:], strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=2e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_qk_clip_brings_the_models_own_heads_to_the_threshold(
    folder: Path, world_size: int
) -> None:
    """In the first layer of language model (MLA) and encoder (MHA), where inputs do not change."""
    threshold = 0.03
    (before, clipped), (after, _) = launch(
        training.max_logits_before_and_after_a_clip,
        world_size,
        *(str(folder), f"parallel.expert={world_size}", f"optimizer.qk_clip_threshold={threshold}"),
    )[0]
    names = ("language.decoder.layers.0.self_attention", "vision.encoder.blocks.0.attention")
    for name in names:
        expected = before[name].clamp(max=threshold)
        torch.testing.assert_close(after[name], expected, rtol=1e-2, atol=0)
    every = torch.cat(list(before.values()))
    assert clipped == (every > threshold).sum() > 0


def _start(config: Path, *overrides: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
            *("-m", "pretrain", "train", str(config), "parallel.expert=2", *overrides),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_killed_at_any_step_and_started_again_it_is_as_if_it_never_stopped(folder: Path) -> None:
    config = folder / "tiny.yaml"
    cache = f"data.cache_dir={folder}/cache"
    assert _start(config, cache, f"run_dir={folder}/calm").wait(timeout=180) == 0

    fatal_step = random.Random(os.urandom(4)).randrange(6, 19)
    metrics = folder / "killed" / "metrics.jsonl"
    run = _start(config, cache, f"run_dir={folder}/killed")
    deadline = time.monotonic() + 120
    while not (
        metrics.exists() and (records := read(metrics)) and records[-1]["step"] >= fatal_step
    ):
        assert run.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Every process of the run: launcher and ranks, in the middle of whatever they do.
    _kill_session(run)

    assert _start(config, cache, f"run_dir={folder}/killed").wait(timeout=180) == 0
    assert training.comparable(metrics) == training.comparable(folder / "calm" / "metrics.jsonl")


def _kill_session(run: "subprocess.Popen[bytes]") -> None:
    import psutil

    everyone = [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]
    for process in everyone:
        process.send_signal(signal.SIGKILL)
    run.wait()
