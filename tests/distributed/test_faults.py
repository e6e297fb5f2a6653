"""Bad steps are skipped or rolled back, dead and hung ranks end or restart a run, SIGTERM saves.

A bad step is a real one, of which one rank's batch is marked and its gradient made NaN.
"""

import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from pretrain import batches, checkpoint, startup, step, train
from pretrain.build import build
from pretrain.checkpoint import storage
from pretrain.errors import PretrainError
from pretrain.evaluate import held_out_losses
from pretrain.metrics import read
from pretrain.model.multimodal import MicroBatch
from pretrain.runtime.faults import Guard, Watchdog
from tests.distributed import training
from tests.distributed.launch import launch

# No evaluation on the way, and none to speak of at the ends.
BRIEF = ("optimizer.warmup_steps=2", "optimizer.decay_steps=0", "evaluation.every=99",
         "evaluation.sequences=1", "evaluation.captions=2", "evaluation.transcriptions=0",
         "parallel.expert=2")  # fmt: skip
SPOILT = 399  # every label of a batch that is bad


def spoil(bad: Sequence[int], data_of: Callable[[int], int] = lambda n: n) -> None:
    """Corrupt the batches of these numbers in this process; step n reads batch ``data_of(n)``."""
    make_batch, forward_backward = batches.for_step, step.forward_backward

    def spoilt_for_step(
        config: Any, context: Any, data: Any, number: int, *left_out: Any
    ) -> list[MicroBatch]:
        made = make_batch(config, context, data, data_of(number), *left_out)
        if data_of(number) in bad and context.rank == 1:
            for batch in made:
                batch.labels.fill_(SPOILT)
        return made

    def spoilt_forward_backward(
        run: Any, micro_batches: Sequence[MicroBatch], plan: Any = None
    ) -> torch.Tensor:
        sums = forward_backward(run, micro_batches, plan)
        if (micro_batches[0].labels == SPOILT).all():
            next(p for _, p in run.parameters()).grad.view(-1)[0] = torch.nan
        return sums

    batches.for_step, step.forward_backward = spoilt_for_step, spoilt_forward_backward


def _before_and_after_a_bad_step(folder: str) -> tuple[bool, int, list[bool], set[int]]:
    settings = training.tiny(folder, *BRIEF, "faults.non_finite=skip")
    spoil([3])
    context, data = startup.set_up(settings)
    run, guard = build(settings, context, data), Guard(settings.faults)
    states = []
    for number in (1, 2, 3, 4):
        step.train_step(run, batches.for_step(settings, context, data, number), number, guard)
        states.append({n: tensor.clone() for n, tensor in training.local_tensors(run).items()})
    same = [
        all(torch.equal(after[name], before[name]) for name in before)
        for before, after in itertools.pairwise(states)
    ]
    bias = any("expert_bias" in name for name in states[0])
    with checkpoint.saver(run) as saver:
        checkpoint.save(run, saver, guard, 4)
    resumed = build(settings, context, data)
    checkpoint.restore(resumed)
    counts = {g["updates"] for r in (run, resumed) for g in r.optimizer.param_groups}
    return bias, guard.skipped, same, counts


def test_a_skipped_step_changes_no_tensor_on_any_rank(folder: Path) -> None:
    """Weights, the routers' bias, momentum and moments are bit-identical, and so is the optimizer's
    count of updates, also in a run that is resumed."""
    for bias, skipped, same, counts in launch(_before_and_after_a_bad_step, 2, str(folder)):
        assert bias
        assert (skipped, same, counts) == (1, [False, True, False], {3})


# Three updates: of no label at all, of labels in the last quarter alone, and of all labels.
_EMPTY = {"train": [*range(8), *range(8, 14)], "held_out": range(64)}


