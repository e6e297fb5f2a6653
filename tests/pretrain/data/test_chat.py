"""Conversations are rendered as the exported chat template renders them in transformers."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pretrain.data.chat import REPLY, Message, ToolCall, open_reply, readable, render, template
from pretrain.data.conversations import conversation_of
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from tests.pretrain.data import make

_KIMI_K25 = (
    *("<|media_content|>", "<think>", "</think>", "<|tool_calls_section_begin|>"),
    *("<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
    "<|tool_call_end|>",
)
CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% elif message.content %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
)


def tokenizers() -> dict[str, tuple[Tokenizer, Any]]:
    """A tokenizer with the tokens of Kimi K2, and one with those of K2.5; and transformers'."""
    made = {}
    for name, added in (("K2", ()), ("K2.5", _KIMI_K25)):
        trained = Tokenizer.train([make.text(number) for number in range(9)], 400)
        backend = Backend.from_str(trained._backend.to_str())
        backend.add_special_tokens(list(added))
        ours = Tokenizer(backend)
        plain = Backend.from_str(backend.to_str())
        theirs = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=ours.name_of(ours.bos))
        theirs.chat_template = template(ours, CONTENT)
        made[name] = ours, theirs
    return made


TOKENIZERS = tokenizers()
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=9)
names = st.text("abc_", min_size=1, max_size=4)
arguments = st.one_of(
    st.dictionaries(names, st.one_of(st.integers(), words, st.none()), max_size=2),
    words,
)
contents = st.one_of(
    words, st.lists(st.builds(lambda text: {"type": "text", "text": text}, words), max_size=3)
)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": draw(names), "arguments": draw(arguments)},
    }
    id = draw(st.sampled_from(["", "call_1", "call_2", "functions.a:7"]))
    return call | ({"id": id} if id else {})


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    role = draw(st.sampled_from(["system", "developer", "user", "tool", REPLY]))
    message = {"role": role, "content": draw(contents)}
    if role == REPLY:
        if draw(st.booleans()):
            message["reasoning_content"] = draw(words)
        if draw(st.booleans()):
            message["tool_calls"] = draw(st.lists(calls(), max_size=3))
            message["content"] = draw(st.one_of(st.just(message["content"]), st.none()))
            if not message["tool_calls"] and message["content"] is None:
                message["content"] = ""
    elif role == "tool" and draw(st.booleans()):
        message["tool_call_id"] = draw(st.sampled_from(["call_1", "call_2", "functions.a:7"]))
    if draw(st.booleans()):
        message["name"] = draw(names)
    return message


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(
    st.lists(messages(), min_size=1, max_size=6),
    st.lists(st.dictionaries(names, words), max_size=2),
)
def test_rendering_equals_the_template(
    kind: str, conversation: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> None:
    ours, theirs = TOKENIZERS[kind]
    found = conversation_of({"messages": conversation, "tools": tools}, "messages")
    assert found is not None
    document = render(ours, *found)
    expected = theirs.apply_chat_template(conversation, tools=tools or None)["input_ids"]
    assert document.tokens == list(expected)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_reply_is_learned_with_its_reasoning_and_calls(kind: str) -> None:
    ours, _ = TOKENIZERS[kind]
    conversation = [
        {"role": "user", "content": "Weather?"},
        {
            "role": REPLY,
            "content": "",
            "reasoning_content": "I ask.",
            "tool_calls": [
                {"id": "x1", "function": {"name": "look", "arguments": {"city": "Köln"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "x1", "content": "rain"},
        {"role": REPLY, "content": "<think>Rain.</think>It rains."},
        {"role": REPLY, "content": "No.", "weight": 0},
    ]
    value = {"messages": conversation, "tools": json.dumps([{"type": "function"}])}
    document = render(ours, *(conversation_of(value, "messages") or ((),)))
    text = ours.decode(document.tokens, skip_special_tokens=False)
    thinks = "<think></think>" if kind == "K2.5" else ""
    replies = (
        "<think>I ask.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
        '<|tool_call_argument_begin|>{"city": "Köln"}<|tool_call_end|><|tool_calls_section_end|>'
        "<|im_end|>",
        "<think>Rain.</think>It rains.<|im_end|>",
    )
    assert text == (
        '<|bos|><|im_system|>tool_declare<|im_middle|>[{"type":"function"}]<|im_end|>'
        "<|im_user|>user<|im_middle|>Weather?<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|>{replies[0]}"
        "<|im_system|>tool<|im_middle|>## Return of functions.look:0\nrain<|im_end|>"
        f"<|im_assistant|>assistant<|im_middle|>{replies[1]}"
        f"<|im_assistant|>assistant<|im_middle|>{thinks}No.<|im_end|>"
    )
    learned = [t for t, weight in zip(document.tokens, document.weights, strict=True) if weight]
    assert ours.decode(learned, skip_special_tokens=False) == "".join(replies)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("thinking", "start"), [(None, ""), (True, "<think>"), (False, None)])
def test_a_reply_begins_as_in_the_template(
    kind: str, thinking: bool | None, start: str | None
) -> None:
    ours, theirs = TOKENIZERS[kind]
    prompt = [{"role": "user", "content": "Hi"}]
    options = {"add_generation_prompt": True, "thinking": thinking}
    text = theirs.apply_chat_template(prompt, tokenize=False, **options)
    expected = "<think></think>" if start is None else start
    assert text.endswith(f"<|im_assistant|>assistant<|im_middle|>{expected}")
    document = render(ours, [Message("user", "Hi")])
    if thinking is not None and kind == "K2":
        with pytest.raises(PretrainError, match="has no <think> and </think>: leave --thinking"):
            open_reply(document, thinking)
    else:
        expected_ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert open_reply(document, thinking).tokens == expected_ids


def test_replies_are_readable() -> None:
    ours, _ = TOKENIZERS["K2.5"]
    calls = (ToolCall("add", '{"a": 1}'), ToolCall("look", "{}"))
    document = render(ours, [Message(REPLY, "Wait.", reasoning="I ask.", calls=calls)])
    reply = document.tokens[document.tokens.index(ours.im_middle) + 1 :]
    expected = '<think>I ask.</think>\nWait.functions.add:0({"a": 1})\nfunctions.look:1({})\n'
    assert readable(ours, reply) == expected
    assert all(expected.startswith(readable(ours, reply[:n])) for n in range(len(reply)))
