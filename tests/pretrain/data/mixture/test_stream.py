"""Streams follow their definition, go back exactly, and keep little."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.interface import RankShare
from pretrain.data.mixture.stream import Sequences, Stream
from pretrain.data.sources.indexed import DocumentCursor
from pretrain.data.sources.interface import Documents, Segment
from pretrain.data.sources.order import Integers
from pretrain.data.sources.splits import Subset

LENGTH = 64


@dataclass
class Sized:
    """Documents whose sizes follow from their number."""

    number: int
    weight: float = 1.0
    whole: bool = False
    has_images: bool = False
    count: int = 40

    @property
    def source(self) -> Any:
        return SimpleNamespace(
            number=self.number,
            seed=3,
            has_images=self.has_images,
            config=SimpleNamespace(weight=self.weight),
        )

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        tokens = 3 + numbers * 7919 % (50 if self.whole else 150)
        return tokens, tokens // 2 * self.has_images

    def cursor(self) -> DocumentCursor:
        return DocumentCursor(cast(Documents, self), np.arange(self.count), RankShare())


def stream(sources: Sequence[Sized], share: float = 0.2) -> Stream:
    return Stream([source.cursor() for source in sources], LENGTH, share)


def definition(sources: Sequence[Sized], share: float, count: int) -> list[list[Segment]]:
    """The sequences as the module's docstring defines them: every choice looks at all sources."""

    def furthest_behind(cursors: Sequence[DocumentCursor]) -> DocumentCursor:
        return min(cursors, key=lambda cursor: cursor.taken / cursor.source.config.weight)

    cursors = [source.cursor() for source in sources]
    vision = [cursor for cursor in cursors if cursor.source.has_images]
    text = [cursor for cursor in cursors if not cursor.source.has_images]
    sequences, placed = [], 0
    for number in range(1, count + 1):
        segments, room = [], LENGTH
        while vision and (not text or placed < share * LENGTH * number):
            cursor = furthest_behind(vision)
            size, placeholders = cursor.peek()
            if size > room:
                break
            segments.append(cast(Segment, cursor.take(room)))
            room, placed = room - size, placed + placeholders
        candidates = list(text)
        while candidates and room > 1:
            cursor = furthest_behind(candidates)
            size, _ = cursor.peek()
            if cursor.whole and size > room:
                candidates.remove(cursor)
                continue
            segments.append(cast(Segment, cursor.take(room)))
            room -= min(size, room)
        sequences.append(segments)
    return sequences


mixtures = st.lists(
    st.tuples(st.floats(0.1, 10), st.sampled_from(["cut", "whole", "images"])),
    min_size=1,
    max_size=6,
).map(
    lambda kinds: [
        Sized(number, weight, kind != "cut", kind == "images")
        for number, (weight, kind) in enumerate(kinds)
    ]
)


@settings(deadline=None)
@given(sources=mixtures, share=st.floats(0, 0.3))
def test_streams_equal_their_definition(sources: list[Sized], share: float) -> None:
    made = stream(sources, share)
    assert [made.next() for _ in range(60)] == definition(sources, share, 60)


SOURCES = [
    Sized(0),
    Sized(1, 0.3),
    Sized(2, 2.0, whole=True),
    Sized(3, whole=True, has_images=True),
]


@settings(deadline=None, max_examples=30)
@given(
    indices=st.lists(st.integers(0, 400), min_size=1, max_size=12),
    interval=st.integers(1, 9),
    kept=st.integers(3, 12),
)
def test_sequences_in_any_order_need_a_bounded_number_of_states(
    indices: list[int], interval: int, kept: int
) -> None:
    expected = definition(SOURCES, 0.2, 401)
    sequences = Sequences(lambda: stream(SOURCES), interval, kept)
    for index in indices:
        assert sequences[index] == expected[index]
        assert len(sequences._states) == len(sequences._numbers) <= kept
        assert sequences._numbers == sorted(set(sequences._numbers))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences that streams make from now on."""
    made, following = [], Stream.next

    def counting(stream: Stream) -> list[Segment]:
        made.append(stream.sequences)
        return following(stream)

    monkeypatch.setattr(Stream, "next", counting)
    return made


def test_a_checkpoint_makes_no_sequence_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = counted(monkeypatch), 16
    sequences = Sequences(lambda: stream(SOURCES), batch)
    for step in range(1, 200):
        for index in range((step - 1) * batch, step * batch):
            sequences[index]
        # The loader is one step ahead of the checkpoint.
        assert sequences.state(max(0, step - 1) * batch)["sequences"] == max(0, step - 1) * batch
    assert made == list(range(199 * batch))


def test_memory_does_not_grow_with_documents() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        numbers = Subset(count, np.empty(0, np.int64), leaves_out=True)
        cursor = DocumentCursor(cast(Documents, Sized(0)), numbers, RankShare())
        sequences = Sequences(lambda: Stream([cursor], LENGTH, 0.0))
        for index in range(2000):
            sequences[index]
        _, bytes_needed = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return bytes_needed

    few, many = peak(10**4), peak(10**9)
    assert many < 1.5 * few and many < 2**20
