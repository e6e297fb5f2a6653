"""Checks of the fields of JSON records: nothing in them may be lost silently."""

from collections.abc import Sequence
from typing import Any

# Fields that a document of text would lose.
MEDIA = (
    *("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios"),
    *("input_image", "input_audio", "pixel_values"),
)
_EMPTY: tuple[Any, ...] = (None, "", [], {}, False)


def lost_field(value: dict[str, Any], names: Sequence[str]) -> str:
    """The first of the named fields that is not empty; an empty string if all are."""
    return next((name for name in names if value.get(name) not in _EMPTY), "")


def no_field(value: dict[str, Any], field: str) -> str:
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
