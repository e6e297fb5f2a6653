"""Signals end a run in an orderly way, or at once when that is asked for; so does its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

# A run that is set up, trains, saves and is closed, as far as signals are concerned.
RUN = """
import contextlib, sys, time
from pretrain.runtime import stopping

with stopping.on_signals(), stopping.on_signals() as termination:  # the command line's, the run's
    print("set up", flush=True)
    while sys.argv[1] == "set up":
        with contextlib.suppress(BaseException):  # as imports and libraries do
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


def run(where: str, **environment: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, where],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    reached(process, "set up" if where == "set up" else "training")
    return process


def reached(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    while (found := process.stdout.readline()) != f"{line}\n":
        assert found, process.communicate()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_training_saves_and_leaves_with_its_status(number: signal.Signals) -> None:
    process = run("training")
    process.send_signal(number)
    said, told = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "saving\nsaved\n")
    assert told == f"{number.name}: saving after this step; Ctrl-C leaves without saving\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_set_up_leaves_with_a_line_whatever_is_caught(
    number: signal.Signals,
) -> None:
    process = run("set up")
    process.send_signal(number)
    said, told = process.communicate(timeout=60)
    assert (process.returncode, said) == (128 + number, "")
    assert told == f"{number.name}: stopped; checkpoints are as they were\n"


def test_a_second_ctrl_c_leaves_at_once_and_no_other_signal_does() -> None:
    process = run("slow")
    process.send_signal(signal.SIGTERM)
    reached(process, "saving")
    for number in (signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.endswith("SIGINT again: leaving without saving\n")


def test_a_ctrl_c_that_torchrun_passes_on_is_no_second_one() -> None:
    process = run("training", TORCHELASTIC_RUN_ID="x")
    process.send_signal(signal.SIGINT)
    reached(process, "saving")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "saved\n")


def test_an_ignored_signal_stays_ignored() -> None:
    """As SIGHUP under nohup."""
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-c", RUN, "training"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    reached(process, "training")
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
def test_a_rank_ends_with_a_killed_torchrun_and_a_process_of_its_own_does_not_with_its_shell(
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
    if launched:  # the end of stderr is the end of the rank, which has it too
        assert f"torchrun (process {launcher.pid}) has ended" in launcher.communicate(timeout=60)[1]
        return
    launcher.wait()
    time.sleep(1.0)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it is still there
    launcher.communicate()
