"""Sources of conversations: JSON lines, and tables (Parquet and Arrow)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data import conversations, files, remote, saved_datasets, tables
from pretrain.data.chat import REPLY, Message, render
from pretrain.data.composer import Composer
from pretrain.data.files import reason
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip
from pretrain.data.sources.indexed import FileSource, IndexedSource, too_long
from pretrain.data.sources.interface import Segment, content_hash
from pretrain.data.sources.parts import Encoded
from pretrain.data.sources.tokens import TokenDocuments, index_tokens
from pretrain.errors import PretrainError

_KINDS = "files of conversations (.jsonl, .json; .gz, .zst, .bz2 or .xz; .parquet, .arrow)"


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
    """Conversations in the layouts of :mod:`pretrain.data.conversations`, such as
    ``{"messages": [{"role": "user", "content": "…"}, …]}``."""

    is_chat = True

    def find(self) -> list[Path | Skip]:
        path = remote.local_path(self.config.path, self.data.cache_dir, self.setting)
        items = files.find_json(path, self.setting, _KINDS, tables.SUFFIXES)
        return saved_datasets.select(items, Path(path), self.setting)

    def check(self) -> None:
        for file in self.files:
            self._check_table(Path(file.name))

    def _check_table(self, file: Path) -> None:
        """
        Raises:
            PretrainError: a table has no column of conversations.
        """
        try:
            if not tables.kind(file):
                return
            schema = tables.schema(file)
        except files.UNREADABLE:
            return  # reading the file will give the reason
        lists = [column.name for column in schema if tables.is_list(column.type)]
        try:
            found = conversations.layout(schema.names, lists, self.config.field)
        except conversations.UnsupportedLayoutError as error:
            raise PretrainError(f"{self.setting}.path: {file} is {error}") from error
        except ValueError as error:
            found, problem = "", str(error)
        else:
            problem = "no column of messages"
        if not found:
            raise PretrainError(
                f"{self.setting}.field: {file} has {problem}; its columns are "
                f"{tables.described(schema)}: set it to the column with lists of messages"
            )

    def read(self, file: Path) -> Iterator[Chat | Skip]:
        """The conversations of a file.

        A conversation that would lose something, such as an image or a tool call, is skipped.

        Raises:
            PretrainError: the file has a layout that is recognized, but not read.
        """
        self._check_table(file)
        field = self.config.field
        for name, value in tables.read_objects(file, (field, *conversations.FIELDS, *files.MEDIA)):
            try:
                yield value if isinstance(value, Skip) else _chat(name, value, field)
            except conversations.UnsupportedLayoutError as error:
                raise PretrainError(f"{self.setting}.path: {name} is {error}") from error
            except ValueError as error:
                yield Skip(name, reason(error))

    def index(self, composer: Composer) -> "ChatDocuments":
        return index_chats(self, composer)


def _chat(name: str, value: dict[str, Any], field: str) -> Chat | Skip:
    """
    Raises:
        ValueError: as :func:`conversations.messages_of`.
    """
    messages = conversations.messages_of(value, field)
    if messages is None:
        return Skip(name, files.no_field(value, "messages"))
    if not any(message.role == REPLY and message.content.strip() for message in messages):
        return Skip(name, f"no reply of the {REPLY} in it", corrupt=False)
    if conversations.starts_with_reply(messages):
        return Skip(name, "it starts with a reply", corrupt=False)
    return Chat(name, messages)


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
