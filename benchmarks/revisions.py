"""Tokens per second of the trainer as it is and as it was at another commit, in alternating runs.

Both train on ``benchmarks/trainer.yaml`` with two processes, as ``make train`` starts them. A
machine with other load changes its speed from minute to minute: compare the runs of one round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.runner import ROOT, Result, markdown, positive_int, quartiles
from pretrain.metrics import read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Processes, rounds, steps of a run, and steps at its beginning that are not counted.
_FORMS = {"full": (2, 10, 200, 20), "quick": (2, 6, 60, 10), "tiny": (1, 1, 4, 1)}
_TINY = (
    "parallel.expert=1",
    *("global_batch_size=4", "micro_batch_size=2", "data.max_corpus_mb=1.0"),
    *("data.vocab_size=400", "language.num_layers=2", "evaluation.sequences=1"),
    *("evaluation.captions=2", "evaluation.transcriptions=0"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision", default="HEAD", help="the other commit; default: the last one"
    )
    parser.add_argument("--rounds", type=positive_int, help="pairs of runs; default: by the form")


def run(options: argparse.Namespace) -> Result:
    processes, rounds, steps, skipped = _FORMS[options.form]
    settings = [
        *(f"steps={steps}", "optimizer.warmup_steps=1", "optimizer.decay_steps=1"),
        *(_TINY if options.form == "tiny" else ()),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = folder / "tree"
        _extract(options.revision, other)
        for number in range(options.rounds or rounds):
            row = {}
            for side, tree in (("before", other), ("now", ROOT)):
                run_dir = folder / f"{side}{number}"
                paths = (f"run_dir={run_dir}", f"data.cache_dir={folder / side}")
                _train(tree, processes, [*settings, *paths])
                row[side] = _tokens_per_second(run_dir, skipped)
            rows.append(row)
            print(f"round {number + 1}: {row['now'] / row['before']:.3f}", flush=True)
    return {
        "revision": _git("rev-parse", "--short=10", options.revision).decode().strip(),
        "steps": steps - skipped,
        "processes": processes,
        "rounds": rows,
        "speedup": quartiles([row["now"] / row["before"] for row in rows]),
    }


def _git(*arguments: str) -> bytes:
    """
    Raises:
        SystemExit: git fails, such as for an unknown commit.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def _extract(revision: str, folder: Path) -> None:
    """Write the files of a commit."""
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    archive.write_bytes(_git("archive", "--format=tar", revision))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _train(tree: Path, processes: int, overrides: list[str]) -> None:
    """Train by the files in ``tree``.

    Raises:
        SystemExit: the run failed.
    """
    config = tree / "benchmarks" / "trainer.yaml"
    if not config.exists():  # the settings of make train at that time
        config = tree / "configs" / "laptop.yaml"
    training = ["pretrain", "train", str(config), *overrides]
    if (tree / "pretrain" / "runtime" / "launcher.py").exists():
        command = ["-m", *training, "--processes", str(processes)]
    else:
        launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
        command = ["-m", *launcher, *training]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the run of {tree} failed:\n{done.stderr.decode()[-2000:]}")


def _tokens_per_second(run_dir: Path, skipped: int) -> float:
    """The median over the steps of a run."""
    records = read(run_dir / "metrics.jsonl")
    return statistics.median(
        float(record["tokens_per_second"]) for record in records if record["step"] > skipped
    )


def plot(result: Result, figure: "Figure") -> None:
    axes = figure.subplots()
    rows = result["rounds"]
    numbers = range(1, len(rows) + 1)
    axes.plot(numbers, [r["before"] for r in rows], "o-", color="0.6", label=result["revision"])
    axes.plot(numbers, [r["now"] for r in rows], "o-", color="tab:blue", label="now")
    axes.set(xlabel="round", ylabel="tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_xticks(numbers)
    axes.legend()


def table(result: Result) -> str:
    rows = [
        [number, f"{r['before']:,.0f}", f"{r['now']:,.0f}", f"{r['now'] / r['before']:.3f}"]
        for number, r in enumerate(result["rounds"], start=1)
    ]
    low, middle, high = result["speedup"]
    rows.append(["median (quartiles)", "", "", f"{middle:.3f} ({low:.3f} to {high:.3f})"])
    header = ["round", f"{result['revision']}, tokens/s", "now, tokens/s", "speedup"]
    about = f"Medians of {result['steps']} steps with {result['processes']} processes"
    return f"{about}\n\n{markdown(header, rows)}"
