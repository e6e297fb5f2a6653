"""Choosing the documents of each sequence by their sizes, without reading them.

Each source keeps its share because the next document always comes from the source that is furthest
behind. Images keep ``vision_share`` because they are taken whenever their tokens are due. Documents
that do not fit a sequence wait for the next one. The shares therefore hold over any stretch of
sequences without randomness, and no document is lost or repeated within an epoch.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.data.sources.interface import Cursor, Segment


@dataclass
class Stream:
    """Consecutive sequences, each a list of the segments that fill it.

    Attributes:
        cursors: one for each source.
        length: tokens in a sequence.
        vision_share: share of all tokens that are image placeholders. If no source has text, images
            fill the sequences.
        sequences: sequences made so far.
        placeholders: image placeholders in them.
    """

    cursors: Sequence[Cursor]
    length: int
    vision_share: float
    sequences: int = 0
    placeholders: int = 0

    def __post_init__(self) -> None:
        self._vision = [cursor for cursor in self.cursors if cursor.source.has_images]
        self._text = [cursor for cursor in self.cursors if not cursor.source.has_images]

    def next(self) -> list[Segment]:
        """The segments of the next sequence: images as far as they are due, then text."""
        segments, room = [], self.length
        self.sequences += 1
        due = self.vision_share * self.length * self.sequences
        while self._vision and (not self._text or self.placeholders < due):
            cursor = _furthest_behind(self._vision)
            size, placeholders = cursor.peek()
            if size > room:
                break
            segments.append(cursor.take(room))
            room -= size
            self.placeholders += placeholders
        candidates = list(self._text)
        while candidates and room > 1:
            cursor = _furthest_behind(candidates)
            size, _ = cursor.peek()
            if cursor.whole and size > room:
                candidates.remove(cursor)  # its document waits; other sources may fill this one
                continue
            segments.append(cursor.take(room))
            room -= min(size, room)
        return segments

    def state(self) -> dict[str, Any]:
        """The position in plain values."""
        return {
            "sequences": self.sequences,
            "placed": self.placeholders,
            "sources": [cursor.state() for cursor in self.cursors],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Move to a position that :meth:`state` returned."""
        self.sequences, self.placeholders = state["sequences"], state["placed"]
        for cursor, saved in zip(self.cursors, state["sources"], strict=True):
            cursor.restore(saved)


def _furthest_behind(cursors: Sequence[Cursor]) -> Cursor:
    return min(cursors, key=lambda cursor: cursor.taken / cursor.source.config.weight)


class Sequences:
    """A stream's sequences by number, in any order.

    To go back, the stream restarts from the nearest earlier state that is kept.

    Args:
        interval: sequences between states that are kept.
        kept: number of states that are kept, the latest ones; by default all.
    """

    def __init__(
        self, make: Callable[[], Stream], interval: int = 256, kept: int | None = None
    ) -> None:
        self._stream, self._interval, self._kept = make(), interval, kept
        self._states = {0: self._stream.state()}
        # A thread prepares the next sequences while another one asks for states.
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> list[Segment]:
        with self._lock:
            self._seek(index)
            return self._advance()

    def state(self, index: int) -> dict[str, Any]:
        """The stream's state before sequence ``index``."""
        with self._lock:
            if index in self._states:
                return copy.deepcopy(self._states[index])
            self._seek(index)
            return copy.deepcopy(self._stream.state())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state of another stream of the same documents."""
        with self._lock:
            index = state["sequences"]
            # Later states would otherwise be kept in its place.
            self._states = {n: kept for n, kept in self._states.items() if n < index}
            self._states[index] = copy.deepcopy(state)

    def _seek(self, index: int) -> None:
        start = max(number for number in self._states if number <= index)
        if not start <= self._stream.sequences <= index:
            self._stream.restore(copy.deepcopy(self._states[start]))
        while self._stream.sequences < index:
            self._advance()

    def _advance(self) -> list[Segment]:
        segments, done = self._stream.next(), self._stream.sequences
        if done % self._interval == 0 and done not in self._states:
            self._states[done] = copy.deepcopy(self._stream.state())
            for number in sorted(self._states)[: -self._kept] if self._kept else ():
                del self._states[number]
        return segments
