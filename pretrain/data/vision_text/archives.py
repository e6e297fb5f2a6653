"""Tar archives: the samples of WebDataset shards, and single images by name.

Images are read in place, so a shard needs no index but the one that every source of images has in
the cache. Compressed archives are unpacked into the cache once.
"""

import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data import files
from pretrain.data.cache import cached, key_of, stamp
from pretrain.data.content import content_hash
from pretrain.data.files import MAX_DOCUMENT_BYTES, reason
from pretrain.data.media import pixels, video
from pretrain.data.media.frames import Media
from pretrain.data.media.span import Place, Span
from pretrain.data.skipped import EmptyRecordError, Skip
from pretrain.data.vision_text.copies import uncompressed
from pretrain.data.vision_text.document import Mixed
from pretrain.data.vision_text.layouts import CAPTION, Folder, Names

SUFFIXES = (".tar", ".tgz", *(f".tar{packed}" for packed in (".gz", ".zst", ".bz2", ".xz")))
_TEXT = ("txt", "text", "caption")
_MAX_BYTES = 2**28
# The key of a sample, and the suffix of one of its files, as WebDataset divides names.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_ERRORS = (*files.UNREADABLE, tarfile.TarError)


def is_archive(file: Path) -> bool:
    """Whether a file is a tar archive, by name."""
    return files.ends_with(file, SUFFIXES)


def read_samples(file: Path, names: Names, cache_dir: str) -> Iterator[Mixed | Skip]:
    """The samples of a shard: its files of the same name up to the first dot, which are images or
    videos and their caption.

    The caption is the sample's file with the suffix ``names.field``, that key of its `.json`, its
    `.txt`, or the `caption` in its `.json`. Several images belong to one caption.

    Raises:
        PretrainError: the cache cannot be written.
    """
    number = 0
    try:
        plain = uncompressed(file, cache_dir)
        parts = ((match[1], match[2].lower(), span) for match, span in _named(file, plain))
        for key, group in groupby(parts, lambda part: part[0]):
            sample = [(suffix, span) for _, suffix, span in group]
            number += 1
            name = f"{file}:{key}"
            try:
                yield _sample(name, sample, names)
            except (ValueError, RecursionError) as error:
                yield Skip(name, reason(error), corrupt=not isinstance(error, EmptyRecordError))
    except _ERRORS as error:
        after = f"cannot be read after {number:,} samples: " if number else "a damaged archive: "
        yield Skip(str(file), after + reason(error))
    else:
        if not number:
            yield Skip(str(file), "no samples in it", corrupt=False)


def _named(file: Path, plain: Path) -> Iterator[tuple[re.Match[str], Span]]:
    for name, span in members(file, plain):
        if match := _NAME.fullmatch(name.removeprefix("./")):
            yield match, span


