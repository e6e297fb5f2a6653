"""Scores of transcriptions: exact matches, and the character error rate."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.reading import Reading, edit_distance, scores

words = st.text("abc", max_size=8)


@functools.cache
def by_definition(one: str, other: str) -> int:
    """The Levenshtein distance, by its recursive definition."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return by_definition(one[1:], other[1:])
    ways = ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    return 1 + min(by_definition(*way) for way in ways)


@given(words, words)
def test_edit_distance_is_levenshteins(one: str, other: str) -> None:
    assert edit_distance(one, other) == by_definition(one, other) == edit_distance(other, one)


def test_scores_count_whole_captions_and_single_characters() -> None:
    readings = [Reading("same", "same"), Reading("Case", "case"), Reading("gone", "")]
    assert scores(readings) == {"exact_match": 1 / 3, "character_error_rate": 5 / 12}
    assert scores([Reading("it", "it repeats")])["character_error_rate"] == pytest.approx(4)
    assert set(scores([]).values()) == {None}
    # Not from the trainer, but from a damaged transcriptions.json that the report reads.
    assert scores([Reading("", "text")]) == {"exact_match": 0, "character_error_rate": None}
