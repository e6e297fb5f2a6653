"""Reading a user's own files: what is in them, and what is wrong with them."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import SourceConfig
from pretrain.data import files
from pretrain.data.chat import REPLY, Message
from pretrain.data.files import reason
from pretrain.data.media import pixels, video
from pretrain.data.media.frames import Media as Media
from pretrain.data.skipped import Skip
from pretrain.data.tokenizer import ROLES
from pretrain.errors import PretrainError

_JSON = files.with_compressed(files.JSON_LINES)
_TEXT = files.with_compressed((*files.JSON_LINES, *files.PLAIN))
CAPTIONS = "captions.jsonl"
_CAPTION = ".txt"
# Pillow warns of damaged metadata, which changes nothing, and of large images below its own limit.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Fields whose content a document of text would lose.
_MEDIA = (
    *("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios"),
    *("input_image", "input_audio", "pixel_values"),
)
# Those that no document has; a caption's image_url often tells where its image is from.
_UNREAD = ("images", "videos", "audio", "audios", "input_audio")
_NOTHING: tuple[Any, ...] = (None, "", [], {}, False)
_LOST_OF_CHAT = (*_MEDIA, "tools", "functions", "system")
_LOST_OF_MESSAGE = (
    *(*_MEDIA, "tool_calls", "function_call", "tool_call_id", "tools"),
    *("reasoning_content", "reasoning", "thinking", "prefix"),
)


@dataclass(frozen=True)
class Text:
    """A document of text."""

    name: str
    text: str

    @property
    def hash(self) -> int:
        return content_hash(self.text)


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
    """64 bits of a document's content: the same document is always in the same split."""
    # File names that are not UTF-8 have surrogates in them.
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big")


def text_files(source: SourceConfig, key: str) -> list[Path | Skip]:
    """The files of a source of text in the order of their names, and what is left out."""
    kinds = "files of text (.jsonl, .json, .txt, .md; .gz, .zst, .bz2 or .xz)"
    return files.find(source.path, key, _TEXT, kinds)


def chat_files(source: SourceConfig, key: str) -> list[Path | Skip]:
    """The JSON files of a source of conversations, and what is left out."""
    return _json_files(source, key)


def mixed_files(source: SourceConfig, key: str) -> list[Path | Skip]:
    """The JSON files of a source of images, or the images of a folder, and what is left out."""
    path = Path(source.path)
    if not path.is_dir():
        return _json_files(source, key)
    if (path / CAPTIONS).is_file():
        return [path / CAPTIONS, *_unnamed(path / CAPTIONS)]
    return list(_images(path, key))


def _unnamed(captions: Path) -> Iterator[Skip]:
    """The images of a folder that its captions.jsonl does not name."""
    named = set(map(os.path.normpath, media_paths(captions)))
    for item in files.walk(captions.parent, pixels.suffixes(), "images"):
        if isinstance(item, Path) and os.path.normpath(item) not in named:
            yield Skip(str(item), f"not named in {CAPTIONS}", corrupt=False)


def _images(folder: Path, key: str) -> Iterator[Path | Skip]:
    """The images of a folder, whatever they are called, and everything else but their captions."""
    found = list(files.walk(folder, ("",), "files"))
    images = {item for item in found if isinstance(item, Path) and _is_image(item)}
    if not images:
        failed = (item for item in found if isinstance(item, Skip) and item.corrupt)
        why = "".join(f" ({skip.name}: {skip.reason})" for skip in list(failed)[:1])
        raise PretrainError(f"{key}.path: the folder {folder} has no images in it{why}")
    captions = set(map(caption_of, images))
    for item in sorted(found, key=lambda item: str(item if isinstance(item, Path) else item.name)):
        if isinstance(item, Skip) or item in images:
            yield item
        elif item in captions:
            continue
        elif video.is_video(str(item)):
            yield Skip(str(item), f"a video: name it in {CAPTIONS}", corrupt=False)
        elif item.suffix.lower() == _CAPTION:
            yield Skip(str(item), "a caption without an image of its name")
        else:
            yield Skip(str(item), "neither an image nor a caption", corrupt=False)


