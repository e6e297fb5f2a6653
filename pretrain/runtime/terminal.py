"""What the main rank tells people while it trains: a live view on a terminal, lines elsewhere."""

import atexit
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
# Losses that the live view draws.
_RECENT = 40


def duration(seconds: float) -> str:
    """As ``1h02m`` or ``2m03s``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _nats(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"


def progress_line(metrics: Mapping[str, Any], steps: int, eta_seconds: float) -> str:
    """One readable line about a training step."""
    step = metrics["step"]
    return (
        f"step {step:>{len(str(steps))}}/{steps}"
        f" | loss {_nats(metrics['loss'])} | text {_nats(metrics['text_loss'])}"
        f" | caption {_nats(metrics['caption_loss'])}"
        f" | {metrics['tokens_per_second']:6,.0f} tok/s, MFU {metrics['mfu']:.0%}"
        f" | max logit {metrics['max_logit']:5.1f}"
        f" | heads clipped {metrics['heads_clipped']}/{metrics['heads']}"
        f" | expert load {metrics['expert_load']:.2f}"
        f" | encoder balance {metrics['encoder_balance']:.3f}"
        f" | grad {metrics['grad_norm']:.2f} | lr {metrics['lr']:.1e}"
        f" | ETA {duration(eta_seconds)}"
    )


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of blocks, the least lowest and the largest full."""
    least, most = min(values, default=0.0), max(values, default=0.0)
    scale = (len(_BLOCKS) - 1) / (most - least) if most > least else 0.0
    return "".join(_BLOCKS[round((value - least) * scale)] for value in values)


class Terminal:
    """Progress and time left.

    On a terminal, a view that stays at the bottom while what is said scrolls above it; elsewhere
    a line every ``log_every`` steps, and for the first and the last.

    Args:
        steps: the run's length.
        done: steps that are behind.
        log_every: steps between lines.
        console: where to; default: standard output.
    """

    def __init__(
        self, steps: int, done: int, log_every: int, console: Console | None = None
    ) -> None:
        self._steps, self._done, self._log_every = steps, done, log_every
        self._started = time.monotonic()
        self._metrics: Mapping[str, Any] = {}
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._live: Live | None = None
        if console is None and sys.stdout.isatty():
            console = Console()
        if console is not None and console.is_terminal:
            self._live = Live(
                get_renderable=self._view, console=console, refresh_per_second=2, transient=True
            )
            self._live.start()
            # An error on the way out must not leave the terminal without its cursor.
            atexit.register(self._live.stop)

    def say(self, text: str) -> None:
        """Print a line for people."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Show a training step."""
        step = metrics["step"]
        self._metrics = metrics
        if metrics["loss"] is not None and math.isfinite(metrics["loss"]):
            self._losses.append(metrics["loss"])
        due = step % self._log_every == 0 or step == self._done + 1 or step == self._steps
        if self._live is None and due:
            self.say(progress_line(metrics, self._steps, self._seconds_left()))

    def close(self) -> None:
        """Leave the last view where it is."""
        if self._live is not None:
            self._live.transient = False
            self._live.stop()
            atexit.unregister(self._live.stop)

    def _seconds_left(self) -> float:
        step: int = self._metrics["step"]
        passed = time.monotonic() - self._started
        return passed / (step - self._done) * (self._steps - step)

    def _view(self) -> RenderableType:
        metrics, elapsed = self._metrics, duration(time.monotonic() - self._started)
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
            f"{step / self._steps:.0%}  {elapsed} passed  ETA {duration(self._seconds_left())}",
        )
        columns = (
            (
                ("loss", f"{_nats(metrics['loss'])} {sparkline(self._losses)}"),
                ("text", _nats(metrics["text_loss"])),
                ("caption", _nats(metrics["caption_loss"])),
            ),
            (
                ("max logit", f"{metrics['max_logit']:.1f}"),
                ("heads clipped", f"{metrics['heads_clipped']}/{metrics['heads']}"),
                ("gradient norm", f"{metrics['grad_norm']:.2f}"),
            ),
            (
                ("expert load", f"{metrics['expert_load']:.2f}"),
                ("encoder balance", f"{metrics['encoder_balance']:.3f}"),
                ("learning rate", f"{metrics['lr']:.1e}"),
            ),
            (
                ("tokens/s", f"{metrics['tokens_per_second']:,.0f}"),
                ("MFU", f"{metrics['mfu']:.1%}"),
                ("memory", f"{metrics['memory_gib']:.1f} GiB"),
            ),
        )
        table = Table.grid(padding=(0, 3))
        cells = []
        for column in columns:
            cell = Table.grid(padding=(0, 1))
            for label, value in column:
                cell.add_row(Text(label, style="dim"), Text(value, no_wrap=True))
            cells.append(cell)
        table.add_row(*cells)
        return Group(progress, table)
