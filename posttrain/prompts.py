"""The prompts of each batch of rollouts, drawn from several tasks by their shares."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def counts(shares: Sequence[float], prompts: int, offset: float) -> list[int]:
    """Number of prompts of each task in a batch, by systematic sampling.

    Each is the task's part of the prompts, rounded up or down. Its mean over uniform offsets is
    exactly that part.

    Args:
        shares: of each task, positive; relative to their sum.
        prompts: of the batch.
        offset: in [0, 1).
    """
    total = math.fsum(shares)
    inner = itertools.accumulate(shares[:-1])
    ends = [min(prompts, math.floor(offset + prompts * end / total)) for end in inner]
    return [end - start for start, end in itertools.pairwise([0, *ends, prompts])]


class PromptSampler(Sampler[int]):
    """Rows of a dataset in which the problems of several tasks follow each other.

    All responses to a prompt follow each other, and a batch is repeated for each of its updates, as
    TRL's trainer expects it. Every task passes through its problems in a random order, and then in
    another one. What a batch contains depends on the seed and its number alone, so that a resumed
    run continues with the same prompts.

    Args:
        sizes: number of problems of each task.
        shares: of each task; see :func:`counts`.
        prompts: of a batch of rollouts.
        group_size: responses to each prompt.
        updates: steps of the optimizer for each batch.
        batches: number of batches of rollouts.
        seed: of the order.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        shares: Sequence[float],
        *,
        prompts: int,
        group_size: int,
        updates: int,
        batches: int,
        seed: int,
    ) -> None:
        self._sizes, self._shares = list(sizes), list(shares)
        self._prompts, self._group_size = prompts, group_size
        self._updates, self._batches = updates, batches
        self._seed = seed

    def __len__(self) -> int:
        return self._batches * self._updates * self._prompts * self._group_size

    def __iter__(self) -> Iterator[int]:
        for rows in self.prompts():
            repeated = [row for row in rows for _ in range(self._group_size)]
            for _ in range(self._updates):
                yield from repeated

    def prompts(self) -> Iterator[list[int]]:
        """The row of each prompt, for every batch."""
        starts = [0, *itertools.accumulate(self._sizes)]
        orders = [
            _order(start, size, self._seed)
            for start, size in zip(starts, self._sizes, strict=False)
        ]
        for batch in range(self._batches):
            offset = random.Random(f"{self._seed} {batch}").random()
            found = counts(self._shares, self._prompts, offset)
            yield [
                row
                for order, count in zip(orders, found, strict=True)
                for row in itertools.islice(order, count)
            ]


def _order(start: int, size: int, seed: int) -> Iterator[int]:
    """The rows of a task, again and again, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (start + torch.randperm(size, generator=generator)).tolist()
