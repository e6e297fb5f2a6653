"""Programs in a real terminal (a pty), whose output an emulator shows on a screen."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import NamedTuple

import pyte

ROOT = Path(__file__).parents[3]


class Shown(NamedTuple):
    """Output of a program that has ended.

    Attributes:
        lines: all lines of output that are on the screen or have been scrolled off it.
        output: the bytes that the program wrote.
        status: its exit status.
        before_end: lines of the screen when the program wrote ``mark``.
    """

    lines: list[str]
    output: bytes
    status: int
    before_end: list[str]


MARK = b"\x1b]0;mark\x07"
"""Sets the title of the window: written by a program when the screen is to be looked at."""


def set_size(descriptor: int, rows: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def run(
    code: str,
    rows: int = 12,
    columns: int = 80,
    resized: tuple[int, int] | None = None,
    **environment: str,
) -> Shown:
    """Run Python code in a terminal.

    Args:
        resized: rows and columns of the terminal after the first :data:`MARK`, when a line is sent
            to the program.
        environment: changes of the environment variables.
    """
    controller, terminal = pty.openpty()
    set_size(terminal, rows, columns)
    names = {"NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR", "RANK", "COLORTERM"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT,
        env={**inherited, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(terminal)
    screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
    stream, output, before_end, looked = pyte.ByteStream(screen), b"", list[str](), 0
    while chunk := _read(controller):
        output += chunk
        stream.feed(chunk)
        if output.count(MARK) > looked:
            looked += 1
            before_end = list(screen.display)
            if resized:
                set_size(controller, *resized)
                screen.resize(*resized)
            os.write(controller, b"\n")
    os.close(controller)
    above = ["".join(row[i].data for i in range(columns)) for row in screen.history.top]
    lines = [line.rstrip() for line in (*above, *screen.display)]
    return Shown(lines, output, process.wait(), [line.rstrip() for line in before_end])


def _read(controller: int) -> bytes:
    assert select.select([controller], [], [], 60)[0], "the program writes nothing"
    try:
        return os.read(controller, 1 << 16)
    except OSError:  # Linux: the terminal is closed
        return b""
