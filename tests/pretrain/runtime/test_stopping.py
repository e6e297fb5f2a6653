"""Signals end a run after saving, or at once; ranks end with their launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

# The phases of a run as far as signals are concerned: set-up, training, saving.
RUN = """
import contextlib, sys, time
from pretrain.runtime import stopping

# Both the command line and train() handle signals.
with stopping.on_signals(), stopping.on_signals() as termination:
    print("set up", flush=True)
    while sys.argv[1] == "set up":
        with contextlib.suppress(BaseException):  # like imports and libraries
            time.sleep(60)
    termination.saves = True
    print("training", flush=True)
    while not termination.signal:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(60 if sys.argv[1] == "slow" else 0.5)
    print("saved", flush=True)
    raise SystemExit(stopping.status(termination.signal))
"""


def run(phase: str, **environment: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, phase],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    wait_for(process, "set up" if phase == "set up" else "training")
    return process


def wait_for(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    while (output := process.stdout.readline()) != f"{line}\n":
        assert output, process.communicate()


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_in_training_save_and_exit_with_their_status(number: signal.Signals) -> None:
    process = run("training")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (128 + number, "saving\nsaved\n")
    assert stderr == f"{number.name}: saving after this step; Ctrl-C exits without saving\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_during_set_up_exit_at_once_even_if_exceptions_are_caught(
    number: signal.Signals,
) -> None:
    process = run("set up")
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (128 + number, "")
    assert stderr == f"{number.name}: stopped; checkpoints are unchanged\n"


def test_only_a_second_ctrl_c_exits_without_saving() -> None:
    process = run("slow")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "saving")
    for number in (signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.endswith("SIGINT again: exiting without saving\n")


def test_ctrl_c_forwarded_by_torchrun_does_not_count_as_the_second() -> None:
    process = run("training", TORCHELASTIC_RUN_ID="x")
    process.send_signal(signal.SIGINT)
    wait_for(process, "saving")
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "saved\n")


# A library that catches the exception, and then lacks what its users need.
CATCHES = """
import contextlib, os, signal, time

with contextlib.suppress(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
WORKS = """
import os, signal, time
from pretrain.runtime import stopping

with stopping.without_traceback():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "arguments", [["-m", "pretrain", "plan", "configs/laptop.yaml"], ["-c", WORKS]]
)
def test_ctrl_c_leaves_no_traceback(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "torch.py").write_text(CATCHES)
    ended = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (130, "interrupted\n")


def test_ignored_signals_stay_ignored() -> None:
    """For example SIGHUP under nohup."""
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", RUN, "training"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(process, "training")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saving\nsaved\n"


RANK = """
import os, sys, time
from pretrain.runtime.stopping import end_with_launcher

with end_with_launcher(0.05):
    open(sys.argv[1], "w").write(str(os.getpid()))
    time.sleep(60)
"""


@pytest.mark.parametrize("launched", [True, False])
def test_ranks_end_with_a_killed_torchrun_and_single_processes_survive_their_shell(
    tmp_path: Path, launched: bool
) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}, sys.argv[1]])"
    environment = {"TORCHELASTIC_RUN_ID": "x"} if launched else {}
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "pid")],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launcher.kill()
    if launched:  # the rank shares stderr, which is closed when it ends
        assert (
            f"the launcher (process {launcher.pid}) has ended"
            in launcher.communicate(timeout=60)[1]
        )
        return
    launcher.wait()
    time.sleep(1.0)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # still running
    launcher.communicate()
