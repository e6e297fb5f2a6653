"""An environment as TRL's ``environment_factory`` expects one.

TRL's trainer runs the turns: it renders the prompt, parses the calls and calls methods of an object
by their names. For the parsing, the tokenizer needs the chat template of Kimi's format and
:data:`RESPONSE_TEMPLATE`. The object here has a method for each tool. It does not see the final
answer, so a reward function judges it, with the environments that TRL passes to it.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.environment.core import Environment, Task
from posttrain.environment.markup import ToolCall
from posttrain.environment.tools import ToolError

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_assistant|>assistant<|im_middle|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": (
                r"(?:<\|tool_calls_section_begin\|>)?<\|tool_call_begin\|>"
                r"functions\.(?P<name>[\w-]+):\d+<\|tool_call_argument_begin\|>"
            ),
            "close_pattern": r"<\|tool_call_end\|>(?:<\|tool_calls_section_end\|>)?",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>|$", "content": "text"},
    },
}
"""``response_template`` of a tokenizer, by which transformers reads a reply in Kimi's format."""


def environment_factory(
    create: Callable[[], Environment], tools: Sequence[Callable[..., Any]]
) -> Callable[[], Any]:
    """A factory for ``GRPOTrainer(environment_factory=…)``.

    Each row of the dataset needs a ``seed``. The question is appended to the last message.

    Args:
        create: returns a new environment, whose tasks all have the same tools.
        tools: functions with the names, annotations and docstrings of these tools, with a section
            ``Args:``; they are not called.
    """
    methods = {tool.__name__: _method(tool) for tool in tools}
    return type("TrlEnvironment", (_TrlEnvironment,), {"_create": staticmethod(create), **methods})


async def judged(completions: Sequence[Any], environments: Sequence[Any], **_: Any) -> list[Any]:
    """A reward function of TRL: the judge's reward of each final message; None without one."""
    rewards: list[Any] = []
    for completion, environment in zip(completions, environments, strict=True):
        final = completion[-1] if completion else {}
        if final.get("role") != "assistant" or final.get("tool_calls"):
            rewards.append(0.0)
            continue
        answer = final.get("content") or ""
        reward, _info = await environment._environment.judge(answer.strip())
        rewards.append(None if math.isnan(reward) else reward)
    return rewards


class _TrlEnvironment:
    _create: Callable[[], Environment]

    def __init__(self) -> None:
        self._environment = self._create()

    def reset(self, seed: int, **_: Any) -> str:
        """Start the task of a seed; returns its question."""
        task: Task = self._environment.start(seed)
        return task.question


def _method(tool: Callable[..., Any]) -> Callable[..., Any]:
    async def method(self: _TrlEnvironment, **arguments: Any) -> str:
        call = ToolCall(f"functions.{tool.__name__}:0", tool.__name__, arguments)
        (result,) = await self._environment.toolset.call_all([call])
        if result.failed:  # TRL turns it into an observation, and counts it
            raise ToolError(result.content)
        return result.content

    signature = inspect.signature(tool)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [first, *signature.parameters.values()]
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    method.__name__, method.__doc__ = tool.__name__, tool.__doc__
    method.__annotations__ = dict(tool.__annotations__)
    return method
