"""A terminal shows a live view below everything else; a file or a pipe receives plain lines."""

import math
import re
import signal
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain import console
from pretrain.config import Config
from pretrain.runtime.footer import RELEASE
from pretrain.runtime.live import render
from pretrain.runtime.progress import Progress, bar_line, duration, fitting, sparkline
from pretrain.runtime.terminal import History, Terminal, held_out_line, progress_line
from tests.pretrain.runtime import screen
from tests.pretrain.runtime.test_metrics_writer import STEP

METRICS: dict[str, Any] = {**STEP, "memory_gib": 1.25}

# Ten steps of a run of 40; then the screen is looked at (`look`).
PROGRAM = f"""
import os, subprocess, sys, time
from pretrain.runtime import live
from pretrain.runtime.terminal import Terminal
live._SECONDS = 60  # drawn only by look()
def look():
    live._display.draw(sys.stdout)
    os.write(1, {screen.MARK!r})
    sys.stdin.readline()
terminal = Terminal(40, 0, 5, lambda: activity)
activity = ""
for step in range(1, 11):
    terminal.say(f"message {{step}}")
    terminal.show({{"step": step, **{METRICS!r}, "loss": 6.0 - step / 10, "max_logit": step * 1.0}})
"""


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


def test_an_evaluation_without_held_out_data_names_the_setting() -> None:
    names = ("held_out_text_loss", "held_out_caption_loss", "right_caption_loss")
    metrics = {"step": 6, "swapped_caption_loss": None, **dict.fromkeys(names)}
    line = held_out_line(metrics)
    assert line.startswith("held out after step 6: nothing to evaluate (data.held_out")


def test_a_run_without_steps_left_names_the_setting() -> None:
    config = Config(steps=300)
    assert console._start(config, 0) == "starting at step 0"
    assert console._start(config, 299) == "resuming after step 299"
    ended = "nothing is left to train after step 300: to continue, raise steps"
    assert console._start(config, 300) == ended


def test_the_view_is_below_the_output_of_all_processes_and_disappears() -> None:
    """Also of those that write to the terminal directly: other ranks, and libraries in C++."""
    others = """
live._display.draw(sys.stdout)
os.write(2, b"a warning from C++\\n")
live._display.draw(sys.stdout)
subprocess.run([sys.executable, "-c", "print('a traceback of rank 1', *range(9), sep=chr(10))"])
look()
terminal.close()
print("the end")
"""
    shown = screen.run(PROGRAM + others)
    assert shown.status == 0
    *above, bar, loss, logit, speed = shown.before_end
    assert bar.startswith("step 10/40  ━") and re.search(
        r"━  25%  ETA 0m\d\ds  0m\d\ds elapsed$", bar
    )
    assert loss.startswith("loss 5.000        █▇▆▆▅▄▃▃▂▁")
    assert logit.startswith("max logit  10.0   ▁▂▃▃▄▅▆▆▇█") and "heads clipped 1/6" in logit
    assert speed.startswith("tokens/s  1,000") and "MFU 25.0%" in speed
    assert above[-1] == "" and above[-2] == "8"  # the cursor is in the line above the view
    said = [line for line in shown.lines if line]
    assert said[:10] == [f"message {step}" for step in range(1, 11)]
    assert said[10:21] == ["a warning from C++", "a traceback of rank 1", *map(str, range(9))]
    last = progress_line({"step": 10, **METRICS, "loss": 5.0, "max_logit": 10.0}, 40, 0)
    assert said[21].startswith(last[:60]) and said[-1] == "the end"


@pytest.mark.parametrize("size", [(20, 60), (8, 100)])
def test_the_view_follows_the_size_of_the_terminal(size: tuple[int, int]) -> None:
    again = 'look()\nlook()\nterminal.close()\nprint("the end")\n'
    shown = screen.run(PROGRAM + again, resized=size)
    rows, columns = size
    view = [line for line in shown.before_end if re.match("step |loss |max logit|tokens/s", line)]
    assert view == shown.before_end[rows - len(view) :]
    assert len(view) == 4 and all(len(line) <= columns for line in view)
    assert not any(line.startswith("loss") for line in shown.lines)
    assert shown.lines.count("the end") == 1


@pytest.mark.parametrize(("rows", "count"), [(3, 0), (5, 2)])
def test_three_rows_remain_for_other_output(rows: int, count: int) -> None:
    shown = screen.run(PROGRAM + "look()", rows=rows)
    view = [line for line in shown.before_end if re.match("step |loss |max logit|tokens/s", line)]
    assert view == shown.before_end[rows - count :]


def test_narrow_terminals_show_the_most_important_numbers() -> None:
    shown = screen.run(PROGRAM + "look()", columns=100, COLUMNS="40")
    view = shown.before_end[-4:]
    assert re.fullmatch(r"step 10/40  ━+╺━+  25%  ETA 0m\d\ds", view[0])
    assert view[1].startswith("loss 5.000        █▇▆▆▅▄▃▃▂▁")
    assert all(len(line) <= 40 for line in view)


