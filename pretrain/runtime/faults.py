"""Faults during training: bad steps, late collectives, and ranks that hang or have ended.

All decisions depend on numbers that were reduced over all ranks, so all ranks decide the same.
"""

import contextlib
import faulthandler
import math
import os
import re
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import torch.distributed as dist

from pretrain.config import FaultConfig
from pretrain.errors import LostRankError, PretrainError, one_line
from pretrain.runtime import live, without_cuda

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

# Collectives that NCCL's flight recorder remembers; about 1 KiB each, allocated once.
_RECORDED_COLLECTIVES = 2000


def record_collectives(run_dir: Path) -> None:
    """Let NCCL record its last collectives, and write them when one exceeds its time limit.

    Call it before the processes are joined. Each rank writes ``run_dir/flight_recorder/rank<r>``,
    which ``torchfrtrace --prefix rank FOLDER`` compares. The user's environment takes precedence.
    Without a GPU nothing is recorded.
    """
    if without_cuda.USE_CUDA:
        # torch 2.9 to 2.13 accept these names; newer ones have aliases (TORCH_FR_BUFFER_SIZE).
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(_RECORDED_COLLECTIVES))
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        file = _flight_recorder(run_dir).absolute() / "rank"
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(file))


def _flight_recorder(run_dir: Path) -> Path:
    return run_dir / "flight_recorder"


class Watchdog:
    """Ends this process with a stack trace if the run makes no progress.

    If one rank hangs, all others wait for it. Usually they wait in a collective, which ends them
    after ``faults.collective_seconds``: over gloo by an exception in :meth:`__exit__`'s context,
    over NCCL by aborting the process. A hang elsewhere, such as a file system that does not answer,
    is noticed after ``faults.hang_seconds``. In every case each rank that still runs writes its
    stacks to ``stacks-rank<r>.txt`` in the run's folder and, after ``faults.hang_seconds``, to
    stderr, and the first of them names the ranks that wrote nothing. All end with status 1 or by
    SIGABRT, and torchrun ends or restarts the job. A rank that loses the connection to one that has
    ended also writes its stack.

    Args:
        seconds: time without :meth:`beat` after which the process ends; 0: never.
        rank, world_size: of all processes.
        run_dir: a folder shared by all ranks.

    Raises:
        OSError: the file of stacks, or the folder of the flight recorder, cannot be created.
    """

    _GRACE_SECONDS = 5.0

    def __init__(self, seconds: float, rank: int, world_size: int, run_dir: Path) -> None:
        self._seconds, self._rank, self._world_size = seconds, rank, world_size
        self._run_dir = run_dir
        self._last_beat = time.monotonic()
        self._activity = "setting up"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        if without_cuda.USE_CUDA:
            _flight_recorder(run_dir).mkdir(exist_ok=True)  # NCCL does not create it
        self._file: IO[str] = self._path(rank).open("w")

    def __enter__(self) -> "Watchdog":
        self.beat(self._activity)
        if self._seconds:
            self._thread.start()
        self._on_abort = not faulthandler.is_enabled()
        if self._on_abort:  # NCCL aborts from another thread
            faulthandler.enable(self._file)
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._on_abort:
            faulthandler.disable()
        if error is None or not is_lost_connection(error):
            self._file.close()
            self._path(self._rank).unlink(missing_ok=True)
            return
        try:
            self._report_lost_rank(error)
        finally:
            self._file.close()

    def beat(self, activity: str) -> None:
        """Report progress, and name the activity that begins."""
        self._last_beat, self._activity = time.monotonic(), activity
        if self._seconds:
            # In case a hang blocks all Python threads: faulthandler uses a native thread.
            limit = self._seconds + 3 * self._GRACE_SECONDS
            faulthandler.dump_traceback_later(limit, exit=True, file=self._file)

    @property
    def activity(self) -> str:
        """The activity of the last :meth:`beat`."""
        return self._activity

    def _path(self, rank: int) -> Path:
        return _stacks_file(self._run_dir, rank)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last_beat > self._seconds:
                self._end()

    def _end(self) -> None:
        try:
            self._report()
        finally:  # even if the disk is full or stderr is closed
            live.release()
            os._exit(1)

    def _report(self) -> None:
        message = (
            f"rank {self._rank} (process {os.getpid()}) made no progress for {self._seconds:g} "
            f"seconds (faults.hang_seconds) in {self._activity}; it ends with these stacks:\n"
        )
        self._write(message)
        faulthandler.dump_traceback(self._file, all_threads=True)
        stacks = self._path(self._rank).read_text().removeprefix(message)
        print(stacks, end="", file=sys.stderr, flush=True)
        self._name_silent_ranks()

    def _report_lost_rank(self, error: BaseException) -> None:
        """Write the stack of an error, and name it in one line.

        Raises:
            LostRankError: unless the stack cannot be written and must be printed.
        """
        late = is_time_limit(error)
        if late:
            message = (
                f"rank {self._rank} (process {os.getpid()}) waited for other ranks longer than "
                f"faults.collective_seconds in {self._activity}: {one_line(str(error))}\n"
            )
            with contextlib.suppress(OSError):  # a full disk must not hide the exception
                self._write(message)
        try:
            raise_lost_rank(error, self._run_dir, self._rank, self._activity)
        finally:
            if late:
                self._name_silent_ranks()

    def _write(self, message: str) -> None:
        print(message, end="", file=sys.stderr, flush=True)
        self._file.write(message)
        self._file.flush()

    def _name_silent_ranks(self) -> None:
        time.sleep(self._GRACE_SECONDS)  # wait for the reports of other ranks
        # Usually rank 0 has reported, and the other ranks look for its file alone.
        lower = any(self._has_reported(r) for r in range(self._rank))
        if lower or not self._has_reported(self._rank):
            return
        silent = [str(r) for r in range(self._world_size) if not self._has_reported(r)]
        if silent:
            print(f"no sign of life from rank {', '.join(silent)}", file=sys.stderr, flush=True)

    def _has_reported(self, rank: int) -> bool:
        try:
            return self._path(rank).stat().st_size > 0
        except OSError:
            return False


