"""Finding and reading the files of a source: folders, compression, kinds of content, limits.

Every file is either read or yielded as a :class:`Skip` with the reason. The content of a file
determines how it is read; its suffix only determines whether a folder's search includes it.
"""

import bz2
import fnmatch
import glob
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

import zstandard

from pretrain.data import skipped
from pretrain.data.cache import TAG
from pretrain.data.skipped import Skip
from pretrain.errors import PretrainError, one_line

# Maximum size of a line, or of a file that is one document, after decompression.
MAX_DOCUMENT_BYTES = 16 << 20
# Bytes to read for the end of an overlong line. If it is longer, the rest of the file is skipped.
_MAX_PASSED_BYTES = 4 << 30
# Compressed bytes passed to a decompressor at once. At Zstandard's highest ratio (128 KiB in 4
# bytes) they expand to 32 MiB.
_STEP = 1 << 10
# Decompressed bytes that determine how a file is read.
_HEAD = 1 << 16
_XZ_MEMORY = 1 << 30

JSON_LINES = (".jsonl", ".ndjson", ".json")
PLAIN = (".txt", ".md", ".rst")
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
# Errors that reading a file can raise, compressed or not.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError, lzma.LZMAError)

# Fields that a document of text would lose.
MEDIA = (
    *("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios"),
    *("input_image", "input_audio", "pixel_values"),
)
_EMPTY: tuple[Any, ...] = (None, "", [], {}, False)


def with_compressed(suffixes: Iterable[str]) -> tuple[str, ...]:
    """The suffixes, alone and with the suffix of each supported compression."""
    return tuple(kind + packed for kind in suffixes for packed in ("", *_COMPRESSED))


_JSON = with_compressed(JSON_LINES)
_PLAIN = with_compressed(PLAIN)
_CACHE = f"a cache (it contains {TAG})"
# Names of files about a data set, as in repositories.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|authors|datasheet"
    r"|data(set)?_?card|(md|sha)\d+(sums?)?|checksums?)[-_.].*",
    re.IGNORECASE,
)


def is_json(path: Path) -> bool:
    """Whether a file's name is that of JSON lines or of an array of JSON objects."""
    return ends_with(path, _JSON)


def ends_with(path: Path, suffixes: Iterable[str]) -> bool:
    return path.name.lower().endswith(tuple(suffixes))


# ---------------------------------------------------------------------- finding files


def find(path: str, setting: str, suffixes: Sequence[str], kinds: str) -> list[Path | Skip]:
    """The files of a source and everything that is left out, sorted by name.

    Args:
        path: a file, a folder or a pattern. A folder is searched at any depth and through links for
            files with one of the suffixes; hidden files and folders are left out.
        setting: the source's name in messages; empty if there is no source.
        kinds: description of the suffixes for messages.

    Raises:
        PretrainError: there are no files.
    """
    root = Path(path)
    if root.is_dir():
        items = list(walk(root, suffixes, kinds))
        nothing = f"the folder {root} has no {kinds} in it"
    elif root.exists():
        if not root.is_file():
            raise PretrainError(f"{path_of(setting)}{root} is neither a file nor a folder")
        items, nothing = [root], ""
    elif glob.has_magic(path):
        items = list(matches(Path(path)))
        nothing = f"no file matches {path}"
    else:
        raise PretrainError(f"{path_of(setting)}{root} does not exist")
    if not root.is_file():
        items = without_descriptions(items)
    paths = [item for item in items if isinstance(item, Path)]
    if not paths:
        raise PretrainError(f"{path_of(setting)}{nothing}{why_nothing(items)}")
    if not any(_size(path) for path in paths):
        raise PretrainError(f"{path_of(setting)}{paths[0]} is empty")
    return sorted(items, key=lambda item: item.name if isinstance(item, Skip) else str(item))


def path_of(setting: str) -> str:
    """The beginning of a message about the path of a source, which may have no name."""
    return f"{setting}.path: " if setting else ""


def without_descriptions(items: Sequence[Path | Skip]) -> list[Path | Skip]:
    """The files of a folder without those that are about the others: a README, a license or
    checksums next to JSON or tables. (Next to plain text, they may be documents, too.)"""
    about = {item for item in items if isinstance(item, Path) and is_about(item)}
    data = {item for item in items if isinstance(item, Path)} - about
    if all(ends_with(path, _PLAIN) for path in data):
        return list(items)
    why = "describes the other files"
    return [Skip(str(item), why, corrupt=False) if item in about else item for item in items]


