"""Progress of a run on standard output: a live view in a terminal, otherwise lines of text."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from pretrain.metrics import METRICS, READING, Record, formatted
from pretrain.runtime import live
from pretrain.runtime.progress import bar_line, duration, fitting, sparkline

# Metrics of a progress line, in its order.
_METRICS = (
    *("loss", "text_loss", "caption_loss", "max_logit", "heads_clipped", "grad_norm"),
    *("expert_load", "encoder_balance", "lr", "tokens_per_second", "mfu", "memory_gib"),
)
# Rows of the live view; in a narrow terminal, the last ones of each row are left out.
_ROWS = (
    ("loss", "text_loss", "caption_loss", "grad_norm", "lr"),
    ("max_logit", "heads_clipped", "expert_load", "encoder_balance"),
    ("tokens_per_second", "mfu", "memory_gib"),
)
# Points of a sparkline, and the characters that the first cell of each row has besides.
_POINTS = 32
_FIRST_CELL = 17


def _cells(metrics: Record, names: Iterable[str]) -> list[str]:
    """Label and value of each metric."""
    values = {name: formatted(metrics, name) for name in names}
    if "heads_clipped" in values:
        values["heads_clipped"] += f"/{metrics['heads']}"
    return [f"{METRICS[name].label} {value}" for name, value in values.items()]


def progress_line(metrics: Record, steps: int, eta_seconds: float) -> str:
    """One line about a training step."""
    step = f"step {metrics['step']:>{len(str(steps))}}/{steps}"
    return " | ".join([step, *_cells(metrics, _METRICS), f"ETA {duration(eta_seconds)}"])


def held_out_line(metrics: Record) -> str:
    """One line about a held-out evaluation."""
    names = ("held_out_text_loss", "held_out_caption_loss")
    cells = [f"{METRICS[n].label} {formatted(metrics, n)}" for n in names if metrics[n] is not None]
    right, swapped = metrics["right_caption_loss"], metrics["swapped_caption_loss"]
    if right is not None:
        cells.append(
            f"with the right image {right:.3f}, with another image {swapped:.3f} "
            f"(gap {swapped - right:+.3f} nats/token)"
        )
    if metrics.get("exact_match") is not None:
        cells += [f"{METRICS[name].label} {formatted(metrics, name)}" for name in READING]
    return f"held out after step {metrics['step']}: " + (
        " | ".join(cells) or "nothing to evaluate (data.held_out, or a source's split)"
    )


class History:
    """A series of any length in at most ``limit`` points, each of equally many values.

    Args:
        limit: an even number.
        largest: whether a point is the largest of its values, instead of their mean.
    """

    def __init__(self, limit: int = _POINTS, *, largest: bool = False) -> None:
        self._limit, self._largest = limit, largest
        self._points: list[float] = []
        self._stride = 1  # values of a point
        self._value, self._count = 0.0, 0  # the last point, while it is incomplete

    def add(self, value: float | None) -> None:
        """Append a value, unless it is missing or not finite."""
        if value is None or not math.isfinite(value):
            return
        self._count += 1
        if self._largest:
            self._value = value if self._count == 1 else max(self._value, value)
        else:
            self._value += (value - self._value) / self._count
        if self._count < self._stride:
            return
        self._points.append(self._value)
        self._value, self._count = 0.0, 0
        if len(self._points) > self._limit:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            self._value, self._count = self._points[-1], self._stride
            self._points = [max(pair) if self._largest else sum(pair) / 2 for pair in pairs]
            self._stride *= 2

    def last(self, count: int) -> list[float]:
        """The last points; fewer if there are not as many."""
        points = [*self._points, self._value] if self._count else self._points
        return points[-count:] if count > 0 else []


class Terminal:
    """Progress and remaining time.

    In a terminal, a live view stays at the bottom while messages scroll above it. Otherwise a line
    is printed for the first step, the last one and every ``log_every`` steps.

    Args:
        steps: length of the run.
        done: last finished step.
        log_every: steps between lines.
        activity: returns what the run is doing.
    """

    def __init__(
        self, steps: int, done: int, log_every: int, activity: Callable[[], str] = lambda: ""
    ) -> None:
        self._steps, self._done, self._log_every = steps, done, log_every
        self._activity = activity
        self._start = time.monotonic()
        self._metrics: Record = {}
        self._history = {"loss": History(), "max_logit": History(largest=True)}
        self._is_live = live.terminal() is sys.stdout
        self._showing = contextlib.ExitStack()
        if self._is_live:
            self._showing.enter_context(live.showing(self._view))

    def say(self, text: str) -> None:
        """Print a message."""
        print(text, flush=True)

    def show(self, metrics: Record) -> None:
        """Show the metrics of a training step."""
        step = metrics["step"]
        self._metrics = metrics
        for name, history in self._history.items():
            history.add(metrics[name])
        due = step % self._log_every == 0 or step == self._done + 1 or step == self._steps
        if not self._is_live and due:
            self.say(progress_line(metrics, self._steps, self._seconds_left()))

    def close(self) -> None:
        """End the live view; print the last line about a step."""
        self._showing.close()
        if self._is_live and self._metrics:
            self.say(progress_line(self._metrics, self._steps, self._seconds_left()))
        self._is_live = False

    def _seconds_left(self) -> float:
        step: int = self._metrics["step"]
        elapsed = time.monotonic() - self._start
        return elapsed / (step - self._done) * (self._steps - step)

    def _view(self, width: int) -> list[Any]:
        metrics, elapsed = self._metrics, duration(time.monotonic() - self._start)
        if not metrics:
            return [fitting([self._activity() or "before the first step", elapsed], width)]
        step = metrics["step"]
        share = step / self._steps
        times = [f"{share:.0%}", f"ETA {duration(self._seconds_left())}", f"{elapsed} elapsed"]
        if self._activity() and not self._activity().startswith("step "):
            times.insert(0, self._activity())
        lines = [bar_line(f"step {step:,}/{self._steps:,}", share, times, width)]
        return [*lines, *(self._row(metrics, names, width) for names in _ROWS)]

    def _row(self, metrics: Record, names: tuple[str, ...], width: int) -> str:
        """Metrics in one line; the first one with a sparkline, if it has a history."""
        first, *others = _cells(metrics, names)
        room = max(min(_POINTS, width - _FIRST_CELL - 1), 0)
        history = self._history.get(names[0])
        blocks = sparkline(history.last(room)) if history else ""
        return fitting([f"{first:<{_FIRST_CELL}} {blocks:<{room}}", *others], width)
