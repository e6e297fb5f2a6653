"""Writing the metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases, the terminal."""

import io
import itertools
import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pretrain.errors import one_line
from pretrain.metrics import read, scalars
from pretrain.runtime import atomic
from pretrain.runtime.output import warn
from pretrain.runtime.terminal import Terminal, held_out_line


class AppendedFile:
    """A file to which records are appended, each completely or not at all.

    If a record cannot be written, for example because the disk is full, a warning is printed; the
    record is kept in memory and written before the next one once there is room.

    Args:
        path: created if it does not exist.

    Raises:
        OSError: the file cannot be opened.
    """

    # Records kept in memory; the oldest ones beyond that are lost.
    _MAX_WAITING = 10_000

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)
        self._waiting: deque[bytes] = deque(maxlen=self._MAX_WAITING)
        self._warned = False

    @property
    def deleted(self) -> bool:
        """Whether the file was deleted; what is written to the open one is then lost."""
        try:
            self._path.stat()
        except FileNotFoundError:
            return True
        except OSError:  # an unavailable disk must not stop the run
            pass
        return False

    def append(self, record: bytes) -> None:
        """Write the waiting records and this one; keep those that cannot be written."""
        self._waiting.append(record)
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._warned:
                warn(
                    f"cannot write {self._path} ({error.strerror}); training continues, and the "
                    f"last {self._MAX_WAITING:,} records are written once there is room"
                )
            self._warned = True
        else:
            if self._warned:
                warn(f"{self._path} is written again")
            self._warned = False

    def close(self) -> None:
        """Close the file after a last attempt to write the waiting records."""
        if self._waiting:
            self.append(self._waiting.pop())
        self._file.close()

    def _write(self, record: bytes) -> None:
        rest = record
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._end)  # remove the part written before the disk was full
            raise
        self._end += len(record)


class TensorBoardFile:
    """A TensorBoard event file, written in the calling thread.

    Args:
        folder: log directory of TensorBoard; created if it does not exist.
        first_step: first step that will be written; TensorBoard drops this step and later ones
            from earlier files.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{platform.node()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), step=first_step, session_log=start))

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
    """Writes metrics to all destinations; on ranks other than the main rank it does nothing.

    A full disk at the start of a run is an error; later it only causes a warning, since training
    is worth more than its metrics.

    Args:
        run_dir: folder of the run; created if it does not exist.
        steps: length of the run.
        done: last finished step. Records of later steps are removed, because these steps are
            computed again; if it is 0, their file is renamed instead, because the checkpoints of
            these steps may be missing by mistake.
        log_every: steps between progress lines.
        enabled: whether this is the main rank.
        wandb: opens a ``wandb.Run``; None: Weights & Biases is not used.
        activity: returns what the run is doing, for the live view.

    Raises:
        OSError, PretrainError: the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: int,
        done: int,
        log_every: int,
        enabled: bool,
        wandb: Callable[[], Any] | None = None,
        activity: Callable[[], str] = lambda: "",
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._enabled = enabled
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        records = read(self.path)
        kept = [record for record in records if record["step"] <= done] if done else []
        if not done and records and records[-1]["step"] > 0:
            self._set_aside(records[-1]["step"])
        atomic.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = AppendedFile(self.path)
        self._board = TensorBoardFile(run_dir / "tensorboard", done + 1)
        self._wandb = wandb() if wandb is not None else None
        self._terminal = Terminal(steps, done, log_every, activity)

    def _set_aside(self, last: int) -> None:
        """Rename a metrics.jsonl with records up to step ``last``, to a name that is free."""
        names = (self.path.with_name(f"{self.path.name}.{number}") for number in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        self.path.rename(aside)
        warn(
            f"{self.path} has metrics up to step {last}, but the run has no checkpoint and starts "
            f"at step 0: they are now in {aside}"
        )

    @property
    def deleted(self) -> bool:
        """Whether metrics.jsonl was deleted, with the run's folder or alone."""
        return self._enabled and self._file.deleted

    def begin(self, assignment: str, start: Mapping[str, Any]) -> None:
        """Write parameters.txt and append a line to starts.jsonl.

        Raises:
            OSError: a file cannot be written.
        """
        if self._enabled:
            (self.path.parent / "parameters.txt").write_text(assignment + "\n")
            with (self.path.parent / "starts.jsonl").open("a") as file:
                file.write(json.dumps(start) + "\n")

    def say(self, text: str) -> None:
        """Print a message."""
        if self._enabled:
            self._terminal.say(text)

    def save(self, name: str, text: str) -> None:
        """Write a text file next to metrics.jsonl; warn if that fails."""
        if self._enabled:
            try:
                (self.path.parent / name).write_text(text + "\n")
            except OSError as error:
                warn(f"cannot write {self.path.parent / name}: {error.strerror}")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write the record of one step: ``step`` and :data:`pretrain.metrics.METRICS` by name."""
        if not self._enabled:
            return
        step = metrics["step"]
        self._file.append((json.dumps(metrics) + "\n").encode())
        numbers = scalars(metrics)
        self._board.write(numbers, step)
        if self._wandb is not None:
            self._call_wandb(lambda run: run.log(numbers, step=step))
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
                self._call_wandb(lambda run: run.finish())

    def _call_wandb(self, action: Callable[[Any], None]) -> None:
        try:
            action(self._wandb)
        except Exception as error:  # an unreachable service must not stop the training
            warn(f"metrics are no longer sent to Weights & Biases ({one_line(str(error))})")
            self._wandb = None
