"""A terminal shows a live view; a file or a pipe receives plain lines."""

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
from tests.pretrain.runtime.test_metrics_writer import STEP

METRICS: dict[str, Any] = {**STEP, "memory_gib": 1.25}


def test_pipes_receive_lines_for_the_first_the_last_and_every_tenth_step(
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
    assert "loss 3.500 | text 3.250 | caption -" in lines[0]
    assert "\x1b" not in "".join(lines)


def test_live_view_shows_progress_and_metrics() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, height=20)
    terminal = Terminal(steps=40, done=0, log_every=10, console=screen)
    terminal.say("[not] markup")
    for step in range(1, 11):
        terminal.show({"step": step, **METRICS, "loss": 6.0 - step / 10})
        terminal.show({"step": step, **METRICS, "loss": math.nan})  # a skipped step
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
        "1.25",
    ):
        assert text in last, text


def test_cursor_is_visible_again_after_an_error() -> None:
    """The live view hides it."""
    code = (
        "from pretrain.runtime.terminal import Terminal; import time;"
        "terminal = Terminal(10, 0, 5); terminal.say('hello'); raise RuntimeError('broken')"
    )
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            chunk = os.read(controller, 4096)
        except OSError:  # Linux: the terminal is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(controller)
    assert process.wait() == 1
    assert b"hello" in output and b"broken" in output
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_sparkline_has_one_block_per_value_in_the_order_of_the_values(
    values: list[float],
) -> None:
    line = sparkline(values)
    assert len(line) == len(values)
    blocks = dict(zip(values, line, strict=True))
    ordered = [blocks[value] for value in sorted(blocks)]
    assert ordered == sorted(ordered)
    if len(blocks) > 1:
        assert ordered[0] == "▁" and ordered[-1] == "█"


def test_durations_are_formatted_in_hours_minutes_and_seconds() -> None:
    assert [duration(s) for s in (0.5, 61, 3600, 90061)] == ["0m00s", "1m01s", "1h00m", "25h01m"]
