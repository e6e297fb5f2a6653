"""Ways in which a run ends early: signals, and the end of its launcher."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

# SIGHUP comes when the terminal or the connection is lost.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Set by torchrun.
_LAUNCHED = "TORCHELASTIC_RUN_ID"
# torchrun passes on a Ctrl-C that the terminal has sent to all processes already.
_SAME_PRESS_SECONDS = 3.0


class Termination:
    """Whether this process was asked to end.

    Attributes:
        signal: the number of the first signal that asked; 0: none.
        saves: whether the run is to finish its step and save first. Otherwise, as during set-up,
            the process ends at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.saves = False

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def watch(self, descriptor: int) -> None:
        """Read signal numbers, which arrive even while the main thread is in a library.

        An exception in the main thread would not do: imports and libraries catch it, or fail with
        another one because of it. Returns at the end of the file.
        """
        first: float | None = None
        while received := os.read(descriptor, 1):
            number = received[0]
            if number not in _SIGNALS:
                continue
            if not self.saves:
                self._say(f"{name(number)}: stopped; checkpoints are as they were")
                _leave(number)
            elif first is None:
                first = time.monotonic()
                self._say(f"{name(number)}: saving after this step; Ctrl-C leaves without saving")
            elif number == signal.SIGINT and self._is_another_press(first):
                self._say("SIGINT again: leaving without saving")
                _leave(number)

    @staticmethod
    def _is_another_press(first: float) -> bool:
        return _LAUNCHED not in os.environ or time.monotonic() - first > _SAME_PRESS_SECONDS

    @staticmethod
    def _say(line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            _write_to_stderr(f"{line}\n")


def status(number: int) -> int:
    """The exit status that a shell gives a process that ended by a signal."""
    return 128 + number


def name(number: int) -> str:
    return signal.Signals(number).name


def _write_to_stderr(text: str) -> None:
    """Past Python's buffers, which the interrupted code may be using."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _leave(number: int) -> None:
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        os.write(1, b"\x1b[?25h")  # the live view hides the cursor
    os._exit(status(number))


@contextlib.contextmanager
def on_signals() -> Iterator[Termination]:
    """Within, SIGTERM, SIGINT (Ctrl-C) and SIGHUP are handled as :class:`Termination` says.

    They may come several times, from a terminal, a scheduler and torchrun. A second Ctrl-C ends the
    process at once. A signal that is ignored, as SIGHUP under nohup, stays ignored.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination  # only the main thread can handle signals
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    before = {n: signal.getsignal(n) for n in _SIGNALS}
    watcher = threading.Thread(
        target=termination.watch, args=(read_end,), name="signals", daemon=True
    )
    watcher.start()
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, termination.on_signal)
    try:
        yield termination
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(before_fd)
        os.close(write_end)
        watcher.join()
        os.close(read_end)


@contextlib.contextmanager
def end_with_launcher(seconds: float = 1.0) -> Iterator[None]:
    """Within, this process ends when torchrun does, even if that was killed.

    Otherwise its ranks would go on, next to those of the job that takes its place.

    Args:
        seconds: between two checks.
    """
    if _LAUNCHED not in os.environ:
        yield
        return
    launcher, done = os.getppid(), threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            if os.getppid() != launcher:
                rank = os.environ.get("RANK", "0")
                _write_to_stderr(f"torchrun (process {launcher}) has ended: rank {rank} ends too\n")
                os._exit(1)

    thread = threading.Thread(target=watch, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