def is_about(path: Path) -> bool:
    """Whether a file's name is that of a file about a data set, such as README.md."""
    plain = ends_with(path, _PLAIN) and _ABOUT.fullmatch(path.name)
    return bool(plain) or path.name in ("dataset_infos.json", skipped.FILE)


def why_nothing(items: Iterable[Path | Skip]) -> str:
    """Why a folder or pattern has no files to read: the first that is damaged, or not supported,
    or the folder of a cache; empty if there is no such reason."""
    skips = [item for item in items if isinstance(item, Skip)]
    causes = [
        skip
        for skip in skips
        if skip.corrupt or skip.reason == _CACHE or _foreign_suffix(Path(skip.name))
    ]
    return f" ({causes[0].name}: {causes[0].reason})" if causes else ""


def find_json(
    path: str, setting: str, kinds: str = "", more: Sequence[str] = ()
) -> list[Path | Skip]:
    """:func:`find` for sources that read JSON, and files with ``more`` suffixes.

    Raises:
        PretrainError: there are no files, or one is of another kind.
    """
    kinds = kinds or "JSONL files (.jsonl; .gz, .zst, .bz2 or .xz)"
    items = find(path, setting, (*_JSON, *more), kinds)
    for item in items:
        if isinstance(item, Path) and not (is_json(item) or ends_with(item, more)):
            raise PretrainError(
                f"{setting}.path: {item} is neither a folder nor a .jsonl file (or .jsonl.gz, "
                f"{', '.join(('.jsonl.zst', '.json', *more))})"
            )
    return items


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1  # reading the file will give the reason


def walk(root: Path, suffixes: Sequence[str], kinds: str) -> Iterator[Path | Skip]:
    """Every file in a folder and its subfolders."""
    for item in _tree(root):
        if isinstance(item, Skip):
            yield item
            continue
        for path, kind in item:
            if path.name.startswith("."):
                yield Skip(str(path), "hidden (its name begins with a dot)", corrupt=False)
            elif kind == "file" and ends_with(path, suffixes):
                yield path
            elif kind == "file":
                yield Skip(str(path), _foreign_suffix(path) or f"not {kinds}", corrupt=False)
            elif kind != "folder":
                yield Skip(str(path), kind)


def _tree(root: Path) -> Iterator[list[tuple[Path, str]] | Skip]:
    """The entries of a folder and of its subfolders that are not hidden.

    Links are followed. A folder that is reachable in several ways is read once.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links come last
        try:
            status = folder.stat()
        except OSError as error:
            yield _unreadable(folder, error)
            continue
        if (status.st_dev, status.st_ino) in seen:
            yield Skip(str(folder), "a link to a folder that is read already", corrupt=False)
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = _entries(folder)
        if isinstance(entries, list) and (folder / TAG, "file") in entries:
            entries = Skip(str(folder), _CACHE, corrupt=False)
        yield entries
        if isinstance(entries, list):
            for path, kind in entries:
                if kind == "folder" and not path.name.startswith("."):
                    (links if path.is_symlink() else folders).append(path)


def _entries(folder: Path) -> list[tuple[Path, str]] | Skip:
    """The path and kind of each entry in a folder, by name."""
    try:
        with os.scandir(folder) as scanned:
            return sorted((folder / entry.name, _kind(entry)) for entry in scanned)
    except OSError as error:
        return _unreadable(folder, error)


def _unreadable(folder: Path, error: OSError) -> Skip:
    return Skip(str(folder), f"the folder cannot be read: {reason(error)}")


def _kind(entry: "os.DirEntry[str]") -> str:
    """``folder``, ``file``, or the reason why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    return "neither a file nor a folder"


def matches(pattern: Path) -> Iterator[Path | Skip]:
    """Every file that a pattern matches, and every match that cannot be read.

    Like :func:`glob.glob`, but cycles of links end, and errors are reported.
    """
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    items = dict.fromkeys(_expand(Path(*fixed), pattern.parts[len(fixed) :]))
    above = {parent for item in items if isinstance(item, Path) for parent in item.parents}
    for item in items:
        if isinstance(item, Skip) or not item.is_dir():
            yield item
        elif item not in above:
            yield Skip(str(item), "a folder (its files match pattern/**/*)", corrupt=False)


