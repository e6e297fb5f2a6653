"""Tokens of a rollout: no text is ever encoded again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.environment.rollouts import Sample


@dataclass
class Trajectory:
    """A prompt, and what the model and the environment added, token by token.

    Attributes:
        prompt: ids of the first prompt.
        completion: ids after it, of the model and of observations, [n].
        logprobs: log-probability of each when it was sampled; 0 for observations, [n].
        mask: 1 for tokens of the model, 0 for observations, [n].
    """

    prompt: list[int]
    completion: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def tokens(self) -> list[int]:
        """All ids: the next prompt."""
        return self.prompt + self.completion

    def add_sample(self, sample: Sample) -> None:
        """Append tokens of the model."""
        self.completion += sample.tokens
        self.logprobs += sample.logprobs
        self.mask += [1] * len(sample.tokens)

    def add_observation(self, tokens: Sequence[int]) -> None:
        """Append tokens of the environment, outside the objective."""
        self.completion += tokens
        self.logprobs += [0.0] * len(tokens)
        self.mask += [0] * len(tokens)


def for_trl(trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """The output of a ``rollout_func`` of TRL's GRPOTrainer."""
    return {
        "prompt_ids": [trajectory.prompt for trajectory in trajectories],
        "completion_ids": [trajectory.completion for trajectory in trajectories],
        "logprobs": [trajectory.logprobs for trajectory in trajectories],
        "env_mask": [trajectory.mask for trajectory in trajectories],
    }
