"""An episode: a model and an environment take turns, as tokens."""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from posttrain.environment.chat import Chat
from posttrain.environment.core import Environment
from posttrain.environment.rollouts import Sample
from posttrain.environment.trajectory import Trajectory

Model = Callable[[list[int]], Awaitable[Sample]]
"""Samples a continuation of a prompt, such as :meth:`Rollouts.generate` of one model."""


@dataclass(frozen=True)
class Episode:
    """The result of an episode.

    Attributes:
        trajectory: its tokens.
        reward: of the final answer; 0 without one, nan if the judge failed.
        answer: the final answer; None without one.
        turns: replies of the model.
        failure: the reason without an answer or a reward; None with both.
        out_of_context: whether its context was too short for a reply or an observation.
    """

    trajectory: Trajectory
    reward: float
    answer: str | None
    turns: int
    failure: str | None
    out_of_context: bool = False

    def is_cut_off(self, ends: Collection[int]) -> bool:
        """Whether a limit of tokens ended it.

        Args:
            ends: ids that end a reply.
        """
        tokens = self.trajectory.completion
        return self.out_of_context or not tokens or tokens[-1] not in ends


async def run_episode(
    environment: Environment, model: Model, chat: Chat, *, seed: int, context: int
) -> Episode:
    """Run a task to its end.

    Args:
        seed: of the task.
        context: limit of the trajectory, in tokens. A reply is cut off there and has no effect; an
            observation that does not fit ends the episode, too.
    """
    messages, info = await environment.reset(seed=seed)
    trajectory = Trajectory(chat.prompt(messages, info["tools"]))
    turns = 0
    while (room := context - len(trajectory)) > 0:
        sample = await model(trajectory.tokens)
        turns += 1
        trajectory.add_sample(Sample(sample.tokens[:room], sample.logprobs[:room]))
        if len(sample.tokens) > room:
            break
        step = await environment.step(chat.decode(sample.tokens))
        if step.terminated or step.truncated:
            answer, failure = step.info["answer"], step.info.get("failure")
            return Episode(trajectory, step.reward, answer, turns, failure)
        observation = chat.results(sample.tokens, step.observation)
        if len(trajectory) + len(observation) >= context:
            break
        trajectory.add_observation(observation)
    failure = f"no answer within {context} tokens"
    return Episode(trajectory, 0.0, None, turns, failure, out_of_context=True)
