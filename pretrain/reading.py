"""Scores of a model's transcriptions of text in images, and of its replies about images."""

from collections.abc import Sequence
from typing import NamedTuple

from pretrain.metrics import formatted

# Transcriptions shown at the end of a run; the report has more.
_MAX_LISTED = 10


class Reading(NamedTuple):
    """A held-out image as the model reads it.

    Attributes:
        caption: the text in the image, or the right reply.
        text: the model's transcription, or its reply.
        picture: the image, or the first frame of a clip, as a PNG file in base64; empty for all but
            the first images.
        question: the text of the message before a reply.
    """

    caption: str
    text: str
    picture: str = ""
    question: str = ""

    @property
    def expected(self) -> str:
        """The question, if there is one, and the caption."""
        return f"{self.question} {self.caption}".strip()

    @property
    def is_exact(self) -> bool:
        return self.caption == self.text


def scores(readings: Sequence[Reading]) -> dict[str, float | None]:
    """Scores of transcriptions; None if there is nothing to read.

    Returns:
        ``exact_match``: share of the transcriptions that equal the caption.
        ``character_error_rate``: Levenshtein distance from the captions, summed, divided by the
        number of characters of the captions.
    """
    if not readings:
        return {"exact_match": None, "character_error_rate": None}
    errors = sum(edit_distance(reading.caption, reading.text) for reading in readings)
    characters = sum(len(reading.caption) for reading in readings)
    return {
        "exact_match": sum(reading.is_exact for reading in readings) / len(readings),
        "character_error_rate": errors / characters if characters else None,
    }


def summary(readings: Sequence[Reading]) -> str:
    """The number of images read exactly and the character error rate, in words."""
    exact = sum(reading.is_exact for reading in readings)
    achieved = scores(readings)
    return (
        f"{exact} of {len(readings)} images read exactly ({formatted(achieved, 'exact_match')}), "
        f"character error rate {formatted(achieved, 'character_error_rate')}"
    )


def listing(readings: Sequence[Reading]) -> str:
    """The number of held-out images that the model reads exactly, and its first readings.

    Empty without any.
    """
    if not readings:
        return ""
    shown = readings[:_MAX_LISTED]
    width = max(len(reading.expected) for reading in shown)
    lines = [f"  {reading.expected:<{width}} | {reading.text}" for reading in shown]
    title = f"held-out images: {summary(readings)}"
    return "\n".join([title, "  text in the image | transcription", *lines])


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of a character from ``one`` to
    ``other``."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        diagonal, row[0] = row[0], number
        for column, wanted in enumerate(other, 1):
            change = diagonal + (character != wanted)
            diagonal = row[column]
            row[column] = min(change, row[column] + 1, row[column - 1] + 1)
    return row[-1]
