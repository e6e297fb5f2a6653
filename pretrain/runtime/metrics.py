"""What a run writes for people to look at: metrics.jsonl, TensorBoard, curves."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from pretrain.runtime.terminal import Terminal

# What depends on the machine and its load. All else is a function of configuration and seed.
MACHINE = ("tokens_per_second", "mfu", "memory_gib")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in the order of their steps.

    Where steps were written again, by a run that went back to a checkpoint, what stood there of
    them and of later ones belongs to a future that was given up.
    """
    records: list[dict[str, Any]] = []
    for record in read_lines(path):
        if "step" in record:
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
            records.append(record)
    return records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a kill cut short is left out."""
    found = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                found.append(record)
    return found


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers by name, those of layers as ``name/layer``; what is None is left out."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            width = len(str(len(value) - 1))
            numbered = ((f"{name}/{layer:0{width}}", item) for layer, item in enumerate(value))
            found.update((key, item) for key, item in numbered if item is not None)
        elif value is not None and name != "step":
            found[name] = value
    return found


class MetricsWriter:
    """metrics.jsonl, TensorBoard and the terminal, written by the main rank alone.

    Args:
        run_dir: the run's folder, made here.
        steps: the run's length.
        done: steps that are behind. What was recorded after them belongs to a future that is
            about to be computed again, and is removed.
        log_every: steps between progress lines.
        enabled: whether this is the main rank; every method does nothing elsewhere.
        wandb: opens a ``wandb.Run``, where one is wanted.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        done: int,
        log_every: int,
        enabled: bool,
        wandb: Callable[[], Any] | None = None,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._enabled = enabled
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read(self.path) if record["step"] <= done] if done else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.rename(self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1)
        self._wandb = wandb() if wandb is not None else None
        self._terminal = Terminal(steps, done, log_every)

    def say(self, text: str) -> None:
        """Print a line for people."""
        if self._enabled:
            self._terminal.say(text)

    def save(self, name: str, text: str) -> None:
        """Write a text file beside the metrics."""
        if self._enabled:
            (self.path.parent / name).write_text(text + "\n")

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a file of JSON lines beside the metrics."""
        if self._enabled:
            with (self.path.parent / name).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record one step: ``step`` and numbers, or lists of them by layer (None, where there was
        nothing to measure)."""
        if not self._enabled:
            return
        step = metrics["step"]
        self._file.write(json.dumps(metrics) + "\n")
        # All in one event: a hundred add_scalar() take milliseconds.
        numbers = scalars(metrics)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._board.file_writer.add_summary(Summary(value=values), step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if "grad_norm" in metrics:
            self._terminal.show(metrics)
        if "held_out_text_loss" in metrics:
            self.say(held_out_line(metrics))

    def close(self) -> None:
        if self._enabled:
            self._terminal.close()
            self._file.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()


def held_out_line(metrics: Mapping[str, Any]) -> str:
    """One readable line about a held-out evaluation."""
    parts = [
        f"{label} {metrics[key]:.3f}"
        for label, key in (("text", "held_out_text_loss"), ("caption", "held_out_caption_loss"))
        if metrics[key] is not None
    ]
    right, swapped = metrics["right_caption_loss"], metrics["swapped_caption_loss"]
    if right is not None:
        parts.append(
            f"with the right image {right:.3f}, another's {swapped:.3f} "
            f"(gap {swapped - right:+.3f} nats/token)"
        )
    return f"held out after step {metrics['step']}: " + (" | ".join(parts) or "nothing")


def plot(run_dir: Path) -> Path:
    """Draw the run's loss curves, max logit and encoder balance; returns the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read(run_dir / "metrics.jsonl")
    training = [record for record in records if "grad_norm" in record]
    held_out = [record for record in records if "held_out_text_loss" in record]
    steps = [record["step"] for record in training]

    figure, (losses, logits, balance) = pyplot.subplots(1, 3, figsize=(15, 4.2))
    for name, colour in (("text", "tab:blue"), ("caption", "tab:orange")):
        values = [record[f"{name}_loss"] for record in training]
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        losses.plot(*zip(*points, strict=True), color=colour, alpha=0.25, linewidth=0.8)
        losses.plot(
            [record["step"] for record in held_out],
            [record[f"held_out_{name}_loss"] for record in held_out],
            "o-",
            color=colour,
            label=f"{name}, held out",
        )
    swapped = [record for record in held_out if "swapped_caption_loss" in record]
    if swapped:
        losses.plot(
            [record["step"] for record in swapped],
            [record["swapped_caption_loss"] for record in swapped],
            "x",
            color="tab:red",
            label="caption, another's image",
        )
    losses.set(title="Loss (nats a token)", xlabel="step")
    losses.legend()
    logits.plot(steps, [record["max_logit"] for record in training], color="tab:green")
    logits.set(title="Largest attention logit", xlabel="step")
    balance.plot(steps, [record["encoder_balance"] for record in training], color="tab:purple")
    balance.set(title="Encoder load, max / mean over ranks", xlabel="step")
    for axes in (losses, logits, balance):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
