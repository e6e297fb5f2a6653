"""Toggle: rewards alternate between a token budget for each problem and no budget.

Source: Kimi K2.5 (arXiv 2602.02276, section 4.4). The numbers are not published: the defaults of
:class:`Toggle` are this project's choice.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Mode = Literal["toggle", "permanent", "off"]
"""``toggle`` alternates; ``permanent`` is the ablation with a budget in every iteration."""


def has_budget(iteration: int, period: int) -> bool:
    """Whether an iteration, counted from 0, is in the phase with budgets, which comes first."""
    return iteration // period % 2 == 0


def estimate_budget(
    lengths: Sequence[int], correct: Sequence[bool], percentile: float, token_limit: int
) -> float:
    """Budget of a problem: a percentile of the lengths of its correct responses, in tokens.

    Args:
        lengths: number of tokens of each response, [n].
        correct: whether each response is correct, [n].
        percentile: from 0 to 100; between two lengths, it is interpolated.
        token_limit: the budget if no response is correct, and the largest budget.
    """
    of_correct = [n for n, right in zip(lengths, correct, strict=True) if right]
    if not of_correct:
        return float(token_limit)
    return min(float(token_limit), float(np.percentile(of_correct, percentile)))


def gate(
    rewards: Sequence[float], lengths: Sequence[int], budget: float, accuracy: float
) -> list[float]:
    """Rewards of the responses to one problem in the phase with budgets.

    A response over the budget loses its reward, unless the mean reward is below ``accuracy``: a
    problem that is not solved yet may take any number of tokens.

    Args:
        rewards: of each response, [k], not negative.
        lengths: number of tokens of each response, [k].
    """
    if not rewards or math.fsum(rewards) / len(rewards) < accuracy:
        return list(rewards)
    pairs = zip(rewards, lengths, strict=True)
    return [reward if length <= budget else 0.0 for reward, length in pairs]


@dataclass
class Toggle:
    """Rewards under Toggle, and the budgets: one number for each problem.

    Attributes:
        token_limit: the limit of a response, in tokens.
        mode: :data:`Mode`.
        period: iterations of each phase (m in the report).
        accuracy: mean reward from which a problem has a budget (λ), in [0, 1].
        percentile: of the lengths of correct responses (rho), from 0 to 100.
        budgets: budget of each problem, in tokens; fixed once estimated.

    Raises:
        ValueError: a setting is out of its range.
    """

    token_limit: int
    mode: Mode = "toggle"
    period: int = 10
    accuracy: float = 0.6
    percentile: float = 50.0
    budgets: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = {"token_limit": (1, math.inf), "period": (1, math.inf)}
        ranges |= {"accuracy": (0, 1), "percentile": (0, 100)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"toggle.{name}={getattr(self, name)}: must be {low} to {high}")
        if self.mode not in ("toggle", "permanent", "off"):
            raise ValueError(f"toggle.mode={self.mode!r}: must be toggle, permanent or off")

    def has_budget(self, iteration: int) -> bool:
        """Whether an iteration, counted from 0, has budgets."""
        return self.mode == "permanent" or (
            self.mode == "toggle" and has_budget(iteration, self.period)
        )

    def estimate(self, problem: str, lengths: Sequence[int], correct: Iterable[bool]) -> float:
        """Estimate the budget of a problem from responses before training; later calls keep it."""
        if problem not in self.budgets:
            budget = estimate_budget(lengths, list(correct), self.percentile, self.token_limit)
            self.budgets[problem] = budget
        return self.budgets[problem]

    def rewards(
        self, iteration: int, problem: str, rewards: Sequence[float], lengths: Sequence[int]
    ) -> list[float]:
        """Rewards of all responses to a problem in an iteration, [k].

        Args:
            iteration: counted from 0.
            problem: the name that its budget was estimated under; without one, the token limit.
            rewards: of each response, [k].
            lengths: number of tokens of each response, [k].

        Raises:
            ValueError: a reward is negative or not finite, which the gate would turn into a gain.
        """
        if not all(math.isfinite(reward) and reward >= 0 for reward in rewards):
            raise ValueError(f"Toggle needs rewards of at least 0, not {min(rewards)}")
        if not self.has_budget(iteration):
            return list(rewards)
        budget = self.budgets.get(problem, float(self.token_limit))
        return gate(rewards, lengths, budget, self.accuracy)

    def state_dict(self) -> dict[str, float]:
        """The budgets, for a checkpoint; JSON can store them."""
        return dict(self.budgets)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resume with the budgets of a checkpoint.

        Raises:
            ValueError: a budget is not a number from 0 to the limit of tokens.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"budgets must be given by problem, got {state!r:.80}")
        for problem, budget in state.items():
            if not (isinstance(budget, int | float) and 0 <= budget <= self.token_limit):
                raise ValueError(
                    f"the budget of {problem!r} is {budget!r}: must be 0 to {self.token_limit}"
                )
        self.budgets = {problem: float(budget) for problem, budget in state.items()}
