"""Images and videos within other files: members of archives, values in columns of tables."""

from __future__ import annotations

import io
from typing import IO, Any, NamedTuple


class Span(NamedTuple):
    """A range of a file's bytes that is an image or a video.

    Attributes:
        file: path of the file.
        start: first byte.
        size: number of bytes.
        name: name for messages, which determines whether it is a video: its suffix is the usual
            one. Independent of where a copy of the file is.
    """

    file: str
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return self.name

    def open(self) -> IO[bytes]:
        """Open the range like a file; only what is read of it is read from the disk.

        Raises:
            OSError: the file cannot be opened.
        """
        return io.BufferedReader(_Range(self))


Place = str | Span
"""Where an image or a video is: the path of a file, or a range of one."""


def content(place: Place) -> bytes:
    """The bytes of an image or a video.

    Raises:
        OSError: it cannot be read.
    """
    with open(place, "rb") if isinstance(place, str) else place.open() as file:
        return file.read()


class _Range(io.RawIOBase):
    """A range of a file."""

    def __init__(self, span: Span) -> None:
        self._file = open(span.file, "rb", buffering=0)  # noqa: SIM115 (closed in close)
        self._start, self._size = span.start, span.size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        room = min(len(buffer), max(0, self._size - self._place))
        self._file.seek(self._start + self._place)
        count = self._file.readinto(memoryview(buffer)[:room]) or 0
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
