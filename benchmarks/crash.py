"""Crash: ranks of a run are killed at random moments of steps and saves; is anything lost?

One run is left alone. Another, of the same configuration, is started once by torchrun, with
``--max-restarts``, and a rank of it is killed (SIGKILL) again and again: at a random moment, or in
the midst of a save. It has to restart by itself, from no older checkpoint than the newest that was
complete when the rank died, and its losses have to equal those of the other run, to the bit.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.runner import ROOT, Result, markdown, positive_int
from pretrain.checkpoint import storage
from pretrain.metrics import read, read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ranks, kills, steps of the run, steps between checkpoints
_FORMS = {"full": (2, 50, 450, 5), "quick": (2, 6, 60, 5), "tiny": (1, 1, 12, 4)}
_PATIENCE_SECONDS = 300.0
_CONFIG = """
global_batch_size: 4
micro_batch_size: 2
language: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_heads: 2, q_lora_rank: 16,
  kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8, num_experts: 4,
  expert_ffn_hidden_size: 32, shared_expert_ffn_hidden_size: 32}
vision: {num_layers: 1, hidden_size: 16, num_heads: 2, ffn_hidden_size: 32, position_grid: 8}
data: {seq_length: 96, vocab_size: 400, max_corpus_mb: 1.0, images: {max_chars: 10}}
optimizer: {lr: 5.0e-3, warmup_steps: 2, decay_steps: 0}
evaluation: {every: 100000, sequences: 1, captions: 2, transcriptions: 0}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kills", type=positive_int, help="default: 50; 6 with --quick, 1 with --tiny"
    )


def run(options: argparse.Namespace) -> Result:
    ranks, kills, steps, every = _FORMS[options.form]
    if options.kills is not None:
        if options.kills < 1:
            raise SystemExit(f"--kills must be at least 1, not {options.kills}")
        kills, steps = options.kills, max(steps, 9 * options.kills + 6)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(
            f"{_CONFIG}steps: {steps}\ncheckpoint: {{every: {every}}}\n"
            f"parallel: {{expert: {ranks}}}\n"
        )
        # Beside each other: while one starts again, the other has the machine.
        with (
            _started(folder, "calm", ranks, 0) as calm,
            _started(folder, "killed", ranks, kills) as killed,
        ):
            run_dir = folder / "killed"
            told = [_kill(killed, run_dir, rng, ranks, number, every) for number in range(kills)]
            _ended(killed)
            _ended(calm)
        starts = read_lines(folder / "killed" / "starts.jsonl")
        losses, expected = (
            [record["loss"] for record in read(folder / run_dir / "metrics.jsonl")[1:]]
            for run_dir in ("killed", "calm")
        )
    for kill, start in zip(told, starts[1:], strict=True):
        kill["resumed_from"] = start["step"]
    return {
        "steps": steps,
        "steps_between_checkpoints": every,
        "ranks": ranks,
        "kills": told,
        "losses": losses,
        "expected": expected,
    }


@contextlib.contextmanager
def _started(
    folder: Path, run_dir: str, ranks: int, restarts: int
) -> Iterator["subprocess.Popen[bytes]"]:
    """A run under torchrun; it, and whatever it started, is gone afterwards."""
    launcher = ("--nproc-per-node", str(ranks), "--max-restarts", str(restarts), "--standalone")
    with (folder / f"{run_dir}.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *launcher),
                *("--monitor-interval", "0.1", "-m", "pretrain", "train"),
                *(str(folder / "run.yaml"), f"run_dir={folder / run_dir}"),
                f"data.cache_dir={folder / 'cache'}",
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        except BaseException:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
                for one in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            process.kill()
            raise
        finally:
            process.wait()


def _ended(process: "subprocess.Popen[bytes]") -> None:
    status = process.wait(_PATIENCE_SECONDS)
    if status:
        raise RuntimeError(f"a run that should have come to its end left with status {status}")


def _kill(
    process: "subprocess.Popen[bytes]",
    run_dir: Path,
    rng: random.Random,
    ranks: int,
    number: int,
    every: int,
) -> dict[str, Any]:
    """Kill a rank once this start of the run has made some steps; where it stood then."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    in_save, ahead, rank = rng.random() < 0.5, rng.randrange(1, 2 * every), rng.randrange(ranks)
    delay = rng.uniform(0, 0.2)

    def wait_for(moment: "Any") -> None:
        while not moment():
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before kill {number + 1}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run made no progress before kill {number + 1}")
            time.sleep(0.001)

    wait_for(lambda: len(read_lines(run_dir / "starts.jsonl")) == number + 1)
    first = read_lines(run_dir / "starts.jsonl")[-1]["step"]
    wait_for(lambda: (records := read(metrics)) and records[-1]["step"] >= first + ahead)
    if in_save:
        wait_for(lambda: any(checkpoints.glob("*.partial")))
    else:
        time.sleep(delay)
    saved = storage.steps(checkpoints)
    saving = any(checkpoints.glob("*.partial"))
    for one in psutil.Process(process.pid).children():
        if one.environ().get("RANK") == str(rank):
            one.kill()
            break
    else:
        raise RuntimeError(f"rank {rank} was not there for kill {number + 1}")
    return {
        "rank": rank,
        "during_a_save": saving,
        "after_step": read(metrics)[-1]["step"],
        "newest_checkpoint": saved[-1] if saved else 0,
    }


def _differing(result: Result) -> int:
    pairs = zip(result["losses"], result["expected"], strict=True)
    return sum(loss != expected for loss, expected in pairs)


def plot(result: Result, figure: "Figure") -> None:
    axes = figure.subplots()
    steps = range(1, len(result["losses"]) + 1)
    axes.plot(steps, result["expected"], color="0.6", linewidth=4, label="left alone")
    axes.plot(
        steps, result["losses"], color="tab:blue", label=f"killed {len(result['kills'])} times"
    )
    for kill in result["kills"]:
        colour = "tab:red" if kill["during_a_save"] else "tab:orange"
        axes.axvline(kill["after_step"], color=colour, linewidth=0.8)
    axes.plot([], [], color="tab:red", label="killed during a save")
    axes.plot([], [], color="tab:orange", label="killed during a step")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()


def table(result: Result) -> str:
    kills = result["kills"]
    lost = [kill["after_step"] - kill["resumed_from"] for kill in kills]
    older = sum(kill["resumed_from"] < kill["newest_checkpoint"] for kill in kills)
    return markdown(
        ["Ranks killed", ""],
        [
            ["kills", len(kills)],
            ["of them during a save", sum(kill["during_a_save"] for kill in kills)],
            ["resumes from an older checkpoint than the newest complete one", older],
            ["steps done again, mean", f"{sum(lost) / len(lost):.1f}"],
            ["steps done again, most", max(lost)],
            ["steps between checkpoints", result["steps_between_checkpoints"]],
            ["steps of the run", result["steps"]],
            ["steps whose loss differs from the uninterrupted run's", _differing(result)],
        ],
    )
