"""Conversations as other trainers store them: messages of OpenAI, ShareGPT's and LLaVA's, and
Alpaca's, with tool calls, reasoning, images and videos."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pretrain.data import files
from pretrain.data.chat import REPLY, ROLES, Message, ToolCall
from pretrain.data.media import video
from pretrain.data.media.frames import Media

LISTS = ("messages", "conversations")
"""Usual keys of a list of messages, in order of preference."""
_ALPACA = ("instruction", "output")
_COMPLETED = ("prompt", "completion")
# Keys of preference data: if a record has all of an entry, its replies are not those to learn.
_PREFERENCES = (
    *(("chosen", "rejected"), ("preferred_output", "non_preferred_output")),
    *(("rejected_response",), ("rejected_messages",), ("kto_tag",)),
    *(("response_j", "response_k"), ("response_0", "response_1"), ("response_a", "response_b")),
    ("conversation_a", "conversation_b"),
)
_LABEL = "label"
_SYSTEM = ("system", "system_prompt")
FIELDS = (
    *(*LISTS, *_ALPACA, *_COMPLETED, *_SYSTEM, *dict.fromkeys(sum(_PREFERENCES, ())), _LABEL),
    *("input", "history", "tools", "functions"),
)
"""Keys of a record that this module reads, in addition to the field of a source and to media."""
# Senders of ShareGPT, also as in data sets made from it.
_SENDERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), REPLY),
    **{"system": "system", "developer": "developer"},
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), REPLY),
}
_CALLS = ("function_call", "tool_call")
# Keys of a record with media, by their kind.
_MEDIA = {"image": ("image", "images"), "video": ("video", "videos")}
READ_MEDIA = tuple(key for keys in _MEDIA.values() for key in keys)
"""Keys of a record with images and videos."""
# A line that a placeholder has for itself belongs to it. Qwen-VL's contain the name of a file.
_PLACEHOLDER = re.compile(r"(?:<(image|video|audio)>|<img>([^<>]+)</img>)\n?")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REASONED = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_LOST_FROM_MESSAGE = (*files.MEDIA, "tools", "prefix", "refusal")
# Keys of a reply that say whether it is in the loss.
_LEARNED = ("weight", "train", "loss")

Reference = str | bytes
"""The name, URL (also ``data:``) or content of a file."""
Resolve = Callable[[Sequence[Reference], bool], Media]
"""Finds an image, a video, or the frames of a video (the second argument is then true).

Raises:
    ValueError: it cannot be found.
"""


class UnsupportedLayoutError(ValueError):
    """The records of a source have a layout that is recognized, but not read."""


class Conversation(NamedTuple):
    """A conversation, and the declarations of the tools in it."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()

    @property
    def media(self) -> list[Media]:
        """Images and videos in the order of the messages."""
        return [media for message in self.messages for media in message.media]


class _Placeholder(NamedTuple):
    """A place of a message to which an image or video of the record belongs.

    Attributes:
        number: of the medium; None: the next one.
    """

    kind: str
    number: int | None = None


def no_media(references: Sequence[Reference], moving: bool) -> Media:
    """For a source of text alone: the :data:`Resolve` that refuses images and videos."""
    raise UnsupportedLayoutError(
        f"a conversation with {'videos' if moving else 'images'}: set the source's type to "
        "vision_chat, which reads them"
    )


