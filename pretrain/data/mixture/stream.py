"""Which documents make up which sequence: a fold over sizes, without reading what they hold.

Sources keep their shares by always drawing from the one that is furthest behind; images keep
theirs by being drawn whenever their tokens are due. What does not fit a sequence waits for the
next, so shares hold over steps without chance, and no document is lost or seen twice in an epoch.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pretrain.data.index import ChatIndex, MixedIndex, TextIndex
from pretrain.data.packing import Document

if TYPE_CHECKING:
    from pretrain.data.sources.energon import Shards

# States are kept at every so many sequences, to go back to.
_ANCHOR = 256


class Piece(NamedTuple):
    """What a source adds to a sequence.

    Attributes:
        source: its number.
        document: its number in the source's index, or the document itself.
        start, stop: which of a text's tokens, where it is cut.
    """

    source: int
    document: int | Document
    start: int = 0
    stop: int = 0


class Cursor(Protocol):
    """A place in a source."""

    source: int
    weight: float
    vision: bool
    taken: int
    """Tokens drawn so far."""

    @property
    def whole(self) -> bool:
        """Whether documents are never cut."""

    def peek(self) -> tuple[int, int]:
        """(tokens, placeholders among them) of the next document."""

    def take(self, room: int) -> Piece:
        """The next document, or of a text as much of it as there is room for."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@lru_cache(maxsize=16)
def _order(seed: int, source: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, source, epoch]).permutation(count)


@dataclass
class IndexCursor:
    """In an index: every epoch has its own order, which the seed decides.

    Attributes:
        documents: those of the split, by number.
        rank, ranks: of these readers it takes its turn; together they read every document once.
        position: documents behind.
        offset: tokens of the present text that are behind.
    """

    source: int
    weight: float
    vision: bool
    index: "TextIndex | ChatIndex | MixedIndex | Shards"
    documents: npt.NDArray[np.int64]
    seed: int
    rank: int = 0
    ranks: int = 1
    position: int = 0
    offset: int = 0
    taken: int = 0

    @property
    def whole(self) -> bool:
        return not isinstance(self.index, TextIndex)

    def _document(self) -> int:
        epoch, place = divmod(self.position * self.ranks + self.rank, len(self.documents))
        order = _order(self.seed, self.source, epoch, len(self.documents))
        return int(self.documents[order[place]])

    def peek(self) -> tuple[int, int]:
        document = self._document()
        if isinstance(self.index, TextIndex):
            return 1 + self.index.length(document) - self.offset, 0
        tokens, placeholders = self.index.sizes[document].tolist()
        return tokens, placeholders

    def take(self, room: int) -> Piece:
        document = self._document()
        if not isinstance(self.index, TextIndex):
            self.taken += int(self.index.sizes[document, 0])
            self.position += 1
            return Piece(self.source, document)
        length = self.index.length(document)
        # A piece begins with the token that begins a document.
        stop = min(length, self.offset + room - 1)
        piece = Piece(self.source, document, self.offset, stop)
        self.taken += stop - self.offset
        self.offset = stop
        if stop == length:
            self.position, self.offset = self.position + 1, 0
        return piece

    def state(self) -> dict[str, Any]:
        return {"position": self.position, "offset": self.offset, "taken": self.taken}

    def restore(self, state: dict[str, Any]) -> None:
        self.position, self.offset = state["position"], state["offset"]
        self.taken = state["taken"]


@dataclass
class Stream:
    """Sequences one after the other, each a list of pieces that fill it.

    Attributes:
        cursors: of all sources.
        length: tokens in a sequence.
        vision_share: of all tokens that are placeholders; beside no text, images fill everything.
        sequences, placed: sequences and placeholders so far.
    """

    cursors: Sequence[Cursor]
    length: int
    vision_share: float
    sequences: int = 0
    placed: int = 0
    _by_kind: tuple[list[Cursor], list[Cursor]] = field(init=False)

    def __post_init__(self) -> None:
        used = [cursor for cursor in self.cursors if cursor.weight > 0]
        self._by_kind = [c for c in used if c.vision], [c for c in used if not c.vision]

    def next(self) -> list[Piece]:
        vision, text = self._by_kind
        pieces, room = [], self.length
        self.sequences += 1
        due = self.vision_share * self.length * self.sequences
        while vision and (not text or self.placed < due):
            cursor = _furthest_behind(vision)
            size, placeholders = cursor.peek()
            if size > room:
                break
            pieces.append(cursor.take(room))
            room -= size
            self.placed += placeholders
        text = list(text)
        while text and room > 1:
            cursor = _furthest_behind(text)
            size, _ = cursor.peek()
            if cursor.whole and size > room:
                text.remove(cursor)  # it waits for the next sequence; others may fill this one
                continue
            pieces.append(cursor.take(room))
            room -= min(size, room)
        return pieces

    def state(self) -> dict[str, Any]:
        """Plain values, from which :meth:`restore` goes on."""
        return {
            "sequences": self.sequences,
            "placed": self.placed,
            "sources": [cursor.state() for cursor in self.cursors],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.sequences, self.placed = state["sequences"], state["placed"]
        for cursor, saved in zip(self.cursors, state["sources"], strict=True):
            cursor.restore(saved)


def _furthest_behind(cursors: Sequence[Cursor]) -> Cursor:
    return min(cursors, key=lambda cursor: cursor.taken / cursor.weight)


class Sequences:
    """A stream's sequences by number, in any order.

    Those before the present one are made again from the state kept before them; going on from a
    checkpoint takes up its state.
    """

    def __init__(self, make: Callable[[], Stream]) -> None:
        self._stream = make()
        self._anchors = {0: self._stream.state()}
        # A thread makes sequences ahead while another asks for states.
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> list[Piece]:
        with self._lock:
            self._seek(index)
            return self._advance()

    def state(self, index: int) -> dict[str, Any]:
        """As it is before sequence ``index``."""
        with self._lock:
            self._seek(index)
            return copy.deepcopy(self._stream.state())

    def restore(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._anchors[state["sequences"]] = copy.deepcopy(state)

    def _seek(self, index: int) -> None:
        anchor = max(number for number in self._anchors if number <= index)
        if not anchor <= self._stream.sequences <= index:
            self._stream.restore(copy.deepcopy(self._anchors[anchor]))
        while self._stream.sequences < index:
            self._advance()

    def _advance(self) -> list[Piece]:
        pieces = self._stream.next()
        if self._stream.sequences % _ANCHOR == 0:
            self._anchors.setdefault(self._stream.sequences, self._stream.state())
        return pieces


class OnwardSequences:
    """A stream that reads as it goes, and can only go on.

    Args:
        share: sequences of a step: states are kept before each, for the last few.
    """

    def __init__(self, make: Callable[[], Stream], share: int) -> None:
        self._stream, self._share = make(), share
        self._states: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> list[Piece]:
        with self._lock:
            if index != self._stream.sequences:
                raise ValueError(f"sequence {index} is not the next one, {self._stream.sequences}")
            if index % self._share == 0:
                self._states[index] = copy.deepcopy(self._stream.state())
                for old in sorted(self._states)[:-4]:
                    del self._states[old]
            return self._stream.next()

    def state(self, index: int) -> dict[str, Any]:
        """As it was before sequence ``index``, the first of one of the last steps."""
        with self._lock:
            if index == self._stream.sequences:
                return copy.deepcopy(self._stream.state())
            return self._states[index]

    def restore(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._stream.restore(state)
            self._states.clear()
