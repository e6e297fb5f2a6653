"""Write the records of a source as files of Parquet, which contain its images and videos."""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.data import tables
from pretrain.data.files import MAX_DOCUMENT_BYTES, reason
from pretrain.data.interface import Split
from pretrain.data.media import span
from pretrain.data.media.frames import Media
from pretrain.data.media.span import Place
from pretrain.data.skipped import Skip
from pretrain.data.sources.chat import Chat
from pretrain.data.sources.interface import Record
from pretrain.data.sources.vision_chat import VisionChat
from pretrain.data.vision_text.columns import MAX_ROW_BYTES
from pretrain.data.vision_text.document import Mixed
from pretrain.runtime.progress import counted

if TYPE_CHECKING:
    import pyarrow as pa

# Bytes of images and text that are collected for a group of rows.
_GROUP_BYTES = 1 << 26


def write(
    records: Iterable[Record | Skip],
    folder: Path,
    per_file: int,
    split_of: Callable[[Record], Split],
) -> tuple[str, dict[Split, int], list[Skip]]:
    """Write records as ``folder/train-00000.parquet`` and ``folder/held_out-00000.parquet``, ….

    Args:
        records: all of one kind.
        folder: is created.
        per_file: records per file.
        split_of: the split of a record.

    Returns:
        The type of source that reads the files, the number of records in each split, and the
        records that are left out.
    """
    folder.mkdir()
    kind = _TEXT
    counts: dict[Split, int] = {"train": 0, "held_out": 0}
    skips: list[Skip] = []
    files: dict[Split, _Files] = {}
    for record in counted(records, f"writing {folder.name}", "records"):
        if isinstance(record, Skip):
            skips.append(record)
            continue
        kind = _kind(record)
        try:
            row = kind.row(record)
            if (size := _size(row)) > kind.max_bytes:
                raise ValueError(f"{size:,} bytes are more than a row may have")
        except (OSError, ValueError) as error:
            skips.append(Skip(record.name, reason(error)))
            continue
        split = split_of(record)
        if split not in files:
            files[split] = _Files(folder, split, kind.schema(), per_file)
        files[split].add(row)
        counts[split] += 1
    for one in files.values():
        one.close()
    return kind.type, counts, skips


class _Files:
    """The files of a split."""

    def __init__(self, folder: Path, split: Split, schema: "pa.Schema", per_file: int) -> None:
        self._folder, self._split, self._schema = folder, split, schema
        self._per_file = per_file
        self._numbers = itertools.count()
        self._writer: Any = None
        self._rows: list[dict[str, Any]] = []
        self._size = self._count = 0

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._size += _size(row)
        self._count += 1
        if self._size >= _GROUP_BYTES:
            self._write()
        if self._count == self._per_file:
            self.close()

    def close(self) -> None:
        self._write()
        if self._writer is not None:
            self._writer.close()
        self._writer, self._count = None, 0

    def _write(self) -> None:
        pyarrow = tables.require_pyarrow()
        from pyarrow import parquet

        if not self._rows:
            return
        if self._writer is None:
            path = self._folder / f"{self._split}-{next(self._numbers):05}.parquet"
            self._writer = parquet.ParquetWriter(path, self._schema)
        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows, self._size = [], 0


def _size(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_size, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 8


# ---------------------------------------------------------------------- rows


class _Kind(NamedTuple):
    """A kind of records.

    Attributes:
        type: of the source that reads its files.
        schema: the columns.
        row: their values for a record.
        max_bytes: of a row that this source reads.
    """

    type: str
    schema: Callable[[], "pa.Schema"]
    row: Callable[[Any], dict[str, Any]]
    max_bytes: int = MAX_DOCUMENT_BYTES


def _kind(record: Record) -> _Kind:
    if isinstance(record, Mixed):
        return _DOCUMENTS
    if isinstance(record, Chat):
        return _VISION_CHAT if isinstance(record, VisionChat) else _CHAT
    return _TEXT


def _text_schema() -> "pa.Schema":
    pyarrow = tables.require_pyarrow()
    return pyarrow.schema({"text": pyarrow.large_string()})


def _part_fields() -> dict[str, "pa.DataType"]:
    pyarrow = tables.require_pyarrow()
    file = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    return {"text": pyarrow.string(), "image": file, "video": pyarrow.list_(file)}


def _parts_schema() -> "pa.Schema":
    pyarrow = tables.require_pyarrow()
    return pyarrow.schema({"parts": pyarrow.list_(pyarrow.struct(_part_fields()))})


def _messages_schema() -> "pa.Schema":
    pyarrow = tables.require_pyarrow()
    text = pyarrow.string()
    function = pyarrow.struct({"name": text, "arguments": text})
    message = pyarrow.struct(
        {
            "role": text,
            "content": pyarrow.list_(pyarrow.struct({"type": text, **_part_fields()})),
            "name": text,
            "reasoning_content": text,
            "tool_calls": pyarrow.list_(pyarrow.struct({"id": text, "function": function})),
            "tool_call_id": text,
            "weight": pyarrow.int8(),
        }
    )
    return pyarrow.schema({"messages": pyarrow.list_(message), "tools": text})


def _of_text(record: Record) -> dict[str, Any]:
    return {"text": record.text}


def _of_document(record: Mixed) -> dict[str, Any]:
    return {"parts": [dict([_part(part)]) for part in record.parts]}


def _of_conversation(record: Chat) -> dict[str, Any]:
    messages, tools = record.conversation
    listed = []
    for message in messages:
        parts = map(_part, message.parts)
        calls = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
        listed.append(
            {
                "role": message.role,
                "content": [{"type": type, type: value} for type, value in parts],
                "name": message.name or None,
                "reasoning_content": message.reasoning,
                "tool_calls": calls or None,
                "tool_call_id": message.answered or None,
                "weight": None if message.learned else 0,
            }
        )
    return {"messages": listed, "tools": json.dumps(tools) if tools else None}


def _part(part: str | Media) -> tuple[str, Any]:
    """The type of a part, and its value."""
    if isinstance(part, str):
        return "text", part
    files = [_file(place) for place in part.paths]
    return ("video", files) if part.moving else ("image", files[0])


def _file(place: Place) -> dict[str, Any]:
    return {"bytes": span.content(place), "path": Path(str(place)).name}


_TEXT = _Kind("text", _text_schema, _of_text)
_DOCUMENTS = _Kind("images", _parts_schema, _of_document, MAX_ROW_BYTES)
_CHAT = _Kind("chat", _messages_schema, _of_conversation)
_VISION_CHAT = _Kind("vision_chat", _messages_schema, _of_conversation, MAX_ROW_BYTES)
