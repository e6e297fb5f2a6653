"""An environment of OpenEnv, which runs on a server, as an environment of this package.

OpenEnv is not imported: its client is given. It requires many packages, among them an older Pillow
than this project, so it may need a separate Python environment.
"""

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from posttrain.environment.core import Ability, Environment, Message, Step, Task
from posttrain.environment.tools import TIMEOUT, Tool, ToolError, Toolset


class OpenEnvEnvironment(Environment):
    """Calls of tools are actions, and observations are their results.

    The task ends when the server says so, or with a reply without calls. Its reward is that of all
    steps. If the server fails, the task ends with the reward nan, and the environment cannot be
    used again.

    Args:
        client: an asynchronous client, such as ``openenv.core.GenericEnvClient``, for this
            environment alone.
        actions: functions with annotated parameters, of which each returns an action of the client.
            They become the tools.
        text: text of an observation, for the model; the first one is the question.
        reward: maps the sum of the rewards of all steps to [0, 1].
        ability: of the tasks.
        max_turns: replies of the model.
        timeout: seconds after which a step of the server has failed.
    """

    def __init__(
        self,
        client: Any,
        actions: Sequence[Callable[..., Any]],
        *,
        text: Callable[[Any], str] = str,
        reward: Callable[[float], float] = float,
        ability: Ability = "agentic",
        max_turns: int = 8,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(
            lambda seed: Task(f"{seed}", ability, self._text, None, _unused),
            tools=lambda _task: Toolset(Tool(self._tool(action), None, None) for action in actions),
            judge=lambda _task, _answer: reward(self._total),
            max_turns=max_turns,
        )
        self._client, self._to_text, self._timeout = client, text, timeout
        self._lock = asyncio.Lock()
        self._text, self._total, self._done = "", 0.0, False
        self._failure: str | None = None

    async def reset(self, *, seed: int) -> tuple[list[Message], dict[str, Any]]:
        """
        Raises:
            RuntimeError: the server failed, now or in an earlier task.
        """
        self._total = 0.0
        if self._failure is None:
            await self._observe(self._client.reset(seed=seed))
        if self._failure is not None:
            raise RuntimeError(self._failure)
        return await super().reset(seed=seed)

    async def step(self, action: str) -> Step:
        step = await super().step(action)
        if self._failure is not None:
            self._ended = True
            return Step([], math.nan, False, True, {"answer": None, "failure": self._failure})
        if not self._done or step.terminated:
            return step
        self._ended = True
        reward, info = await self.judge(self._text)
        return Step([], reward, True, False, {"answer": self._text, **info})

    async def _observe(self, response: Awaitable[Any]) -> None:
        """Wait for the server. After a failure, its next response could be one to this request."""
        try:
            result = await asyncio.wait_for(response, self._timeout)
        except TimeoutError:
            self._failure = f"server: no response within {self._timeout:g} s"
        except Exception as error:  # a client is any code
            text = " ".join(str(error).split())
            self._failure = f"server: {type(error).__name__}: {text}"
        else:
            self._text, self._done = self._to_text(result.observation), bool(result.done)
            self._total += result.reward or 0.0

    def _tool(self, action: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(action)
        async def tool(**arguments: Any) -> str:
            made = action(**arguments)
            async with self._lock:  # a server takes one action after the other
                if self._done or self._failure is not None:
                    raise ToolError("the task has ended")
                await self._observe(self._client.step(made))
                return self._text

        return tool


def _unused(_answer: str, _truth: Any) -> float:
    raise AssertionError("the judge does not ask the task")
