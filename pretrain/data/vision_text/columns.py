"""Columns of tables with images: their choice, and their rows with the places of the images.

Images are read in place, which needs uncompressed Arrow files, such as those of `save_to_disk`. Of
Parquet and compressed Arrow files, the columns are copied once into the cache: the values of a
Parquet column can only be decoded together, hundreds of images for each one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.data import tables
from pretrain.data.files import UNREADABLE, reason
from pretrain.data.media.span import Span
from pretrain.data.skipped import Skip
from pretrain.data.vision_text.copies import copied
from pretrain.data.vision_text.layouts import CAPTION, SOUND, Names, layout_of, media_keys

if TYPE_CHECKING:
    import pyarrow as pa

Kinds = Mapping[str, str]
"""The kind of each column: `text`, `image` ({bytes, path}), `bytes`, a list of one of these, or
another type."""
_IMAGES = ("image", "list of image", "bytes", "list of bytes")
_CAPTIONS = ("text", "list of text", "null")  # null: no row has a value
# Names of columns of bytes that are images.
_NAMES = (
    *("image", "images", "img", "imgs", "jpg", "jpeg", "png", "webp", "avif", "gif", "tif", "tiff"),
    *("picture", "photo", "image_bytes", "img_bytes", "image_data", "video", "videos", "mp4"),
)
MAX_ROW_BYTES = 2**28
"""Bytes of the largest row."""
# The reason why a copy ends early, in a file next to it.
_DAMAGE = "damage"


def choose(kinds: Kinds, names: Names, likely_text: str = "") -> list[str]:
    """The columns that documents are made of.

    Args:
        likely_text: the column that is probably the text, for messages.

    Raises:
        ValueError: a column is missing, has another type, or several could be meant.
    """
    if layout_of(kinds) in ("OBELICS", "MMC4", "parts"):
        return [
            key for key in ("parts", "images", "texts", "image_info", "text_list") if key in kinds
        ]
    images = image_columns(kinds, names)
    caption = names.field if names.field in kinds else CAPTION
    if caption not in kinds:
        fix = f"; set field to {likely_text!r}, the likely one" if likely_text else ""
        raise ValueError(f"has no column {names.field!r} of captions{fix}")
    if kinds[caption] not in _CAPTIONS:
        fix = f": set field to {likely_text!r}, the likely one" if likely_text else ""
        raise ValueError(f"has {caption!r} of type {kinds[caption]}, not text{fix}")
    if not images:
        raise ValueError("has no column of images: set image_field")
    if len(images) > 1:
        raise ValueError(f"has the images {', '.join(images)}: set image_field to one of them")
    return [*images, caption]


def image_columns(kinds: Kinds, names: Names) -> list[str]:
    """The columns that may be meant by the images of a table.

    Raises:
        ValueError: the one that is set is missing or has another type.
    """
    if field := names.image_field:
        if field not in kinds:
            raise ValueError(f"has no column {field!r} of images")
        if kinds[field] not in (*_IMAGES, *_CAPTIONS):
            raise ValueError(f"has {field!r} of type {kinds[field]}, not images")
        return [field]
    keys = [key for key in media_keys(kinds) if kinds[key] in _CAPTIONS]
    named = [key for key in keys if kinds[key] != "null"] or keys
    found = [key for key in kinds if kinds[key].endswith("image")]
    usual = [key for key in kinds if kinds[key].endswith("bytes") and key.lower() in _NAMES]
    return found or usual or named


def kinds_of(found: pa.Schema) -> dict[str, str]:
    """The kinds of a table's columns."""
    # Sound is stored in columns of the same type as images.
    return {
        column.name: "audio" if column.name.lower() in SOUND else _kind(column.type)
        for column in found
    }


def _kind(type: pa.DataType) -> str:
    pyarrow = tables.require_pyarrow()
    if tables.is_text(type):
        return "text"
    if tables.is_list(type):
        return f"list of {_kind(type.value_type)}"
    if _is_bytes(type):
        return "bytes"
    if pyarrow.types.is_struct(type):
        keys = {type.field(number).name: type.field(number).type for number in range(len(type))}
        if keys.keys() == {"bytes", "path"} and _is_bytes(keys["bytes"]):
            return "image"
    return str(type)


def _is_bytes(type: pa.DataType) -> bool:
    pyarrow = tables.require_pyarrow()
    return bool(pyarrow.types.is_binary(type) or pyarrow.types.is_large_binary(type))


def _has_bytes(type: pa.DataType) -> bool:
    if _is_bytes(type):
        return True
    return any(_has_bytes(type.field(number).type) for number in range(type.num_fields))


# ---------------------------------------------------------------------- rows


