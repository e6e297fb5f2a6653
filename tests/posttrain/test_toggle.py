"""Toggle removes rewards over budget only, in its phase only, and of solved problems only."""

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import RlTaskConfig
from posttrain.modes import Mode
from posttrain.practice import Practice, read_budgets
from posttrain.toggle import Toggle, estimate_budget, gate, has_budget
from pretrain.errors import PretrainError

rewards = st.floats(0, 1)
group = st.lists(st.tuples(rewards, st.integers(1, 100)), min_size=1, max_size=8)
limit = 100


def unzip(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


@given(st.integers(0, 1000), st.integers(1, 50))
def test_phases_alternate(iteration: int, period: int) -> None:
    assert has_budget(iteration, period) != has_budget(iteration + period, period)
    assert has_budget(iteration // period * period, period) == has_budget(iteration, period)
    assert has_budget(0, period)


@given(group, st.floats(0, 100), st.floats(0, 1))
def test_the_gate(pairs: list[Any], budget: float, accuracy: float) -> None:
    values, lengths = unzip(pairs)
    gated = gate(values, lengths, budget, accuracy)
    solved = math.fsum(values) / len(values) >= accuracy
    for before, after, length in zip(values, gated, lengths, strict=True):
        assert after == (0.0 if solved and length > budget else before)
    # A larger budget takes no reward away.
    larger = gate(values, lengths, budget + 1, accuracy)
    assert all(a <= b for a, b in zip(gated, larger, strict=True))
    assert gate(values, lengths, max(lengths), accuracy) == values


@given(st.lists(st.tuples(st.integers(1, limit), st.booleans())), st.floats(0, 100), st.randoms())
def test_budgets_are_within_the_lengths_of_correct_responses(
    pairs: list[Any], percentile: float, rng: Any
) -> None:
    lengths, correct = unzip(pairs)
    budget = estimate_budget(lengths, correct, percentile, limit)
    right = [length for length, ok in pairs if ok]
    assert budget == limit if not right else min(right) <= budget <= max(right)
    assert estimate_budget(*unzip(rng.sample(pairs, len(pairs))), percentile, limit) == budget
    # Wrong responses do not matter, and a larger percentile is a larger budget.
    assert estimate_budget([*lengths, 1], [*correct, False], percentile, limit) == budget
    assert estimate_budget(lengths, correct, 100, limit) >= budget


def test_by_hand() -> None:
    toggle = Toggle(limit, period=2, accuracy=0.5, percentile=50)
    assert toggle.estimate("p", [10, 20, 30, 5], [True, True, True, False]) == 20
    assert toggle.estimate("p", [1], [True]) == 20  # fixed
    values, lengths = [1.0, 1.0, 0.0], [20, 21, 5]
    results = [toggle.rewards(iteration, "p", values, lengths) for iteration in range(5)]
    budgeted = [1.0, 0.0, 0.0]
    assert results == [budgeted, budgeted, values, values, budgeted]
    assert toggle.rewards(0, "p", [1.0, 0.0, 0.0], [99, 1, 1]) == [1.0, 0.0, 0.0]  # not solved
    assert toggle.rewards(0, "without a budget", values, lengths) == values


def test_ablations() -> None:
    for mode, budgeted in (("permanent", True), ("off", False)):
        toggle = Toggle(limit, mode=mode, period=1)  # type: ignore[arg-type]
        assert {toggle.has_budget(iteration) for iteration in range(4)} == {budgeted}


@given(st.dictionaries(st.text(), st.floats(0, limit)))
def test_budgets_survive_a_checkpoint(budgets: dict[str, float]) -> None:
    toggle, resumed = Toggle(limit, budgets=budgets), Toggle(limit)
    resumed.load_state_dict(json.loads(json.dumps(toggle.state_dict())))
    assert resumed == toggle


def test_bad_values_are_errors() -> None:
    for name, value in {"token_limit": 0, "period": 0, "accuracy": 1.5, "percentile": -1}.items():
        with pytest.raises(ValueError, match=rf"toggle\.{name}={value}: must be"):
            Toggle(**({"token_limit": limit} | {name: value}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode"):
        Toggle(limit, mode="never")  # type: ignore[arg-type]
    for reward in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="at least 0"):
            Toggle(limit).rewards(0, "p", [reward], [1])
    for budget in (math.nan, -1, limit + 1, "x"):
        with pytest.raises(ValueError, match="the budget of 'p'"):
            Toggle(limit).load_state_dict({"p": budget})  # type: ignore[dict-item]


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


@given(content=st.text() | st.builds(json.dumps, JSON | st.fixed_dictionaries({"sums": JSON})))
def test_stored_budgets_are_read_or_refused(content: str) -> None:
    """A file that was edited or cut short names itself and the way out."""
    practice = Practice("sums", RlTaskConfig(), Mode("instant", "", {}, []), [], Toggle(limit))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "budgets.json"
        file.write_text(content, encoding="utf-8")
        try:
            state = read_budgets(file, [practice])
        except PretrainError as error:
            assert re.search(r"budgets\.json cannot be used \(.*\): remove it", str(error), re.S)
            return
    assert practice.toggle is not None
    assert practice.toggle.state_dict() == state.get("sums", {})
