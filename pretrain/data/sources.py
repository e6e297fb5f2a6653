"""Reading a user's own files: what is in them, and what is wrong with them."""

import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from pretrain.config import SourceConfig
from pretrain.data import video
from pretrain.data.chat import REPLY, Message
from pretrain.data.pixels import Pixels, open_image
from pretrain.data.skipped import Skip
from pretrain.data.tokenizer import ROLES
from pretrain.errors import PretrainError

_JSONL = (".jsonl", ".ndjson")
_PLAIN = (".txt", ".md", ".rst")
_PACKED = ("", ".gz", ".zst")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CAPTIONS = "captions.jsonl"
# What readers of damaged files raise.
_UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True)
class Text:
    """A document of text."""

    name: str
    text: str

    @property
    def hash(self) -> int:
        return content_hash(self.text)


@dataclass(frozen=True)
class Media:
    """An image, or the frames of a video.

    Attributes:
        paths: of each frame; or one path, of an image, an animation or a video file.
        moving: whether it is a video.
    """

    paths: tuple[str, ...]
    moving: bool


@dataclass(frozen=True)
class Mixed:
    """A document of text and images in reading order; a pair is one of them and its caption."""

    name: str
    parts: tuple[str | Media, ...]

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def hash(self) -> int:
        names = [n for p in self.parts for n in ([p] if isinstance(p, str) else p.paths)]
        root = Path(self.name).parent
        return content_hash(*(name.removeprefix(f"{root}/") for name in names))


@dataclass(frozen=True)
class Chat:
    """A conversation; there is a reply in it."""

    name: str
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        return "\n".join(message.content for message in self.messages)

    @property
    def hash(self) -> int:
        return content_hash(*(part for message in self.messages for part in message))