def read_rows(
    file: Path, columns: list[str], cache_dir: str
) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
    """(name, row) of every row of a table; bytes in it are :class:`Span` objects. Rows that cannot
    be read, and the rest of a damaged file, are :class:`Skip` objects.

    Raises:
        PretrainError: the cache cannot be written, or pyarrow is not installed.
    """
    pyarrow = tables.require_pyarrow()
    found = tables.schema(file)
    if not any(_has_bytes(column.type) for column in found if column.name in columns):
        yield from tables.read_rows(file, columns)
        return
    number, damage = 0, ""
    try:
        place = _in_place(file, columns, cache_dir)
        damaged = place.with_name(_DAMAGE)
        damage = damaged.read_text() if place != file and damaged.exists() else ""
        with tables.mapped_batches(place, columns) as (address, batches):
            for batch in batches:
                for part, why in _validated(batch):
                    names = part.schema.names
                    readers = (
                        {}
                        if why
                        else {key: _reader(part.column(key), place, address) for key in names}
                    )
                    for row in range(len(part)):
                        number += 1
                        name = f"{file}:{number}"
                        values = {key: read(row, f"{name}.{key}") for key, read in readers.items()}
                        if why or all(value is None for value in values.values()):
                            yield name, Skip(name, why or "an empty or damaged row")
                        else:
                            yield name, values
    except (*UNREADABLE, OverflowError, pyarrow.ArrowException) as error:
        damage = reason(error)
    if damage:
        after = f"cannot be read after row {number}: " if number else "a damaged table: "
        yield str(file), Skip(str(file), after + damage)
    elif not number:
        yield str(file), Skip(str(file), "no rows in it", corrupt=False)


def _validated(batch: pa.RecordBatch) -> Iterator[tuple[pa.RecordBatch, str]]:
    """Pieces of a batch, each with the reason why it cannot be read or an empty string."""
    pyarrow = tables.require_pyarrow()
    try:
        batch.validate(full=True)
        large = len(batch) == 1 and batch.nbytes > MAX_ROW_BYTES
        yield batch, f"larger than {MAX_ROW_BYTES >> 20} MiB" if large else ""
    except pyarrow.ArrowInvalid as error:
        if len(batch) == 1:
            yield batch, f"damaged: {reason(error)}"
        else:
            for number in range(len(batch)):
                yield from _validated(batch.slice(number, 1))


def _reader(values: pa.Array, place: Path, address: int) -> Callable[[int, str], Any]:
    """A function of a row's number and name that returns its value as JSON has it, with bytes as a
    span of the file that is mapped to an address. Scalars of pyarrow would copy them."""
    pyarrow = tables.require_pyarrow()
    if _is_bytes(values.type):
        _, offsets, data = values.buffers()
        dtype = np.int64 if pyarrow.types.is_large_binary(values.type) else np.int32
        ends = np.frombuffer(offsets, dtype)[values.offset :] if offsets else np.zeros(1, dtype)
        base = data.address - address if data else 0

        def read(row: int, name: str) -> Any:
            start, size = int(ends[row]), int(ends[row + 1] - ends[row])
            return Span(str(place), base + start, size, name) if size else None

    elif pyarrow.types.is_struct(values.type):
        keys = [values.type.field(number).name for number in range(values.type.num_fields)]
        fields = {key: _reader(values.field(key), place, address) for key in keys}

        def read(row: int, name: str) -> Any:
            return {key: field(row, name) for key, field in fields.items()}

    elif tables.is_list(values.type):
        item, starts = _reader(values.values, place, address), values.offsets

        def read(row: int, name: str) -> Any:
            places = range(starts[row].as_py(), starts[row + 1].as_py())
            return [item(place, f"{name}[{number}]") for number, place in enumerate(places)]

    else:

        def read(row: int, name: str) -> Any:
            return values[row].as_py()

    return lambda row, name: read(row, name) if values[row].is_valid else None


# ---------------------------------------------------------------------- copies


def _in_place(file: Path, columns: list[str], cache_dir: str) -> Path:
    """An Arrow file with the columns in which bytes lie uncompressed: the file or its copy."""
    if tables.kind(file) == "Arrow" and _is_uncompressed(file, columns):
        return file
    return copied("stored", file, tuple(columns), cache_dir, lambda to: _copy(file, columns, to))


def _is_uncompressed(file: Path, columns: list[str]) -> bool:
    with tables.mapped_batches(file, columns) as (address, batches):
        for batch in batches:
            buffers = (buffer for column in batch.columns for buffer in column.buffers())
            for buffer in buffers:
                if buffer is not None and buffer.size:
                    return bool(0 <= buffer.address - address < file.stat().st_size)
    return True


def _copy(file: Path, columns: list[str], target: Path) -> None:
    """Copy columns into an Arrow file, up to the place where the file is damaged, if it is."""
    pyarrow = tables.require_pyarrow()
    from pyarrow import ipc

    batches = tables.batches(file, columns)
    with contextlib.ExitStack() as stack:
        writer = None
        while True:
            try:
                batch = next(batches, None)
            except (*UNREADABLE, OverflowError, pyarrow.ArrowException) as error:
                target.with_name(_DAMAGE).write_text(reason(error))
                batch = None
                if writer is None:
                    raise ValueError(reason(error)) from error
            if writer is None:
                schema = batch.schema if batch is not None else _chosen(file, columns)
                writer = stack.enter_context(ipc.new_stream(str(target), schema))
            if batch is None:
                return
            for part, damage in _validated(batch):
                writer.write_batch(part if not damage else _nulls(part))


def _chosen(file: Path, columns: list[str]) -> pa.Schema:
    """The schema of a table's columns, for a copy of one without rows."""
    pyarrow = tables.require_pyarrow()
    return pyarrow.schema([column for column in tables.schema(file) if column.name in columns])


def _nulls(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows of nulls in place of damaged ones, so that the other rows keep their numbers."""
    pyarrow = tables.require_pyarrow()
    arrays = [pyarrow.nulls(len(batch), field.type) for field in batch.schema]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=batch.schema)
