"""Choosing the documents of each sequence by their sizes, without reading them.

Each source keeps its share because the next document always comes from the source that is furthest
behind. Images keep ``vision_share`` because they are taken whenever their tokens are due. Documents
that do not fit a sequence wait for the next one. The shares therefore hold over any stretch of
sequences without randomness, and no document is lost or repeated within an epoch.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.data.sources.interface import Cursor, Segment

# Sequences between states that are kept for seeking.
_ANCHOR_INTERVAL = 256
# Steps whose states are kept when sequences can only be read in order.
_KEPT_STEPS = 4


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
    _vision: list[Cursor] = field(init=False)
    _text: list[Cursor] = field(init=False)

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
        """The position, in plain values."""
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

    To go back, the stream restarts from the nearest earlier state: one is kept for every 256
    sequences, and those restored from checkpoints.
    """

    def __init__(self, make: Callable[[], Stream]) -> None:
        self._stream = make()
        self._anchors = {0: self._stream.state()}
        # A thread prepares the next sequences while another one asks for states.
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> list[Segment]:
        with self._lock:
            self._seek(index)
            return self._advance()

    def state(self, index: int) -> dict[str, Any]:
        """The stream's state before sequence ``index``."""
        with self._lock:
            self._seek(index)
            return copy.deepcopy(self._stream.state())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state of another stream of the same documents."""
        with self._lock:
            self._anchors[state["sequences"]] = copy.deepcopy(state)

    def _seek(self, index: int) -> None:
        anchor = max(number for number in self._anchors if number <= index)
        if not anchor <= self._stream.sequences <= index:
            self._stream.restore(copy.deepcopy(self._anchors[anchor]))
        while self._stream.sequences < index:
            self._advance()

    def _advance(self) -> list[Segment]:
        segments = self._stream.next()
        if self._stream.sequences % _ANCHOR_INTERVAL == 0:
            self._anchors.setdefault(self._stream.sequences, self._stream.state())
        return segments


class ForwardSequences:
    """The sequences of a stream that can only be read in order.

    Args:
        step_size: sequences in a step. The states before each of the last few steps are kept.
    """

    def __init__(self, make: Callable[[], Stream], step_size: int) -> None:
        self._stream, self._step_size = make(), step_size
        self._states: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> list[Segment]:
        with self._lock:
            if index != self._stream.sequences:
                raise ValueError(f"sequence {index} is not the next one, {self._stream.sequences}")
            if index % self._step_size == 0:
                self._states[index] = copy.deepcopy(self._stream.state())
                for old in sorted(self._states)[:-_KEPT_STEPS]:
                    del self._states[old]
            return self._stream.next()

    def state(self, index: int) -> dict[str, Any]:
        """The stream's state before sequence ``index``, the first one of a recent step."""
        with self._lock:
            if index == self._stream.sequences:
                return copy.deepcopy(self._stream.state())
            return self._states[index]

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state of another stream of the same documents and share."""
        with self._lock:
            self._stream.restore(state)
            self._states.clear()
