"""Progress of a run on standard output: a live view in a terminal, otherwise lines of text."""

import atexit
import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.metrics import METRICS, READING, Record, formatted

# Metrics of a progress line; each group is a column of the live view.
_COLUMNS = (
    ("loss", "text_loss", "caption_loss"),
    ("max_logit", "heads_clipped", "grad_norm"),
    ("expert_load", "encoder_balance", "lr"),
    ("tokens_per_second", "mfu", "memory_gib"),
)
_BLOCKS = "▁▂▃▄▅▆▇█"
# Losses drawn in the live view.
_NUM_LOSSES = 40


def duration(seconds: float) -> str:
    """A duration as ``1h02m`` or ``2m03s``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _cells(metrics: Record, names: Iterable[str]) -> list[tuple[str, str]]:
    """(label, value) of each metric."""
    values = {name: formatted(metrics, name) for name in names}
    if "heads_clipped" in values:
        values["heads_clipped"] += f"/{metrics['heads']}"
    return [(METRICS[name].label, value) for name, value in values.items()]


def progress_line(metrics: Record, steps: int, eta_seconds: float) -> str:
    """One line about a training step."""
    step = f"step {metrics['step']:>{len(str(steps))}}/{steps}"
    cells = _cells(metrics, (name for names in _COLUMNS for name in names))
    cells.append(("ETA", duration(eta_seconds)))
    return " | ".join([step, *(f"{label} {value}" for label, value in cells)])


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
    return f"held out after step {metrics['step']}: " + (" | ".join(cells) or "no data")


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of blocks, from the lowest block for the minimum to a full one."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


class Terminal:
    """Progress and remaining time.

    In a terminal, a live view stays at the bottom while messages scroll above it. Otherwise a line
    is printed for the first step, the last one and every ``log_every`` steps.

    Args:
        steps: length of the run.
        done: last finished step.
        log_every: steps between lines.
        console: destination; default: standard output.
    """

    def __init__(
        self, steps: int, done: int, log_every: int, console: Console | None = None
    ) -> None:
        self._steps, self._done, self._log_every = steps, done, log_every
        self._start = time.monotonic()
        self._metrics: Record = {}
        self._losses: deque[float] = deque(maxlen=_NUM_LOSSES)
        self._live: Live | None = None
        if console is None and sys.stdout.isatty():
            console = Console()
        if console is not None and console.is_terminal:
            self._live = Live(
                get_renderable=self._view, console=console, refresh_per_second=2, transient=True
            )
            self._live.start()
            # The live view hides the cursor: show it again if an error ends the process.
            atexit.register(self._live.stop)

    def say(self, text: str) -> None:
        """Print a message."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def show(self, metrics: Record) -> None:
        """Show the metrics of a training step."""
        step = metrics["step"]
        self._metrics = metrics
        if metrics["loss"] is not None and math.isfinite(metrics["loss"]):
            self._losses.append(metrics["loss"])
        due = step % self._log_every == 0 or step == self._done + 1 or step == self._steps
        if self._live is None and due:
            self.say(progress_line(metrics, self._steps, self._seconds_left()))

    def close(self) -> None:
        """Stop updating; the last view stays visible."""
        if self._live is not None:
            self._live.transient = False
            self._live.stop()
            atexit.unregister(self._live.stop)

    def _seconds_left(self) -> float:
        step: int = self._metrics["step"]
        elapsed = time.monotonic() - self._start
        return elapsed / (step - self._done) * (self._steps - step)

    def _view(self) -> RenderableType:
        metrics, elapsed = self._metrics, duration(time.monotonic() - self._start)
        if not metrics:
            return Text(f"before the first step, {elapsed}", style="dim")
        step = metrics["step"]
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column(no_wrap=True)
        progress.add_column(ratio=1)
        progress.add_column(no_wrap=True)
        progress.add_row(
            f"step {step:,}/{self._steps:,}",
            ProgressBar(total=self._steps, completed=step),
            f"{step / self._steps:.0%}  {elapsed} elapsed  ETA {duration(self._seconds_left())}",
        )
        table = Table.grid(padding=(0, 3))
        columns = []
        for names in _COLUMNS:
            column = Table.grid(padding=(0, 1))
            for label, value in _cells(metrics, names):
                text = f"{value} {sparkline(self._losses)}" if label == "loss" else value
                column.add_row(Text(label, style="dim"), Text(text, no_wrap=True))
            columns.append(column)
        table.add_row(*columns)
        return Group(progress, table)
