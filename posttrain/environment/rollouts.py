"""Asynchronous rollouts whose requests for tokens become batches.

Each rollout is a coroutine and may start others. As soon as all of them wait for a model, one call
of the model answers all requests: no rollout waits for a slower one in tokens, and the engine is
any function from a batch of prompts to a batch of samples.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Sample(NamedTuple):
    """Generated tokens.

    Attributes:
        tokens: ids, [n], with the token that ended the generation.
        logprobs: log-probability of each when it was sampled, [n].
    """

    tokens: list[int]
    logprobs: list[float]


Generate = Callable[[list[list[int]]], Sequence[Sample]]
"""A model: a sample for each prompt, a list of ids. It decides when a sample ends."""


class Rollouts:
    """Runs coroutines, and generates for all of them at once.

    Everything that :meth:`run` and :meth:`gather` start is a rollout. It must wait for nothing but
    :meth:`generate`, :meth:`gather` and, for anything slow, the body of :meth:`waiting`.

    Attributes:
        batches: number of calls of a model so far.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._running = 0
        self._error: Exception | None = None
        self._requests: dict[Generate, list[tuple[list[int], asyncio.Future[Sample]]]] = {}

    def run(self, *rollouts: Coroutine[Any, Any, T]) -> list[T]:
        """Run rollouts to their ends; returns their results.

        Raises:
            Exception: the first one of a rollout, after all have ended.
        """
        self._running, self._requests, self._error = 1, {}, None
        results = asyncio.run(self.gather(*rollouts))
        if self._error:  # a rollout may have caught it
            raise self._error
        return results

    async def gather(self, *rollouts: Coroutine[Any, Any, T]) -> list[T]:
        """Run rollouts at the same time, within a rollout; see :meth:`run`."""
        if not rollouts:
            return []
        left = len(rollouts)
        self._running += left - 1  # this one waits

        async def follow(rollout: Coroutine[Any, Any, T]) -> T:
            nonlocal left
            try:
                return await rollout
            finally:
                left -= 1
                if left:  # the last one hands its place to the rollout that waits for all
                    self._pause()

        results = await asyncio.gather(*map(follow, rollouts), return_exceptions=True)
        values = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            values.append(result)
        return values

    async def generate(self, model: Generate, prompt: list[int]) -> Sample:
        """Sample a continuation of a prompt, together with all other rollouts.

        Requests of the same model are one batch, in the order of the requests.

        Raises:
            ValueError: the model returned another number of samples, or tokens without finite
                log-probabilities.
        """
        if self._error:
            raise self._error
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        request = (prompt, future)
        self._requests.setdefault(model, []).append(request)
        self._pause()
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._running += 1
            raise

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let others generate while this rollout waits in the body, such as for a server."""
        self._pause()
        try:
            yield
        finally:
            self._running += 1

    def _pause(self) -> None:
        self._running -= 1
        while self._running == 0 and self._requests:
            requests, self._requests = self._requests, {}
            for model, batch in requests.items():
                self._answer(model, [request for request in batch if not request[1].done()])

    def _answer(
        self, model: Generate, batch: list[tuple[list[int], asyncio.Future[Sample]]]
    ) -> None:
        if not batch:
            return
        self._running += len(batch)
        self.batches += 1
        try:
            samples = _checked(model([prompt for prompt, _ in batch]), len(batch))
        except Exception as error:  # every rollout gets it, instead of waiting forever
            self._error = error
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), sample in zip(batch, samples, strict=True):
            future.set_result(sample)


def _checked(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    if len(samples) != count:
        raise ValueError(f"the model returned {len(samples)} samples for {count} prompts")
    for tokens, logprobs in samples:
        if len(tokens) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise ValueError("the model returned tokens without finite log-probabilities")
    return samples