def content_hash(*parts: str) -> int:
    """64 bits of what is in a document: the same document is always of the same split."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def text_files(source: SourceConfig, key: str) -> list[Path]:
    """The files of a source of text, in an order that only names decide."""
    suffixes = [kind + packed for kind in (*_JSONL, *_PLAIN) for packed in _PACKED]
    return _find(source, key, suffixes, "files of text (.jsonl, .txt, .md; .gz or .zst)")


def chat_files(source: SourceConfig, key: str) -> list[Path]:
    """The JSONL files of a source of conversations."""
    suffixes = [kind + packed for kind in _JSONL for packed in _PACKED]
    return _find(source, key, suffixes, "JSONL files (.jsonl; .gz or .zst)", others=False)


def mixed_files(source: SourceConfig, key: str) -> list[Path]:
    """The JSONL files of a source of images; or the images of a folder without any."""
    path = Path(source.path)
    if path.is_dir():
        listed = path / CAPTIONS
        return [listed] if listed.is_file() else _find(source, key, _IMAGES, "images")
    suffixes = [kind + packed for kind in _JSONL for packed in _PACKED]
    return _find(source, key, suffixes, "JSONL files", others=False)


def _find(
    source: SourceConfig, key: str, suffixes: Sequence[str], what: str, *, others: bool = True
) -> list[Path]:
    """
    Raises:
        PretrainError: there is nothing; it names the setting.
    """
    path = Path(source.path)
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file() and _ends(p, suffixes))
        found = [p for p in inside if not any(n.startswith(".") for n in p.relative_to(path).parts)]
        if not found:
            raise PretrainError(f"{key}.path: the folder {path} has no {what} in it")
    elif path.is_file():
        found = [path]
    elif glob.has_magic(source.path):
        found = [p for p in map(Path, glob.glob(source.path, recursive=True)) if p.is_file()]
        if not found:
            raise PretrainError(f"{key}.path: no file matches {source.path}")
    else:
        raise PretrainError(f"{key}.path: {path} does not exist")
    if not others and not all(_ends(p, suffixes) for p in found):
        stranger = next(p for p in found if not _ends(p, suffixes))
        raise PretrainError(
            f"{key}.path: {stranger} is neither a folder nor a .jsonl file (.jsonl.gz, .jsonl.zst)"
        )
    if not any(p.stat().st_size for p in found):
        raise PretrainError(f"{key}.path: {found[0]} is empty")
    return sorted(found)


def _ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(suffixes))


def read_text(source: SourceConfig, files: Sequence[Path], key: str) -> Iterator[Text | Skip]:
    """Every document: a line of a JSONL file, or a plain file.

    Raises:
        PretrainError: the first object of the source has no such field.
    """
    seen = False
    for file in files:
        if _ends(file, [kind + packed for kind in _JSONL for packed in _PACKED]):
            for name, value in _read_jsonl(file):
                if isinstance(value, Skip):
                    yield value
                    continue
                text = value.get(source.field)
                if not seen and source.field not in value:
                    raise PretrainError(
                        f"{name} has no field {source.field!r}, only {', '.join(value) or 'none'}: "
                        f"set {key}.field"
                    )
                seen = True
                yield _text(name, text, source.field)
        else:
            try:
                with _open(file) as stream:
                    yield _text(str(file), stream.read().decode(), "text")
            except (*_UNREADABLE, UnicodeDecodeError) as error:
                yield Skip(str(file), _reason(error))


def _text(name: str, text: Any, field: str) -> Text | Skip:
    if not isinstance(text, str):
        what = "has no field" if text is None else "has no text in its field"
        return Skip(name, f"{what} {field!r}")
    if not _is_unicode(text):
        return Skip(name, "half a surrogate pair in its text")
    return Text(name, text) if text.strip() else Skip(name, "no text in it", corrupt=False)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any] | Skip]]:
    """(file and line, object) of every line that is not blank."""
    number = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, 1):
                name = f"{file}:{number}"
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    yield name, Skip(name, f"not JSON: {_reason(error)}")
                    continue
                yield (
                    name,
                    value if isinstance(value, dict) else Skip(name, "not a JSON object"),
                )
    except _UNREADABLE as error:
        yield "", Skip(str(file), f"cannot be read after line {number}: {_reason(error)}")


def _open(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    if file.suffix == ".zst":
        return io.BufferedReader(_Zstd(file))
    return file.open("rb")


class _Zstd(io.RawIOBase):
    """Frames of Zstandard as one stream; zstandard's own reader takes a cut-off frame for whole."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed = self._ready = b""
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed:
                if self._inside:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._ready = self._frame.decompress(self._packed)
            self._inside = not self._frame.eof
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_chats(source: SourceConfig, files: Sequence[Path], key: str) -> Iterator[Chat | Skip]:
    """Every conversation: lines of ``{"messages": [{"role": "user", "content": "…"}, …]}``.

    Raises:
        PretrainError: the first object of the source has no such field.
    """
    seen = False
    for file in files:
        for name, value in _read_jsonl(file):
            if isinstance(value, Skip):
                yield value
                continue
            field = source.field if source.field in value else "messages"
            if not seen and field not in value:
                raise PretrainError(
                    f"{name} has no field 'messages', only {', '.join(value) or 'none'}: "
                    f"set {key}.field"
                )
            seen = True
            yield _chat(name, value.get(field), field)


def _chat(name: str, value: Any, field: str) -> Chat | Skip:
    if not isinstance(value, list):
        return Skip(name, f"no list of messages in {field!r}")
    messages = []
    for number, message in enumerate(value, 1):
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, dict)
            else (None, None)
        )
        if role not in ROLES:
            return Skip(name, f"message {number} is of role {role!r}, none of {', '.join(ROLES)}")
        if not isinstance(content, str):
            return Skip(name, f"message {number} has no text for its content")
        if not _is_unicode(content):
            return Skip(name, f"half a surrogate pair in message {number}")
        messages.append(Message(role, content))
    if not any(message.role == REPLY and message.content.strip() for message in messages):
        return Skip(name, f"no reply of the {REPLY} in it", corrupt=False)
    return Chat(name, tuple(messages))


