"""Any text of a model is a reply: an answer, calls, or calls that are errors."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.environment.markup import (
    CALL_BEGIN,
    MAX_CALLS,
    SECTION_BEGIN,
    SECTION_END,
    TOKENS,
    BadCall,
    Reply,
    ToolCall,
    parse_reply,
    render_calls,
)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,10}", fullmatch=True)
values = st.one_of(st.text(st.characters(codec="ascii")), st.integers(-9, 9), st.booleans())
arguments = st.dictionaries(st.text(st.characters(codec="ascii")), values)
calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=4)
hostile = st.lists(st.sampled_from([*TOKENS, "functions.f:0", "{}", "{", "[1]", "NaN", " x "])).map(
    "".join
)


@given(calls)
def test_rendered_calls_are_read(calls: list[tuple[str, dict[str, Any]]]) -> None:
    if any(token in json.dumps(args) for _, args in calls for token in TOKENS):
        return
    reply = parse_reply(
        f"<think>{render_calls(calls)}</think> text {render_calls(calls)}<|im_end|>"
    )
    assert reply.answer == "text"
    assert reply.calls == tuple(
        ToolCall(f"functions.{name}:{index}", name, args)
        for index, (name, args) in enumerate(calls)
    )


@given(hostile | st.text())
def test_any_text_is_a_reply(text: str) -> None:
    reply = parse_reply(text)
    assert bool(reply.calls) or not any(t in text for t in (CALL_BEGIN, SECTION_BEGIN, SECTION_END))
    for call in reply.calls:
        assert isinstance(call, ToolCall) or call.reason


def one(call: str, end: str = SECTION_END) -> Reply:
    return parse_reply(f"{SECTION_BEGIN}{call}{end}")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("", "the section has no call"),
        (CALL_BEGIN, "the id is not functions.NAME:INDEX"),
        (f"{CALL_BEGIN}get:0<|tool_call_argument_begin|>{{}}<|tool_call_end|>", "the id is not"),
        (f"{CALL_BEGIN}functions.get:0", "the call has no <|tool_call_argument_begin|>"),
        (
            f"{CALL_BEGIN}functions.get:0<|tool_call_argument_begin|>{{}}",
            "the call has no <|tool_call_end|>",
        ),
        *(
            (
                f"{CALL_BEGIN}functions.get:0<|tool_call_argument_begin|>{text}<|tool_call_end|>",
                reason,
            )
            for text, reason in (
                *(("{", "not JSON"), ("[1]", "not a JSON object"), ("[" * 50_000, "not JSON")),
                ('{"a": ["\\ud800"]}', "not JSON"),
                *(('{"a": NaN}', "not JSON"), ('{"a": ' + "1" * 5000 + "}", "not JSON")),
                ("x" * 70_000, "more than 65536 characters"),
            )
        ),
    ],
)
def test_a_call_that_cannot_be_read_has_a_reason(call: str, reason: str) -> None:
    for end in (SECTION_END, ""):  # a reply may be cut off
        (bad,) = one(call, end).calls
        assert isinstance(bad, BadCall)
        assert reason in bad.reason


def test_calls_are_bounded() -> None:
    calls = one(CALL_BEGIN * 10_000).calls
    assert len(calls) == MAX_CALLS + 1
    assert calls[-1] == BadCall("", "a reply can have 64 calls")


def test_calls_without_a_section_are_errors() -> None:
    reply = parse_reply(f"text{CALL_BEGIN}functions.get:0")
    assert reply == Reply("text", (BadCall("", f"calls need {SECTION_BEGIN}"),))
