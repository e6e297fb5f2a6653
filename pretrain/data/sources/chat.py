"""Sources of conversations: JSON lines, and tables (Parquet and Arrow)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.data import conversations, files, remote, saved_datasets, tables
from pretrain.data.chat import REPLY, Message, render
from pretrain.data.composer import Composer
from pretrain.data.content import content_hash
from pretrain.data.conversations import Conversation, Resolve, no_media
from pretrain.data.files import reason
from pretrain.data.media.span import Place
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip
from pretrain.data.sources.indexed import FileSource, IndexedSource, too_long
from pretrain.data.sources.interface import Segment
from pretrain.data.sources.parts import Encoded
from pretrain.data.sources.tokens import TokenDocuments, index_tokens
from pretrain.errors import PretrainError

COLUMNS: dict[str, npt.DTypeLike] = {"weights": np.float32, "categories": np.uint8}
"""Columns of an index besides its tokens, with their dtypes."""
FORMAT = 3
"""Part of the name of an index. Raise it when conversations are read or rendered differently."""
_KINDS = "files of conversations (.jsonl, .json; .gz, .zst, .bz2 or .xz; .parquet, .arrow)"


@dataclass(frozen=True)
class Chat:
    """A conversation with at least one reply."""

    name: str
    conversation: Conversation

    @property
    def text(self) -> str:
        tools = [json.dumps(self.conversation.tools, ensure_ascii=False)]
        messages = (message.text for message in self.conversation.messages)
        return "\n".join((*(tools if self.conversation.tools else ()), *messages))

    @property
    def hash(self) -> int:
        return content_hash(*self._hashed())

    def _hashed(self) -> Iterator[str]:
        for message in self.conversation.messages:
            yield message.role
            for part in message.parts:
                yield from (part,) if isinstance(part, str) else map(self._name_of, part.paths)
            if message[2:] != Message(message.role, "")[2:]:
                yield json.dumps(message[2:])
        if self.conversation.tools:
            yield json.dumps(self.conversation.tools)

    def _name_of(self, place: Place) -> str:
        """The name of a medium, wherever the files are."""
        root, name = f"{Path(self.name).parent}/", str(place)
        # Files outside the folder are copies, whose names are those of URLs.
        return name.removeprefix(root) if name.startswith(root) else Path(name).name


C = TypeVar("C", bound=Chat)


class ConversationSource(FileSource[C]):
    """Conversations in the layouts of :mod:`pretrain.data.conversations`, such as
    ``{"messages": [{"role": "user", "content": "…"}, …]}``."""

    is_chat = True
    record: type[C]
    max_row_bytes: ClassVar[int] = files.MAX_DOCUMENT_BYTES
    """Larger rows of tables are skipped."""

    def resolver(self, file: Path) -> Resolve:
        """Finds the images and videos that a file names."""
        return no_media

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
        lists = [column.name for column in schema if tables.has_lists(column.type)]
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
        for column in schema:
            if column.name in conversations.READ_MEDIA and not tables.can_name_media(column.type):
                raise PretrainError(
                    f"{self.setting}.path: {file} has {column.name!r} of type {column.type}, "
                    "neither names nor contents of images or videos: write these, or remove the "
                    "column"
                )

    def read(self, file: Path) -> Iterator[C | Skip]:
        """The conversations of a file.

        A conversation that would lose something is skipped.

        Raises:
            PretrainError: the file has a layout that is recognized, but not read.
        """
        yield from self.read_with(file, self.resolver(file))

    def read_with(self, file: Path, resolve: Resolve) -> Iterator[C | Skip]:
        """:meth:`read`, with another function that finds images and videos."""
        self._check_table(file)
        field = self.config.field
        is_table = file.exists() and bool(tables.kind(file))
        names = (field, *conversations.FIELDS, *files.MEDIA)
        for name, value in tables.read_objects(file, names, self.max_row_bytes):
            if isinstance(value, Skip):
                yield value
                continue
            try:
                record = _without_nulls(value) if is_table else value
                found = read_conversation(name, record, field, resolve)
                yield found if isinstance(found, Skip) else self.record(name, found)
            except conversations.UnsupportedLayoutError as error:
                raise PretrainError(f"{self.setting}.path: {name} is {error}") from error
            except ValueError as error:
                yield Skip(name, reason(error))


def _without_nulls(value: Any) -> Any:
    """The value without null fields, which a table has for all that an object does not have."""
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def read_conversation(
    name: str, value: Mapping[str, Any], field: str, resolve: Resolve
) -> Conversation | Skip:
    """The conversation in a record, or the reason why it is left out.

    Raises:
        ValueError: as :func:`conversations.conversation_of`.
    """
    conversation = conversations.conversation_of(value, field, resolve)
    if conversation is None:
        return Skip(name, files.no_field(value, "messages"))
    messages = conversation.messages
    if not any(m.role == REPLY and m.learned and (m.text.strip() or m.calls) for m in messages):
        return Skip(name, f"no reply of the {REPLY} in it", corrupt=False)
    if conversations.starts_with_reply(messages):
        return Skip(name, "it starts with a reply", corrupt=False)
    return conversation


class ChatSource(ConversationSource[Chat]):
    """Conversations of text alone."""

    record = Chat

    def index(self, composer: Composer) -> "ChatDocuments":
        return index_chats(self, composer)


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
                document = render(tokenizer, *record.conversation)
            except ValueError as error:
                yield Skip(record.name, reason(error))
                continue
            if len(document) > length:
                yield too_long(record.name, len(document), length)
            else:
                yield record.hash, (document.tokens, document.weights, document.categories)

    columns = {"tokens": tokenizer.dtype, **COLUMNS}
    name = source.index_name("chat", tokenizer, length, FORMAT)
    return index_tokens(source, composer, name, columns, ChatDocuments, encode)
