"""Conversations as the model reads them: the chat format of Kimi K2 and K2.5.

The format follows the tokenizer. One that has Kimi K2.5's tokens gives K2.5's format, in which
every reply begins with its reasoning, even if it has none, and images with their kind. Others give
K2's format.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pretrain.data import tokenizer as tokens
from pretrain.data.media.frames import Media
from pretrain.data.packing import Document
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError

REPLY = "assistant"
# Kimi K2's template begins all messages but those of users and the assistant like a system message,
# with their role as the header.
_TOKENS = {**{role: role for role in tokens.ROLES}, "developer": "system", "tool": "system"}
ROLES = tuple(_TOKENS)
"""Roles of messages."""
_DECLARED = "tool_declare"
THINK, _END_THINK = "<think>", "</think>"
_CALLS, _END_CALLS = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _END_CALL = (
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
    "<|tool_call_end|>",
)
MARKUP = (THINK, _END_THINK, _CALLS, _END_CALLS, _CALL, _ARGUMENTS, _END_CALL)
"""Tokens around reasoning and tool calls; without them, a tokenizer spells them."""
# In text for people, such as ``functions.add:0({"a":1})``.
_READABLE = {
    **{THINK: THINK, _END_THINK: f"{_END_THINK}\n", _CALLS: "", _END_CALLS: ""},
    **{_CALL: "", _ARGUMENTS: "(", _END_CALL: ")\n"},
}
_IMAGE, _CONTENT = "image", "<|media_content|>"
KIND_OF_IMAGE = _IMAGE + _CONTENT
"""Follows the token that begins an image, in Kimi K2.5's format."""
_RETURNED = "## Return of "
_FUNCTIONS = "functions."


class ToolCall(NamedTuple):
    """A call of a tool in a reply.

    Attributes:
        name: of the function.
        arguments: in JSON.
        id: by which a result names the call; may be empty. Kimi's ids contain the function's name
            and a number, ``functions.NAME:0``; others are replaced by such.
    """

    name: str
    arguments: str
    id: str = ""


class Message(NamedTuple):
    """A message of a conversation.

    Attributes:
        role: one of :data:`ROLES`.
        content: its text, or text, images and videos in reading order.
        name: replaces the role in the header, if given.
        reasoning: of a reply, before its content; None if nothing is known of it.
        calls: the tools that a reply calls.
        answered: of a tool's result, the id of the call; empty: the results are in the order of the
            calls.
        learned: whether a reply is in the loss.
    """

    role: str
    content: str | tuple[str | Media, ...]
    name: str = ""
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    answered: str = ""
    learned: bool = True

    @property
    def parts(self) -> tuple[str | Media, ...]:
        """Text, images and videos in reading order."""
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def media(self) -> list[Media]:
        """Images and videos."""
        return [part for part in self.parts if isinstance(part, Media)]

    @property
    def text(self) -> str:
        """All text in the message, for a tokenizer to be trained on."""
        calls = (part for call in self.calls for part in (call.name, call.arguments))
        parts = (part for part in self.parts if isinstance(part, str))
        return "\n".join(filter(None, (self.reasoning, *parts, *calls)))


AddMedia = Callable[[Document, Media], object]
"""Appends an image or video to a document, for :func:`render`."""


def add_header(document: Document, role: str, name: str = "") -> Document:
    """Append the header of a role's message, with weight 0."""
    tokenizer = document.tokenizer
    start = tokenizer.roles[_TOKENS.get(role, "system")]
    header = [start, *tokenizer.encode(name or role), tokenizer.im_middle]
    return document.add_tokens(header, weight=0)


def add_content(
    document: Document,
    content: Sequence[str | int | Media],
    weight: float,
    add_media: AddMedia | None = None,
) -> Document:
    """Append text, ids of special tokens, and media; adjacent texts are tokenized together.

    Args:
        weight: of the text and the special tokens; that of media is 0.
        add_media: appends the images and videos.
    """
    tokenizer, text = document.tokenizer, ""

    def flush() -> None:
        nonlocal text
        if text:
            document.add_tokens(tokenizer.encode(text), weight=weight)
        text = ""

    for part in content:
        if isinstance(part, str):
            text += part
            continue
        flush()
        if isinstance(part, int):
            document.add_tokens([part], weight=weight)
        else:
            assert add_media is not None
            add_media(document, part)
            # Kimi K2.5's template has a line for each image.
            text = "\n" if has_kinds(tokenizer) else ""
    flush()
    return document