def _through_empty_batches(folder: str, *overrides: str) -> dict[str, Any]:
    settings = training.tiny(folder, *BRIEF[:-1], "steps=3", *overrides)
    context, data = startup.set_up(settings)
    samples = data.samples

    def without_labels(split: str, indices: Iterable[int], **options: Any) -> list[Any]:
        numbers = list(indices)
        made = zip(numbers, samples(split, numbers, **options), strict=True)
        return [m.without_labels() if number in _EMPTY[split] else m for number, m in made]

    object.__setattr__(data, "samples", without_labels)  # it is frozen
    run, guard = build(settings, context, data), Guard(settings.faults)
    metrics, states = [], []
    for number in (1, 2, 3):
        states.append({name: tensor.detach().clone() for name, tensor in run.named_tensors.items()})
        micro_batches = batches.for_step(settings, context, data, number)
        metrics.append(step.train_step(run, micro_batches, number, guard))
        if number == 1:
            assert not any(run.optimizer.state.values())
            assert all(torch.equal(run.named_tensors[name], was) for name, was in states[0].items())
    return {
        "metrics": metrics,
        "counts": (guard.empty, guard.skipped, run.optimizer.param_groups[0]["updates"]),
        "held_out": held_out_losses(run),
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.vision_share=0.2",),
        ("data.vision_share=0",),
        ("data.sources=[{type: standard_library_chat}]", "data.max_corpus_mb=1"),
        ("data.vision_share=0.2", "faults.spike=roll_back", "precision=bfloat16"),
    ],
    ids=["images", "text", "chat", "bfloat16"],
)
def test_a_batch_without_labels_is_a_step_without_an_update(
    folder: Path, overrides: tuple[str, ...]
) -> None:
    """On every rank, also if only some ranks or micro-batches are empty."""
    alone = launch(_through_empty_batches, 1, str(folder), *overrides)[0]
    together = launch(_through_empty_batches, 2, str(folder), "parallel.expert=2", *overrides)
    for outcome in (alone, *together):
        assert outcome["counts"] == (1, 0, 2)
        empty, part, full = outcome["metrics"]
        assert (empty["loss"], empty["grad_norm"], empty["empty_steps"]) == (None, 0.0, 1)
        assert part["loss"] > 0 and full["loss"] > 0
        assert outcome["held_out"]["held_out_loss"] is None
        assert not any(isinstance(v, float) and math.isnan(v) for v in outcome["held_out"].values())
    tolerance = 2e-2 if "precision=bfloat16" in overrides else 2e-5
    for mine, reference in zip(together[0]["metrics"][1:], alone["metrics"][1:], strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], rel=tolerance)
    assert together[0]["metrics"][1]["grad_norm"] == pytest.approx(
        alone["metrics"][1]["grad_norm"], rel=100 * tolerance
    )


ROLL_BACK = (*BRIEF, "faults.non_finite=roll_back", "checkpoint.every=4")


def _train_rolling_back(folder: str, *overrides: str) -> list[dict[str, Any]]:
    spoil([7, 14])
    return training.train_and_read(folder, *ROLL_BACK, *overrides)


def _train_without_that_data(folder: str, *overrides: str) -> list[dict[str, Any]]:
    # From 7 it went back to 4. The eleventh update then took number 14, and it went back to 8.
    spoil([], data_of=lambda number: number + (0 if number <= 4 else 3 if number <= 8 else 6))
    return training.train_and_read(folder, *ROLL_BACK, *overrides)


