"""PARL: the rewards of an orchestrator, and its critical steps.

Source: Kimi K2.5 (arXiv 2602.02276, section 5). The forms of the two auxiliary rewards, their
weights and the annealing are not published: those here are this project's choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A turn of the orchestrator.

    Attributes:
        sub_steps: replies of each sub-agent that the turn assigned a task to.
        finished: how many of them returned an answer.
        main_steps: replies of the orchestrator itself.
    """

    sub_steps: tuple[int, ...] = ()
    finished: int = 0
    main_steps: int = 1


def critical_steps(stages: Sequence[Stage]) -> int:
    """Steps on the longest path: of each stage, the main steps and its longest sub-agent's."""
    return sum(stage.main_steps + max(stage.sub_steps, default=0) for stage in stages)


def total_steps(stages: Sequence[Stage]) -> int:
    """Steps of all agents."""
    return sum(stage.main_steps + sum(stage.sub_steps) for stage in stages)


def parallelism(stages: Sequence[Stage]) -> float:
    """Total steps over critical steps, at least 1: the speed-up; 1 without a stage."""
    return total_steps(stages) / critical_steps(stages) if stages else 1.0


def parallel_reward(stages: Sequence[Stage], wanted: int) -> float:
    """Reward of instantiating sub-agents, in [0, 1]: min(1, assigned tasks / wanted)."""
    return min(1.0, sum(len(stage.sub_steps) for stage in stages) / wanted)


def finish_reward(stages: Sequence[Stage]) -> float:
    """Share of the assigned tasks that a sub-agent answered, in [0, 1]; 0 without tasks."""
    assigned = sum(len(stage.sub_steps) for stage in stages)
    return sum(stage.finished for stage in stages) / assigned if assigned else 0.0


def annealed(weight: float, progress: float, end: float) -> float:
    """A weight that falls linearly from its value to 0.

    Args:
        progress: share of the training that is done, in [0, 1].
        end: the progress at which it is 0; infinite: the weight is constant.
    """
    return weight * max(0.0, 1 - progress / end)


@dataclass(frozen=True)
class Parl:
    """The reward: lambda1 · parallel + lambda2 · finish + performance.

    Attributes:
        parallel_weight: lambda1 at the start.
        finish_weight: lambda2 at the start.
        anneal_until: share of the training after which both are 0; infinite: never, the ablation
            that leaves spurious sub-agents.
        wanted: assigned tasks from which the parallel reward is 1.

    Raises:
        ValueError: a setting is out of its range.
    """

    parallel_weight: float = 0.3
    finish_weight: float = 0.2
    anneal_until: float = 0.6
    wanted: int = 3

    def __post_init__(self) -> None:
        for name in ("parallel_weight", "finish_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"swarm.{name}={value}: must be finite and at least 0")
        if not self.anneal_until > 0:
            raise ValueError(f"swarm.anneal_until={self.anneal_until}: must be positive")
        if self.wanted < 1:
            raise ValueError(f"swarm.wanted={self.wanted}: must be at least 1")

    def reward(self, performance: float, stages: Sequence[Stage], progress: float) -> float:
        """Reward of an episode.

        Args:
            performance: reward of its answer.
            progress: share of the training that is done, in [0, 1].
        """
        first = annealed(self.parallel_weight, progress, self.anneal_until)
        second = annealed(self.finish_weight, progress, self.anneal_until)
        auxiliary = first * parallel_reward(stages, self.wanted) + second * finish_reward(stages)
        return performance + auxiliary
