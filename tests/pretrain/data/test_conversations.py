"""A conversation gives the same tokens in every layout, as Kimi's template renders it."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.chat import render
from pretrain.data.conversations import UnsupportedLayoutError, conversation_of, layout_name
from pretrain.data.media.frames import Media
from pretrain.data.tokenizer import Tokenizer
from tests.pretrain.data import make

TOKENIZER = Tokenizer.train([make.text(number) for number in range(9)], 400)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=9)
ROLES = ("user", "assistant")
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)


def tokens(value: dict[str, Any], field: str = "text") -> list[int]:
    return render(TOKENIZER, *(conversation_of(value, field) or ((),))).tokens


@settings(deadline=None, max_examples=50)
@given(st.one_of(st.just(""), words), turns, st.booleans())
def test_every_layout_gives_the_same_tokens(
    system: str, turns: list[tuple[str, str]], apart: bool
) -> None:
    said = [("system", system)] if system else []
    for asked, replied in turns:
        said += [("user", asked), ("assistant", replied)]
    openai = [{"role": role, "content": text} for role, text in said]
    lists = [
        {"role": role, "content": [{"type": "text", "text": part} for part in (text[:2], text[2:])]}
        for role, text in said
    ]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    share = [{"from": names[role], "value": text} for role, text in said]
    *history, (asked, replied) = turns
    instruction, _, given = asked.partition("\n") if apart else (asked, "", "")
    if not instruction or not given:
        instruction, given = asked, ""
    alpaca = {"instruction": instruction, "input": given, "output": replied, "system": system}
    alpaca |= {"history": [list(pair) for pair in history]}
    expected = tokens({"messages": openai})
    assert tokens({"messages": lists}) == expected
    assert tokens({"conversations": share}) == expected
    assert tokens(alpaca) == expected
    assert tokens({"messages": openai[bool(system) :], "system": system}) == expected
    assert tokens({"talk": share, "messages": None, "text": "…"}, "talk") == expected


def test_tool_and_developer_turns_are_rendered_by_kimis_template() -> None:
    messages = [
        {"role": "developer", "content": "Be exact."},
        {"role": "user", "content": "Add."},
        {"role": "tool", "tool_call_id": "functions.add:0", "content": "12"},
        {"role": "assistant", "content": "12."},
    ]
    document = render(TOKENIZER, *(conversation_of({"messages": messages}, "text") or ((),)))
    assert TOKENIZER.decode(document.tokens, skip_special_tokens=False) == (
        "<|bos|><|im_system|>developer<|im_middle|>Be exact.<|im_end|>"
        "<|im_user|>user<|im_middle|>Add.<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.add:0\n12<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|>12.<|im_end|>"
    )
    learned = [t for t, weight in zip(document.tokens, document.weights, strict=True) if weight]
    assert learned == [*TOKENIZER.encode("12."), TOKENIZER.im_end]


REPLY = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "DPO": ({"prompt": "a", "chosen": REPLY, "rejected": REPLY}, "^preference data"),
    "pairs": ({"chosen": "a", "rejected": "b"}, "^preference data"),
    "with messages": ({"chosen": REPLY, "rejected": REPLY, "messages": REPLY}, "^preference data"),
    "KTO": ({"messages": REPLY, "label": False}, "^preference data .* as in KTO"),
    "KTO with completions": (
        {"prompt": REPLY[:1], "completion": REPLY[1:], "label": True},
        "^preference data",
    ),
    "KTO of LLaMA-Factory": ({"conversations": SHARE, "kto_tag": True}, "remove the key$"),
    "DPO of ms-swift": ({"messages": REPLY, "rejected_response": "c"}, "^preference data"),
    "DPO of OpenAI": (
        {"input": {}, "preferred_output": REPLY[1:], "non_preferred_output": REPLY[1:]},
        "^preference data",
    ),
    "compared conversations": (
        {"conversation_a": REPLY, "conversation_b": REPLY, "winner": "a"},
        "^preference data",
    ),
    "compared replies": ({"prompt": "a", "response_0": "b", "response_1": "c"}, "^preference data"),
    "Gemini": (
        {"messages": [{"role": "user", "parts": [{"text": "a"}]}]},
        "Gemini's layout .*: write it",
    ),
    "LLaVA": ({"image": "a.jpg", "conversations": SHARE}, "set the source's type to vision_chat"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layouts_are_named(name: str) -> None:
    value, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedLayoutError, match=message):
        conversation_of(value, "text")


def test_one_side_of_preferences_can_be_chosen() -> None:
    value = {"chosen": REPLY, "rejected": REPLY[:1]}
    assert tokens(value, "chosen") == tokens({"messages": REPLY})


@given(turns, turns)
def test_prompts_and_completions_are_conversations(
    before: list[tuple[str, str]], after: list[tuple[str, str]]
) -> None:
    """As TRL has them: replies of the prompt are not learned."""
    prompt, completion = (
        [{"role": r, "content": c} for pair in part for r, c in zip(ROLES, pair, strict=True)]
        for part in (before, after)
    )
    value = {"prompt": prompt, "completion": completion}
    assert layout_name(value, "text") == "prompts and completions"
    assert tokens(value) == tokens({"messages": prompt + completion})
    messages, _ = conversation_of(value, "text") or ((), ())
    learned = [message.learned for message in messages if message.role == "assistant"]
    assert learned == [False] * len(before) + [True] * len(after)


@pytest.mark.parametrize("text", ["content", "value"])
@pytest.mark.parametrize("sender", ["role", "from"])
@pytest.mark.parametrize("names", [("user", "assistant"), ("human", "gpt"), ("Human", "GPT")])
def test_keys_and_senders_may_be_of_another_layout(
    sender: str, text: str, names: tuple[str, str]
) -> None:
    values = [{sender: name, text: said} for name, said in zip(names, "ab", strict=True)]
    assert tokens({"messages": values}) == tokens({"messages": REPLY})
    call = {"from": "Function_Call", "value": '{"name": "f"}'}
    found = conversation_of({"messages": [values[0], call]}, "text")
    assert found is not None and found.messages[1].calls[0].name == "f"
    values[0][sender] = "narrator"
    with pytest.raises(ValueError, match=r"message 1 is (of role|from) 'narrator'"):
        tokens({"messages": values})


def test_a_system_prompt_is_a_message_of_the_system() -> None:
    expected = tokens({"messages": REPLY, "system": "s"})
    assert tokens({"messages": REPLY, "system_prompt": "s"}) == expected
    assert tokens({"messages": REPLY, "system_prompt": "s", "system": "s"}) == expected
    with pytest.raises(ValueError, match="it has 'system' and 'system_prompt'"):
        tokens({"messages": REPLY, "system_prompt": "s", "system": "t"})


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_replies_are_learned_or_not(key: str) -> None:
    def learned(value: object) -> bool:
        found = conversation_of({"messages": [REPLY[0], REPLY[1] | {key: value}]}, "text")
        assert found is not None
        return found.messages[1].learned

    assert not learned(0) and not learned(False)
    assert learned(1) and learned(True) and learned(None)
    for other in (0.5, "0", "false", [1]):
        with pytest.raises(ValueError, match=f"the '{key}' of message 2 is .*, neither 0 nor 1"):
            learned(other)


def test_tool_calls_may_be_json() -> None:
    calls = [{"id": "a", "function": {"name": "f", "arguments": '{"b": 1}'}}]
    values = [
        {"messages": [REPLY[0], {"role": "assistant", "content": None, "tool_calls": one}]}
        for one in (calls, json.dumps(calls))
    ]
    assert tokens(values[0]) == tokens(values[1])


CALLED: dict[str, Any] = {
    "system": "s",
    "tools": [{"type": "function", "function": {"name": "f", "description": "d"}}],
    "messages": [
        {"role": "user", "name": "n", "content": [{"type": "text", "text": "a"}]},
        {
            **{"role": "assistant", "content": "b", "reasoning_content": "c"},
            "tool_calls": [{"id": "i", "function": {"name": "f", "arguments": {"x": "y"}}}],
        },
        {"role": "tool", "tool_call_id": "i", "content": "d"},
        {"role": "assistant", "content": "e"},
    ],
}


def texts_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every string in a value."""
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(one, str):
            yield value, key
        elif isinstance(one, dict | list):
            yield from texts_of(one)


