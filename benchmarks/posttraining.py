"""Runs of ``posttrain`` in the benchmarks of reinforcement learning and of the agent swarm."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.runner import ROOT, positive_int


def add_arguments(parser: argparse.ArgumentParser, runs: Path) -> None:
    """Add the options that both benchmarks have.

    Args:
        runs: default of the folder of the runs.
    """
    parser.add_argument("--seeds", type=positive_int, help="number of seeds; default: by the form")
    parser.add_argument("--model", default="runs/laptop/hf", help="folder of the exported model")
    parser.add_argument(
        "--pretraining", default="configs/laptop.yaml", help="configuration of its pretraining"
    )
    parser.add_argument(
        "--runs", type=Path, default=runs, help="folder of the runs, which are kept"
    )


def train(command: str, config: str, folder: Path, settings: Sequence[str]) -> None:
    """Train in a folder with configs/posttrain/``config``.yaml, unless that run is complete."""
    if not (folder / "hf").is_dir():
        file = f"configs/posttrain/{config}.yaml"
        arguments = [command, file, f"run_dir={folder}", *settings]
        subprocess.run([sys.executable, "-m", "posttrain", *arguments], cwd=ROOT, check=True)


def mean_and_spread(values: Sequence[float | None], form: str) -> str:
    """The mean and sample standard deviation of the runs that have a value, for a table.

    Args:
        values: of each run.
        form: format of a number, such as ``".2f"``.
    """
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    spread = f" ± {format(np.std(found, ddof=1), form)}" if len(found) > 1 else ""
    return f"{format(np.mean(found), form)}{spread}"
