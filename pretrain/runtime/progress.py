"""Progress of long operations: a live view in a terminal, otherwise lines of text."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from types import TracebackType
from typing import Any, Self, TypeVar

from pretrain.runtime import live

T = TypeVar("T")

_BLOCKS = "▁▂▃▄▅▆▇█"
_LINE_SECONDS = 10.0
_MIN_BAR = 10


def duration(seconds: float) -> str:
    """A duration as ``1h02m`` or ``2m03s``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of blocks, from the lowest block for the minimum to a full one."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low if high > low else 1.0
    # Divided, because the reciprocal of a tiny span would be infinite.
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)


def fitting(parts: Sequence[str], width: int, gap: str = "  ") -> str:
    """As many of the first parts as fit into a width, in one line."""
    line = ""
    for part in parts:
        longer = f"{line}{gap}{part}" if line else part
        if line and len(longer) > width:
            break
        line = longer
    return line[:width]


def bar_line(left: str, share: float, right: Sequence[str], width: int) -> Any:
    """A text, a bar and as many other texts as fit, in one line of a live view.

    Args:
        share: filled part of the bar, in [0, 1]. The bar is left out if there is no room.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    # The other texts are worth more than the bar.
    rest = fitting(right, width - len(left) - 2) if width - len(left) > _MIN_BAR else ""
    line = Table.grid(padding=(0, 2), expand=True)
    line.add_column(no_wrap=True, overflow="crop")
    if width - len(left) - len(rest) - 4 < _MIN_BAR:
        line.add_row(fitting([left, rest], width))
        return line
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(left, ProgressBar(total=1.0, completed=share), rest)
    return line


class Progress:
    """Context that shows the progress of an operation while it lasts.

    In a terminal there is a bar, or, if the total is not known, the time and the number so far.
    Otherwise a line is printed on stderr every ten seconds.

    Args:
        operation: description of the operation, such as ``indexing images``.
        total: number of all things; None if it is not known.
        unit: their name, in the plural.
    """

    def __init__(self, operation: str, total: int | None = None, unit: str = "documents") -> None:
        self._operation, self._total, self._unit = operation, total, unit
        self._start = time.monotonic()
        self._next = self._start + _LINE_SECONDS
        self._count, self._others = 0, ""
        self._showing = live.showing(self._view)

    def __enter__(self) -> Self:
        self._showing.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._showing.__exit__(kind, error, at)

    def __call__(self, count: int, others: str = "") -> None:
        """Report how many are finished, and other numbers."""
        self._count, self._others = count, others
        if time.monotonic() >= self._next and live.terminal() is None:
            print(f"{self._operation}: {self._numbers()} so far", file=sys.stderr, flush=True)
            self._next = time.monotonic() + _LINE_SECONDS

    def _numbers(self) -> str:
        total = "" if self._total is None else f" of {self._total:,}"
        return f"{self._count:,}{total} {self._unit}{self._others}"

    def _view(self, width: int) -> list[Any]:
        elapsed = time.monotonic() - self._start
        if not self._total:
            numbers = [self._numbers()] if self._count else []
            return [fitting([self._operation, duration(elapsed), *numbers], width)]
        share = min(self._count / self._total, 1.0)
        right = [f"{share:.0%}", duration(elapsed)]
        if share > 0:
            right[1] = f"ETA {duration(elapsed / share - elapsed)}"
        return [bar_line(self._operation, share, [*right, self._numbers()], width)]


def counted(things: Iterable[T], operation: str, unit: str = "documents") -> Iterator[T]:
    """Iterate over things while the progress of an operation on them is shown."""
    total = len(things) if isinstance(things, Sized) else None
    with Progress(operation, total, unit) as progress:
        for number, thing in enumerate(things):
            progress(number)
            yield thing
