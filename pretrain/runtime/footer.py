"""Lines at the bottom of a terminal, above which all other output scrolls.

The terminal does the work: its scroll region (DECSTBM, as in the VT100) excludes the last rows.
Warnings, tracebacks of other ranks and messages of C++ libraries therefore stay readable, although
they are written by other processes and without this module.
"""

import os
from collections.abc import Sequence

_SAVE_CURSOR, _RESTORE_CURSOR = "\x1b7", "\x1b8"
_WHOLE_SCREEN = f"{_SAVE_CURSOR}\x1b[r{_RESTORE_CURSOR}"
_ERASE_BELOW = "\x1b[J"
# Rows that other output has at least.
_MIN_ROWS = 3

RELEASE = f"{_WHOLE_SCREEN}{_ERASE_BELOW}"
"""Removes the lines of a footer, and lets the whole screen scroll again."""


def size_of(descriptor: int) -> os.terminal_size:
    """Columns and rows of a terminal; no more columns than the environment variable COLUMNS.

    Raises:
        OSError: it is not a terminal.
    """
    columns, rows = os.get_terminal_size(descriptor)
    limit = os.environ.get("COLUMNS", "")
    return os.terminal_size((min(columns, int(limit)) if limit.isdigit() else columns, rows))


class Footer:
    """The last rows of a terminal.

    Args:
        descriptor: file descriptor of the terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._reserved = (os.terminal_size((0, 0)), 0)

    def draw(self, lines: Sequence[str]) -> None:
        """Show lines in place of the previous ones; the first of them if there is no room for all.

        Args:
            lines: text with escape sequences for its style, not wider than the terminal.
        """
        size = size_of(self._descriptor)
        shown = lines[: max(size.lines - _MIN_ROWS, 0)]
        parts = []
        # Resizing moves what is on the screen, and resets the region in most terminals.
        if self._reserved != (size, len(shown)):
            self._reserved = size, len(shown)
            parts.append(_reserve(len(shown), size.lines))
        parts.append(_SAVE_CURSOR)
        for row, line in enumerate(shown, size.lines - len(shown) + 1):
            parts.append(f"\x1b[{row};1H{line}\x1b[0m\x1b[K")
        parts.append(_RESTORE_CURSOR)
        # At once, so that nothing is written by others while the cursor is elsewhere.
        os.write(self._descriptor, "".join(parts).encode(errors="replace"))

    def close(self) -> None:
        """Remove the lines."""
        if self._reserved[1]:
            self._reserved = (os.terminal_size((0, 0)), 0)
            os.write(self._descriptor, RELEASE.encode())


def _reserve(height: int, rows: int) -> str:
    """Remove the previous lines, scroll other output up as far as necessary, and set the region."""
    if not height:
        return RELEASE
    index = "\x1bD" * height  # moves down, and scrolls in the last row
    return f"{RELEASE}{index}\x1b[{height}A{_SAVE_CURSOR}\x1b[1;{rows - height}r{_RESTORE_CURSOR}"
