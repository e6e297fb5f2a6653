"""Closed and full outputs do not end a run."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.runtime.metrics_writer import AppendedFile

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


@pytest.mark.parametrize("command", ["settings", "plan configs/laptop.yaml"])
def test_commands_end_quietly_if_their_reader_has_ended(command: str) -> None:
    ended = subprocess.run(
        ["bash", "-c", f'"$0" -u -m pretrain {command} | true', sys.executable],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


def test_records_refused_by_a_full_disk_are_written_once_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = AppendedFile(path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    file.append(b"one\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, unlimited[1]))
    try:
        file.append(b"two\n")  # there is room for two bytes
        file.append(b"three\n")
        assert path.read_bytes() == b"one\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    file.append(b"four\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "metrics.jsonl (File too large); training continues" in warnings[0]
    assert "metrics.jsonl is written again" in warnings[1]
