"""Files with images and text: finding them in a folder, and reading their documents."""

import contextlib
import csv
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pretrain.data import files, saved_datasets, tables
from pretrain.data.files import reason
from pretrain.data.media import pixels, video
from pretrain.data.media.frames import Media
from pretrain.data.remote import MediaDownloads
from pretrain.data.skipped import Skip
from pretrain.data.vision_text import archives, columns, mds
from pretrain.data.vision_text.document import Mixed
from pretrain.data.vision_text.layouts import (
    Files,
    Folder,
    Names,
    WithUrls,
    documents,
    layout_of,
    media_keys,
    named_files,
)
from pretrain.errors import PretrainError

Kind = Literal["captions", "metadata", "lines", "shards", "MDS", "tables", "images"]
CAPTIONS = "captions.jsonl"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the files that describe the images of a folder, as in `datasets`."""
_LINES = files.with_compressed((".jsonl", ".ndjson"))
_CAPTION_SUFFIX = ".txt"
_SPLIT = re.compile(r"(train|test|valid|validation|val|dev)(ing)?", re.IGNORECASE)
_SAMPLED = 5
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_NUMBERED = 10**6


# ---------------------------------------------------------------------- finding


def find(path: str, setting: str) -> list[Path | Skip]:
    """The files of a source that documents are read from, and what is left out.

    Args:
        path: a file, a folder or a pattern.
        setting: the source's name in messages.

    Raises:
        PretrainError: there are none, or a folder has several splits.
    """
    folder = Path(path)
    if folder.is_dir():
        return _in_folder(folder, setting)
    items = numbered(path, setting) or files.find(path, setting, ("",), "files")
    for item in items:
        if isinstance(item, Path) and not _is_read(item):
            raise PretrainError(
                f"{setting}.path: {item} is neither a folder nor a .jsonl file (or .jsonl.gz, "
                ".jsonl.zst, .json), a table (.parquet, .arrow) or a shard (.tar, .mds)"
            )
    return items


def numbered(path: str, setting: str) -> list[Path | Skip]:
    """The files of a pattern such as ``{00000..00099}.tar``; empty if it is none.

    Raises:
        PretrainError: none of them exists, or there are too many.
    """
    begin, *groups = _RANGE.split(path)  # between the ranges, their first and last numbers
    if not groups or Path(path).exists():
        return []
    names = [begin]
    for first, last, text in zip(groups[::3], groups[1::3], groups[2::3], strict=True):
        numbers = range(int(first), int(last) + 1)
        if len(names) * len(numbers) > _MAX_NUMBERED:
            where = files.path_of(setting)
            raise PretrainError(f"{where}{path} has more than {_MAX_NUMBERED:,} files")
        names = [f"{name}{n:0{len(first)}}{text}" for name in names for n in numbers]
    names = list(dict.fromkeys(names))  # {1..11}{1..11} has 111 twice
    items = [Path(n) if Path(n).is_file() else Skip(n, "does not exist") for n in names]
    if not any(isinstance(item, Path) for item in items):
        raise PretrainError(f"{files.path_of(setting)}no file matches {path}")
    return items


def _is_read(file: Path) -> bool:
    try:
        known = (
            files.is_json(file) or archives.is_archive(file) or files.ends_with(file, mds.SUFFIXES)
        )
        return known or file.name in METADATA or bool(tables.kind(file))
    except OSError:
        return True  # reading it will give the reason


def kind_of(folder: Path, items: Sequence[Path]) -> Kind:
    """The way in which a folder stores images and text.

    Args:
        items: its files.
    """
    if (folder / CAPTIONS).is_file():
        return "captions"
    if any(item.name in METADATA for item in items):
        return "metadata"
    lines = [item for item in items if files.ends_with(item, _LINES)]
    if any(map(_names_media, lines)):
        return "lines"
    if any(map(archives.is_archive, items)):
        return "shards"
    if any(files.ends_with(item, mds.SUFFIXES) for item in items):
        return "MDS"
    stored = [item for item in items if files.ends_with(item, tables.SUFFIXES)]
    if any(map(_has_images, stored)):
        return "tables"
    return "images"


def is_split(name: str) -> bool:
    """Whether a folder's name is that of a split."""
    return bool(_SPLIT.fullmatch(name))


