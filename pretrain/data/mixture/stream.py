"""Choosing the documents of each sequence by their sizes, without reading them.

Each source keeps its share because the next document always comes from the source that is furthest
behind. Images keep ``vision_share`` because they are taken whenever their tokens are due. Documents
that do not fit a sequence wait for the next one. The shares therefore hold over any stretch of
sequences without randomness, and no document is lost or repeated within an epoch.

Where a sequence begins depends on all sequences before it. Every rank therefore chooses the
documents of the whole global batch: a few microseconds for each document, in the thread that
prepares the next step. If ranks shared this work, the step would wait as long for the last one.
"""

import bisect
import copy
import heapq
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
        self._line_up()

    def _line_up(self) -> None:
        self._vision = _queue([cursor for cursor in self.cursors if cursor.source.has_images])
        self._text = _queue([cursor for cursor in self.cursors if not cursor.source.has_images])

    def next(self) -> list[Segment]:
        """The segments of the next sequence: images as far as they are due, then text."""
        segments, room = [], self.length
        self.sequences += 1
        due = self.vision_share * self.length * self.sequences
        while self._vision and (not self._text or self.placeholders < due):
            *_, cursor = self._vision[0]
            size, placeholders = cursor.peek()
            segment = cursor.take(room)
            if segment is None:
                break
            segments.append(segment)
            _move_back(self._vision)
            room -= size
            self.placeholders += placeholders
        waiting = []
        while self._text and room > 1:
            *_, cursor = self._text[0]
            segment = cursor.take(room)
            if segment is None:  # its document waits; other sources may fill this sequence
                waiting.append(heapq.heappop(self._text))
                continue
            segments.append(segment)
            _move_back(self._text)
            # A range of a cut document also gets the token that begins a document.
            room -= segment.stop - segment.start + (not cursor.whole)
        for entry in waiting:
            heapq.heappush(self._text, entry)
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
        self._line_up()


# Cursors in a heap, by the tokens that they have taken for their weight: the furthest behind comes
# first. Of equal ones, it is the first in the list.
_Queue = list[tuple[float, int, Cursor]]


def _queue(cursors: Sequence[Cursor]) -> _Queue:
    entries = [(c.taken / c.source.config.weight, n, c) for n, c in enumerate(cursors)]
    heapq.heapify(entries)
    return entries


def _move_back(queue: _Queue) -> None:
    """Move the first cursor back by what it has taken."""
    _, number, cursor = queue[0]
    heapq.heapreplace(queue, (cursor.taken / cursor.source.config.weight, number, cursor))


class Sequences:
    """A stream's sequences by number, in any order.

    To go back, the stream restarts from the nearest earlier state that is kept. Their number is
    bounded: the latest half is kept, older ones are further and further apart.

    Args:
        interval: sequences between states that are kept.
        kept: maximum number of states that are kept.
    """

    def __init__(self, make: Callable[[], Stream], interval: int = 256, kept: int = 32) -> None:
        self._stream, self._interval, self._kept = make(), interval, kept
        self._numbers, self._states = [0], [self._stream.state()]  # ascending
        # A thread prepares the next sequences while another one asks for states.
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> list[Segment]:
        with self._lock:
            self._seek(index)
            return self._advance()

    def state(self, index: int) -> dict[str, Any]:
        """The stream's state before sequence ``index``."""
        with self._lock:
            nearest = self._nearest(index)
            if self._numbers[nearest] == index:
                return copy.deepcopy(self._states[nearest])
            self._seek(index)
            return copy.deepcopy(self._stream.state())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state of another stream of the same documents."""
        with self._lock:
            index = state["sequences"]
            # Later states would otherwise be kept in its place.
            earlier = bisect.bisect_left(self._numbers, index)
            del self._numbers[earlier:], self._states[earlier:]
            self._keep(index, copy.deepcopy(state))

    def _nearest(self, index: int) -> int:
        """Place of the last state that is kept of those up to sequence ``index``."""
        return bisect.bisect_right(self._numbers, index) - 1

    def _seek(self, index: int) -> None:
        nearest = self._nearest(index)
        if not self._numbers[nearest] <= self._stream.sequences <= index:
            self._stream.restore(copy.deepcopy(self._states[nearest]))
        while self._stream.sequences < index:
            self._advance()

    def _advance(self) -> list[Segment]:
        segments, done = self._stream.next(), self._stream.sequences
        if done % self._interval == 0 and done > self._numbers[-1]:
            self._keep(done, self._stream.state())
        return segments

    def _keep(self, number: int, state: dict[str, Any]) -> None:
        self._numbers.append(number)
        self._states.append(state)
        if len(self._numbers) > self._kept:
            older = slice(1, -(self._kept // 2), 2)
            del self._numbers[older], self._states[older]
