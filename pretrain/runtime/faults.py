"""Faults during training: bad steps and hung ranks.

All decisions depend on numbers that were reduced over all ranks, so all ranks decide the same.
"""

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from pretrain.config import FaultConfig
from pretrain.errors import PretrainError

# ---------------------------------------------------------------------- bad steps


Action = Literal["stop", "skip", "roll_back"]


class Fault(NamedTuple):
    """A step that must not update the model.

    Attributes:
        kind: ``empty``: no token of the global batch has a label.
        action: reaction from the configuration; an empty step is always skipped.
        reason: description for messages.
        skipped: number of consecutive skipped steps before this one, if their limit is the reason
            to stop.
    """

    kind: Literal["empty", "non_finite", "spike"]
    action: Action
    reason: str
    skipped: int = 0


class RollBack(Exception):
    """The run must return to its newest checkpoint; the message is the reason."""


def is_spike(loss: float, previous: Sequence[float], deviations: float) -> bool:
    """Whether a loss exceeds the median of the previous ones by more than ``deviations`` standard
    deviations.

    The standard deviation is estimated robustly as 1.4826 times the median absolute deviation,
    and is at least a thousandth of the median.
    """
    median = statistics.median(previous)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in previous)
    return loss > median + deviations * max(deviation, 1e-3 * abs(median))


class Guard:
    """Checks every step before it updates the model, and counts the steps without an update.

    The state is part of the checkpoints, so that a resumed run makes the same decisions.

    Args:
        config: reaction to each kind of fault.

    Attributes:
        skipped: steps that a fault left without an update.
        empty: steps that had nothing to learn, and thus no update. The learning rate's schedule
            counts them; limits on faults do not.
        skipped_batches: batches of the data skipped by rolling back: update n reads batch
            n + ``skipped_batches``.
    """

    def __init__(self, config: FaultConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._in_a_row = 0
        self._returned: tuple[int, int] = (0, 0)
        self.skipped = 0
        self.empty = 0
        self.skipped_batches = 0

    def judge(self, loss: float | None, norm: float) -> Fault | None:
        """Check a step; None if it may update the model.

        Args:
            loss: mean loss of the global batch; None if no token has a label.
            norm: norm of the whole model's gradient.
        """
        config = self._config
        if loss is None:
            self.empty += 1
            return Fault("empty", "skip", "no token of the batch has a label")
        if not math.isfinite(norm) or not math.isfinite(loss):
            reason = f"loss {loss} and gradient norm {norm} are not both finite"
            return self._fault("non_finite", config.non_finite, reason)
        full = len(self._losses) == config.spike_window
        if (
            config.spike != "ignore"
            and full
            and is_spike(loss, self._losses, config.spike_deviations)
        ):
            median = statistics.median(self._losses)
            reason = (
                f"the loss {loss:.4g} is far above the median {median:.4g} of the "
                f"{len(self._losses)} losses before it"
            )
            return self._fault("spike", config.spike, reason)
        self._in_a_row = 0
        self._losses.append(loss)
        return None

    def _fault(self, kind: Literal["non_finite", "spike"], action: Action, reason: str) -> Fault:
        if action == "skip":
            self._in_a_row += 1
            if self._in_a_row > self._config.max_in_a_row:
                return Fault(kind, "stop", reason, self._in_a_row - 1)
            self.skipped += 1
        return Fault(kind, action, reason)

    def roll_back(self, step: int, to: int, state: dict[str, Any]) -> None:
        """Record that the run returns from ``step`` to the checkpoint of step ``to``.

        Args:
            state: the :meth:`state_dict` stored in that checkpoint.

        Raises:
            PretrainError: the run has already returned to that checkpoint ``max_in_a_row`` times.
        """
        skipped_batches = self.skipped_batches + step - to
        times = self._returned[1] + 1 if self._returned[0] == to else 1
        if times > self._config.max_in_a_row:
            raise PretrainError(
                f"rolled back to step {to} {times - 1} times (faults.max_in_a_row), and step "
                f"{step} has a fault again: lower optimizer.lr, or check the data"
            )
        self.load_state_dict(state)
        self._returned, self.skipped_batches = (to, times), skipped_batches

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; it can be serialized as JSON."""
        return {
            "losses": list(self._losses),
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
            "empty": self.empty,
            "passed_over": self.skipped_batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`; missing entries take their initial values."""
        self._losses = deque(state.get("losses", ()), maxlen=self._config.spike_window)
        self._in_a_row = state.get("in_a_row", 0)
        self.skipped = state.get("skipped", 0)
        self.empty = state.get("empty", 0)
        self.skipped_batches = state.get("passed_over", 0)


# ---------------------------------------------------------------------- hung ranks


class Watchdog:
    """Ends this process with a stack trace if the run makes no progress.

    If one rank hangs, all others wait for it. Each rank that still runs writes its stacks to stderr
    and to ``stacks-rank<r>.txt`` in the run's folder; the first of them names the ranks that wrote
    nothing; all end with status 1, and torchrun ends or restarts the job.

    Args:
        seconds: time without :meth:`beat` after which the process ends; 0: never.
        rank, world_size: of all processes.
        run_dir: a folder shared by all ranks.

    Raises:
        OSError: the file of stacks cannot be created.
    """

    _GRACE_SECONDS = 5.0

    def __init__(self, seconds: float, rank: int, world_size: int, run_dir: Path) -> None:
        self._seconds, self._rank, self._world_size = seconds, rank, world_size
        self._run_dir = run_dir
        self._last_beat = time.monotonic()
        self._activity = "setting up"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._file: IO[str] | None = None
        if seconds:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = self._path(rank).open("w")

    def __enter__(self) -> "Watchdog":
        if self._file is not None:
            self.beat(self._activity)
            self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._file is not None:
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._path(self._rank).unlink(missing_ok=True)

    def beat(self, activity: str) -> None:
        """Report progress, and name the activity that begins."""
        self._last_beat, self._activity = time.monotonic(), activity
        if self._file is not None:
            # In case a hang blocks all Python threads: faulthandler uses a native thread.
            limit = self._seconds + 3 * self._GRACE_SECONDS
            faulthandler.dump_traceback_later(limit, exit=True, file=self._file)

    def _path(self, rank: int) -> Path:
        return self._run_dir / f"stacks-rank{rank}.txt"

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last_beat > self._seconds:
                self._end()

    def _end(self) -> None:
        try:
            self._report()
        finally:  # even if the disk is full or stderr is closed
            os._exit(1)

    def _report(self) -> None:
        message = (
            f"rank {self._rank} (process {os.getpid()}) made no progress for {self._seconds:g} "
            f"seconds (faults.hang_seconds) in {self._activity}; it ends with these stacks:\n"
        )
        print(message, end="", file=sys.stderr, flush=True)
        assert self._file is not None
        self._file.write(message)
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        stacks = self._path(self._rank).read_text().removeprefix(message)
        print(stacks, end="", file=sys.stderr, flush=True)
        time.sleep(self._GRACE_SECONDS)  # wait for the reports of other ranks
        reported = [r for r in range(self._world_size) if self._has_reported(r)]
        silent = [str(r) for r in range(self._world_size) if r not in reported]
        if silent and self._rank == reported[0]:
            print(f"no sign of life from rank {', '.join(silent)}", file=sys.stderr, flush=True)

    def _has_reported(self, rank: int) -> bool:
        try:
            return self._path(rank).stat().st_size > 0
        except OSError:
            return False