def has_kinds(tokenizer: Tokenizer) -> bool:
    """Whether images begin with their kind, as in Kimi K2.5's format."""
    return tokenizer.id_of(_CONTENT) is not None


def kind_of(tokenizer: Tokenizer, media: Media) -> list[int]:
    """The tokens between the one that begins an image and its placeholders. Videos have none."""
    end = tokenizer.id_of(_CONTENT)
    if end is None or media.moving:
        return []
    return [*tokenizer.encode(_IMAGE).tolist(), end]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    add_media: AddMedia | None = None,
) -> Document:
    """Render a conversation; only replies and their end tokens have a weight other than 0.

    :func:`template` renders the same tokens, except that special tokens written out in a content
    are plain text here. Unlike Kimi K2's own template, neither adds a default system message; and
    unlike K2.5's, both keep the reasoning of earlier replies.

    Args:
        tools: declarations of the tools, in OpenAI's format.
        add_media: appends the images and videos in the messages.
    """
    document = Document(tokenizer)
    if tools:
        declared = json.dumps(list(tools), ensure_ascii=False, separators=(",", ":"))
        add_content(add_header(document, _DECLARED), [declared, tokenizer.im_end], weight=0)
    calls = _Calls()
    for message in messages:
        add_header(document, message.role, message.name)
        content = [*_content(tokenizer, message, calls), tokenizer.im_end]
        learned = message.role == REPLY and message.learned
        add_content(document, content, 1 if learned else 0, add_media)
    return document


class _Calls:
    """The calls of a conversation, by the ids with which they are rendered."""

    def __init__(self) -> None:
        self._rendered: list[str] = []
        self._by_id: dict[str, str] = {}
        self._results = 0

    def add(self, call: ToolCall) -> str:
        """The id with which a call is rendered."""
        own = call.id if call.id.startswith(_FUNCTIONS) else ""
        rendered = own or f"{_FUNCTIONS}{call.name}:{len(self._rendered)}"
        self._rendered.append(rendered)
        if call.id:
            self._by_id[call.id] = rendered
        return rendered

    def answered(self, id: str) -> str:
        """The rendered id of the call that a result answers; empty if there is none."""
        number = self._results
        self._results += 1
        if id:
            return self._by_id.get(id, id)
        return self._rendered[number] if number < len(self._rendered) else ""


def add_thought(document: Document, *, is_empty: bool = True) -> Document:
    """Append the empty reasoning with which a reply begins in Kimi K2.5's format, with weight 0;
    or, if it is not empty, the token that begins it."""
    tokenizer = document.tokenizer
    names = (THINK, _END_THINK) if is_empty else (THINK,)
    markup = [tokenizer.id_of(name) for name in names]
    return document.add_tokens((id for id in markup if id is not None), weight=0)


def open_reply(document: Document, thinking: bool | None) -> Document:
    """Append the header of a reply, with weight 0, and what the mode begins with.

    Args:
        thinking: begin with reasoning, or with empty reasoning; None: the model chooses. Like the
            variable of :func:`template`.

    Raises:
        PretrainError: the tokenizer has no tokens for reasoning.
    """
    add_header(document, REPLY)
    if thinking is None:
        return document
    if not always_thinks(document.tokenizer):
        raise PretrainError(
            f"{document.tokenizer.name} has no {THINK} and {_END_THINK}: leave --thinking and "
            "--no-thinking out, or teach the model with `python -m posttrain sft`"
        )
    return add_thought(document, is_empty=not thinking)


