"""Closed and full outputs do not end a run."""

import subprocess
import sys
from pathlib import Path

import pytest

WRITER = """
import os, sys
from pretrain.runtime.output import durable

with durable():
    assert os.open(os.devnull, os.O_WRONLY) > 2  # its descriptor is not one of the standard streams
    for number in range(3000):
        print("line", number, flush=number % 2 == 0)
        print("error", number, file=sys.stderr)
    print("no end of line", end="")
"""


@pytest.mark.parametrize(
    "redirection", ["| head -1", ">&-", "2>&-", ">&- 2>&-", "> /dev/full", "2> /dev/full"]
)
def test_closed_and_full_outputs_are_ignored(redirection: str, tmp_path: Path) -> None:
    command = f'"$0" -c "$1" {redirection}; echo "${{PIPESTATUS[0]}}" > "$2"'
    ended = subprocess.run(
        ["bash", "-c", command, sys.executable, WRITER, str(tmp_path / "status")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (tmp_path / "status").read_text() == "0\n", ended.stderr
    assert "Error" not in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "command",
    [
        "pretrain settings", "pretrain plan configs/laptop.yaml", "pretrain data inspect README.md",
        "posttrain settings", "benchmarks list", "benchmarks table coefficients",
    ],
)  # fmt: skip
def test_commands_end_quietly_if_their_reader_has_ended(command: str) -> None:
    ended = subprocess.run(
        ["bash", "-c", f'"$0" -u -m {command} | true', sys.executable],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    # torch's build for CUDA warns where it finds CUDA but no GPU.
    ours = [line for line in ended.stderr.splitlines() if "CUDA_HOME" not in line]
    assert (ended.returncode, ours) == (0, [])
