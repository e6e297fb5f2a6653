"""Samples of MosaicML's MDS shards (`mosaicml-streaming`), read without that library.

A shard is the number of its samples, where each begins (both uint32), a JSON object that describes
the columns, and the samples: the sizes of their columns without a fixed size (uint32), and the
values. Images are read in place. Compressed shards are unpacked into the cache once.
"""

import itertools
import json
import os
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pretrain.data import files
from pretrain.data.files import MAX_DOCUMENT_BYTES, UNREADABLE, reason
from pretrain.data.media.span import Span
from pretrain.data.skipped import Skip
from pretrain.data.vision_text.copies import uncompressed

INDEX = "index.json"
# Compressions that MDSWriter offers and that are not read.
_COMPRESSED = {".br": "Brotli", ".snappy": "Snappy"}
SUFFIXES = (*files.with_compressed((".mds",)), *(f".mds{suffix}" for suffix in _COMPRESSED))
_MAX_HEADER_BYTES = 1 << 20
_IMAGES = ("jpeg", "png", "bytes")
# Lists of images, and the bytes before their number.
_LISTS = {"list[jpeg]": 4, "list[png]": 4, "jpeg_array": 0, "jpegarray": 0}
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": files.decode,
    "json": lambda value: files.from_json(files.decode(value)),
    "str_int": lambda value: int(value.decode()),
    "str_float": lambda value: float(value.decode()),
    "int": lambda value: int.from_bytes(value, "little", signed=True),
}


class _Column(NamedTuple):
    name: str
    encoding: str
    size: int | None


def kinds(file: Path, cache_dir: str) -> dict[str, str]:
    """The kinds of a shard's columns, as those of tables
    (:func:`pretrain.data.vision_text.columns.kinds_of`).

    Raises:
        files.UNREADABLE: the shard is damaged.
        PretrainError: the cache cannot be written.
    """
    with _plain(file, cache_dir).open("rb") as stream:
        _, columns = _header(stream)
    known = {"str": "text", "jpeg": "image", "png": "image", "bytes": "bytes"}
    known |= dict.fromkeys(_LISTS, "list of image")
    return {column.name: known.get(column.encoding, column.encoding) for column in columns}


def listed(index: Path) -> list[list[str]]:
    """The names that each shard of an index may have: plain, and compressed if it is.

    Raises:
        ValueError: the index is damaged.
    """
    try:
        shards = json.loads(index.read_text())["shards"]
        datas = [[shard.get("raw_data"), shard.get("zip_data")] for shard in shards]
        return [[str(data["basename"]) for data in pair if data] for pair in datas]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged: {reason(error)}") from error


def read_rows(
    file: Path, columns: Collection[str], cache_dir: str
) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
    """(name, row) of every sample of a shard; images in it are :class:`Span` objects.

    Args:
        columns: names of the columns to read.

    Raises:
        PretrainError: the cache cannot be written.
    """
    number = 0
    try:
        plain = _plain(file, cache_dir)
        with plain.open("rb") as stream:
            offsets, described = _header(stream)
            if int(offsets[-1]) > plain.stat().st_size or np.any(np.diff(offsets) < 0):
                raise ValueError("it is cut off, or the places of its samples are damaged")
            for number, (start, stop) in enumerate(itertools.pairwise(offsets), 1):
                name = f"{file}:{number}"
                try:
                    span = Span(str(plain), int(start), int(stop - start), name)
                    yield name, _row(stream, span, described, columns)
                except (ValueError, RecursionError) as error:
                    yield name, Skip(name, reason(error))
    except UNREADABLE as error:
        yield str(file), Skip(str(file), f"a damaged shard: {reason(error)}")
    else:
        if not number:
            yield str(file), Skip(str(file), "no samples in it", corrupt=False)


def _plain(file: Path, cache_dir: str) -> Path:
    """The path of a shard's content.

    Raises:
        files.UNREADABLE: the shard is damaged, or compressed in a way that is not read.
        PretrainError: the cache cannot be written.
    """
    if name := _COMPRESSED.get(file.suffix.lower()):
        raise ValueError(f"compressed with {name}: write it again with compression='zstd'")
    return uncompressed(file, cache_dir)


def _header(stream: IO[bytes]) -> tuple[Any, list[_Column]]:
    """The place of each sample and the end of the last, int64 [samples + 1], and the columns.

    Raises:
        ValueError: it is damaged.
    """
    try:
        (count,) = struct.unpack("<I", stream.read(4))
        if 4 * (count + 2) > os.fstat(stream.fileno()).st_size:
            raise ValueError("its header is damaged")
        offsets = np.frombuffer(stream.read(4 * (count + 1)), "<u4").astype(np.int64)
        start = 4 * (count + 2)
        if not start <= offsets[0] <= start + _MAX_HEADER_BYTES:
            raise ValueError("its header is damaged")
        about = json.loads(stream.read(int(offsets[0]) - start))
        lists = (about["column_names"], about["column_encodings"], about["column_sizes"])
        columns = [
            _Column(str(name), str(encoding).partition(":")[0], None if size is None else int(size))
            for name, encoding, size in zip(*lists, strict=True)
        ]
    except (struct.error, KeyError, TypeError, RecursionError) as error:
        raise ValueError("its header is damaged") from error
    return offsets, columns


def _row(
    stream: IO[bytes], sample: Span, described: list[_Column], columns: Collection[str]
) -> dict[str, Any]:
    stream.seek(sample.start)
    open_sizes = sum(column.size is None for column in described)
    head = stream.read(4 * open_sizes)
    if len(head) < 4 * open_sizes:
        raise ValueError("it is cut off")
    sizes = iter(struct.unpack(f"<{open_sizes}I", head))
    start, row = sample.start + len(head), dict[str, Any]()
    for column in described:
        size = next(sizes) if column.size is None else column.size
        if start + size > sample.start + sample.size:
            raise ValueError("its columns are longer than it")
        if column.name in columns:
            row[column.name] = _value(stream, sample, column, start, size)
        start += size
    return row


def _value(stream: IO[bytes], sample: Span, column: _Column, start: int, size: int) -> Any:
    if column.encoding in _IMAGES:
        return Span(sample.file, start, size, f"{sample.name}.{column.name}") if size else None
    if column.encoding in _LISTS:
        return list(_listed_images(stream, sample, column, start, size))
    if column.encoding not in _DECODERS:  # pickled data would run code
        raise ValueError(f"{column.name!r} is stored as {column.encoding}, which is not read")
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{column.name!r} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    stream.seek(start)
    return _DECODERS[column.encoding](stream.read(size))


def _listed_images(
    stream: IO[bytes], sample: Span, column: _Column, start: int, size: int
) -> Iterator[Span]:
    """The images of a list: their number and their sizes (uint32) precede them."""
    try:
        place = start + _LISTS[column.encoding]
        stream.seek(place)
        (count,) = struct.unpack("<I", stream.read(4))
        if 4 * count > size:
            raise ValueError(f"{column.name!r} is damaged")
        sizes = struct.unpack(f"<{count}I", stream.read(4 * count))
    except struct.error as error:
        raise ValueError(f"{column.name!r} is damaged") from error
    place += 4 * (count + 1)
    if place + sum(sizes) > start + size:
        raise ValueError(f"{column.name!r} is damaged")
    for number, each in enumerate(sizes, 1):
        yield Span(sample.file, place, each, f"{sample.name}.{column.name}[{number}]")
        place += each
