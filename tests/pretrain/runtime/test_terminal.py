"""A terminal gets a view that stays in place; a file or a pipe gets plain lines."""

import io
import math
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pretrain.runtime.terminal import Terminal, duration, sparkline
from tests.pretrain.runtime.test_metrics import STEP

METRICS: dict[str, Any] = {**STEP, "memory_gib": 1.25}


def test_a_pipe_gets_a_line_for_the_first_the_last_and_every_tenth_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal(steps=25, done=2, log_every=10)
    for step in range(3, 26):
        terminal.show({"step": step, **METRICS})
    terminal.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        f"step {step:2}/25" for step in (3, 10, 20, 25)
    ]
    assert "loss 3.500 | text 3.250 | caption     -" in lines[0]
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_progress_and_every_measure() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, height=20)
    terminal = Terminal(steps=40, done=0, log_every=10, console=screen)
    terminal.say("[not] markup")
    for step in range(1, 11):
        terminal.show({"step": step, **METRICS, "loss": 6.0 - step / 10})
        terminal.show({"step": step, **METRICS, "loss": math.nan})  # one that was skipped
    terminal.show({"step": 10, **METRICS, "loss": 5.0})
    terminal.close()
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "[not] markup" in shown
    last = shown.rpartition("step 10/40")[2]
    for text in (
        "25%",
        "ETA",
        "5.000 █",
        "3.250",
        "7.5",
        "1/6",
        "1.50",
        "1,000",
        "25.0%",
        "1.2 GiB",
    ):
        assert text in last, text


def test_a_real_terminal_has_its_cursor_back_after_an_error() -> None:
    """The view hides it."""
    code = (
        "from pretrain.runtime.terminal import Terminal; import time;"
        "terminal = Terminal(10, 0, 5); terminal.say('hello'); raise RuntimeError('broken')"
    )
    controller, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=side, stderr=side, env={**os.environ, "TERM": "xterm"}
    )
    os.close(side)
    told = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not chunk:
            break
        told += chunk
    os.close(controller)
    assert process.wait() == 1
    assert b"hello" in told and b"broken" in told
    assert told.rindex(b"\x1b[?25h") > told.rindex(b"\x1b[?25l")


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_sparkline_has_a_block_for_each_value_and_larger_ones_are_higher(
    values: list[float],
) -> None:
    line = sparkline(values)
    assert len(line) == len(values)
    blocks = dict(zip(values, line, strict=True))
    ordered = [blocks[value] for value in sorted(blocks)]
    assert ordered == sorted(ordered)
    if len(blocks) > 1:
        assert ordered[0] == "▁" and ordered[-1] == "█"


def test_durations_are_short() -> None:
    assert [duration(s) for s in (0.5, 61, 3600, 90061)] == ["0m00s", "1m01s", "1h00m", "25h01m"]