def layout(names: Collection[str], lists: Collection[str], field: str) -> str:
    """The key of the messages; ``instruction`` in Alpaca's layout; ``prompt`` if they are divided
    into a prompt and its completion; empty if there is none.

    Args:
        names: keys of a record, or columns of a table.
        lists: those of them whose values are lists.
        field: the source's field, which precedes the usual names.

    Raises:
        UnsupportedLayoutError: preference data.
        ValueError: the messages are not a list.
    """
    if field not in lists and (keys := preference(names)):
        listed = " and ".join(map(repr, keys))
        fix = "to finetune on the better replies, write them as messages"
        if keys[0] == "chosen":
            fix = "to finetune on the chosen conversations, set the source's field to chosen"
        elif len(keys) == 1:
            fix = "to finetune on its conversations, remove the key"
        raise UnsupportedLayoutError(
            f"preference data ({listed}), on which this trainer does not train; {fix}"
        )
    if field not in lists and all(name in lists for name in _COMPLETED):
        return _COMPLETED[0]
    keys = (field, *LISTS)
    if key := next((key for key in keys if key in lists), ""):
        return key
    if all(name in names for name in _ALPACA):
        return _ALPACA[0]
    if key := next((key for key in keys if key in names), ""):
        raise ValueError(f"no list of messages in {key!r}")
    return ""


def preference(names: Collection[str]) -> tuple[str, ...]:
    """The keys that make a record one of preferences; empty if there are none."""
    return next((keys for keys in _PREFERENCES if all(key in names for key in keys)), ())


def is_completed(value: Mapping[str, Any]) -> bool:
    """Whether the messages of a record are divided into a prompt and its completion."""
    return all(isinstance(value.get(name), list) for name in _COMPLETED)


def layout_name(value: Mapping[str, Any], field: str) -> str:
    """The data set or interface after which a record's layout is named; empty if it has none.

    Raises:
        UnsupportedLayoutError, ValueError: as :func:`layout`.
    """
    key = layout(value, _lists(value), field)
    if key in ("", _ALPACA[0]):
        return "Alpaca" if key else ""
    if key == _COMPLETED[0] and is_completed(value):
        return "prompts and completions"
    first = value[key][0] if value[key] else None
    if not (isinstance(first, dict) and first.get("from")):
        return "OpenAI"
    return "LLaVA" if any(value.get(name) for name in READ_MEDIA) else "ShareGPT"


def conversation_of(
    value: Mapping[str, Any], field: str, resolve: Resolve = no_media
) -> Conversation | None:
    """The conversation in a record; None if the record has no layout of one.

    Args:
        field: see :func:`layout`.
        resolve: finds images and videos.

    Raises:
        UnsupportedLayoutError: the layout is recognized, but not read.
        ValueError: the conversation is not valid, or something in it is not read.
    """
    key = layout(value, _lists(value), field)
    if not key:
        return None
    if lost := files.lost_field(value, [name for name in files.MEDIA if name not in READ_MEDIA]):
        raise ValueError(f"its {lost!r} would be lost: conversations have images and videos only")
    if isinstance(value.get(_LABEL), bool):
        raise UnsupportedLayoutError(
            f"preference data ({_LABEL!r} is true for replies that are wanted, as in KTO), on "
            "which this trainer does not train; remove the key to finetune on all replies"
        )
    if key == _ALPACA[0]:
        listed = _alpaca(value)
    elif key == _COMPLETED[0] and is_completed(value):
        listed = [*map(_not_learned, value[key]), *value[_COMPLETED[1]]]
    else:
        listed = value[key]
    has_media = any(name in value for name in READ_MEDIA)
    places = _Places(value, resolve)
    messages = tuple(
        _message(number, message, has_media, places) for number, message in enumerate(listed, 1)
    )
    places.require_all_used()
    if given := [key for key in _SYSTEM if value.get(key)]:
        key, system = given[0], value[given[0]]
        if len(given) > 1 and system != value[given[1]]:
            raise ValueError(f"it has {' and '.join(map(repr, given))}")
        if messages and messages[0].role == "system":
            raise ValueError(f"it has a {key!r} and a message of the system")
        if not isinstance(system, str) or not files.is_unicode(system):
            raise ValueError(f"its {key!r} is not a text")
        messages = (Message("system", system), *messages)
    tools = tuple(_tools(value))
    if not files.is_unicode(json.dumps(tools, ensure_ascii=False)):
        raise ValueError("half a surrogate pair in its tools")
    return Conversation(messages, tools)