def read_mixed(source: SourceConfig, files: Sequence[Path], key: str) -> Iterator[Mixed | Skip]:
    """Every document of a source of images.

    Lines of JSONL are ``{"image": "a.jpg", "caption": "…"}``, ``{"video": "a.mp4", "caption":
    "…"}`` (or an animated GIF, PNG or WebP, or a list of frames), or ``{"parts": [{"text": "…"},
    {"image": "a.jpg"}, …]}``. Paths are relative to the file's folder and stay within it. In a
    folder without ``captions.jsonl``, ``a.txt`` is the caption of ``a.jpg``.
    """
    for file in files:
        if not _ends(file, _IMAGES):
            for name, value in _read_jsonl(file):
                yield value if isinstance(value, Skip) else _mixed(name, value, file, source.field)
            continue
        caption = file.with_suffix(".txt")
        try:
            text = caption.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            yield Skip(str(file), f"no caption {caption.name} beside it")
        except (OSError, UnicodeDecodeError) as error:
            yield Skip(str(caption), _reason(error))
        else:
            if text:
                yield Mixed(str(file), (Media((str(file),), moving=False), text))
            else:
                yield Skip(str(caption), "no text in it")


def _mixed(name: str, value: dict[str, Any], file: Path, field: str) -> Mixed | Skip:
    try:
        if "parts" in value:
            parts = [_part(part, file.parent) for part in _list(value["parts"])]
        else:
            caption = value.get(field, value.get("caption"))
            if not isinstance(caption, str) or not caption.strip():
                raise ValueError(f"no caption in {field!r} or 'caption'")
            media = {kind: value[kind] for kind in ("image", "video") if kind in value}
            parts = [_part(media, file.parent), caption.strip()]
        parts = [part for part in parts if part]
        if not parts:
            raise ValueError("nothing in it")
        if not all(_is_unicode(part) for part in parts if isinstance(part, str)):
            raise ValueError("half a surrogate pair in its text")
    except ValueError as error:
        return Skip(name, str(error))
    return Mixed(name, tuple(parts))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("'parts' is not a list")
    return value


def _part(part: Any, root: Path) -> str | Media:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and len(part) == 1:
        ((kind, value),) = part.items()
        if kind == "text" and isinstance(value, str):
            return value
        if kind == "image" and isinstance(value, str):
            return Media((_inside(value, root),), moving=False)
        if kind == "video" and isinstance(value, str):
            return Media((_inside(value, root),), moving=True)
        if kind == "video" and isinstance(value, list) and value:
            return Media(tuple(_inside(str(frame), root) for frame in value), moving=True)
    raise ValueError("neither an image, a video nor text: " + json.dumps(part)[:80])


def _inside(name: str, root: Path) -> str:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name} lies outside {root}")
    return str(path)


def measure(media: Media, fps: float) -> tuple[int, int, int]:
    """(frames, height, width) in pixels, without decoding: of a video file but its first frame.

    Args:
        fps: frames a second that are taken of a video file; of an animation all are.

    Raises:
        ValueError: a file is missing or no image.
        PretrainError: PyAV is needed and not installed.
    """
    sizes = []
    for path in media.paths:
        if video.is_video(path):
            if not media.moving:
                raise ValueError(f"{path} is a video: write 'video', not 'image'")
            if len(media.paths) > 1:
                raise ValueError("a frame of it is a video")
            return video.measure(path, fps)
        with open_image(path) as image:
            sizes.append((image.num_frames if media.moving else 1, *image.size))
    if len({size[1:] for size in sizes}) > 1:
        raise ValueError("its frames differ in size")
    if len(media.paths) > 1 and any(frames > 1 for frames, _, _ in sizes):
        raise ValueError("a frame of it is a video")
    return sum(size[0] for size in sizes), *sizes[0][1:]


def frames(media: Media, fps: float) -> Iterator[Pixels]:
    """Each frame, uint8 [height, width, 3].

    Args:
        fps: as of :func:`measure`.

    Raises:
        ValueError: a file is missing or damaged.
        PretrainError: PyAV is needed and not installed.
    """
    for path in media.paths:
        if video.is_video(path):
            yield from video.frames(path, fps)
            continue
        with open_image(path) as image:
            for number in range(image.num_frames) if media.moving else (None,):
                yield image.rgb(number)
