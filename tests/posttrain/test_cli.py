"""The command line of post-training."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import cli
from posttrain.config import Config
from pretrain import config as configuration

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


def test_a_section_that_is_changed_in_part_keeps_its_other_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the supervised start's optimizer are not those of reinforcement learning."""
    assert cli.main(["settings"]) == 0
    lines = capsys.readouterr().out
    assert "\noptimizer.lr=0.0003  " in lines and "\nswarm.start.lr=0.01  " in lines
    assert "\nswarm.start.frozen=()  Patterns" in lines  # the meaning of an inherited setting
    (tmp_path / "run.yaml").write_text("swarm: {start: {warmup_steps: 3}}\n")
    start = configuration.load_as(Config, tmp_path / "run.yaml").swarm.start
    assert (start.lr, start.warmup_steps) == (0.01, 3)