def readable(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A reply as text for people: with its reasoning, and tool calls like calls of functions."""
    markup = {tokenizer.id_of(name): shown for name, shown in _READABLE.items()}
    text = ""
    for shown, group in itertools.groupby(ids, markup.get):
        some = list(group)
        text += tokenizer.decode(some) if shown is None else shown * len(some)
    return text


def _content(tokenizer: Tokenizer, message: Message, calls: _Calls) -> Iterator[str | int | Media]:
    def markup(name: str) -> str | int:
        number = tokenizer.id_of(name)
        return name if number is None else number

    if message.role == REPLY and (message.reasoning is not None or always_thinks(tokenizer)):
        yield from (markup(THINK), message.reasoning or "", markup(_END_THINK))
    if message.role == "tool" and (call := calls.answered(message.answered)):
        yield f"{_RETURNED}{call}\n"
    yield from message.parts
    if message.calls:
        yield markup(_CALLS)
        for one in message.calls:
            yield from (markup(_CALL), calls.add(one), markup(_ARGUMENTS), one.arguments)
            yield markup(_END_CALL)
        yield markup(_END_CALLS)


def always_thinks(tokenizer: Tokenizer) -> bool:
    """Whether replies without reasoning begin with empty reasoning, as in Kimi K2.5's format."""
    return tokenizer.id_of(_END_THINK) is not None


def template(tokenizer: Tokenizer, content: str) -> str:
    """The chat template in Jinja, for transformers and inference servers.

    Its variable ``thinking`` begins a reply with reasoning (true) or without (false); by default
    the model chooses.

    Args:
        content: Jinja that renders the content of a message.
    """
    unknown_role = f"the roles are {', '.join(ROLES)}, not "
    thinks = "message.reasoning_content is defined and message.reasoning_content is not none"
    reasoning = (
        f"{{% if {'true' if always_thinks(tokenizer) else thinks} %}}{THINK}"
        f"{{{{ message.reasoning_content or '' }}}}{_END_THINK}{{% endif %}}"
    )
    calls = (
        f"{_CALLS}{{% for call in message.tool_calls %}}{{% set function = call.function %}}"
        f"{{% set own = call.id if (call.id or '').startswith('{_FUNCTIONS}') else "
        f"'{_FUNCTIONS}' ~ function.name ~ ':' ~ ns.ids | length %}}"
        "{% set ns.ids = ns.ids + [own] %}"
        "{% if call.id %}{% set ns.by_id = dict(ns.by_id, **{call.id: own}) %}{% endif %}"
        f"{_CALL}{{{{ own }}}}{_ARGUMENTS}"
        "{% if function.arguments is string %}{{ function.arguments }}"
        "{% else %}{{ function.arguments | tojson }}{% endif %}"
        f"{_END_CALL}{{% endfor %}}{_END_CALLS}"
    )
    result = (
        "{% set id = message.tool_call_id or '' %}"
        "{% set id = ns.by_id.get(id, id) if id else (ns.ids + [''] * (ns.results + 1))"
        "[ns.results] %}{% set ns.results = ns.results + 1 %}"
        f"{{% if id %}}{{{{ '{_RETURNED}' ~ id ~ '\\n' }}}}{{% endif %}}"
    )
    return (
        "{{ bos_token }}{% set ns = namespace(ids=[], by_id={}, results=0) %}"
        f"{{% if tools %}}<|im_system|>{_DECLARED}<|im_middle|>"
        "{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{% endif %}"
        "{% for message in messages %}"
        f"{{% if message.role not in {list(ROLES)} %}}"
        f"{{{{ raise_exception('{unknown_role}' ~ message.role) }}}}{{% endif %}}"
        f"{{{{ '<|im_' ~ {_TOKENS}[message.role] ~ '|>' ~ (message.name or message.role) }}}}"
        "<|im_middle|>"
        f"{{% if message.role == '{REPLY}' %}}{reasoning}"
        f"{{% elif message.role == 'tool' %}}{result}{{% endif %}}"
        f"{content}{{% if message.tool_calls %}}{calls}{{% endif %}}<|im_end|>{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_{REPLY}|>{REPLY}<|im_middle|>"
        f"{{% if thinking is defined and thinking is not none %}}{THINK}"
        f"{{% if not thinking %}}{_END_THINK}{{% endif %}}{{% endif %}}{{% endif %}}"
    )
