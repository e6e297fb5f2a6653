"""Sources of conversations: JSON lines in the format of Chat Completions."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data import files
from pretrain.data.chat import REPLY, Message, render
from pretrain.data.composer import Composer
from pretrain.data.files import reason
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip
from pretrain.data.sources.indexed import FileSource, IndexedSource, too_long
from pretrain.data.sources.interface import Segment, content_hash
from pretrain.data.sources.parts import Encoded
from pretrain.data.sources.tokens import TokenDocuments, index_tokens
from pretrain.data.tokenizer import ROLES

_LOST_FROM_CHAT = (*files.MEDIA, "tools", "functions", "system")
_LOST_FROM_MESSAGE = (
    *(*files.MEDIA, "tool_calls", "function_call", "tool_call_id", "tools"),
    *("reasoning_content", "reasoning", "thinking", "prefix"),
)


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one reply."""

    name: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        return "\n".join(message.content for message in self.messages)

    @property
    def hash(self) -> int:
        return content_hash(*(part for message in self.messages for part in message))


class ChatSource(FileSource[Chat]):
    """JSON lines of conversations: ``{"messages": [{"role": "user", "content": "…"}, …]}``."""

    is_chat = True

    def find(self) -> list[Path | Skip]:
        return files.find_json(self.config.path, self.setting)

    def read(self, file: Path) -> Iterator[Chat | Skip]:
        """The conversations of a file.

        A conversation that would lose something, such as an image or a tool call, is skipped.
        """
        for name, value in files.read_objects(file):
            try:
                yield value if isinstance(value, Skip) else _chat(name, value, self.config.field)
            except ValueError as error:
                yield Skip(name, reason(error))

    def index(self, composer: Composer) -> "ChatDocuments":
        return index_chats(self, composer)


def _chat(name: str, value: dict[str, Any], field: str) -> Chat | Skip:
    """
    Raises:
        ValueError: the record is not a conversation, or contains more than text.
    """
    field = field if field in value else "messages"
    if field not in value:
        return Skip(name, files.no_field(value, "messages"))
    if not isinstance(value[field], list):
        raise ValueError(f"no list of messages in {field!r}")
    if lost := files.lost_field(value, _LOST_FROM_CHAT):
        raise ValueError(f"its {lost!r} would be lost: a source of chat has messages of text alone")
    messages = tuple(_message(number, message) for number, message in enumerate(value[field], 1))
    if not any(message.role == REPLY and message.content.strip() for message in messages):
        return Skip(name, f"no reply of the {REPLY} in it", corrupt=False)
    return Chat(name, messages)


def _message(number: int, message: Any) -> Message:
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
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
    return Message(role, content)


def _joined(number: int, parts: list[Any]) -> str:
    """The text of a content that is a list of parts, as in Chat Completions."""
    texts = []
    for part in parts:
        fields = part if isinstance(part, dict) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"message {number} has a part of type {kind!r:.40}, not only text")
        texts.append(text)
    return "".join(texts)


@dataclass(frozen=True)
class ChatDocuments(TokenDocuments):
    """Rendered conversations, which are never cut.

    Attributes:
        weights: float32, the weight of each token as a label.
        categories: uint8, the category under which the loss of each token is reported.
    """

    weights: npt.NDArray[np.float32]
    categories: npt.NDArray[np.uint8]

    def document(self, segment: Segment, *, pixels: bool = True) -> Document:
        tokens = self.extent(segment.number)
        columns = (self.tokens, self.weights, self.categories)
        return Document(self.composer.tokenizer, *(column[tokens].tolist() for column in columns))


def index_chats(source: IndexedSource[Chat], composer: Composer) -> ChatDocuments:
    """Load the index of a source of conversations, or build it; raises as :func:`index_tokens`."""
    tokenizer, length = composer.tokenizer, source.data.seq_length
    tokenizer.require_chat()

    def encode(records: Iterator[Chat | Skip]) -> Iterator[Encoded | Skip]:
        for record in records:
            if isinstance(record, Skip):
                yield record
                continue
            try:
                document = render(tokenizer, record.messages)
            except ValueError as error:
                yield Skip(record.name, reason(error))
                continue
            if len(document) > length:
                yield too_long(record.name, len(document), length)
            else:
                yield record.hash, (document.tokens, document.weights, document.categories)

    columns = {"tokens": tokenizer.dtype, "weights": np.float32, "categories": np.uint8}
    name = source.index_name("chat", tokenizer, length)
    return index_tokens(source, composer, name, columns, ChatDocuments, encode)