def test_the_view_has_no_colors_with_no_color() -> None:
    color = re.compile(rb"\x1b\[[\d;]*(3[0-8]|9[0-7])[\d;]*m")
    assert color.search(screen.run(PROGRAM + "look()").output)
    shown = screen.run(PROGRAM + "look()", NO_COLOR="1")
    assert not color.search(shown.output) and "━" in shown.before_end[-4]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"RANK": "1"}])
def test_nothing_is_drawn_by_other_ranks_or_in_terminals_without_a_cursor(
    environment: dict[str, str],
) -> None:
    shown = screen.run(PROGRAM + "terminal.close()", **environment)
    assert b"\x1b" not in shown.output
    assert sum(line.startswith("step ") for line in shown.lines) == 3  # steps 1, 5 and 10


def test_sparklines_are_ascii_without_unicode() -> None:
    shown = screen.run(PROGRAM + "look()", PYTHONIOENCODING="latin-1")
    assert shown.before_end[-3].startswith("loss 5.000        #*++=-,,._")


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("raise RuntimeError('broken')", 1),
        ("signal.raise_signal(signal.SIGTERM); time.sleep(60)", 128 + signal.SIGTERM),
        ("signal.raise_signal(signal.SIGINT); time.sleep(60)", 128 + signal.SIGINT),
        ("sys.exit(3)", 3),
    ],
)
def test_the_terminal_is_in_order_after_an_early_end(end: str, status: int) -> None:
    program = f"""
import signal
from pretrain.runtime import stopping
with stopping.on_signals():
    live._display.draw(sys.stdout)
    {end}
"""
    shown = screen.run(PROGRAM + program)
    assert shown.status == status
    assert shown.output.count(b"loss") == 1
    assert RELEASE.encode() in shown.output.partition(b"loss")[2]
    assert not any(line.startswith("loss") for line in shown.lines)
    assert "broken" in "".join(shown.lines) or "broken" not in end


def test_progress_is_a_bar_that_disappears() -> None:
    code = f"""
import os, sys, time
from pretrain.runtime import live
from pretrain.runtime.progress import Progress, counted
live._SECONDS = 60
with Progress("preparing the data"):
    for number in counted(range(4), "indexing", "files"):
        if number == 2:
            live._display.draw(sys.stdout)
            os.write(1, {screen.MARK!r})
            sys.stdin.readline()
print("done")
"""
    shown = screen.run(code)
    outer, inner = shown.before_end[-2:]
    assert re.fullmatch(r"preparing the data  0m00s", outer)
    assert re.fullmatch(r"indexing  ━+╺━+  50%  ETA 0m00s  2 of 4 files", inner)
    assert [line for line in shown.lines if line] == ["done"]


def test_names_in_brackets_are_no_markup() -> None:
    """As in a path: ``[/b]`` would end the thread that draws, and ``[b]`` would not be shown."""
    lines = [fitting(["a[/b][b].txt"], 60), bar_line("reading [b]:key:[/c]", 0.5, ["50%"], 60)]
    shown = render(lines, 60, sys.stdout)
    assert "a[/b][b].txt" in shown[0] and "reading [b]:key:[/c]" in shown[1]


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (None, "indexing: 2,000 documents, 7 tokens so far\n"),
        (3000, "indexing: 2,000 of 3,000 documents, 7 tokens so far\n"),
    ],
)
def test_progress_is_reported_in_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], total: int | None, line: str
) -> None:
    with Progress("indexing", total) as progress:
        progress(1)
        assert capsys.readouterr().err == ""
        progress._next = 0
        progress(2000, ", 7 tokens")
    assert capsys.readouterr().err == line


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
@example(values=[5e-324, 0.0])
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


@given(values=st.lists(st.integers(-1000, 1000), max_size=200), largest=st.booleans())
def test_a_history_joins_equally_many_values_in_each_point(
    values: list[int], largest: bool
) -> None:
    history = History(4, largest=largest)
    for value in values:
        history.add(float(value))
        history.add(math.nan)
        history.add(None)
    stride = 1
    while len(values) >= 5 * stride:  # more than 4 points
        stride *= 2
    parts = [values[first : first + stride] for first in range(0, len(values), stride)]
    expected = [max(part) if largest else sum(part) / len(part) for part in parts]
    assert history.last(5) == pytest.approx(expected)
    assert history.last(2) == history.last(5)[-2:] and history.last(0) == []


@given(parts=st.lists(st.text("ab", min_size=1, max_size=9), max_size=6), width=st.integers(0, 40))
def test_as_many_parts_as_fit_are_in_a_line(parts: list[str], width: int) -> None:
    line = fitting(parts, width)
    assert len(line) <= width
    longer = ["  ".join(parts[:count]) for count in range(len(parts) + 1)]
    assert all(len(text) > width for text in longer if len(text) > len(line))


def test_durations_are_formatted_in_hours_minutes_and_seconds() -> None:
    assert [duration(s) for s in (0.5, 61, 3600, 90061)] == ["0m00s", "1m01s", "1h00m", "25h01m"]
