"""Rows of Parquet and Arrow files as JSON-like objects, in memory that does not grow with the file.

Arrow files are those of Feather (version 2) and of the `datasets` library, which saves streams.
Needs pyarrow.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.data import files
from pretrain.data.files import MAX_DOCUMENT_BYTES, UNREADABLE, reason
from pretrain.data.skipped import Skip
from pretrain.errors import PretrainError

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".arrow", ".feather")
_MAGIC = {
    "Parquet": re.compile(rb"PAR1[\0-\x1f]"),
    # A message of a stream begins with a continuation marker and its size, below 2^24.
    "Arrow": re.compile(rb"ARROW1\0\0|\xff{4}[\0-\xff]{3}\0"),
}
# Bytes of the rows that are decoded at once, by the average size of a row; and the most rows.
_BATCH_BYTES = 16 << 20
_BATCH_ROWS = 1024
# Bytes of a column that are read from a Parquet file at once.
_BUFFER_BYTES = 1 << 20
# Names of a text column in public data sets, the most likely ones first.
TEXT_NAMES = (
    *("text", "content", "raw_content", "body", "document", "article", "passage", "markdown"),
    *("code", "story", "contents", "page_content", "abstract", "sentence"),
)
# Names of values that are about a document, and not its text.
_ABOUT = re.compile(
    r"(.*[_-])?(ids?|uuid|guid|urls?|uri|link|href|path|file(_?name)?|(sha|md)\d+|hash|key|date|time"
    r"|timestamp|created(_at)?|license|status|source|domain|lang(uage)?|split|model|label|score)",
    re.IGNORECASE,
)
_SAMPLED_ROWS = 20


def kind(path: Path) -> str:
    """``Parquet`` or ``Arrow`` by the first bytes of a file; empty for all others.

    Raises:
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        return ""
    with path.open("rb") as file:
        head = file.read(8)
    return next((name for name, magic in _MAGIC.items() if magic.match(head)), "")


def read_objects(
    path: Path, columns: Collection[str] | None = None, max_row_bytes: int | None = None
) -> Iterator[tuple[str, Any]]:
    """:func:`read_rows` of a table, and the objects of any other file (:mod:`.files`)."""
    try:
        table = kind(path)
    except OSError as error:
        yield str(path), Skip(str(path), reason(error))
        return
    yield from read_rows(path, columns, max_row_bytes) if table else files.read_objects(path)


def read_rows(
    path: Path, columns: Collection[str] | None = None, max_row_bytes: int | None = None
) -> Iterator[tuple[str, Any]]:
    """(name, object) of every row of a table; the name is the file and the number of the row.

    A :class:`Skip` takes the place of a row that cannot be read, of the rest of a damaged file, or
    of a file without rows.

    Args:
        columns: names of the columns to read, if the table has them; default: all.
        max_row_bytes: larger rows are skipped; default: the limit of a document of text.

    Raises:
        PretrainError: pyarrow is not installed.
    """
    pyarrow = require_pyarrow()
    number, limit = 0, max_row_bytes or MAX_DOCUMENT_BYTES
    try:
        for batch in batches(path, columns):
            for value in _objects(batch, limit):
                number += 1
                name = f"{path}:{number}"
                yield name, Skip(name, value) if isinstance(value, str) else value
    except (*UNREADABLE, OverflowError, pyarrow.ArrowException) as error:
        after = f"cannot be read after row {number}: " if number else "a damaged table: "
        yield str(path), Skip(str(path), after + reason(error))
    else:
        if not number:
            yield str(path), Skip(str(path), "no rows in it", corrupt=False)