def _names_media(file: Path) -> bool:
    """Whether the first objects of a file have images."""
    rows = (value for _, value in itertools.islice(files.read_objects(file), _SAMPLED))
    return any(
        not isinstance(row, Skip) and (media_keys(row) or layout_of(row) not in ("captions",))
        for row in rows
    )


def _has_images(file: Path) -> bool:
    """Whether a table has images, or names of images."""
    try:
        kinds = columns.kinds_of(tables.schema(file))
        return bool(columns.image_columns(kinds, Names())) or layout_of(kinds) != "captions"
    except files.UNREADABLE:
        return True  # reading it will give the reason


def _in_folder(folder: Path, setting: str) -> list[Path | Skip]:
    items = list(files.walk(folder, ("",), "files"))
    paths = [item for item in items if isinstance(item, Path)]
    kind = kind_of(folder, paths)
    if kind == "captions":
        return [folder / CAPTIONS, *_unnamed([folder / CAPTIONS], paths)]
    if kind == "metadata":
        described = sorted(item for item in paths if item.name in METADATA)
        first: dict[Path, Path] = {}  # in each folder
        for item in described:
            if (one := first.setdefault(item.parent, item)) is not item:
                raise PretrainError(
                    f"{setting}.path: {one} and {item.name} describe the same images: remove one"
                )
        names = [item.parent.name for item in described]
        if len(names) > 1 and all(map(is_split, names)):
            raise PretrainError(
                f"{setting}.path: {folder} has the splits {', '.join(names)}: set it to one of "
                f"them, such as {described[0].parent}"
            )
        return [*described, *_unnamed(described, paths)]
    if kind == "images":
        return list(_images(folder, items, setting))
    if kind == "tables":
        items = saved_datasets.select(items, folder, setting)
    suffixes = {
        "lines": _LINES,
        "shards": archives.SUFFIXES,
        "MDS": mds.SUFFIXES,
        "tables": tables.SUFFIXES,
    }[kind]
    media = (*pixels.suffixes(), *video.SUFFIXES) if kind == "lines" else ()
    chosen = [
        Skip(str(item), _not_chosen(item, kind), corrupt=False)
        if isinstance(item, Path) and not files.ends_with(item, suffixes)
        else item
        for item in items
        if isinstance(item, Skip) or not files.ends_with(item, media)
    ]
    if kind == "MDS":
        chosen += _missing(paths)
    return sorted(chosen, key=lambda item: item.name if isinstance(item, Skip) else str(item))


def _not_chosen(file: Path, kind: Kind) -> str:
    if kind == "lines" and archives.is_archive(file):
        return "only images that the lines name are read from it"
    return f"not one of the {kind}"


def _missing(paths: Sequence[Path]) -> Iterator[Skip]:
    """The shards of MDS that an index lists and that are not there."""
    existing = set(paths)
    for index in (path for path in paths if path.name == mds.INDEX):
        try:
            shards = mds.listed(index)
        except ValueError as error:
            yield Skip(str(index), reason(error))
            continue
        for shard in shards:
            if not any(index.parent / name in existing for name in shard):
                yield Skip(str(index.parent / shard[0]), f"listed in {mds.INDEX}, but missing")


def _unnamed(described: Sequence[Path], paths: Sequence[Path]) -> Iterator[Skip]:
    """The images of a folder that the files which describe them do not name."""
    named = {os.path.normpath(f.parent / name) for f in described for name in _named_in(f)}
    for path in paths:
        if _is_picture(path) and os.path.normpath(path) not in named:
            yield Skip(str(path), f"not named in {described[0].name}", corrupt=False)


def _named_in(file: Path) -> Iterator[str]:
    for _, row in read_records(file):
        yield from () if isinstance(row, Skip) else named_files(row)


