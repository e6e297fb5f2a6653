"""Standard output and standard error that may be closed, or full, without an effect on the run."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

# The reader of a pipe has gone, or the terminal.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Durable:
    """A text stream whose errors of the system are dropped, with the text."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:
                discard(self._stream)


def discard(stream: Any) -> None:
    """Send what is written to a stream from now on, and at exit, nowhere."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def durable() -> Iterator[None]:
    """Within, standard output and error can be closed at any time; so they can at exit."""
    _open_closed()
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


def _open_closed() -> None:
    """Streams that were closed from the start lead nowhere.

    Python has None for them, and the next files that are opened would get their descriptors.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_WRONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            setattr(sys, name, os.fdopen(descriptor, "w", closefd=False))
