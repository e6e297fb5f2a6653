"""Calls in threads that do not keep the process from ending."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from pretrain.runtime import live

T = TypeVar("T")

_running: set[Future[Any]] = set()


def start(action: Callable[[], T], name: str) -> Future[T]:
    """Call a function in a new thread.

    A process that has failed ends although the thread is still running: it may wait for other
    ranks, which wait for this one. Threads of a ThreadPoolExecutor would be joined first.

    Args:
        name: name of the thread.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            result = action()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            _running.discard(future)

    _running.add(future)
    threading.Thread(target=call, name=name, daemon=True).start()
    return future


@contextlib.contextmanager
def ending_process() -> Iterator[None]:
    """Context for a whole program, which ends the process at once if calls are still running.

    The interpreter would otherwise end their threads when they return from C++, such as from a
    collective whose other ranks have ended, and C++ then aborts the process: with status 134
    by SIGABRT.
    """
    status = 0
    try:
        yield
    except BaseException as error:
        if not _running:
            raise
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
    if _running:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or closed
                stream.flush()
        live.release()
        os._exit(status)