def _images(folder: Path, items: Sequence[Path | Skip], setting: str) -> Iterator[Path | Skip]:
    """The images of a folder, by content or name, and all other files except their captions."""
    images = {item for item in items if isinstance(item, Path) and _is_image(item)}
    if not images:
        why = files.why_nothing(items)
        raise PretrainError(f"{setting}.path: the folder {folder} has no images in it{why}")
    captions = set(map(caption_of, images))
    for item in sorted(items, key=lambda item: str(item if isinstance(item, Path) else item.name)):
        if isinstance(item, Skip) or item in images:
            yield item
        elif item in captions:
            continue
        elif video.is_video(str(item)):
            yield Skip(str(item), f"a video: name it in {CAPTIONS}", corrupt=False)
        elif item.suffix.lower() == _CAPTION_SUFFIX:
            why = "a caption without an image of its name"
            yield Skip(str(item), why, corrupt=not files.is_about(item))
        else:
            yield Skip(str(item), "neither an image nor a caption", corrupt=False)


def _is_picture(file: Path) -> bool:
    """Whether a file is an image by its suffix."""
    return files.ends_with(file, pixels.suffixes())


def _is_image(file: Path) -> bool:
    """Whether a file is an image: by its suffix, even if it is damaged, or by its content."""
    if _is_picture(file):
        return True
    if file.suffix.lower() == _CAPTION_SUFFIX or video.is_video(str(file)):
        return False
    try:
        with pixels.open_image(file):
            return True
    except ValueError:
        return False


def caption_of(image: Path) -> Path:
    """The path of an image's caption, which may not exist."""
    paths = [image.with_suffix(suffix) for suffix in (_CAPTION_SUFFIX, _CAPTION_SUFFIX.upper())]
    return next((path for path in paths if path.exists()), paths[0])


def companions(file: Path) -> list[Path]:
    """Other files that the documents of a file are read from, apart from single images."""
    if names_files(file) and not _is_picture(file):
        return archives.archives_of(file.parent)
    return [caption_of(file)]


def names_files(file: Path) -> bool:
    """Whether the images of a file may be in other files; those of a shard are in it, or in its
    copy."""
    return not files.ends_with(file, (".tar", ".mds"))


# ---------------------------------------------------------------------- reading


def read(
    file: Path, names: Names, cache_dir: str, setting: str, downloads: MediaDownloads | None = None
) -> Iterator[Mixed | Skip]:
    """The documents of a file that :func:`find` found.

    In a folder of images without a file that describes them, the caption of ``a.jpg`` is ``a.txt``.

    Args:
        downloads: copies images at URLs; None: records that name them are skipped.

    Raises:
        PretrainError: a table lacks a column, or the cache cannot be written.
    """
    if archives.is_archive(file):
        yield from archives.read_samples(file, names, cache_dir)
        return
    if _is_picture(file) or not _is_read(file):
        yield _captioned(file)
        return
    try:
        found: Files | None = None
        for name, row in read_records(file, names, cache_dir, setting):
            if isinstance(row, Skip):
                yield row
                continue
            if found is None:
                found = Folder(file.parent)
                if layout_of(row) in ("MMC4", "OBELICS"):
                    found = archives.open_archived(file.parent, cache_dir)
                found = WithUrls(found, downloads) if downloads else found
            yield from documents(name, row, found, names)
    except files.UNREADABLE as error:
        yield Skip(str(file), reason(error))


def read_records(
    file: Path, names: Names | None = None, cache_dir: str = "", setting: str = ""
) -> Iterator[tuple[str, Mapping[str, Any] | Skip]]:
    """(name, record) of every record of a file of JSON, a table or a shard of MDS.

    Args:
        names: default: all columns, without the content of images.

    Raises:
        PretrainError: a table lacks a column, or the cache cannot be written.
    """
    if file.suffix.lower() == ".csv":
        yield from _csv_rows(file)
    elif files.ends_with(file, mds.SUFFIXES):
        chosen = columns_of(file, names or Names(), cache_dir, setting)
        yield from mds.read_rows(file, chosen, cache_dir)
    elif _is_table(file) and names is None:
        kinds = columns.kinds_of(tables.schema(file))
        yield from tables.read_rows(file, [name for name, kind in kinds.items() if "text" in kind])
    elif _is_table(file):
        chosen = columns_of(file, names or Names(), cache_dir, setting)
        yield from columns.read_rows(file, chosen, cache_dir)
    else:
        yield from files.read_objects(file)


