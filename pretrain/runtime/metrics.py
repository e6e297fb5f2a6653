"""Metrics of a run, for people: metrics.jsonl, TensorBoard, curves."""

import io
import json
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pretrain.errors import one_line
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
        if type(record.get("step")) is int:
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
            records.append(record)
    return records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a kill cut short is left out."""
    found = []
    if path.is_file():  # not a pipe, which may never end
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
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


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class AppendedFile:
    """A file that records are appended to, each of them whole or not at all.

    A disk that refuses a record, being full for example, costs a warning. The record is kept, and
    written before the next one once the disk has room.

    Args:
        path: made, or continued, at once.

    Raises:
        OSError: the file cannot be opened.
    """

    # Records that are kept; after that, the oldest are lost.
    _MOST = 10_000

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)
        self._waiting: deque[bytes] = deque(maxlen=self._MOST)
        self._warned = False

    def append(self, record: bytes) -> None:
        """Write a record after those that are waiting, or leave it waiting."""
        self._waiting.append(record)
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._warned:
                warn(
                    f"cannot write {self._path} ({error.strerror}); training continues, and its "
                    f"latest {self._MOST:,} records are written as soon as that is possible"
                )
            self._warned = True
        else:
            if self._warned:
                warn(f"{self._path} is written again")
            self._warned = False

    def close(self) -> None:
        """Close the file; waiting records are tried once more, and otherwise lost."""
        if self._waiting:
            self.append(self._waiting.pop())
        self._file.close()

    def _write(self, record: bytes) -> None:
        rest = record
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._end)  # of what was written before the disk was full
            raise
        self._end += len(record)


class TensorBoardFile:
    """An event file of TensorBoard, written in the calling thread.

    Args:
        folder: where TensorBoard looks, made here.
        first: the first step to come; TensorBoard drops what earlier files have of later ones.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{platform.node()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=first, session_log=start))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())


class MetricsWriter:
    """metrics.jsonl, TensorBoard and the terminal, written by the main rank alone.

    A disk that is full when a run starts ends it; later on it costs a warning, since metrics are
    worth less than the training.

    Args:
        run_dir: the run's folder, made here.
        steps: the run's length.
        done: steps that are behind. Records of later steps are removed: these are computed again.
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
        self._file = AppendedFile(self.path)
        self._board = TensorBoardFile(run_dir / "tensorboard", done + 1)
        self._wandb = wandb() if wandb is not None else None
        self._terminal = Terminal(steps, done, log_every)

    def begin(self, assignment: str, start: Mapping[str, Any]) -> None:
        """Write parameters.txt, and a line of starts.jsonl.

        Raises:
            OSError: the disk refuses.
        """
        if self._enabled:
            (self.path.parent / "parameters.txt").write_text(assignment + "\n")
            with (self.path.parent / "starts.jsonl").open("a") as file:
                file.write(json.dumps(start) + "\n")

    def say(self, text: str) -> None:
        """Print a line for people."""
        if self._enabled:
            self._terminal.say(text)

    def save(self, name: str, text: str) -> None:
        """Write a text file next to the metrics; a disk that refuses costs a warning."""
        if self._enabled:
            try:
                (self.path.parent / name).write_text(text + "\n")
            except OSError as error:
                warn(f"cannot write {self.path.parent / name}: {error.strerror}")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record one step: ``step`` and numbers, or lists of them by layer (None, where there was
        nothing to measure)."""
        if not self._enabled:
            return
        step = metrics["step"]
        self._file.append((json.dumps(metrics) + "\n").encode())
        numbers = scalars(metrics)
        self._board.write(numbers, step)
        if self._wandb is not None:
            self._of_wandb(lambda run: run.log(numbers, step=step))
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
                self._of_wandb(lambda run: run.finish())

    def _of_wandb(self, action: Callable[[Any], None]) -> None:
        try:
            action(self._wandb)
        except Exception as error:  # a service that has gone is no reason to stop training
            warn(f"Weights & Biases gets no more metrics ({one_line(str(error))})")
            self._wandb = None


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
