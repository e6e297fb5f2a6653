"""A judge that fails or is out of range costs neither the run nor the other scores."""

import asyncio
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.rewards.judges import Grade, Rubric, grade, with_rubrics

scores = st.floats(0, 1)


def graded(values: Sequence[float | Exception], weights: Sequence[float] | None = None) -> Grade:
    rubrics = [Rubric(f"{i}", "", w) for i, w in enumerate(weights or [1.0] * len(values))]

    async def judge(rubric: Rubric, question: str, answer: str) -> float:
        assert (question, answer) == ("q", "a")
        value = values[int(rubric.name)]
        if isinstance(value, Exception):
            raise value
        return value

    return asyncio.run(grade(judge, rubrics, "q", "a"))


@given(st.lists(st.tuples(scores, st.floats(0.01, 100)), min_size=1, max_size=5))
def test_the_reward_is_the_weighted_mean(pairs: list[tuple[float, float]]) -> None:
    values, weights = map(list, zip(*pairs, strict=True))
    grade = graded(values, weights)
    assert grade.reward is not None and not grade.failures
    assert min(values) - 1e-12 <= grade.reward <= max(values) + 1e-12
    expected = sum(v * w for v, w in pairs) / sum(weights)
    assert grade.reward == pytest.approx(expected, abs=1e-12)


def test_invalid_scores_are_left_out() -> None:
    grade = graded([0.5, math.nan, 1.5, RuntimeError("no\nserver"), -1])
    assert grade.reward == 0.5
    assert grade.scores == (0.5, None, None, None, None)
    assert "rubric 3: RuntimeError: no server" in grade.failures
    assert len(grade.failures) == 4
    assert all("\n" not in failure for failure in grade.failures)


def test_without_a_score_there_is_no_reward() -> None:
    assert graded([math.inf]).reward is None
    assert with_rubrics(0.25, None, 0.5) == 0.25
    assert with_rubrics(0.25, 0.75, 0.5) == 0.5
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="weight"):
            with_rubrics(0.25, 0.75, weight)


def test_a_judge_that_hangs_is_cancelled() -> None:
    async def judge(rubric: Rubric, question: str, answer: str) -> float:
        return await asyncio.get_running_loop().create_future()

    result = asyncio.run(grade(judge, [Rubric("slow", "")], "q", "a", timeout=0.01))
    assert result.reward is None
    assert result.failures == ("rubric slow: no score within 0.01 s",)


def test_bad_rubrics_are_errors() -> None:
    with pytest.raises(ValueError, match="at least one rubric"):
        graded([])
    for weight in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be positive"):
            Rubric("x", "", weight)