def check_columns(file: Path, names: Names, cache_dir: str, setting: str) -> None:
    """
    Raises:
        PretrainError: the file is a table or a shard of MDS that lacks a column, or has one of the
            wrong type; or the cache cannot be written.
    """
    with contextlib.suppress(*files.UNREADABLE):  # reading it will give the reason
        if _is_picture(file):  # without opening it
            return
        if files.ends_with(file, mds.SUFFIXES) or tables.kind(file):
            columns_of(file, names, cache_dir, setting)


def columns_of(file: Path, names: Names, cache_dir: str, setting: str) -> list[str]:
    """The columns of a table or of a shard of MDS that documents are made of.

    Raises:
        PretrainError: columns are missing or have the wrong type.
        files.UNREADABLE: the file is damaged.
    """
    shard = files.ends_with(file, mds.SUFFIXES)
    kinds = mds.kinds(file, cache_dir) if shard else columns.kinds_of(tables.schema(file))
    texts = [name for name, kind in kinds.items() if kind == "text"]
    likely = tables.likely_text(file) if not shard else next(iter(texts), "")
    try:
        return columns.choose(kinds, names, likely)
    except ValueError as error:
        listed = ", ".join(f"{name[:40]} ({kind[:60]})" for name, kind in kinds.items())
        raise PretrainError(
            f"{setting}: {file} {error}; its columns are {listed}; files with different columns "
            "are different sources"
        ) from error


def _is_table(file: Path) -> bool:
    try:
        return bool(tables.kind(file))
    except OSError:
        return False


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
    """Rows of CSV, with the names in the first row."""
    number = 1
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
            rows = _csv_values(stream)
            names = next(rows, [])
            if isinstance(names, ValueError):
                raise names
            if repeated := next((name for name in names if name and names.count(name) > 1), ""):
                raise ValueError(f"the column {repeated!r} is repeated")
            for number, row in enumerate(rows, 2):
                name = f"{file}:{number}"
                if isinstance(row, ValueError):
                    yield name, Skip(name, reason(row))
                elif len(row) != len(names):
                    yield name, Skip(name, "has more or fewer values than the first line")
                else:
                    yield name, dict(zip(names, row, strict=True))
    except files.UNREADABLE as error:
        yield str(file), Skip(str(file), f"cannot be read after line {number}: {reason(error)}")
    else:
        if number == 1:
            yield str(file), Skip(str(file), "no rows in it", corrupt=False)


def _csv_values(stream: IO[str]) -> Iterator[list[str] | ValueError]:
    """The values of each row, or the error for which it cannot be read; the next row follows."""
    csv.field_size_limit(files.MAX_DOCUMENT_BYTES)
    rows = csv.reader(stream, strict=True)  # a quote without its end would hide other rows
    while True:
        try:
            if row := next(rows):
                for value in row:
                    files.decode(value.encode(errors="surrogateescape"))
                yield row
        except StopIteration:
            return
        except csv.Error as error:
            yield ValueError(f"not CSV: {reason(error)}")
        except ValueError as error:
            yield error


def _captioned(image: Path) -> Mixed | Skip:
    caption = caption_of(image)
    try:
        text = files.read_plain(caption).strip()
    except FileNotFoundError:
        return Skip(str(image), f"no caption {caption.name} in its folder")
    except files.UNREADABLE as error:
        return Skip(str(caption), reason(error))
    if not text:
        return Skip(str(caption), "no text in it", corrupt=False)
    return Mixed(str(image), (Media((str(image),), moving=False), text))
