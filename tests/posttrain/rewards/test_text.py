"""Rewards of texts are in [0, 1], 1 for the truth alone, and accept any answer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rewards.text import (
    MAX_CHARS,
    counting_reward,
    edit_distance,
    edit_distance_reward,
    exact_reward,
    numeric_reward,
    read_number,
)

# Few letters, so that texts have many in common.
short = st.text("abc", max_size=12)


def matrix_distance(first: str, second: str) -> int:
    """The definition: one row of the matrix after the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


@given(short, short)
def test_edit_distance_is_the_definition(first: str, second: str) -> None:
    assert edit_distance(first, second) == matrix_distance(first, second)


def test_edit_distance_of_long_texts() -> None:
    assert edit_distance("kitten" * 200, "sitting" * 200) == matrix_distance(
        "kitten" * 200, "sitting" * 200
    )


@given(short, short, short)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@given(st.text(), st.text())
def test_edit_distance_reward_is_one_for_the_truth_alone(answer: str, truth: str) -> None:
    reward = edit_distance_reward(answer, truth)
    assert 0 <= reward <= 1
    assert (reward == 1) == (answer == truth)


@given(st.text(min_size=1), st.data())
def test_an_error_less_is_a_larger_reward(truth: str, data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, len(truth) - 1))
    one_error = truth[:changed] + chr(ord(truth[changed]) ^ 1) + truth[changed + 1 :]
    assert edit_distance_reward(one_error, truth) == 1 - 1 / len(truth)


@given(st.text())
def test_white_space_and_case_are_no_difference(truth: str) -> None:
    assert exact_reward(f"  {truth}\n", truth) == 1
    assert exact_reward(truth + "x", truth) == 0


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        *(("12", 12), ("it is -3.5.", -3.5), ("1,024 bytes", 1024), ("2 and 3e2", 300)),
        *((".5", 0.5), ("", None), ("none", None), ("nan inf", None), ("7 or 1e999", 7)),
        ("9" * (MAX_CHARS + 1), None),
        ("9" * MAX_CHARS, None),
    ],
)
def test_the_last_finite_number_counts(answer: str, number: float | None) -> None:
    assert read_number(answer) == number


@given(st.text(st.sampled_from("0123456789+-.,eE x\u0663")), st.integers(-1000, 1000))
def test_any_answer_has_a_finite_reward(answer: str, truth: int) -> None:
    assert numeric_reward(answer, truth) in (0, 1)
    assert 0 <= counting_reward(answer, truth) <= 1


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_that_is_written_out_is_right(truth: float) -> None:
    assert numeric_reward(f"{truth!r}", truth) == 1


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_a_closer_count_has_no_smaller_reward(truth: int, first: int, second: int) -> None:
    closer, other = sorted((first, second), key=lambda count: abs(count - truth))
    assert counting_reward(f"{closer}", truth) >= counting_reward(f"{other}", truth)
    assert (counting_reward(f"{first}", truth) == 1) == (first == truth)


def test_counting_has_a_scale() -> None:
    assert counting_reward("7", 4, scale=12) == 0.75
    assert counting_reward("7", 4) == 0.25
    with pytest.raises(ValueError, match="scale=0"):
        counting_reward("7", 4, scale=0)


def test_longer_answers_have_no_reward() -> None:
    long = "a" * (MAX_CHARS + 1)
    assert edit_distance_reward(long, long) == exact_reward(long, long) == 0


@pytest.mark.parametrize("truth", [math.nan, math.inf])
def test_a_truth_that_is_not_finite_is_an_error(truth: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        numeric_reward("1", truth)
    with pytest.raises(ValueError, match="must be finite"):
        counting_reward("1", truth)  # type: ignore[arg-type]
