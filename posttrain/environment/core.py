"""Environments of tasks, in the shape of Gymnasium and asynchronous.

An environment is composed of four functions that can be exchanged: one that draws tasks, one for
their tools, a judge, and one that diversifies prompts (arXiv 2602.02276, appendix D).
"""

import asyncio
import inspect
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from posttrain.environment.markup import parse_reply
from posttrain.environment.tools import ToolResult, Toolset
from posttrain.rewards.judges import TIMEOUT

Ability = Literal["knowledge", "reasoning", "agentic"]
"""Domain of a task. Domains are abilities, not modalities: each has tasks of text and of images."""

Message = dict[str, Any]
"""A message of a conversation: ``role`` and ``content``."""


@dataclass(frozen=True)
class Task:
    """A question and its truth.

    Attributes:
        problem: name of the problem; tasks with the same name have the same question and truth.
        ability: see :data:`Ability`.
        question: message of the user.
        truth: what ``reward`` compares an answer with.
        reward: function of answer and truth, in [0, 1] (:mod:`posttrain.rewards`).
        image: a PIL image that the question is about; None for a task of text.
        data: what the task's tools need.
    """

    problem: str
    ability: Ability
    question: str
    truth: Any
    reward: Callable[[str, Any], float]
    image: Any = None
    data: Any = None


Tasks = Callable[[int], Task]
"""Returns the task of a seed, always the same."""
Judge = Callable[[Task, str], float | Awaitable[float | None] | None]
"""Returns the reward of a final answer, in [0, 1], or None without one."""
Diversify = Callable[[str, random.Random], str]
"""Returns another wording of a question."""


def verified(task: Task, answer: str) -> float:
    """The judge that applies the rule of the task."""
    return task.reward(answer, task.truth)


def one_of(*templates: str) -> Diversify:
    """A prompt diversifier: a random template around the question.

    Args:
        templates: texts that contain ``{question}``.

    Raises:
        ValueError: a template lacks it.
    """
    for template in templates:
        if "{question}" not in template:
            raise ValueError(f"the template {template!r} has no {{question}}")
    return lambda question, rng: rng.choice(templates).replace("{question}", question)


class Step(NamedTuple):
    """The result of an action, in the order of Gymnasium's ``step``.

    Attributes:
        observation: results of tools, for the model; none at the end.
        reward: of the final answer, in [0, 1]; 0 before the end, nan if the judge failed.
        terminated: the action was a final answer.
        truncated: no turns are left.
        info: ``answer``, the final one, and ``failure``, the reason without a reward.
    """

    observation: list[ToolResult]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class Environment:
    """One task at a time: :meth:`reset`, then :meth:`step` until the end.

    Args:
        tasks: see :data:`Tasks`.
        tools: the tools of a task.
        judge: see :data:`Judge`.
        diversify: see :data:`Diversify`.
        max_turns: replies of the model, the final one among them.
        judge_timeout: seconds after which an asynchronous judge has failed.
    """

    def __init__(
        self,
        tasks: Tasks,
        *,
        tools: Callable[[Task], Toolset] = lambda _task: Toolset(),
        judge: Judge = verified,
        diversify: Diversify = lambda question, _rng: question,
        max_turns: int = 8,
        judge_timeout: float = TIMEOUT,
    ) -> None:
        self._judge_timeout = judge_timeout
        self._tasks, self._tools = tasks, tools
        self._judge, self._diversify = judge, diversify
        self._max_turns = max_turns
        self._turns = 0
        self._ended = True

    async def reset(self, *, seed: int) -> tuple[list[Message], dict[str, Any]]:
        """Start the task of a seed.

        Returns:
            The messages of the prompt, and ``task`` and ``tools`` (declarations for the prompt).
        """
        task = self.start(seed)
        content: Any = task.question
        if task.image is not None:
            content = [
                {"type": "image", "image": task.image},
                {"type": "text", "text": task.question},
            ]
        info = {"task": task, "tools": self.toolset.schemas()}
        return [{"role": "user", "content": content}], info

    def start(self, seed: int) -> Task:
        """Start the task of a seed, and return it with its diversified question."""
        task = self._tasks(seed)
        question = self._diversify(task.question, random.Random(seed))
        self.task = replace(task, question=question)
        self.toolset = self._tools(self.task)
        self._turns, self._ended = 0, False
        return self.task

    async def step(self, action: str) -> Step:
        """Apply a reply of the model: run its calls, or judge it if it has none.

        Raises:
            RuntimeError: the task has ended, or none was started.
        """
        if self._ended:
            raise RuntimeError("the task has ended: call reset")
        self._turns += 1
        reply = parse_reply(action)
        if not reply.calls:
            self._ended = True
            reward, info = await self.judge(reply.answer)
            return Step([], reward, True, False, {"answer": reply.answer, **info})
        results = await self.toolset.call_all(reply.calls)
        if self._turns < self._max_turns:
            return Step(results, 0.0, False, False, {})
        return self.truncate(results, f"no answer within {self._max_turns} turns")

    def truncate(self, results: list[ToolResult], reason: str) -> Step:
        """End the task without an answer."""
        self._ended = True
        return Step(results, 0.0, False, True, {"answer": None, "failure": reason})

    async def judge(self, answer: str) -> tuple[float, dict[str, Any]]:
        """Reward of an answer; nan, and the reason in ``failure``, if the judge fails."""
        try:
            result = self._judge(self.task, answer)
            if inspect.isawaitable(result):
                reward = await asyncio.wait_for(result, self._judge_timeout)
            else:
                reward = result
            if reward is None:
                return math.nan, {"failure": "judge: no reward"}
            if not 0 <= reward <= 1:  # true for nan
                failure = f"judge: a reward of {reward}, which is not in [0, 1]"
                return math.nan, {"failure": failure}
            return float(reward), {}
        except TimeoutError:
            return math.nan, {"failure": f"judge: no reward within {self._judge_timeout:g} s"}
        except Exception as error:  # a judge is any code
            text = " ".join(str(error).split())
            return math.nan, {"failure": f"judge: {type(error).__name__}: {text}"}
