"""Conversations as other trainers store them: messages of OpenAI, ShareGPT's, and Alpaca's."""

from collections.abc import Collection, Mapping
from typing import Any

from pretrain.data import files
from pretrain.data.chat import REPLY, ROLES, Message, returned

LISTS = ("messages", "conversations")
"""Usual keys of a list of messages, in order of preference."""
_ALPACA = ("instruction", "output")
PREFERENCE = ("chosen", "rejected")
FIELDS = (*LISTS, *_ALPACA, *PREFERENCE, "input", "history", "system", "tools", "functions")
"""Keys of a record that this module reads, in addition to the field of a source and to media."""
# Senders of ShareGPT, also as in data sets made from it.
_SENDERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), REPLY),
    **{"system": "system", "developer": "developer"},
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")
_PLACEHOLDERS = ("<image>", "<video>", "<audio>")
_LOST_FROM_CHAT = (*files.MEDIA, "tools", "functions")
_LOST_FROM_MESSAGE = (
    *(*files.MEDIA, "tool_calls", "function_call", "tools"),
    *("reasoning_content", "reasoning", "thinking", "prefix"),
)


class UnsupportedLayoutError(ValueError):
    """The records of a source have a layout that is recognized, but not read."""


def layout(names: Collection[str], lists: Collection[str], field: str) -> str:
    """The key of the messages; ``instruction`` in Alpaca's layout; empty if there is neither.

    Args:
        names: keys of a record, or columns of a table.
        lists: those of them whose values are lists.
        field: the source's field, which precedes the usual names.

    Raises:
        UnsupportedLayoutError: preference data.
        ValueError: the messages are not a list.
    """
    if field not in lists and all(name in names for name in PREFERENCE):
        raise UnsupportedLayoutError(
            "preference data ('chosen' and 'rejected'), on which this trainer does not train; to "
            "finetune on the chosen conversations, set the source's field to chosen"
        )
    keys = (field, *LISTS)
    if key := next((key for key in keys if key in lists), ""):
        return key
    if all(name in names for name in _ALPACA):
        return _ALPACA[0]
    if key := next((key for key in keys if key in names), ""):
        raise ValueError(f"no list of messages in {key!r}")
    return ""


def layout_name(value: Mapping[str, Any], field: str) -> str:
    """The data set or interface after which a record's layout is named; empty if it has none.

    Raises:
        UnsupportedLayoutError, ValueError: as :func:`layout`.
    """
    key = layout(value, _lists(value), field)
    if key in ("", _ALPACA[0]):
        return "Alpaca" if key else ""
    first = value[key][0] if value[key] else None
    return "ShareGPT" if isinstance(first, dict) and first.get("from") else "OpenAI"


def messages_of(value: Mapping[str, Any], field: str) -> tuple[Message, ...] | None:
    """The messages of a record; None if it has no layout of a conversation.

    Args:
        field: see :func:`layout`.

    Raises:
        UnsupportedLayoutError: the layout is recognized, but not read.
        ValueError: the conversation is not valid, or contains more than text.
    """
    key = layout(value, _lists(value), field)
    if not key:
        return None
    if lost := files.lost_field(value, _LOST_FROM_CHAT):
        if key == "conversations" and lost in files.MEDIA:
            raise UnsupportedLayoutError(
                f"a conversation with images or other media ({lost!r}), as in LLaVA's data, which "
                "is not read yet: leave out the records with media"
            )
        raise ValueError(f"its {lost!r} would be lost: a source of chat has messages of text alone")
    listed = _alpaca(value) if key == _ALPACA[0] else value[key]
    messages = tuple(_message(number, message) for number, message in enumerate(listed, 1))
    if system := value.get("system"):
        if messages and messages[0].role == "system":
            raise ValueError("it has a 'system' and a message of the system")
        if not isinstance(system, str) or not files.is_unicode(system):
            raise ValueError("its 'system' is not a text")
        messages = (Message("system", system), *messages)
    return messages


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


def _message(number: int, message: Any) -> Message:
    """A message of OpenAI (role, content) or of ShareGPT (from, value)."""
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if role is None and fields.get("from") is not None:
        role, content = _sender(number, fields["from"]), fields.get("value")
        if found := next((p for p in _PLACEHOLDERS if p in str(content)), ""):
            raise ValueError(f"message {number} has a placeholder {found} without its media")
    if role not in ROLES:
        raise ValueError(f"message {number} is of role {role!r:.40}, none of {', '.join(ROLES)}")
    if lost := files.lost_field(fields, _LOST_FROM_MESSAGE):
        raise ValueError(f"the {lost!r} of message {number} would be lost: only its text is read")
    for name in ("weight", "train"):
        if fields.get(name) in (0, False):
            raise ValueError(f"message {number} is not to be learned ({name!r}): this is not read")
    if isinstance(content, list):
        content = _joined(number, content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text for its content")
    if not files.is_unicode(content):
        raise ValueError(f"half a surrogate pair in message {number}")
    if call := fields.get("tool_call_id"):
        content = returned(str(call), content)
    return Message(role, content)


def _sender(number: int, sender: Any) -> str:
    if sender in _CALLS:
        raise ValueError(f"message {number} is a tool call ({sender!r}), which is not read")
    if not isinstance(sender, str) or sender not in _SENDERS:
        known = ", ".join(_SENDERS)
        raise ValueError(f"message {number} is from {sender!r:.40}, none of {known}")
    return _SENDERS[sender]


def _joined(number: int, parts: list[Any]) -> str:
    """The text of a content that is a list of parts."""
    texts = []
    for part in parts:
        fields = part if isinstance(part, dict) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise ValueError(f"message {number} has a part of type {kind!r:.40}, not only text")
        texts.append(text)
    return "".join(texts)
