"""Calls in threads that do not keep the process from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


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

    threading.Thread(target=call, name=name, daemon=True).start()
    return future