def _expand(folder: Path, parts: Sequence[str]) -> Iterator[Path | Skip]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        for item in _tree(folder):
            if isinstance(item, Skip):
                yield item
            elif item:
                yield from _expand(item[0][0].parent, rest or ("*",))
        return
    if not glob.has_magic(part):
        named = folder / part
        entries: list[tuple[Path, str]] | Skip = [(named, "file")] if named.exists() else []
    else:
        entries = _entries(folder)
    if isinstance(entries, Skip):
        yield entries
        return
    for path, kind in entries:
        if glob.has_magic(part):
            hidden = path.name.startswith(".") and not part.startswith(".")
            if hidden or not fnmatch.fnmatch(path.name, part):
                continue
        if not rest:
            yield path if kind in ("file", "folder") else Skip(str(path), kind)
        elif path.is_dir():
            yield from _expand(path, rest)


# ---------------------------------------------------------------------- reading files


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


_DECOMPRESSORS: tuple[tuple[bytes, Callable[[], _Decompressor]], ...] = (
    (rb"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),
    # A frame, or a skippable frame.
    (
        rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
        lambda: zstandard.ZstdDecompressor().decompressobj(),
    ),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2Decompressor),
    (rb"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)),
)


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressing it in bounded memory if it is compressed.

    Compression is recognized by the first bytes, since names are often wrong.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the path is a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise ValueError("not a regular file")
    file = path.open("rb")
    try:
        head = file.peek(16)[:16]
        for magic, make in _DECOMPRESSORS:
            if re.match(magic, head):
                return io.BufferedReader(_Decompressed(file, make), _HEAD)
    except OSError:
        file.close()
        raise
    return file


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed in a way that :func:`open_file` decompresses.

    Raises:
        OSError, ValueError: as :func:`open_file`.
    """
    with open_file(path) as stream:
        return isinstance(getattr(stream, "raw", None), _Decompressed)


class _Decompressed(io.RawIOBase):
    """All frames of a compressed file as one stream; a truncated file is an error."""

    def __init__(self, file: IO[bytes], make: Callable[[], _Decompressor]) -> None:
        self._file, self._make = file, make
        self._frame = make()
        self._packed, self._ready = b"", memoryview(b"")
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_STEP)
            if not self._inside:  # frames may be followed by zeros
                self._packed = self._packed.lstrip(b"\0") or self._file.read(_STEP).lstrip(b"\0")
            if not self._packed:
                if self._inside:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._inside = not self._frame.eof
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = self._make()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Foreign(NamedTuple):
    """A file format that is not read.

    Attributes:
        suffixes: suffixes of its names.
        magic: regular expression of its first bytes; empty if they are not characteristic.
        advice: how to convert it.
    """

    name: str
    suffixes: tuple[str, ...]
    magic: bytes = b""
    advice: str = "convert it to JSON lines"


_FOREIGN = (
    # Intact ones are read by tables.py.
    _Foreign(
        *("a compressed or damaged Parquet file", (".parquet",), rb"PAR1[\x00-\x1f]"),
        "decompress or repair it",
    ),
    _Foreign(
        *("a compressed or damaged Arrow file", (".arrow", ".feather")),
        *(rb"ARROW1\0|\xff\xff\xff\xff", "decompress or repair it"),
    ),
    _Foreign("encrypted Parquet", (), rb"PARE[\x00-\x1f]", "decrypt it"),
    _Foreign("Feather version 1", (), rb"FEA1", "write it again with pyarrow"),
    _Foreign("ORC", (".orc",), rb"ORC[\x00-\x1f]", "convert it to Parquet"),
    _Foreign("MosaicML's MDS", (".mds",), b"", "convert it to Parquet or JSON lines"),
    _Foreign("CSV", (".csv",)),
    _Foreign("TSV", (".tsv", ".tab")),
    _Foreign("NumPy", (".npy", ".npz"), rb"\x93NUMPY"),
    _Foreign(
        *("HTML", (".html", ".htm", ".xhtml"), rb"(?i)\s*(<!doctype html|<html[\s>])"),
        "extract its text",
    ),
    _Foreign("PDF", (".pdf",), b"%PDF-", "extract its text"),
    _Foreign("WARC", (".warc", ".wet", ".wat"), rb"WARC/\d", "extract its text as JSON lines"),
    _Foreign("a tar archive", (".tar", ".tgz"), rb"(?s).{257}ustar", "unpack it"),
    _Foreign("a ZIP archive", (".zip", ".docx", ".epub"), rb"PK(\x03\x04|\x05\x06)", "unpack it"),
    _Foreign("a 7z archive", (".7z",), rb"7z\xbc\xaf\x27\x1c", "unpack it"),
    _Foreign("a RAR archive", (".rar",), rb"Rar!\x1a\x07", "unpack it"),
    _Foreign("LZ4", (".lz4",), rb"\x04\x22\x4d\x18", "decompress it"),
    _Foreign("Brotli", (".br",), advice="decompress it"),
    _Foreign("Snappy", (".snappy", ".sz"), rb"\xff\x06\0\0sNaPpY", "decompress it"),
    _Foreign("LZW", (".z",), rb"\x1f\x9d", "decompress it"),
    _Foreign(
        "compressed twice", (), b"|".join(magic for magic, _ in _DECOMPRESSORS), "decompress it"
    ),
    _Foreign("TFRecord", (".tfrecord", ".tfrecords")),
    _Foreign("Avro", (".avro",), rb"Obj\x01", "convert it to Parquet"),
    _Foreign("LMDB", (".mdb", ".lmdb")),
    _Foreign("Lance", (".lance",), advice="convert it to Parquet"),
    _Foreign("FFCV", (".beton",), advice="convert it to WebDataset shards or Parquet"),
    _Foreign("RecordIO", (".rec",), advice="convert it to WebDataset shards or Parquet"),
    _Foreign("MessagePack", (".msgpack",)),
    _Foreign("SQLite", (".sqlite",), rb"SQLite format 3\0"),
    _Foreign("HDF5", (".h5", ".hdf5"), rb"\x89HDF\r\n\x1a\n"),
    _Foreign("binary data", (".bin", ".idx"), advice="convert it to text or JSON lines"),
    _Foreign("pickled data", (".pkl", ".pickle", ".pt", ".pth"), rb"\x80[\x02-\x05][^\x80-\xff]"),
    _Foreign("an image", (), rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "use a source of images"),
)
# The end of a name such as a.tfrecord-00000-of-00004.
_SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32LE",
    b"\0\0\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
_BINARY = "binary data (it has NUL bytes), not text"
_UTF8_MARK = b"\xef\xbb\xbf"
# Beginnings of JSON; a key may be truncated.
_OBJECT = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*+(?:"\s*(?::|\Z)|\Z)')
_ARRAY = re.compile(rb'\[\s*\{\s*"')
_SECOND_OBJECT = re.compile(rb"[^\n]*\n\s*\{")
# What determines where a JSON value ends, and bytes that are not UTF-8 in a text.
_MARK = re.compile(r'\\.|["{}\[\],]', re.DOTALL)
_UNDECODED = re.compile("[\udc80-\udcff]")
# Between the elements of an array.
_SEPARATOR = re.compile(r"[\s,]*")


def _foreign_suffix(path: Path) -> str:
    """The reason for not reading a file by its name; empty if the name is no reason."""
    path = Path(_SHARD_NUMBER.sub("", path.name))
    for kind in _FOREIGN:
        if kind.suffixes and ends_with(path, with_compressed(kind.suffixes)):
            return f"{kind.name}, which is not read: {kind.advice}"
    return ""


def content(path: Path) -> Literal["lines", "array", "plain"]:
    """The format of a file: JSON lines, an array of JSON objects, or one plain document.

    Raises:
        ValueError: it has another format; the message names the format and how to convert it.
        OSError, EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError: it cannot be read.
    """
    if why := _foreign_suffix(path):
        raise ValueError(why)
    with open_file(path) as stream:
        head = stream.read(_HEAD)
    for kind in _FOREIGN:
        if kind.magic and re.match(kind.magic, head):
            raise ValueError(f"{kind.name}, which is not read: {kind.advice}")
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"{encoding}, not UTF-8: convert it (iconv -f {encoding} -t UTF-8)")
    start = head.removeprefix(_UTF8_MARK).lstrip()
    if b"\0" in head and not (_OBJECT.match(start) or _ARRAY.match(start)):
        raise ValueError(_BINARY)  # in JSON, only the line or element is damaged
    first, newline, rest = start.partition(b"\n")
    by_line = ends_with(path, with_compressed(JSON_LINES[:-1]))
    cut_off = not newline and len(head) == _HEAD
    if _ARRAY.match(start) and not (by_line and rest.strip() and _parses(first)):
        return "array"
    if by_line:
        return "lines"
    if _OBJECT.match(start):
        if cut_off or _parses(first) or _SECOND_OBJECT.match(start):
            return "lines"
        raise ValueError("a JSON object over several lines: write one a line (jq -c . does)")
    if ends_with(path, with_compressed(JSON_LINES)) and start:
        raise ValueError("neither JSON lines nor an array of JSON objects")
    return "plain"


def _parses(text: bytes) -> bool:
    try:
        json.loads(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def read_plain(path: Path) -> str:
    """Read a file that is one document.

    Raises:
        ValueError: the file is too large or not UTF-8.
        OSError, EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError: it cannot be read.
    """
    with open_file(path) as stream:
        text = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{_too_large()}: split it, or write its documents as JSON lines")
    if b"\0" in text:
        raise ValueError(_BINARY)
    return decode(text.removeprefix(_UTF8_MARK))


def _too_large() -> str:
    return f"larger than {MAX_DOCUMENT_BYTES >> 20} MiB"


def decode(text: bytes) -> str:
    """Decode UTF-8.

    Raises:
        ValueError: it is not UTF-8; the message names the position and how to convert it.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(text[error.start], f" at {error.start}")) from error