def _is_image(file: Path) -> bool:
    """Whether a file is an image: by its suffix, even if it is damaged, or by its content."""
    if files.ends_with(file, pixels.suffixes()):
        return True
    if file.suffix.lower() == _CAPTION or video.is_video(str(file)):
        return False
    try:
        with pixels.open_image(file):
            return True
    except ValueError:
        return False


def caption_of(image: Path) -> Path:
    """The text file of an image's name, whether or not there is one."""
    spelt = [image.with_suffix(suffix) for suffix in (_CAPTION, _CAPTION.upper())]
    return next((path for path in spelt if path.exists()), spelt[0])


def _json_files(source: SourceConfig, key: str) -> list[Path | Skip]:
    """
    Raises:
        PretrainError: there is none, or a file is named that is of another kind.
    """
    found = files.find(source.path, key, _JSON, "JSONL files (.jsonl; .gz, .zst, .bz2 or .xz)")
    for item in found:
        if isinstance(item, Path) and not files.ends_with(item, _JSON):
            raise PretrainError(
                f"{key}.path: {item} is neither a folder nor a .jsonl file (or .jsonl.gz, "
                ".jsonl.zst, .json)"
            )
    return found


def read_text(
    source: SourceConfig, found: Sequence[Path | Skip], key: str = ""
) -> Iterator[Text | Skip]:
    """Every document of the files found: JSON objects, or plain files; and what is left out."""
    for item in found:
        yield from [item] if isinstance(item, Skip) else read_text_file(source, item)


def read_text_file(source: SourceConfig, file: Path) -> Iterator[Text | Skip]:
    """Every document of a file: of JSON the objects, otherwise its text."""
    try:
        plain = files.content(file) == "plain"
        if plain:
            yield _text(str(file), files.read_plain(file), "text")
    except files.UNREADABLE as error:
        yield Skip(str(file), reason(error))
        return
    for name, value in () if plain else files.read_objects(file):
        if isinstance(value, Skip):
            yield value
        elif source.field not in value:
            yield Skip(name, _no_field(value, source.field))
        elif lost := _lost(value, _MEDIA):
            yield Skip(name, f"its {lost!r} would be lost: a source of text has no images")
        else:
            yield _text(name, value[source.field], source.field)


def _no_field(value: dict[str, Any], field: str) -> str:
    keys = ", ".join(str(key)[:40] for key in list(value)[:20])
    return f"has no field {field!r}, only {keys or 'none'}: set the source's field"


def _lost(value: dict[str, Any], names: Sequence[str]) -> str:
    """The first of the names under which there is something."""
    return next((name for name in names if value.get(name) not in _NOTHING), "")


def _text(name: str, text: Any, field: str) -> Text | Skip:
    if not isinstance(text, str):
        return Skip(name, f"has no text in its field {field!r}")
    if not _is_unicode(text):
        return Skip(name, "half a surrogate pair in its text")
    return Text(name, text) if text.strip() else Skip(name, "no text in it", corrupt=False)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_chats(
    source: SourceConfig, found: Sequence[Path | Skip], key: str = ""
) -> Iterator[Chat | Skip]:
    """Every conversation of the files found, and what is left out."""
    for item in found:
        yield from [item] if isinstance(item, Skip) else read_chat_file(source, item)


def read_chat_file(source: SourceConfig, file: Path) -> Iterator[Chat | Skip]:
    """Every conversation of a file: ``{"messages": [{"role": "user", "content": "…"}, …]}``.

    A conversation of which something would be lost, such as an image or a call of a tool, is
    left out.
    """
    for name, value in files.read_objects(file):
        if isinstance(value, Skip):
            yield value
            continue
        field = source.field if source.field in value else "messages"
        if field not in value:
            yield Skip(name, _no_field(value, "messages"))
            continue
        try:
            yield _chat(name, value, field)
        except ValueError as error:
            yield Skip(name, reason(error))


