"""The command line of post-training."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import cli

# A command that catches everything, as imports and libraries may.
BUSY = """
import contextlib, time
from posttrain import cli

def busy(_options):
    print("begun", flush=True)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)

cli._COMMANDS["rl"] = busy
cli.main(["rl", "rl.yaml"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_training_ends_the_command_at_once(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stderr == f"{number.name}: stopped; checkpoints are unchanged\n"


def test_settings_of_other_commands_are_refused_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {tmp_path}/nothing\n")
    assert cli.main(["swarm", str(file), "rl.tasks.sums={}"]) == 1
    assert "rl.tasks has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "rl", "swarm", "eval"])
def test_a_missing_configuration_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([command])
    assert capsys.readouterr().err.endswith("arguments are required: config\n")