def require_pyarrow() -> Any:
    """Import pyarrow.

    Raises:
        PretrainError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise PretrainError(
            "Parquet and Arrow files need pyarrow, which is not installed: pip install '.[data]'"
        ) from error
    return pyarrow


# ---------------------------------------------------------------------- columns


def schema(path: Path) -> pa.Schema:
    """Names and types of a table's columns.

    Raises:
        ValueError, OSError: the file is damaged.
        PretrainError: pyarrow is not installed.
    """
    pyarrow = require_pyarrow()
    try:
        if kind(path) == "Parquet":
            from pyarrow import parquet

            found = parquet.read_schema(path)
        else:
            with _arrow_file(path) as (found, *_):
                pass
        _ = found.names  # one that is not UTF-8 is an error here instead of later
        return found
    except pyarrow.ArrowException as error:  # not all are a ValueError
        raise ValueError(reason(error)) from error


def require_column(path: Path, setting: str, field: str) -> None:
    """Check that a file has a column of text, if it is a table.

    Args:
        setting: the source's name in messages.
        field: name of the column.

    Raises:
        PretrainError: the table has no such column, several, or one of another type (the message
            names its columns, and the likely one); or pyarrow is not installed.
    """
    try:
        if not kind(path):
            return
        found = schema(path)
    except UNREADABLE:
        return  # reading the file will give the reason
    types = [column.type for column in found if column.name == field]
    is_empty = [require_pyarrow().types.is_null(type) for type in types]  # no row has a value
    if len(types) == 1 and (is_text(types[0]) or is_empty[0]):
        return
    problem = f"has no column {field!r}"
    if types:
        repeated = f"has {len(types)} columns {field!r}"
        problem = repeated if len(types) > 1 else f"has {field!r} of type {types[0]}, not text"
    likely = likely_text(path)
    fix = f"set it to {likely!r}, the likely one" if likely else "there is no column of text"
    fix = "rename all but one of them" if len(types) > 1 else fix
    raise PretrainError(
        f"{setting}.field: {path} {problem}; its columns are {described(found)}: {fix}; files with "
        "different columns are different sources"
    )


def is_text(type: pa.DataType) -> bool:
    """Whether values of a column are strings."""
    pyarrow = require_pyarrow()
    if pyarrow.types.is_dictionary(type):
        type = type.value_type
    checks = (
        pyarrow.types.is_string,
        pyarrow.types.is_large_string,
        pyarrow.types.is_string_view,
    )
    return any(check(type) for check in checks)


def is_list(type: pa.DataType) -> bool:
    """Whether values of a column are lists."""
    pyarrow = require_pyarrow()
    checks = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_list_view)
    return any(check(type) for check in checks)


def has_lists(type: pa.DataType) -> bool:
    """Whether values of a column are lists in JSON: also those of a fixed size, or no values."""
    types = require_pyarrow().types
    return is_list(type) or bool(types.is_fixed_size_list(type) or types.is_null(type))


def can_name_media(type: pa.DataType) -> bool:
    """Whether values of a column can be names or contents of images or videos, or lists of them."""
    pyarrow = require_pyarrow()
    if pyarrow.types.is_null(type):
        return True
    if has_lists(type):
        return can_name_media(type.value_type)
    checks = (
        *(pyarrow.types.is_struct, pyarrow.types.is_binary),
        *(pyarrow.types.is_large_binary, is_text),
    )
    return any(check(type) for check in checks)


def described(found: pa.Schema) -> str:
    """Names and types of up to 20 columns, for messages."""
    columns = [f"{column.name[:40]} ({str(column.type)[:60]})" for column in found]
    more = [f"and {len(columns) - 20} more"] if len(columns) > 20 else []
    return ", ".join([*columns[:20], *more]) or "none"


def text_columns(path: Path) -> list[str]:
    """The columns of a table that are text; raises as :func:`schema`."""
    return [column.name for column in schema(path) if is_text(column.type)]


def likely_text(path: Path) -> str:
    """The column that is probably a table's text: by its name, or the longest in the first rows.

    Returns:
        an empty string if no column is text.

    Raises:
        ValueError, OSError: the file is damaged.
    """
    names = text_columns(path)
    rows = [value for _, value in itertools.islice(read_rows(path, names), _SAMPLED_ROWS)]
    return likely_field([row for row in rows if isinstance(row, Mapping)], names)


def likely_field(rows: Iterable[Mapping[str, Any]], names: Collection[str] = ()) -> str:
    """The key that is probably the text of objects: one of the usual names, or the one with the
    longest values of several words, which identifiers, URLs and the like are not; or the only one.
    An empty string if there is none.

    Args:
        names: keys to choose from; default: all whose values are strings.
    """
    lengths: dict[str, int] = dict.fromkeys(names, 0)
    is_prose: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, str) and (name in lengths or not names):
                lengths[name] = lengths.get(name, 0) + len(value)
                is_prose[name] = is_prose.get(name, False) or _is_prose(value)
    lower = {name.lower(): name for name in reversed(lengths)}  # the first one if case differs
    if usual := next((lower[name] for name in TEXT_NAMES if name in lower), ""):
        return usual
    written = [name for name in lengths if is_prose.get(name, False)]
    other = [name for name in lengths if not _ABOUT.fullmatch(name)]
    both = [name for name in written if name in other]
    alone = other if len(lengths) == 1 else []
    return max(both or written or alone, key=lambda name: lengths[name], default="")


def _is_prose(value: str) -> bool:
    """Whether a value is of several words, or of another alphabet."""
    return len(value.split()) > 1 or not value.isascii()


# ---------------------------------------------------------------------- batches of rows


def batches(path: Path, columns: Collection[str] | None) -> Iterator[pa.RecordBatch]:
    """Rows of a table, of a Parquet file about 16 MiB at once; not validated.

    Args:
        columns: as for :func:`read_rows`.

    Raises:
        OSError, ValueError, ArrowException: the file is damaged.
    """
    if kind(path) == "Parquet":
        yield from _parquet_batches(path, columns)
    else:
        with mapped_batches(path, columns) as (_, found):
            yield from found


@contextlib.contextmanager
def mapped_batches(
    path: Path, columns: Collection[str] | None
) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
    """The address in memory of the first byte of an Arrow file, and its rows, whose values lie in
    the same memory unless they are compressed; raises as :func:`batches`."""
    with _arrow_file(path) as (found, address, stored):
        names = _present(found, columns)
        selected = (batch.select(names) for batch in stored)
        pieces = (
            batch.slice(start, _BATCH_ROWS)
            for batch in selected
            for start in range(0, len(batch), _BATCH_ROWS)
        )
        yield address, pieces


def _parquet_batches(path: Path, columns: Collection[str] | None) -> Iterator[pa.RecordBatch]:
    from pyarrow import parquet

    # Without a buffer size, pyarrow would read the columns of a whole row group at once.
    options: dict[str, Any] = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    with parquet.ParquetFile(path, **options) as file:
        names = _present(file.schema_arrow, columns)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            parts = (group.column(index) for index in range(group.num_columns))
            size = sum(
                part.total_uncompressed_size
                for part in parts
                if part.path_in_schema.split(".")[0] in names
            )
            rows = _rows_at_once(size, group.num_rows)
            yield from file.iter_batches(rows, [number], names, use_threads=False)


@contextlib.contextmanager
def _arrow_file(path: Path) -> Iterator[tuple[pa.Schema, int, Iterator[pa.RecordBatch]]]:
    """The schema, the address and the batches of an Arrow file, which is mapped into memory."""
    from pyarrow import ipc, memory_map

    with memory_map(str(path)) as file:
        address = file.read_buffer(file.size()).address  # of the mapping: nothing is read
        file.seek(0)
        if file.read(6) == b"ARROW1":
            reader = ipc.open_file(file)
            yield reader.schema, address, map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            stream = ipc.open_stream(file)
            yield stream.schema, address, iter(stream)


def _present(found: pa.Schema, columns: Collection[str] | None) -> list[str]:
    """The columns to read, in the order of the table."""
    names = list(found.names)
    repeated = {name for name in names if names.count(name) > 1}
    chosen = [name for name in names if columns is None or name in columns]
    if unclear := next((name for name in chosen if name in repeated), None):
        raise ValueError(f"the column {unclear!r} is repeated")
    return chosen


def _rows_at_once(size: int, rows: int) -> int:
    average = max(1, size // max(1, rows))
    return min(max(1, _BATCH_BYTES // average), _BATCH_ROWS)


def _objects(batch: pa.RecordBatch, limit: int) -> Iterator[dict[str, Any] | str]:
    """Each row as an object, or the reason why it cannot be read."""
    pyarrow = require_pyarrow()
    try:
        batch.validate(full=True)  # first: of a damaged batch, not even the size can be computed
    except pyarrow.ArrowInvalid as error:
        if len(batch) == 1:
            yield f"damaged: {reason(error)}"
            return
        for number in range(len(batch)):
            yield from _objects(batch.slice(number, 1), limit)
        return
    if batch.nbytes <= (limit if len(batch) == 1 else MAX_DOCUMENT_BYTES):
        yield from batch.to_pylist()
    elif len(batch) == 1:
        yield f"larger than {limit >> 20} MiB"
    else:
        half = len(batch) // 2
        yield from _objects(batch.slice(0, half), limit)
        yield from _objects(batch.slice(half), limit)
