"""Output to standard streams that may be closed or full without affecting the run."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from pretrain.runtime import stopping

# The reader of the pipe, or the terminal, is closed.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Durable:
    """A text stream that ignores operating system errors and loses the text then."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._ignoring_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignoring_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:
                discard(self._stream)


def discard(stream: Any) -> None:
    """Redirect a stream to the null device."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def durable() -> Iterator[None]:
    """Context in which standard output and error may be closed at any time, also at exit."""
    open_closed()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Durable, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in streams:
            try:
                stream.flush()
            except (OSError, ValueError):
                discard(stream)


@contextlib.contextmanager
def ending_with_reader() -> Iterator[None]:
    """Context that ends the process without a traceback when the program that reads standard output
    has ended, as in `pretrain settings | head`."""
    open_closed()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        raise SystemExit(stopping.status(signal.SIGPIPE)) from None


def open_closed() -> None:
    """Redirect streams that were closed before the start to the null device.

    For these, Python sets None, and the next opened files would get their descriptors.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