def _not_utf8(byte: int, place: str = "") -> str:
    return (
        f"not UTF-8 (byte 0x{byte:02x}{place}): convert it (iconv -f LATIN1 -t UTF-8, if that is "
        "its encoding)"
    )


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
    """(name, object) of every JSON object in a file of JSON lines or of an array.

    The name is the file and the number of the line or element. A :class:`Skip` takes the place of
    an object that cannot be read, or of a file without objects.
    """
    number, unit = 0, "line"
    try:
        kind = content(path)
        if kind == "plain" and _size(path):
            raise ValueError("not JSON lines")
        unit, read = ("element", _elements) if kind == "array" else ("line", _lines)
        with open_file(path) as stream:
            for number, value in read(stream):
                name = f"{path}:{number}" if unit == "line" else f"{path}[{number}]"
                if isinstance(value, dict):
                    yield name, value
                else:
                    why = reason(value) if isinstance(value, Exception) else "not a JSON object"
                    yield name, Skip(name, why)
    except UNREADABLE as error:
        after = f"cannot be read after {unit} {number}: " if number else ""
        yield str(path), Skip(str(path), after + reason(error))
    else:
        if not number:
            yield str(path), Skip(str(path), "no text in it", corrupt=False)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(number, value or error) of every line that is not blank.

    Raises:
        ValueError: the end of an overlong line is not found.
    """
    decoder = _Decoder()
    lines = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            yield number, ValueError(_too_large())
            passed = 0
            while (chunk := stream.readline(_HEAD)) and not chunk.endswith(b"\n"):
                passed += len(chunk)
                if passed > _MAX_PASSED_BYTES:
                    raise ValueError(f"the line is longer than {_MAX_PASSED_BYTES >> 20} MiB")
        elif text := line.removeprefix(_UTF8_MARK if number == 1 else b"").strip():
            try:
                yield number, decoder.decode(decode(text))
            except (ValueError, RecursionError) as error:
                yield number, error


def _elements(stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """(number, value or error) of every element of an array.

    Raises:
        ValueError: the array ends within an element, or after its end there is more.
    """
    decoder, number, step = _Decoder(), 1, _HEAD
    reader = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
    buffer = reader.read(_HEAD)
    place = buffer.index("[") + 1
    while True:
        if separator := _SEPARATOR.match(buffer, place):
            place = separator.end()
        if buffer.startswith("]", place):
            if buffer[place + 1 :].strip() or reader.read(_HEAD).strip():
                raise ValueError("there is more after the end of the array")
            return
        value: Any
        try:
            value, end = decoder.decode_from(buffer, place)
        except (ValueError, RecursionError) as error:
            value, end = ValueError(f"not JSON: {reason(error)}"), _End().find(buffer, place)
            if isinstance(error, RecursionError):
                value = error
        size = (len(buffer) if end < 0 else end) - place
        if size > MAX_DOCUMENT_BYTES:
            value = ValueError(_too_large())
            buffer, end = _passed(reader, buffer, place)
        elif end in (-1, len(buffer)) and (more := reader.read(step)):
            # The element may be incomplete: read more, twice as much each time.
            buffer, place, step = buffer[place:] + more, 0, 2 * step
            continue
        elif end in (-1, place):
            raise ValueError(reason(value))
        elif undecoded := _UNDECODED.search(buffer, place, end):
            value = ValueError(_not_utf8(ord(undecoded[0]) & 0xFF))
        yield number, value
        number, place, step = number + 1, end, _HEAD


def _passed(reader: io.TextIOWrapper, buffer: str, place: int) -> tuple[str, int]:
    """The text in which the value that begins at ``place`` ends, and its end in it.

    Raises:
        ValueError: its end is not found.
    """
    value, passed = _End(), 0
    while (end := value.find(buffer, place)) < 0:
        buffer, place = reader.read(_HEAD), 0
        passed += len(buffer)
        if not buffer or passed > _MAX_PASSED_BYTES:
            raise ValueError(f"the end of an element that is {_too_large()} is not found")
    return buffer, end


class _End:
    """Finds the end of a JSON value, which need not be valid, in pieces of a text."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def find(self, text: str, start: int) -> int:
        """The place after the value in the next piece; -1 if it does not end there."""
        start += self._escaped
        for match in _MARK.finditer(text, start):
            mark = match[0]
            if self._quoted:
                self._quoted = mark != '"'
                if not self._quoted and not self._depth:
                    return match.end()
            elif mark == '"':
                self._quoted = True
            elif mark in "{[":
                self._depth += 1
            elif not self._depth and mark in "}],":
                return match.start()  # a value such as a number, or none
            elif mark in "}]":
                self._depth -= 1
                if not self._depth:
                    return match.end()
        piece = text[start:]
        self._escaped = (len(piece) - len(piece.rstrip("\\"))) % 2 == 1
        return -1


