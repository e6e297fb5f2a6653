"""Kimi's markup of tool calls, as text.

Source: Kimi K2's tool call guidance. A reply is content, and then possibly a section of calls::

    <|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>
    {"argument": "value"}<|tool_call_end|><|tool_calls_section_end|>
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
TOKENS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)
"""Special tokens of the markup."""
THINK_END = "</think>"

MAX_CALLS = 64
"""Calls of a reply that are read: the first ones. Further ones are one error."""
MAX_ARGUMENT_CHARS = 1 << 16
"""Longer arguments are not read."""

_ID = re.compile(r"\s*functions\.([A-Za-z_][\w-]{0,63}):(\d{1,4})\s*")


class ToolCall(NamedTuple):
    """A call of a tool.

    Attributes:
        id: as in the reply, ``functions.NAME:INDEX``; its result refers to it.
        name: of the tool.
        arguments: values by name.
    """

    id: str
    name: str
    arguments: dict[str, Any]


class BadCall(NamedTuple):
    """A call that cannot be read.

    Attributes:
        id: as far as it could be read.
        reason: one line, for the model.
    """

    id: str
    reason: str


class Reply(NamedTuple):
    """A reply of a model.

    Attributes:
        answer: its content without the thinking, stripped.
        calls: in their order; a reply without calls is final.
    """

    answer: str
    calls: tuple[ToolCall | BadCall, ...]


def render_call(name: str, index: int, arguments: Mapping[str, Any]) -> str:
    """A call in Kimi's markup."""
    return (
        f"{CALL_BEGIN}functions.{name}:{index}{ARGUMENT_BEGIN}"
        f"{json.dumps(arguments, separators=(',', ':'))}{CALL_END}"
    )


def render_calls(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A section with calls, each a name and arguments, numbered from 0."""
    rendered = (render_call(name, index, args) for index, (name, args) in enumerate(calls))
    return f"{SECTION_BEGIN}{''.join(rendered)}{SECTION_END}"


def parse_reply(text: str) -> Reply:
    """Read a reply; never raises.

    Everything that resembles a call and is none becomes a :class:`BadCall`. A call before the end
    of the thinking is part of the thinking.
    """
    text = text.rpartition(THINK_END)[2]
    content, section, calls = text.partition(SECTION_BEGIN)
    if not section:
        if CALL_BEGIN in content or SECTION_END in content:
            content = content.partition(CALL_BEGIN)[0]
            return Reply(_stripped(content), (BadCall("", f"calls need {SECTION_BEGIN}"),))
        return Reply(_stripped(content), ())
    calls = calls.partition(SECTION_END)[0]
    pieces = calls.split(CALL_BEGIN, MAX_CALLS + 1)[1:]
    parsed: list[ToolCall | BadCall] = [_parse_call(piece) for piece in pieces[:MAX_CALLS]]
    if not pieces:
        parsed.append(BadCall("", "the section has no call"))
    if len(pieces) > MAX_CALLS:
        parsed.append(BadCall("", f"a reply can have {MAX_CALLS} calls"))
    return Reply(_stripped(content), tuple(parsed))


def _stripped(content: str) -> str:
    return re.sub(r"<\|[a-z_]{1,32}\|>", "", content).strip()


def _parse_call(piece: str) -> ToolCall | BadCall:
    body, end, _ = piece.partition(CALL_END)
    id, begin, arguments = body.partition(ARGUMENT_BEGIN)
    match = _ID.fullmatch(id)
    id = id.strip()[:80] if match else ""
    if not match:
        return BadCall(id, "the id is not functions.NAME:INDEX")
    if not (begin and end):
        return BadCall(id, f"the call has no {CALL_END if begin else ARGUMENT_BEGIN}")
    if len(arguments) > MAX_ARGUMENT_CHARS:
        return BadCall(id, f"the arguments have more than {MAX_ARGUMENT_CHARS} characters")
    try:
        values = json.loads(arguments, parse_constant=_reject)
        json.dumps(values, ensure_ascii=False).encode()  # fails if "\ud800" has no second half
    except (ValueError, RecursionError):
        return BadCall(id, "the arguments are not JSON")
    if not isinstance(values, dict):
        return BadCall(id, "the arguments are not a JSON object")
    return ToolCall(id, match[1], values)


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