# ---------------------------------------------------------------------- lost ranks

_LOST = re.compile(
    r"connection (was likely )?(closed|reset|refused|aborted)|broken pipe|socket closed"
    r"|timed out|timeout|ncclRemoteError|remote process (has )?exit",
    re.IGNORECASE,
)


def is_lost_connection(error: BaseException) -> bool:
    """Whether gloo, NCCL or the store raised this because another rank has ended or is late.

    gloo has no type for its errors, so they are recognized by their texts.
    """
    if isinstance(error, dist.DistNetworkError):
        return True
    text = str(error)
    from_library = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in text.lower()
    )
    return from_library and _LOST.search(text) is not None


def is_time_limit(error: BaseException) -> bool:
    """Whether gloo raised this because a collective exceeded its time limit."""
    return is_lost_connection(error) and "timed out" in str(error).lower()


@contextlib.contextmanager
def naming_lost_ranks(run_dir: Path, rank: int, activity: str) -> Iterator[None]:
    """Context in which the loss of another rank is an error of one line.

    The stack is written to ``stacks-rank<r>.txt`` in the run's folder.

    Args:
        activity: what the run is doing.

    Raises:
        LostRankError: another rank has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        raise_lost_rank(error, run_dir, rank, activity)
        raise


def raise_lost_rank(error: BaseException, run_dir: Path, rank: int, activity: str) -> None:
    """Append the stack of an error of :func:`is_lost_connection` to a file, and raise one line.

    Other errors, and those whose stack cannot be written, are left to the caller to raise.

    Raises:
        LostRankError: names the activity and the file.
    """
    if not is_lost_connection(error):
        return
    file = _stacks_file(run_dir, rank)
    try:
        with file.open("a") as stacks:
            stacks.writelines(traceback.format_exception(error))
    except OSError:
        return
    what = "waits too long for" if is_time_limit(error) else "lost the connection to"
    raise LostRankError(
        f"rank {rank} {what} another rank in {activity}: see that rank's error; the stack of rank "
        f"{rank} is in {file}"
    ) from error


def _stacks_file(run_dir: Path, rank: int) -> Path:
    return run_dir / f"stacks-rank{rank}.txt"
