"""Early end of a run: by a signal, or because its launcher has ended."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from pretrain.runtime import live

# SIGHUP is sent when the terminal or the connection is lost.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Set by torchrun.
_LAUNCHED = "TORCHELASTIC_RUN_ID"
# The terminal sends Ctrl-C to all processes, and torchrun sends it to its ranks a second time.
_SAME_PRESS_SECONDS = 3.0


class Termination:
    """Requests to end this process.

    Attributes:
        signal: number of the first signal received; 0: none.
        saves: whether the run finishes its step and saves a checkpoint before it ends. Otherwise,
            as during set-up, the process ends at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.saves = False

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def watch(self, descriptor: int) -> None:
        """Read signal numbers, which arrive even while the main thread is in a library.

        Raising an exception in the main thread would not work: imports and libraries may catch it
        or fail with another one. Returns at the end of the file.
        """
        first: float | None = None
        while received := os.read(descriptor, 1):
            number = received[0]
            if number not in _SIGNALS:
                continue
            if not self.saves:
                self._say(f"{name(number)}: stopped; checkpoints are unchanged")
                _exit(number)
            elif first is None:
                first = time.monotonic()
                self._say(f"{name(number)}: saving after this step; Ctrl-C exits without saving")
            elif number == signal.SIGINT and self._is_another_press(first):
                self._say("SIGINT again: exiting without saving")
                _exit(number)

    @staticmethod
    def _is_another_press(first: float) -> bool:
        return _LAUNCHED not in os.environ or time.monotonic() - first > _SAME_PRESS_SECONDS

    @staticmethod
    def _say(line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            _write_to_stderr(f"{line}\n")


def status(number: int) -> int:
    """Exit status of a process that was ended by a signal."""
    return 128 + number


def name(number: int) -> str:
    return signal.Signals(number).name


def _write_to_stderr(text: str) -> None:
    """Bypass Python's buffers, which the interrupted code may be using."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _exit(number: int) -> None:
    live.release()
    os._exit(status(number))


@contextlib.contextmanager
def on_signals() -> Iterator[Termination]:
    """Context in which :class:`Termination` handles SIGTERM, SIGINT (Ctrl-C) and SIGHUP.

    The same signal may arrive several times, from a terminal, a scheduler and torchrun. A second
    Ctrl-C ends the process at once. Ignored signals, such as SIGHUP under nohup, stay ignored.
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
def without_traceback() -> Iterator[None]:
    """Context for a whole program, which Ctrl-C then ends without a traceback.

    During an import, it ends at once: libraries catch the exception while they are imported, and
    fail with another one later.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if "importlib._bootstrap" in frame.f_code.co_filename:
                _write_to_stderr("interrupted\n")
                _exit(number)
            frame = frame.f_back
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        _write_to_stderr("interrupted\n")
        raise SystemExit(status(signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # while the interpreter ends


@contextlib.contextmanager
def end_with_launcher(seconds: float = 1.0) -> Iterator[None]:
    """Context in which this process ends when torchrun ends, even if torchrun was killed.

    Otherwise the ranks would continue next to those of the job that replaces them.

    Args:
        seconds: time between two checks.
    """
    if _LAUNCHED not in os.environ:
        yield
        return
    launcher, done = os.getppid(), threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            if os.getppid() != launcher:
                rank = os.environ.get("RANK", "0")
                live.release()
                _write_to_stderr(
                    f"the launcher (process {launcher}) has ended: rank {rank} ends too\n"
                )
                os._exit(1)

    thread = threading.Thread(target=watch, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
