"""A conversation gives the same tokens in every layout, as Kimi's template renders it."""

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