def _chat(name: str, value: dict[str, Any], field: str) -> Chat | Skip:
    """
    Raises:
        ValueError: it is not a conversation of text alone.
    """
    if not isinstance(value[field], list):
        raise ValueError(f"no list of messages in {field!r}")
    if lost := _lost(value, _LOST_OF_CHAT):
        raise ValueError(f"its {lost!r} would be lost: a source of chat has messages of text alone")
    messages = tuple(_message(number, one) for number, one in enumerate(value[field], 1))
    if not any(message.role == REPLY and message.content.strip() for message in messages):
        return Skip(name, f"no reply of the {REPLY} in it", corrupt=False)
    return Chat(name, messages)


def _message(number: int, message: Any) -> Message:
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} is of role {role!r:.40}, none of {', '.join(ROLES)}")
    if lost := _lost(fields, _LOST_OF_MESSAGE):
        raise ValueError(f"the {lost!r} of message {number} would be lost: only its text is read")
    for name in ("weight", "train"):
        if fields.get(name) in (0, False):
            raise ValueError(f"message {number} is not to be learned ({name!r}): this is not read")
    if isinstance(content, list):
        content = _joined(number, content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has no text for its content")
    if not _is_unicode(content):
        raise ValueError(f"half a surrogate pair in message {number}")
    return Message(role, content)


def _joined(number: int, parts: list[Any]) -> str:
    """The text of a content that is a list of parts, as Chat Completions has it."""
    texts = []
    for part in parts:
        fields = part if isinstance(part, dict) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"message {number} has a part of type {kind!r:.40}, not only text")
        texts.append(text)
    return "".join(texts)


def read_mixed(
    source: SourceConfig, found: Sequence[Path | Skip], key: str = ""
) -> Iterator[Mixed | Skip]:
    """Every document of the files found, and what is left out."""
    for item in found:
        yield from [item] if isinstance(item, Skip) else read_mixed_file(source, item)


def read_mixed_file(source: SourceConfig, file: Path) -> Iterator[Mixed | Skip]:
    """Every document of a JSON file, or an image with its caption.

    Objects of JSON are ``{"image": "a.jpg", "caption": "…"}``, ``{"video": "a.mp4", "caption":
    "…"}`` (or an animated GIF, PNG or WebP, or a list of frames), or ``{"parts": [{"text": "…"},
    {"image": "a.jpg"}, …]}``. Paths are relative to the file's folder and stay within it. The
    caption of ``a.jpg`` in a folder without ``captions.jsonl`` is ``a.txt``.
    """
    if not files.ends_with(file, _JSON):
        yield _pair(file)
        return
    for name, value in files.read_objects(file):
        yield value if isinstance(value, Skip) else _mixed(name, value, file, source.field)


def _pair(image: Path) -> Mixed | Skip:
    caption = caption_of(image)
    try:
        text = files.read_plain(caption).strip()
    except FileNotFoundError:
        return Skip(str(image), f"no caption {caption.name} in its folder")
    except files.UNREADABLE as error:
        return Skip(str(caption), reason(error))
    if not text:
        return Skip(str(caption), "no text in it")
    return Mixed(str(image), (Media((str(image),), moving=False), text))


def media_paths(file: Path) -> Iterator[str]:
    """Every file that the documents of a file name as an image or a video, whether it is there or
    not; an image itself."""
    if not files.ends_with(file, _JSON):
        yield str(file)
        return
    for _, value in files.read_objects(file):
        if isinstance(value, Skip):
            continue
        parts = value.get("parts")
        for part in (value, *(parts if isinstance(parts, list) else ())):
            for kind in ("image", "video") if isinstance(part, dict) else ():
                named = part.get(kind)
                for one in named if isinstance(named, list) else [named]:
                    if isinstance(one, str):
                        yield str(file.parent / one)


def _mixed(name: str, value: dict[str, Any], file: Path, field: str) -> Mixed | Skip:
    try:
        unread = (*_UNREAD, "image", "video") if "parts" in value else _UNREAD
        if lost := _lost(value, unread):
            raise ValueError(f"its {lost!r} would be lost: name it in 'parts'")
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
        return Skip(name, reason(error))
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
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ValueError(f"{name}: {reason(error)}") from error
    if not inside:
        raise ValueError(f"{name} lies outside {root}")
    return str(path)