@pytest.mark.parametrize("number", range(len(list(texts_of(CALLED)))))
def test_half_a_surrogate_pair_anywhere_is_an_error_of_the_record(number: int) -> None:
    value = copy.deepcopy(CALLED)
    container, key = list(texts_of(value))[number]
    container[key] += "\ud800"
    with pytest.raises(ValueError):
        conversation_of(value, "text")


def test_layouts_have_names() -> None:
    assert layout_name({"messages": REPLY}, "text") == "OpenAI"
    assert layout_name({"conversations": SHARE}, "text") == "ShareGPT"
    assert layout_name({"instruction": "a", "output": "b"}, "text") == "Alpaca"
    assert layout_name({"text": "a"}, "messages") == ""


KEYS = (
    *("messages", "conversations", "role", "content", "from", "value", "type", "text", "image"),
    *("images", "image_url", "url", "video", "videos", "tool_calls", "function", "name", "tools"),
    *("arguments", "function_call", "reasoning_content", "system", "index", "weight", "base64"),
    *("instruction", "output", "input", "history", "functions", "id", "tool_call_id"),
)
VALUES = (
    *("user", "assistant", "human", "gpt", "function_call", "<image>", "<img>a</img>", "text"),
    *("image", "video_url", "a.png", '{"name": "f"}', "[1]", "", "\ud800", "<think>a</think>b"),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.sampled_from(VALUES)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
described = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": values},
    optional={"tool_calls": values, "reasoning_content": values, "name": values},
)
sent = st.fixed_dictionaries({"from": st.sampled_from(VALUES), "value": values})


@settings(deadline=None, max_examples=400)
@given(
    st.fixed_dictionaries(
        {"messages": st.one_of(values, st.lists(st.one_of(described, sent, values), max_size=4))},
        optional={"images": values, "videos": values, "tools": values, "functions": values},
    )
)
def test_any_record_is_a_conversation_or_an_error_of_one_line(value: dict[str, Any]) -> None:
    try:
        found = conversation_of(value, "text", lambda names, moving: Media(("",), moving))
    except ValueError:
        return
    if found:
        render(TOKENIZER, *found, lambda *_: None)
