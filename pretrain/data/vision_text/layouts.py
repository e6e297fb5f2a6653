"""Layouts of records with images and text in public data sets, and their documents.

A record is an object of JSON, a row of a table or a sample of a shard. Images in it are names of
files, or :class:`~pretrain.data.media.span.Span` objects, alone or with a name as the `datasets`
library stores them ({bytes, path}).

- captions: `image`, `images`, `video` or `videos`, and a caption or a list of captions.
- imagefolder: the same with `file_name` or `file_names` (`datasets`).
- parts: `parts`, a list of {"text": …}, {"image": …} and {"video": …} in reading order.
- OBELICS: `images` and `texts`, two lists of equal length; null where the other one has an entry.
- MMC4: `text_list`, and `image_info` with the index of the sentence that follows each image.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pretrain.data import files
from pretrain.data.files import reason
from pretrain.data.media import video
from pretrain.data.media.frames import Media
from pretrain.data.media.span import Place, Span
from pretrain.data.remote import MediaDownloads, is_url
from pretrain.data.skipped import EmptyRecordError, Skip
from pretrain.data.vision_text.document import Mixed

Layout = Literal["captions", "imagefolder", "parts", "OBELICS", "MMC4"]
Row = Mapping[str, Any]

MEDIA_KEYS = ("image", "images", "video", "videos")
CAPTION = "caption"
SOUND = ("audio", "audios", "input_audio")
"""Fields and columns with sound, which documents do not have. (A caption's image_url is often the
origin of its image.)"""
_FILE_NAME = re.compile(r"(.*_)?file_names?")
# Too long for the name of a file.
_BASE64 = re.compile(r"(data:[^,]*,)?[A-Za-z0-9+/_=\s-]{256,}")


@dataclass(frozen=True)
class Names:
    """Keys of a source's records.

    Attributes:
        field: key of the caption; `caption` is read, too.
        image_field: key of the image or images; empty: the only one of the usual keys.
    """

    field: str = "text"
    image_field: str = ""


class Files(Protocol):
    """Finds the images that records name."""

    def find(self, name: str) -> Place:
        """
        Raises:
            ValueError: the name leads out of the source's folder.
        """


@dataclass(frozen=True)
class Folder:
    """Images by their paths relative to a folder."""

    root: Path

    def find(self, name: str) -> Place:
        if is_url(name):
            raise ValueError(
                f"its image is a URL, {name[:200]}: download it, such as by img2dataset"
            )
        if _BASE64.fullmatch(name):
            raise ValueError(
                f"its image is in base64, {name[:20]}…: store its bytes in Parquet, as `datasets`"
            )
        path = self.root / name
        try:
            inside = path.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError) as error:  # a cycle of links
            raise ValueError(f"{name}: {reason(error)}") from error
        if not inside:
            raise ValueError(f"{name} lies outside {self.root}")
        return str(path)


@dataclass(frozen=True)
class WithUrls:
    """Images at URLs, and others where ``files`` finds them."""

    files: Files
    downloads: MediaDownloads

    def find(self, name: str) -> Place:
        return self.downloads.find(name) if is_url(name) else self.files.find(name)


def layout_of(keys: Collection[str]) -> Layout:
    """The layout of a record, by its keys."""
    if "parts" in keys:
        return "parts"
    if "text_list" in keys and "image_info" in keys:
        return "MMC4"
    if "texts" in keys and "images" in keys:
        return "OBELICS"
    if any(map(_FILE_NAME.fullmatch, keys)):
        return "imagefolder"
    return "captions"


def documents(name: str, row: Row, found: Files, names: Names) -> Iterator[Mixed | Skip]:
    """The documents of a record: one, or one for each caption.

    Args:
        name: name of the record in messages.
        found: finds images by their names.
    """
    made: list[tuple[str | Media, ...]]
    try:
        layout = layout_of(row)
        lost = (*SOUND, *MEDIA_KEYS) if layout == "parts" else SOUND
        if key := files.lost_field(row, lost):
            raise ValueError(f"its {key!r} would be lost: name it in 'parts'")
        if layout in ("captions", "imagefolder"):
            media = _media_of(row, found, names)
            made = [(*media, caption) for caption in _captions(row, names.field)]
        else:
            read = {"parts": _parts, "OBELICS": _obelics, "MMC4": _mmc4}[layout]
            made = [tuple(part for part in read(row, found) if part)]
        for parts in made:
            if not parts:
                raise ValueError("nothing in it")
            if not all(files.is_unicode(part) for part in parts if isinstance(part, str)):
                raise ValueError("half a surrogate pair in its text")
    except ValueError as error:
        yield Skip(name, reason(error), corrupt=not isinstance(error, EmptyRecordError))
        return
    yield from (Mixed(name, parts) for parts in made)


def named_files(row: Row) -> Iterator[str]:
    """Every image and video that a record names, even if the record cannot be read."""
    keys = [key for key in row if key in MEDIA_KEYS or _FILE_NAME.fullmatch(key)]
    parts = row.get("parts")
    values = [row[key] for key in keys]
    for part in parts if isinstance(parts, list) else ():
        values += [part.get(kind) for kind in ("image", "video")] if isinstance(part, dict) else []
    for value in values:
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                yield name


# ---------------------------------------------------------------------- captions


def media_keys(row: Row) -> list[str]:
    """The keys of a record that have images or videos; a value may be null."""
    return [key for key in row if key in MEDIA_KEYS or _FILE_NAME.fullmatch(key)]


def _media_of(row: Row, found: Files, names: Names) -> list[Media]:
    stored = [key for key, value in row.items() if _is_stored(value)]  # under any name
    keys = [names.image_field] if names.image_field else stored or media_keys(row)
    if names.image_field and names.image_field not in row:
        raise ValueError(f"has no field {names.image_field!r}")
    filled = [key for key in keys if row[key] not in (None, "", [])]
    if len(filled) > 1:
        raise ValueError(f"has {' and '.join(map(repr, filled))}: set image_field to one of them")
    if not filled:
        raise EmptyRecordError("no image in it") if keys else ValueError("no image in it")
    (key,) = filled
    value = row[key]
    if key == "video" and isinstance(value, list):  # the frames of one
        return [Media(tuple(_place(frame, found) for frame in value), moving=True)]
    values = value if isinstance(value, list) else [value]
    return [_media(one, found, key) for one in values if one is not None]


def _is_stored(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(
        isinstance(one, Span) or (isinstance(one, Mapping) and isinstance(one.get("bytes"), Span))
        for one in values
    )


def _media(value: Any, found: Files, key: str = "") -> Media:
    """An image or a video; by its suffix, unless the key says so."""
    place = _place(value, found)
    is_video = video.is_video(str(place)) and key not in ("image", "images")
    return Media((place,), moving=is_video or key in ("video", "videos"))


def _place(value: Any, found: Files) -> Place:
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        inside, path = value.get("bytes"), value.get("path")
        if isinstance(inside, Span):
            return inside._replace(name=f"{inside}/{Path(path).name}") if path else inside
        value = path
    if isinstance(value, Span):
        return value
    if isinstance(value, str) and value:
        return found.find(value)
    raise _unclear(value)


def _captions(row: Row, field: str) -> list[str]:
    value = row.get(field, row.get(CAPTION))
    texts = value if isinstance(value, list) else [value]
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not captions or len(captions) < len(texts):
        is_empty = all(
            text is None or (isinstance(text, str) and not text.strip()) for text in texts
        )
        failed = EmptyRecordError if is_empty and row.keys() & {field, CAPTION} else ValueError
        raise failed(f"no caption in {field!r} or {CAPTION!r}")
    return list(dict.fromkeys(captions))


# ---------------------------------------------------------------------- reading order


def _parts(row: Row, found: Files) -> list[str | Media]:
    if not isinstance(row["parts"], list):
        raise ValueError("'parts' is not a list")
    return [_part(part, found) for part in row["parts"]]


def _part(part: Any, found: Files) -> str | Media:
    if isinstance(part, str):
        return part
    filled = part if isinstance(part, dict) else {}
    filled = {kind: value for kind, value in filled.items() if value is not None}  # of a table
    if len(filled) == 1:
        ((kind, value),) = filled.items()
        if kind == "text" and isinstance(value, str):
            return value
        if kind == "video" and isinstance(value, list) and value:
            return Media(tuple(_place(frame, found) for frame in value), moving=True)
        if kind in ("image", "video") and value:
            return _media(value, found, kind)
    raise _unclear(part)


def _unclear(value: Any) -> ValueError:
    return ValueError(f"neither an image, a video nor text: {json.dumps(value, default=str)[:80]}")


def _obelics(row: Row, found: Files) -> list[str | Media]:
    """The lists of OBELICS (Laurençon et al., 2023) as one; paragraphs are separated by a blank
    line."""
    images, texts = row["images"], row["texts"]
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise ValueError("'images' and 'texts' are not lists of the same length")
    parts: list[str | Media] = []
    for image, text in zip(images, texts, strict=True):
        parts += [] if image is None else [_media(image, found)]
        parts += _text(text)
    return _joined(parts, "\n\n")


def _mmc4(row: Row, found: Files) -> list[str | Media]:
    """The sentences of a document of MMC4 (Zhu et al., 2023), each after the images that match it.
    Images that were not downloaded have no name, and are left out."""
    texts, infos = row["text_list"], row["image_info"]
    if not isinstance(texts, list) or not isinstance(infos, list):
        raise ValueError("'text_list' and 'image_info' are not lists")
    before: dict[int, list[Media]] = {}
    for info in infos:
        if not isinstance(info, Mapping):
            raise ValueError("'image_info' has an entry that is not an object")
        place = info.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise ValueError(f"an image has no 'matched_text_index' below {len(texts)}")
        if image := info.get("image_name"):
            before.setdefault(place, []).append(_media(image, found))
    parts: list[str | Media] = []
    for number, text in enumerate(texts):
        parts += [*before.get(number, ()), *_text(text)]
    return _joined(parts, " ")


def _text(text: Any) -> list[str]:
    if text is not None and not isinstance(text, str):
        raise ValueError(f"its text is a {type(text).__name__}")
    return [text.strip()] if text and text.strip() else []


def _joined(parts: Sequence[str | Media], between: str) -> list[str | Media]:
    """Parts with neighbouring texts joined."""
    joined: list[str | Media] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = f"{last}{between}{part}"
        else:
            joined.append(part)
    if not any(isinstance(part, str) for part in joined):
        raise ValueError("no text in it")
    return joined