class _Decoder:
    """Decodes JSON. A repeated key in an object is an error, for its first value would be lost."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self._repeated: str | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self._repeated = next(key for key, count in counts.items() if count > 1)
        return value

    def decode(self, text: str) -> Any:
        """The value of a text.

        Raises:
            ValueError: it is not JSON, or an object repeats a key.
            RecursionError: it is nested too deeply.
        """
        self._repeated = None  # that of a text that was not JSON
        try:
            return self._checked(self._decoder.decode(text))
        except ValueError as error:
            raise ValueError(f"not JSON: {reason(error)}") from error

    def decode_from(self, text: str, place: int) -> tuple[Any, int]:
        """The value that begins at ``place``, and its end; raises as :meth:`decode`."""
        self._repeated = None
        value, end = self._decoder.raw_decode(text, place)
        return self._checked(value), end

    def _checked(self, value: Any) -> Any:
        repeated = self._repeated
        return value if repeated is None else ValueError(f"the key {repeated!r} is repeated")


def from_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError, RecursionError: as :meth:`_Decoder.decode`, also for a repeated key.
    """
    value = _Decoder().decode(text)
    if isinstance(value, ValueError):
        raise value
    return value


# ---------------------------------------------------------------------- fields of JSON objects


def lost_field(value: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the named fields that is not empty; an empty string if all are."""
    return next((name for name in names if value.get(name) not in _EMPTY), "")


def no_field(value: Mapping[str, Any], field: str) -> str:
    """The reason for skipping a record without a field."""
    keys = ", ".join(str(key)[:40] for key in list(value)[:20])
    return f"has no field {field!r}, only {keys or 'none'}: set the source's field"


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: it contains no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def reason(error: BaseException) -> str:
    """The message of an error in one line."""
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text)[:300] or type(error).__name__
