"""Tools of an environment: functions whose results, and errors, are observations."""

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from posttrain.environment.markup import BadCall, ToolCall

MAX_RESULT_CHARS = 4096
"""Default length at which a result is cut off."""
TIMEOUT = 60.0
"""Default seconds after which a tool has failed."""

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


class ToolError(Exception):
    """An error for the model: its message is the observation."""


class ToolResult(NamedTuple):
    """An observation: the answer to a call.

    Attributes:
        id: of the call.
        content: text for the model.
        failed: the call had no effect.
    """

    id: str
    content: str
    failed: bool = False


@dataclass(frozen=True)
class Tool:
    """A function of strings and numbers that returns text, or a coroutine of it.

    Attributes:
        function: its name, docstring and annotated parameters are those of the tool.
        per_turn: calls of a turn that are run; None for all.
        timeout: seconds after which a coroutine has failed; None for one that is bounded otherwise.
            A plain function cannot be interrupted.
    """

    function: Callable[..., str | Awaitable[str]]
    per_turn: int | None = None
    timeout: float | None = TIMEOUT

    @property
    def name(self) -> str:
        return self.function.__name__

    def schema(self) -> dict[str, Any]:
        """The declaration in a chat template, as in the OpenAI API."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": (inspect.getdoc(self.function) or "").partition("\n")[0],
                "parameters": {
                    "type": "object",
                    "properties": {p.name: {"type": _TYPES[p.annotation]} for p in parameters},
                    "required": [p.name for p in parameters if p.default is p.empty],
                },
            },
        }

    def misfit(self, arguments: dict[str, Any]) -> str | None:
        """The reason why arguments do not fit; None if they do."""
        signature = inspect.signature(self.function)
        try:
            bound = signature.bind(**arguments)
        except TypeError as error:
            return f"{self.name}: {error}"
        for name, value in bound.arguments.items():
            wanted = signature.parameters[name].annotation
            if type(value) is not wanted and not (wanted is float and type(value) is int):
                return f"{self.name}: {name} must be of type {_TYPES[wanted]}"
        return None


Gather = Callable[..., Awaitable[list[Any]]]


class Toolset:
    """Tools by name.

    Args:
        gather: runs coroutines at the same time: :meth:`Rollouts.gather` if tools start rollouts.
        max_result_chars: longer results are cut off.

    Raises:
        ValueError: two tools have the same name, or a parameter has no type that JSON has.
    """

    def __init__(
        self,
        tools: Iterable[Tool] = (),
        *,
        gather: Gather = asyncio.gather,
        max_result_chars: int = MAX_RESULT_CHARS,
    ) -> None:
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise ValueError(f"two tools are named {tool.name}")
            for parameter in inspect.signature(tool.function).parameters.values():
                if parameter.annotation not in _TYPES:
                    raise ValueError(
                        f"tool {tool.name}: {parameter.name} must be annotated with one of "
                        f"{', '.join(kind.__name__ for kind in _TYPES)}"
                    )
            self._tools[tool.name] = tool
        self._gather = gather
        self._max_result_chars = max_result_chars

    def schemas(self) -> list[dict[str, Any]]:
        """Declarations of all tools."""
        return [tool.schema() for tool in self._tools.values()]

    async def call_all(self, calls: Sequence[ToolCall | BadCall]) -> list[ToolResult]:
        """Run the calls of a turn at the same time; they start in their order.

        Every call has a result. Calls that cannot be read or run, and errors of tools, are failed
        results.
        """
        counts: Counter[str] = Counter()
        coroutines: list[Coroutine[Any, Any, ToolResult]] = []
        for call in calls:
            name = call.name if isinstance(call, ToolCall) else ""
            counts[name] += 1
            coroutines.append(self._call(call, counts[name]))
        return list(await self._gather(*coroutines))

    async def _call(self, call: ToolCall | BadCall, count: int) -> ToolResult:
        try:
            content, failed = await self._run(call, count), False
        except ToolError as error:
            content, failed = f"error: {error}", True
        content = content.encode(errors="replace").decode()  # surrogates, such as in file names
        return ToolResult(call.id, content[: self._max_result_chars], failed)

    async def _run(self, call: ToolCall | BadCall, count: int) -> str:
        """
        Raises:
            ToolError: the call has no result.
        """
        if isinstance(call, BadCall):
            raise ToolError(call.reason)
        tool = self._tools.get(call.name)
        if tool is None:
            names = ", ".join(self._tools) or "none"
            raise ToolError(f"there is no tool {call.name}; tools: {names}")
        if tool.per_turn is not None and count > tool.per_turn:
            raise ToolError(f"{call.name} can be called {tool.per_turn} times in a turn")
        reason = tool.misfit(call.arguments)
        if reason:
            raise ToolError(reason)
        try:
            result = tool.function(**call.arguments)
            if inspect.isawaitable(result):
                waiting = result
                result = await (
                    waiting if tool.timeout is None else asyncio.wait_for(waiting, tool.timeout)
                )
        except ToolError:
            raise
        except TimeoutError:
            raise ToolError(f"{call.name} had no result within {tool.timeout:g} s") from None
        except Exception as error:  # a tool is any code
            text = " ".join(str(error).split())
            raise ToolError(f"{call.name}: {type(error).__name__}: {text}") from error
        return str(result)
