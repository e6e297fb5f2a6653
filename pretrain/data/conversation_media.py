"""The images and videos of conversations: files, ``data:`` URLs, values of tables, and URLs.

Those that are stored in a file of conversations are copied into the cache once, one after the
other, where they can be read at any time.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt

from pretrain.data.cache import cached, key_of, stamp
from pretrain.data.conversations import Reference, Resolve
from pretrain.data.files import reason
from pretrain.data.media import video
from pretrain.data.media.frames import Media
from pretrain.data.media.span import Place, Span
from pretrain.data.remote import MediaDownloads, is_url
from pretrain.data.vision_text.layouts import Folder

_DATA = re.compile(r"data:(?P<type>[^,;]*)(?:;[^,;]*)*?(?P<base64>;base64)?,", re.IGNORECASE)
_FILE = re.compile(r"file://(localhost(?=/))?", re.IGNORECASE)
_DIGEST_BYTES = 16


class MediaFinder:
    """Finds the media that a file of conversations names.

    Args:
        file: the file of conversations; names of other files are relative to its folder.
        field: the source's field, which determines what is read of the file.
        cache_dir: the cache.
        read_all: reads all conversations of the file, with another function that finds media.
        downloads: copies those at URLs.
    """

    def __init__(
        self,
        file: Path,
        field: str,
        cache_dir: str,
        read_all: Callable[[Resolve], None],
        downloads: MediaDownloads,
    ) -> None:
        self._file, self._folder, self._cache = file, Folder(file.parent), Path(cache_dir)
        self._field, self._read_all, self._downloads = field, read_all, downloads
        self._copy: _Copy | None = None

    def __call__(self, references: Sequence[Reference], moving: bool) -> Media:
        return Media(tuple(map(self._find, references)), moving)

    def _find(self, reference: Reference) -> Place:
        stored = _stored(reference)
        if stored is not None:
            self._copy = self._copy or self._copied()
            return self._copy.find(*stored)
        assert isinstance(reference, str)
        name = _FILE.sub("", reference)
        return self._downloads.find(name) if is_url(name) else self._folder.find(name)

    def _copied(self) -> "_Copy":
        """The copy of all media that are stored in the file, made if it is missing."""
        key = key_of("media", self._field, stamps=[(str(self._file), stamp(self._file))])
        folder = self._cache / f"in-conversations-{key}"

        def build(unfinished: Path) -> None:
            with _Writer(unfinished) as writer:
                self._read_all(writer)

        copied, _ = cached(folder, build, partial(_Copy.open, self._file.name), resumable=True)
        return copied


class _Copy(NamedTuple):
    """The copy of the media in a file of conversations.

    Attributes:
        name: of the file of conversations.
        path: all media, one after the other.
        digests: of the media, sorted.
        ranges: int64 [n, 2], the first byte and the size of each.
    """

    name: str
    path: str
    digests: npt.NDArray[np.bytes_]
    ranges: npt.NDArray[np.int64]

    @classmethod
    def open(cls, name: str, folder: Path) -> "_Copy":
        digests, ranges = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in cls._fields[2:])
        path = folder / "content"
        if len(digests) != len(ranges) or path.stat().st_size != ranges[:, 1].sum():
            raise ValueError("media are not what was written")
        return cls(name, str(path), digests, ranges)

    def find(self, content: bytes, suffix: str) -> Span:
        digest = _digest(content)
        number = int(np.searchsorted(self.digests, np.bytes_(digest)))
        if number == len(self.digests) or self.digests[number] != digest:
            raise ValueError("a medium is not in the copy of the cache")
        start, size = self.ranges[number].tolist()
        return Span(self.path, start, size, f"{self.name}: medium {digest.decode()}{suffix}")


class _Writer:
    """Writes a :class:`_Copy`. It needs about 100 bytes of memory for each medium."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._out = (folder / "content").open("wb")
        self._ranges: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._out.close()
        pairs = sorted(self._ranges.items())
        np.save(self._folder / "digests.npy", np.array([d for d, _ in pairs], f"S{_DIGEST_BYTES}"))
        np.save(
            self._folder / "ranges.npy", np.array([r for _, r in pairs], np.int64).reshape(-1, 2)
        )

    def __call__(self, references: Sequence[Reference], moving: bool) -> Media:
        for content, _ in filter(None, map(_stored, references)):
            if (digest := _digest(content)) not in self._ranges:
                self._ranges[digest] = self._out.tell(), len(content)
                self._out.write(content)
        return Media(("",) * len(references), moving)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_BYTES].encode()


def _stored(reference: Reference) -> tuple[bytes, str] | None:
    """The content of a medium that is stored in the conversation, and the suffix of a video.

    Raises:
        ValueError: it is damaged.
    """
    if isinstance(reference, bytes):
        return reference, _suffix(reference, "")
    match = _DATA.match(reference)
    if match is None:
        return None
    content = _decoded(reference[match.end() :], bool(match["base64"]))
    return content, _suffix(content, match["type"])


def _decoded(content: str, is_base64: bool) -> bytes:
    """The content of a ``data:`` URL.

    Raises:
        ValueError: it is damaged.
    """
    try:
        if is_base64:
            return base64.b64decode(content, validate=True)
        return unquote_to_bytes(content)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"a damaged data: URL: {reason(error)}") from error


def _suffix(content: bytes, type: str) -> str:
    """The suffix of a video, which names must have; empty for images."""
    if type.lower().startswith("video/") or re.match(rb"....ftyp|\x1a\x45\xdf\xa3", content, re.S):
        return video.SUFFIXES[0]
    return ""
