"""Recovery of a run whose ranks are killed at random moments of steps and saves.

One run is not interrupted. Another one with the same configuration runs under torchrun with
``--max-restarts``, and one of its ranks is killed (SIGKILL) repeatedly: at a random moment or
during a save. The run must restart from the newest checkpoint that was complete when the rank was
killed, and its losses must be bit-identical to those of the uninterrupted run.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.runner import ROOT, Result, markdown, positive_int
from pretrain.checkpoint import storage
from pretrain.metrics import read, read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Number of ranks, of kills, of steps, and of steps between checkpoints.
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
        kills, steps = options.kills, max(steps, 9 * options.kills + 6)
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(
            f"{_CONFIG}steps: {steps}\ncheckpoint: {{every: {every}}}\n"
            f"parallel: {{expert: {ranks}}}\n"
        )
        # At the same time: while one restarts, the other uses the machine.
        with (
            _training(folder, "calm", ranks, 0) as uninterrupted,
            _training(folder, "killed", ranks, kills) as killed,
        ):
            run_dir = folder / "killed"
            reports = [_kill(killed, run_dir, rng, ranks, number, every) for number in range(kills)]
            _wait(killed)
            _wait(uninterrupted)
        starts = read_lines(folder / "killed" / "starts.jsonl")
        losses, expected = (
            [record["loss"] for record in read(folder / run_dir / "metrics.jsonl")[1:]]
            for run_dir in ("killed", "calm")
        )
    for kill, start in zip(reports, starts[1:], strict=True):
        kill["resumed_from"] = start["step"]
    return {
        "steps": steps,
        "steps_between_checkpoints": every,
        "ranks": ranks,
        "kills": reports,
        "losses": losses,
        "expected": expected,
    }


@contextlib.contextmanager
def _training(
    folder: Path, run_dir: str, ranks: int, restarts: int
) -> Iterator["subprocess.Popen[bytes]"]:
    """Context of a run under torchrun; all its processes have ended afterwards."""
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
            with contextlib.suppress(psutil.NoSuchProcess):  # it has already ended
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
            raise
        finally:
            process.wait()


def _wait(process: "subprocess.Popen[bytes]") -> None:
    status = process.wait(_PATIENCE_SECONDS)
    if status:
        raise RuntimeError(f"a run exited with status {status} instead of finishing")


def _kill(
    process: "subprocess.Popen[bytes]",
    run_dir: Path,
    rng: random.Random,
    ranks: int,
    number: int,
    every: int,
) -> dict[str, Any]:
    """Kill a rank after some steps since the last start; returns the state of the run then."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    in_save, ahead, rank = rng.random() < 0.5, rng.randrange(1, 2 * every), rng.randrange(ranks)
    # A save takes some hundredths of a second: kill while it runs, not when it begins.
    delay = rng.uniform(0, 0.02 if in_save else 0.2)

    def wait_for(condition: Callable[[], object]) -> None:
        while not condition():
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before kill {number + 1}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the run made no progress before kill {number + 1}")
            time.sleep(0.001)

    wait_for(lambda: len(read_lines(run_dir / "starts.jsonl")) == number + 1)
    first = read_lines(run_dir / "starts.jsonl")[-1]["step"]
    wait_for(lambda: (records := read(metrics)) and records[-1]["step"] >= first + ahead)
    children = psutil.Process(process.pid).children()
    victims = [child for child in children if child.environ().get("RANK") == str(rank)]
    if not victims:
        raise RuntimeError(f"rank {rank} was not found for kill {number + 1}")
    if in_save:
        wait_for(lambda: any(checkpoints.glob("*.partial")))
    time.sleep(delay)
    saved = storage.steps(checkpoints)
    victims[0].kill()
    victims[0].wait()
    return {
        "rank": rank,
        # A save that is interrupted leaves its folder until the next one.
        "during_a_save": any(checkpoints.glob("*.partial")),
        "after_step": read(metrics)[-1]["step"],
        "newest_checkpoint": saved[-1] if saved else 0,
    }


def _differing(result: Result) -> int:
    pairs = zip(result["losses"], result["expected"], strict=True)
    return sum(loss != expected for loss, expected in pairs)


def plot(result: Result, figure: "Figure") -> None:
    axes = figure.subplots()
    steps = range(1, len(result["losses"]) + 1)
    axes.plot(steps, result["expected"], color="0.6", linewidth=4, label="uninterrupted")
    axes.plot(
        steps, result["losses"], color="tab:blue", label=f"killed {len(result['kills'])} times"
    )
    for kill in result["kills"]:
        color = "tab:red" if kill["during_a_save"] else "tab:orange"
        axes.axvline(kill["after_step"], color=color, linewidth=0.8)
    axes.plot([], [], color="tab:red", label="killed during a save")
    axes.plot([], [], color="tab:orange", label="killed during a step")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()


def table(result: Result) -> str:
    kills = result["kills"]
    lost = [kill["after_step"] - kill["resumed_from"] for kill in kills]
    older = sum(kill["resumed_from"] < kill["newest_checkpoint"] for kill in kills)
    return markdown(
        ["Ranks killed", ""],
        [
            ["kills", len(kills)],
            ["kills during a save", sum(kill["during_a_save"] for kill in kills)],
            ["restarts from an older checkpoint than the newest complete one", older],
            ["repeated steps, mean", f"{sum(lost) / len(lost):.1f}"],
            ["repeated steps, maximum", max(lost)],
            ["steps between checkpoints", result["steps_between_checkpoints"]],
            ["steps of the run", result["steps"]],
            ["steps whose loss differs from the uninterrupted run", _differing(result)],
        ],
    )