def _not_learned(message: Any) -> Any:
    """A message of a prompt: its replies are not in the loss."""
    return {**message, _LEARNED[0]: 0} if isinstance(message, dict) else message


def _lists(value: Mapping[str, Any]) -> list[str]:
    return [name for name in value if isinstance(value[name], list)]


def starts_with_reply(messages: Collection[Message]) -> bool:
    """Whether nothing but system and developer messages precedes a reply."""
    roles = (message.role for message in messages)
    return next((role for role in roles if role not in ("system", "developer")), "") == REPLY


def _alpaca(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of an instruction, with its input on the next line, as in LLaMA-Factory."""
    turns: list[dict[str, Any]] = []
    history = value.get("history") or []
    if not isinstance(history, list):
        raise ValueError("its 'history' is not a list")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("its 'history' is not a list of pairs of instruction and reply")
        turns += [{"role": "user", "content": pair[0]}, {"role": REPLY, "content": pair[1]}]
    instruction, given = value[_ALPACA[0]], value.get("input")
    if not isinstance(instruction, str) or not isinstance(given, str | None):
        raise ValueError("its 'instruction' or 'input' is not a text")
    asked = "\n".join(filter(None, (instruction, given)))
    return [
        *turns,
        {"role": "user", "content": asked},
        {"role": REPLY, "content": value[_ALPACA[1]]},
    ]


# ---------------------------------------------------------------------- tools


def _tools(value: Mapping[str, Any]) -> list[Any]:
    """Declarations of tools; those of OpenAI's older ``functions`` become tools."""
    tools = _json_list("tools", value.get("tools"))
    functions = _json_list("functions", value.get("functions"))
    return [*tools, *({"type": "function", "function": function} for function in functions)]


def _json_list(name: str, value: Any) -> list[Any]:
    """A list, also if it is in JSON, as in tables."""
    if isinstance(value, str):
        value = _parsed(f"its {name!r}", value) if value.strip() else None
    if not isinstance(value or [], list) or not all(isinstance(one, dict) for one in value or ()):
        raise ValueError(f"its {name!r} is not a list of declarations")
    return list(value or [])


def _parsed(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON") from error


def _calls(number: int, fields: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """The tool calls of a message; the older ``function_call`` is one."""
    listed = fields.get("tool_calls") or []
    if isinstance(listed, str):  # as in tables
        listed = _parsed(f"the text of the 'tool_calls' of message {number}", listed)
    if not isinstance(listed, list):
        raise ValueError(f"the 'tool_calls' of message {number} are not a list")
    if function := fields.get("function_call"):
        listed = [*listed, {"function": function}]
    return tuple(_call(number, one) for one in listed)


def _call(number: int, value: Any) -> ToolCall:
    call = value if isinstance(value, dict) else {}
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"a tool call of message {number} has no name of a function")
    arguments = function.get("arguments", function.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    id = str(call.get("id") or "")
    if not files.is_unicode(name + arguments + id):
        raise ValueError(f"half a surrogate pair in a tool call of message {number}")
    return ToolCall(name, arguments, id)


# ---------------------------------------------------------------------- messages


def _message(number: int, message: Any, has_media: bool, places: "_Places") -> Message:
    """A message of OpenAI (role, content) or of ShareGPT (from, value); also with the other key of
    its text, or with senders of ShareGPT as roles.

    Args:
        has_media: whether the record has a key of media, to which placeholders in a text refer.
    """
    fields = message if isinstance(message, dict) else {}
    role, calls = fields.get("role"), _calls(number, fields)
    content = fields["content"] if "content" in fields else fields.get("value")
    searched = has_media
    if role is None and (sender := fields.get("from")) is not None:
        role, content, searched = _sender(number, sender), fields.get("value", content), True
        if sender.lower() in _CALLS:
            content, calls = "", _sent_calls(number, content)
    elif isinstance(role, str) and role not in ROLES and role not in _CALLS:
        role = _SENDERS.get(role.lower(), role)
    if content is None and "parts" in fields:
        raise UnsupportedLayoutError(
            "a conversation in Gemini's layout ('parts' in place of 'content'), which is not read: "
            "write it as messages of role and content"
        )
    if role not in ROLES:
        raise ValueError(f"message {number} is of role {role!r:.40}, none of {', '.join(ROLES)}")
    if lost := files.lost_field(fields, _LOST_FROM_MESSAGE):
        raise ValueError(f"the {lost!r} of message {number} would be lost: it is not read")
    reasoning = next((fields[key] for key in _REASONING if fields.get(key) is not None), None)
    if (calls or reasoning) and role != REPLY:
        raise ValueError(f"message {number} of the role {role} has tool calls or reasoning")
    if content is None and (calls or reasoning):
        content = ""
    parts = list(_parts(number, content, searched and role != REPLY))
    if role == REPLY:
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"message {number} is a reply with an image or video")
        parts, reasoning = _reasoned(number, "".join(map(str, parts)), reasoning)
    name, answered = (str(fields.get(key) or "") for key in ("name", "tool_call_id"))
    if not files.is_unicode(name + answered):
        raise ValueError(
            f"half a surrogate pair in the 'name' or 'tool_call_id' of message {number}"
        )
    return Message(
        role,
        _joined([part if isinstance(part, str) else places.find(part) for part in parts]),
        name=name,
        reasoning=reasoning,
        calls=calls,
        answered=answered,
        learned=role != REPLY or _is_learned(number, fields),
    )


def _is_learned(number: int, fields: Mapping[str, Any]) -> bool:
    """Whether a reply is in the loss."""
    given = {key: fields[key] for key in _LEARNED if fields.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1) or isinstance(value, str):
            raise ValueError(f"the {key!r} of message {number} is {value!r:.40}, neither 0 nor 1")
    return all(given.values())


def _sender(number: int, sender: Any) -> str:
    if not isinstance(sender, str) or sender.lower() not in _SENDERS:
        known = ", ".join(_SENDERS)
        raise ValueError(f"message {number} is from {sender!r:.40}, none of {known}")
    return _SENDERS[sender.lower()]


def _sent_calls(number: int, value: Any) -> tuple[ToolCall, ...]:
    """The calls in a message of ShareGPT: an object or a list in JSON."""
    if isinstance(value, str):
        value = _parsed(f"the tool call in message {number}", value)
    return tuple(_call(number, one) for one in (value if isinstance(value, list) else [value]))


def _reasoned(number: int, content: str, reasoning: Any) -> tuple[list[Any], str | None]:
    """The content of a reply without the reasoning at its beginning, and the reasoning."""
    if reasoning is None and (match := _REASONED.match(content)):
        content, reasoning = content[match.end() :], match[1]
    if reasoning is not None and not (isinstance(reasoning, str) and files.is_unicode(reasoning)):
        raise ValueError(f"the reasoning of message {number} is not a text")
    return [content], reasoning


class _Named(NamedTuple):
    """An image or video that a message names itself."""

    references: tuple[Reference, ...]
    moving: bool


def _parts(number: int, content: Any, searched: bool) -> Iterator[str | _Placeholder | _Named]:
    """The parts of a content.

    Args:
        searched: whether to look for placeholders in its text.
    """
    for part in content if isinstance(content, list) else [content]:
        if isinstance(content, list):
            fields = part if isinstance(part, dict) else {}
            kind = str(fields.get("type"))
            if kind not in ("text", "input_text", "output_text"):
                yield _medium(number, kind, fields)
                continue
            part = fields.get("text", fields.get("content"))
        if not isinstance(part, str):
            raise ValueError(f"message {number} has no text for its content")
        if not files.is_unicode(part):
            raise ValueError(f"half a surrogate pair in message {number}")
        yield from _placeholders(number, part) if searched else [part]


def _placeholders(number: int, text: str) -> Iterator[str | _Placeholder | _Named]:
    start = 0
    for match in _PLACEHOLDER.finditer(text):
        if match[1] == "audio":
            raise ValueError(f"message {number} has a placeholder of audio, which is not read")
        yield text[start : match.start()]
        yield _Named((match[2],), False) if match[2] else _Placeholder(match[1])
        start = match.end()
    yield text[start:]


def _medium(number: int, kind: str, fields: Mapping[str, Any]) -> _Placeholder | _Named:
    """The image or video of a part, in the forms of OpenAI, transformers and Qwen."""
    moving = "video" in kind
    if kind not in ("image", "image_url", "input_image", "video", "video_url"):
        raise ValueError(f"message {number} has a part of type {kind:.40}, which is not read")
    names = (kind, "image", "image_url", "video", "video_url", "url", "path", "base64")
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if value is None:
        index = fields.get("index")
        return _Placeholder("video" if moving else "image", index if type(index) is int else None)
    if fields.get("base64") is value and isinstance(value, str):
        value = f"data:;base64,{value}"
    return _Named(_references(value, moving), moving)


def _references(value: Any, moving: bool) -> tuple[Reference, ...]:
    """The files of an image or of a video, which may be a list of its frames.

    Raises:
        ValueError: they are not named in a known form.
    """
    if isinstance(value, list) and moving and value:
        return tuple(one for frame in value for one in _references(frame, False))
    named = value
    if isinstance(value, dict):  # OpenAI's URL, or the image of a table
        named = next((value[k] for k in ("url", "bytes", "path") if value.get(k) is not None), None)
    if isinstance(named, str | bytes) and named:
        return (named,)
    raise ValueError(f"a medium is neither a file nor a URL: {str(value)[:60]}")


def _joined(parts: Sequence[str | Media]) -> str | tuple[str | Media, ...]:
    """The content of a message: a text if it has no media; otherwise without empty parts."""
    if all(isinstance(part, str) for part in parts):
        return "".join(map(str, parts))
    return tuple(part for part in parts if part)


class _Places:
    """The images and videos of a record, in the order of their placeholders."""

    def __init__(self, value: Mapping[str, Any], resolve: Resolve) -> None:
        self._resolve = resolve
        self._given = {kind: list(_given(value, kind)) for kind in _MEDIA}
        for kind, given in self._given.items():
            if given and resolve is no_media:
                resolve(given[0], kind == "video")
        self._used: dict[str, set[int]] = {kind: set() for kind in _MEDIA}

    def find(self, part: _Placeholder | _Named) -> Media:
        if isinstance(part, _Named):
            return self._resolve(part.references, part.moving)
        given, used = self._given[part.kind], self._used[part.kind]
        number = len(used) if part.number is None else part.number
        if not 0 <= number < len(given):
            raise ValueError(
                f"a placeholder <{part.kind}> without its {part.kind}: it has {len(given)}"
            )
        used.add(number)
        return self._resolve(given[number], part.kind == "video")

    def require_all_used(self) -> None:
        """
        Raises:
            ValueError: an image or video has no placeholder.
        """
        for kind, given in self._given.items():
            if len(self._used[kind]) < len(given):
                raise ValueError(
                    f"{len(given)} {kind}s and {len(self._used[kind])} placeholders <{kind}>"
                )


def _given(value: Mapping[str, Any], kind: str) -> Iterator[tuple[Reference, ...]]:
    """The images or videos of a record."""
    for key in _MEDIA[kind]:
        given = value.get(key)
        if given in (None, "", b"", [], {}):
            continue
        moving = kind == "video"
        several = isinstance(given, list) and not (
            moving and key == "video" and not all(map(_is_video, given))
        )
        for one in given if several else [given]:
            yield _references(one, moving)


def _is_video(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and video.is_video(value))