def members(file: Path, plain: Path) -> Iterator[tuple[str, Span]]:
    """The name and the place of every regular file in an archive.

    Args:
        plain: the archive, or its content.

    Raises:
        OSError, TarError, ValueError: it is damaged.
    """
    size = plain.stat().st_size
    with tarfile.open(plain, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # they would grow with the archive
            if not member.isreg() or member.issparse():
                continue
            if member.offset_data + member.size > size:
                raise ValueError(f"it ends within {member.name}")
            span = Span(str(plain), member.offset_data, member.size, f"{file}:{member.name}")
            yield member.name, span
        end = archive.offset
    with plain.open("rb") as stream:  # tarfile takes damage after the first member for the end
        stream.seek(end)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it is cut off or damaged")
        if stream.read(2 * tarfile.RECORDSIZE).strip(b"\0"):  # such as of `cat a.tar b.tar`
            raise ValueError("there is more after its end, such as another archive: unpack it")


def _sample(name: str, sample: list[tuple[str, Span]], names: Names) -> Mixed:
    if repeated := [one for one, count in Counter(one for one, _ in sample).items() if count > 1]:
        raise ValueError(f"its .{repeated[0]} is repeated")
    media = [span for suffix, span in sample if _is_media(f".{suffix}")]
    if names.image_field:
        media = [span for suffix, span in sample if suffix == names.image_field.lower()]
    if not media:
        raise ValueError(f"no image in it, only {', '.join(suffix for suffix, _ in sample)}")
    if too_large := next((span for span in media if span.size > _MAX_BYTES), None):
        raise ValueError(f"{too_large} is larger than {_MAX_BYTES >> 20} MiB")
    parts = [Media((span,), moving=video.is_video(span.name)) for span in media]
    return Mixed(name, (*parts, _caption(sample, names.field)))


def _is_media(suffix: str) -> bool:
    return suffix.endswith((*pixels.suffixes(), *video.SUFFIXES))


def _caption(sample: list[tuple[str, Span]], field: str) -> str:
    own = dict(sample)
    described: Any = files.from_json(_read(own["json"])) if "json" in own else {}
    described = described if isinstance(described, dict) else {}
    text = next(
        (key for key in (field.lower(), *_TEXT) if key in own and not _is_media(f".{key}")), ""
    )
    if isinstance(described.get(field), str) and field.lower() not in own:
        caption = described[field]
    elif text:
        caption = _read(own[text])
    else:
        caption = described.get(CAPTION)
    if isinstance(caption, str) and not caption.strip():
        raise EmptyRecordError("its caption is empty")
    if not isinstance(caption, str):
        raise ValueError(f"no caption: neither .txt nor {field!r} or {CAPTION!r} in .json")
    if not files.is_unicode(caption):
        raise ValueError("half a surrogate pair in its text")
    return caption.strip()


def _read(span: Span) -> str:
    if span.size > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{span} is larger than {MAX_DOCUMENT_BYTES >> 20} MiB")
    with span.open() as file:
        return files.decode(file.read())


# ---------------------------------------------------------------------- images by name


@dataclass(frozen=True)
class Archived:
    """Images by name: in a folder, its subfolder ``images``, or archives in either.

    Attributes:
        hashes: uint64 [n], of the names of files in archives, ascending.
        places: int64 [n, 3], the archive, first byte and size of each.
        archives: each archive, and its content.
    """

    folder: Folder
    hashes: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    archives: list[tuple[str, str]]

    def find(self, name: str) -> Place:
        path = self.folder.find(name)
        below = self.folder.find(f"{_BELOW}/{name}")
        if isinstance(below, str) and not Path(str(path)).exists():
            if Path(below).exists():
                return below
            wanted = np.uint64(content_hash(Path(name).name))
            place = int(np.searchsorted(self.hashes, wanted))
            if place < len(self.hashes) and self.hashes[place] == wanted:
                number, start, size = self.places[place].tolist()
                archive, plain = self.archives[number]
                return Span(plain, start, size, f"{archive}:{name}")
        return path


_BELOW = "images"


def archives_of(folder: Path) -> list[Path]:
    """The archives in a folder and in its subfolder ``images``."""
    found = [path for root in (folder, folder / _BELOW) if root.is_dir() for path in root.iterdir()]
    return sorted(path for path in found if path.is_file() and is_archive(path))


def open_archived(folder: Path, cache_dir: str) -> Archived:
    """Find images by name in a folder and its archives, whose names are indexed in the cache.

    The names are read into memory once, 32 bytes for each; afterwards they are mapped.

    Raises:
        ValueError: an archive is damaged.
        PretrainError: the cache cannot be written.
    """
    archives = archives_of(folder)
    try:
        plain = [uncompressed(archive, cache_dir) for archive in archives]
        key = key_of(stamps=[(str(archive), stamp(archive)) for archive in archives])
        index = Path(cache_dir) / f"archived-{key}"
        pairs = list(zip(archives, plain, strict=True))

        def load(made: Path) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
            hashes, places = (
                np.load(made / f"{n}.npy", mmap_mode="r") for n in ("hashes", "places")
            )
            return hashes, places

        (hashes, places), _ = cached(index, lambda made: _build(made, pairs), load)
    except _ERRORS as error:
        raise ValueError(f"an archive in {folder} is damaged: {reason(error)}") from error
    names = [(str(archive), str(content)) for archive, content in pairs]
    return Archived(Folder(folder), hashes, places, names)


def _build(made: Path, archives: Iterable[tuple[Path, Path]]) -> None:
    hashes, places = array("Q"), array("q")
    for number, (archive, plain) in enumerate(archives):
        for name, span in members(archive, plain):
            hashes.append(content_hash(Path(name).name))
            places.extend((number, span.start, span.size))
    values = np.array(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    np.save(made / "hashes.npy", values[order])
    np.save(made / "places.npy", np.array(places, np.int64).reshape(-1, 3)[order])
