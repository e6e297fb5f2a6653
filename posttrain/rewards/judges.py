"""Generative reward models: answers that a judge grades by several rubrics.

A judge may be a model behind a server, so it is asynchronous and may fail. A score that is missing,
late, not finite or out of range is left out; an answer without any score has no reward, which TRL
takes as "not applicable" (its advantage is 0).
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

TIMEOUT = 60.0
"""Default seconds until a judge has failed."""


@dataclass(frozen=True)
class Rubric:
    """A criterion of a judge.

    Attributes:
        name: its name in messages.
        instruction: text for the judge: the criterion, and that scores are from 0 to 1.
        weight: positive; relative to those of the other rubrics.
    """

    name: str
    instruction: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"rubric {self.name}: weight={self.weight} must be positive")


Judge = Callable[[Rubric, str, str], Awaitable[float]]
"""Returns the score, in [0, 1], of an answer by a rubric; called with rubric, question, answer."""


@dataclass(frozen=True)
class Grade:
    """The result of a judge.

    Attributes:
        reward: weighted mean of the valid scores, in [0, 1]; None without a valid score.
        scores: score of each rubric, in their order; None if it is not valid.
        failures: one line for each score that is not valid.
    """

    reward: float | None
    scores: tuple[float | None, ...]
    failures: tuple[str, ...]


async def grade(
    judge: Judge, rubrics: Sequence[Rubric], question: str, answer: str, *, timeout: float = TIMEOUT
) -> Grade:
    """Grade an answer by all rubrics at the same time.

    Args:
        timeout: seconds after which a score is missing; the judge's coroutine is cancelled.

    Raises:
        ValueError: there are no rubrics.
    """
    if not rubrics:
        raise ValueError("a judge needs at least one rubric")

    async def score(rubric: Rubric) -> float | str:
        try:
            value = await asyncio.wait_for(judge(rubric, question, answer), timeout)
            if 0 <= value <= 1:  # false for nan
                return float(value)
            return f"rubric {rubric.name}: a score of {value}, which is not in [0, 1]"
        except TimeoutError:
            return f"rubric {rubric.name}: no score within {timeout:g} s"
        except Exception as error:  # a judge is any code
            return f"rubric {rubric.name}: {type(error).__name__}: {' '.join(str(error).split())}"

    results = await asyncio.gather(*map(score, rubrics))
    scores = tuple(None if isinstance(result, str) else result for result in results)
    weighted = [
        (rubric.weight, value)
        for rubric, value in zip(rubrics, scores, strict=True)
        if value is not None
    ]
    total = math.fsum(weight for weight, _ in weighted)
    reward = math.fsum(weight * value for weight, value in weighted) / total if weighted else None
    return Grade(
        reward if reward is None else min(1.0, reward),
        scores,
        tuple(result for result in results if isinstance(result, str)),
    )


def with_rubrics(verified: float, graded: float | None, weight: float) -> float:
    """Verified reward and a judge's: (1 - weight) · verified + weight · graded, in [0, 1].

    The judge comes on top of a verified reward; without a grade, the verified reward alone counts.

    Raises:
        ValueError: ``weight`` is not in [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}: must be in [0, 1]")
    return verified if graded is None else (1 - weight) * verified + weight * graded