def test_a_rolled_back_run_continues_after_the_bad_data(folder: Path) -> None:
    """Bit-exact as a run without the data between the checkpoint and the bad batch."""
    settings = (str(folder), "steps=12")
    clean = launch(_train_without_that_data, 2, *settings, f"run_dir={folder}/clean")[0]
    back = launch(_train_rolling_back, 2, *settings, f"run_dir={folder}/back")[0]
    assert [record["step"] for record in back] == list(range(13))
    assert [record["skipped_batches"] for record in back[1:]] == [0] * 4 + [3] * 4 + [6] * 4
    for mine, theirs in zip(back[1:], clean[1:], strict=True):
        assert (mine["loss"], mine["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])

    broken = (str(folder), f"run_dir={folder}/broken")
    launch(_train_rolling_back, 2, *broken, "steps=8")
    resumed = launch(_train_rolling_back, 2, *broken, "steps=12")[0]
    assert [r["loss"] for r in resumed[1:]] == [r["loss"] for r in back[1:]]


def _spoil_weights(numbers: Sequence[int], every_time: bool) -> None:
    """Make a weight of an expert of rank 1 infinite in the update of these steps of this process.

    Args:
        every_time: also when a step is computed again.
    """
    update, spoilt = step._update, set()

    def spoilt_update(run: Any, norm: Any, factor: float, number: int) -> Any:
        outcome = update(run, norm, factor, number)
        if number in numbers and (every_time or number not in spoilt) and dist.get_rank() == 1:
            spoilt.add(number)
            name = max(n for n in run.named_tensors if "local_experts" in n)
            run.named_tensors[name].data.view(-1)[-1] = torch.inf
        return outcome

    step._update = spoilt_update


def _train_with_spoilt_weights(
    folder: str, name: str, numbers: Sequence[int], every_time: bool, *overrides: str
) -> tuple[str, list[int], bool]:
    """The error of a run, its checkpoints, and whether the newest one has finite weights."""
    _spoil_weights(numbers, every_time)
    settings = training.tiny(folder, *BRIEF, f"run_dir={folder}/{name}", *overrides)
    error = ""
    try:
        train.train(settings)
    except PretrainError as caught:
        error = str(caught)
    saved = Path(settings.run_dir) / "checkpoints"
    steps = storage.steps(saved)
    if not steps:
        return error, steps, True
    newest = storage.Checkpoint.open(storage.path_of(saved, steps[-1]))
    tensors = {
        name: torch.zeros(tensor.shape)
        for name, tensor in newest.tensors.items()
        if name.startswith("model.")
    }
    newest.load(tensors)
    return error, steps, all(bool(tensor.isfinite().all()) for tensor in tensors.values())


SAVED_STEP = (4, ("steps=6", "checkpoint.every=2", "checkpoint.keep=1"), [2])


@pytest.mark.parametrize(
    ("action", "number", "options", "saved"),
    [
        ("stop", *SAVED_STEP),
        ("skip", *SAVED_STEP),
        ("roll_back", *SAVED_STEP),
        ("stop", 3, ("steps=3", "checkpoint.every=2"), [2]),  # the last step
        ("roll_back", 1, ("steps=1", "optimizer.warmup_steps=0"), []),
        # The loss of the next step, which is to be saved, is not finite.
        ("skip", 3, ("steps=6", "checkpoint.every=2"), [2]),
    ],
    ids=["stop", "skip", "roll back", "last step", "only step", "step before"],
)
def test_weights_that_are_not_finite_are_never_saved(
    folder: Path, action: str, number: int, options: Sequence[str], saved: list[int]
) -> None:
    """On any rank; the run ends with the same line on all of them."""
    name = "-".join((action, *options, str(number)))
    overrides = [*options, f"faults.non_finite={action}"]
    if action != "stop":
        overrides.append("faults.max_in_a_row=2")
    first, second = launch(
        _train_with_spoilt_weights, 2, str(folder), name, (number,), True, *overrides
    )
    assert first == second
    error, steps, finite = first
    assert (steps, finite) == (saved, True)
    assert ("local_experts" in error and "not finite" in error) or "rolled back to step 2" in error
    assert "intact" not in error and "\n" not in error


def test_a_run_rolls_back_from_weights_that_are_not_finite(folder: Path) -> None:
    overrides = ("steps=6", "checkpoint.every=2", "faults.non_finite=roll_back")
    outcome = launch(
        _train_with_spoilt_weights, 2, str(folder), "mended", (4, 6), False, *overrides
    )[0]
    assert outcome == ("", [4, 6], True)


def _start(
    folder: Path, run_dir: str, *overrides: str, restarts: int = 0, patience: int = 20
) -> "subprocess.Popen[str]":
    launcher = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *launcher),
            *("--max-restarts", str(restarts)),
            *("-m", "pretrain", "train", str(folder / "tiny.yaml"), *BRIEF),
            *(f"data.cache_dir={folder}/cache", f"run_dir={folder / run_dir}", *overrides),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(patience),  # before torch 2.12, 30 seconds
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _reach(run: "subprocess.Popen[str]", metrics: Path, number: int) -> None:
    deadline = time.monotonic() + 240
    while not ((records := read(metrics)) and records[-1]["step"] >= number):
        assert run.poll() is None, f"the run ended early: {run.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _end(run: "subprocess.Popen[str]") -> str:
    """Wait for the end of a run and return its stderr; if it hangs, fail with its stacks."""
    try:
        return run.communicate(timeout=240)[1]
    except subprocess.TimeoutExpired:
        ranks = psutil.Process(run.pid).children()
        for number in (signal.SIGABRT, signal.SIGKILL):
            for process in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            psutil.wait_procs(ranks, timeout=5)
        run.kill()
        pytest.fail(f"the run does not end: {run.communicate()[1]}")


def _rank(run: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    for process in psutil.Process(run.pid).children():
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"rank {rank} is not there")


def test_torchrun_restarts_after_a_kill_and_sigterm_saves(folder: Path) -> None:
    settings = (str(folder), *BRIEF, "steps=20", "checkpoint.every=5")
    calm = launch(training.train_and_read, 2, *settings, f"run_dir={folder}/calm")[0]

    metrics = folder / "killed" / "metrics.jsonl"
    saved = folder / "killed" / "checkpoints"
    run = _start(folder, "killed", *settings[-2:], restarts=1)
    _reach(run, metrics, 7)
    _rank(run, 1).send_signal(signal.SIGKILL)
    _reach(run, metrics, 12)  # by itself, from step 5
    run.send_signal(signal.SIGTERM)
    stderr = _end(run)
    assert run.returncode != 0
    last = read(metrics)[-1]["step"]
    if last < 20:  # else it had ended before the signal reached its ranks
        assert storage.steps(saved)[-1] == last, stderr
    assert launch(training.train_and_read, 2, *settings, f"run_dir={folder}/killed")[0] == calm


def _ended_by_sigterm(
    folder: str, spoilt: Sequence[int] = ()
) -> tuple[int | str | None, list[int]]:
    """Rank 0 receives SIGTERM during the third step; the exit status and the saved steps.

    Args:
        spoilt: steps whose update makes a weight infinite; the status is then an error's message.
    """
    _spoil_weights(spoilt, every_time=True)
    forward_backward = step.forward_backward
    calls = []

    def interrupted(run: Any, micro_batches: Sequence[MicroBatch], plan: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 3 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(run, micro_batches, plan)

    step.forward_backward = interrupted
    run_dir = Path(folder, f"ended-{len(spoilt)}")
    settings = training.tiny(folder, *BRIEF, "steps=20", f"run_dir={run_dir}")
    try:
        train.train(settings)
    except (SystemExit, PretrainError) as end:
        code = end.code if isinstance(end, SystemExit) else str(end)
        return code, storage.steps(run_dir / "checkpoints")
    return "went on", []


def test_sigterm_on_one_rank_ends_all_ranks_after_the_step(
    folder: Path,
) -> None:
    assert launch(_ended_by_sigterm, 2, str(folder)) == [(143, [3])] * 2


def test_a_signal_does_not_save_weights_that_are_not_finite(folder: Path) -> None:
    for reason, saved in launch(_ended_by_sigterm, 2, str(folder), (3,)):
        assert "is not finite after step 3, which is not saved" in str(reason)
        assert saved == []


def _hang(folder: str, where: str) -> None:
    """Train two steps with a call that never returns."""

    def forever(*_arguments: Any) -> None:
        time.sleep(600)

    target = {"restore": checkpoint, "held_out": train}[where]
    setattr(target, where, forever)
    Watchdog._GRACE_SECONDS = 2.0  # a busy machine's threads wake up late
    overrides = ("steps=2", "faults.hang_seconds=3", f"run_dir={folder}/hang-{where}")
    train.train(training.tiny(folder, *BRIEF[:-1], *overrides))


@pytest.mark.parametrize(
    ("where", "doing"),
    [
        ("restore", "loading the newest checkpoint"),
        ("held_out", "the evaluation after step 2"),
    ],
)
def test_the_watchdog_ends_hangs_before_the_first_and_after_the_last_step(
    folder: Path, where: str, doing: str
) -> None:
    with pytest.raises(AssertionError, match="rank 0 ended with 1, no result"):
        launch(_hang, 1, str(folder), where)
    stacks = (folder / f"hang-{where}" / "stacks-rank0.txt").read_text()
    assert f"made no progress for 3 seconds (faults.hang_seconds) in {doing}" in stacks
    assert "in forever" in stacks


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (("hang_seconds=12", "collective_seconds=0"), "made no progress for 12 seconds"),
        (("hang_seconds=0", "collective_seconds=8"), "longer than faults.collective_seconds in"),
    ],
    ids=["watchdog", "collective"],
)
def test_a_hanging_rank_is_named_and_others_write_stacks(
    folder: Path, limits: Sequence[str], message: str
) -> None:
    name = limits[0]
    # A stopped process does not hear torchrun's SIGTERM: it is killed once that has no patience.
    settings = [f"faults.{limit}" for limit in limits]
    run = _start(folder, name, "steps=5000", *settings, patience=1)
    _reach(run, folder / name / "metrics.jsonl", 2)
    _rank(run, 1).send_signal(signal.SIGSTOP)
    stderr = _end(run)
    assert run.returncode != 0
    assert "rank 0 (process " in stderr and message in stderr
    assert "no sign of life from rank 1" in stderr
    assert "[rank0]" not in stderr  # a traceback
    # Which collective it waits in depends on where rank 1 was stopped: not only steps have some.
    assert "in _train\n" in (folder / name / "stacks-rank0.txt").read_text()


def test_a_rank_that_loses_another_prints_one_line_and_writes_its_stack(folder: Path) -> None:
    run = _start(folder, "lost", "steps=5000")
    _reach(run, folder / "lost" / "metrics.jsonl", 2)
    _rank(run, 1).send_signal(signal.SIGKILL)
    stderr = _end(run)
    assert run.returncode != 0
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    stacks = folder / "lost" / "stacks-rank0.txt"
    assert re.fullmatch(
        f"error: rank 0 lost the connection to another rank in .*: see that rank's error; "
        f"the stack of rank 0 is in {stacks}",
        line,
    )
    assert "[rank0]" not in stderr and "in _train\n" in stacks.read_text()
