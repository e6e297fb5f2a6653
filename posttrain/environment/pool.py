"""A pool of environments, which are reused."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """Lends up to ``size`` environments at a time; creates each when it is first needed.

    A pool belongs to one event loop, such as one :meth:`Rollouts.run`.

    Args:
        create: returns a new environment.
        size: limit of environments that are in use at the same time.
        waiting: the context in which a rollout waits for its turn: :meth:`Rollouts.waiting`, so
            that the others generate meanwhile.

    Raises:
        ValueError: ``size`` is not positive.
    """

    def __init__(
        self,
        create: Callable[[], T],
        size: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}: a pool lends at least one environment")
        self._create, self._waiting = create, waiting
        self._places = asyncio.Semaphore(size)
        self._idle: list[T] = []
        self.created = 0

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[T]:
        """Wait for an environment, use it in the body, and return it.

        An environment whose body raised is not used again: its state is unknown.
        """
        with self._waiting() if self._places.locked() else nullcontext():
            await self._places.acquire()
        try:
            if not self._idle:
                self.created += 1
            environment = self._idle.pop() if self._idle else self._create()
            yield environment
            self._idle.append(environment)
        finally:
            self._places.release()
