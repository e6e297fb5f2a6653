"""The live view: progress at the bottom of the terminal of the main rank, drawn twice a second."""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pretrain.runtime.footer import Footer, size_of

_SECONDS = 0.5
# Blocks of sparklines, in a terminal without Unicode.
_ASCII = str.maketrans("▁▂▃▄▅▆▇█", "_.,-=+*#")

View = Callable[[int], list[Any]]
"""Returns the lines to show, as rich's renderables, given the width of the terminal."""


def terminal() -> Any:
    """The stream of the terminal that can show a live view: standard output, or else the errors.

    Returns:
        None on other ranks, without a terminal, and in one that cannot move its cursor.
    """
    if os.environ.get("RANK", "0") != "0" or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return None
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or closed
            if stream.isatty() and all(size_of(stream.fileno())):
                return stream
    return None


def render(lines: list[Any], width: int, stream: Any) -> list[str]:
    """Lines as text with escape sequences, in the colors that the terminal has (see NO_COLOR)."""
    from rich.console import Console

    # Text such as "[a]" or ":key:" is shown as it is.
    console = Console(
        file=stream, force_terminal=True, width=width, highlight=False, markup=False, emoji=False
    )
    with console.capture() as capture:
        for line in lines:
            console.print(line, no_wrap=True, overflow="crop", crop=True)
    text = capture.get()
    if not console.encoding.lower().startswith("utf"):
        text = text.translate(_ASCII).encode("ascii", "replace").decode()
    return text.splitlines()


class _Display:
    """Views in the order in which they were added, drawn by a thread while there are any."""

    def __init__(self) -> None:
        self._views: list[View] = []
        # Guards the views. The drawing thread, which exit stops at any point, never holds it.
        self._changing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread()
        self._footer: Footer | None = None
        self._process = 0

    def add(self, view: View, stream: Any) -> None:
        with self._changing:
            self._views.append(view)
            if self._footer is not None:
                return
            self._process, self._footer = os.getpid(), Footer(stream.fileno())
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=self._draw, args=(self._stop, stream), daemon=True, name="live"
            )
            self._thread.start()

    def remove(self, view: View) -> None:
        with self._changing:
            if view in self._views:
                self._views.remove(view)
                if not self._views:
                    self.release()

    def release(self) -> None:
        """Remove all views and restore the terminal."""
        self._views.clear()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * _SECONDS)
        footer, self._footer = self._footer, None
        if footer is not None and os.getpid() == self._process:  # not a fork's
            with contextlib.suppress(OSError):  # the terminal is closed
                footer.close()

    def draw(self, stream: Any) -> None:
        """Draw the views as they are now."""
        with contextlib.suppress(OSError, ValueError):  # the terminal is closed
            width = size_of(stream.fileno()).columns
            lines = [line for view in tuple(self._views) for line in view(width)]
            if (footer := self._footer) is not None and lines:
                footer.draw(render(lines, width, stream))

    def _draw(self, stop: threading.Event, stream: Any) -> None:
        while not stop.wait(_SECONDS):
            self.draw(stream)


_display = _Display()
atexit.register(_display.release)


@contextlib.contextmanager
def showing(view: View) -> Iterator[None]:
    """Context in which a view is shown, if there is a terminal for it."""
    if (stream := terminal()) is None:
        yield
        return
    _display.add(view, stream)
    try:
        yield
    finally:
        _display.remove(view)


def release() -> None:
    """Restore the terminal; for a process that ends without Python's cleanup."""
    _display.release()
