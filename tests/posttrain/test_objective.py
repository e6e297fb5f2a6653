"""The objective equals eq. 1 of Kimi K2.5's report, and its gradient is masked by the ratio."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import objective

LIMITS: dict[str, Any] = {"ratio_low": 0.8, "ratio_high": 1.25}
finite = st.floats(-3, 3, allow_nan=False)


def reference(
    new: list[list[float]],
    old: list[list[float]],
    rewards: list[float],
    mask: list[list[int]],
    low: float,
    high: float,
    penalty: float,
) -> tuple[float, list[list[float]]]:
    """Eq. 1 of one group and its derivatives by the log-probabilities, number by number."""
    mean = math.fsum(rewards) / len(rewards)
    count = max(1, sum(map(sum, mask)))
    total, gradient = 0.0, [[0.0] * len(row) for row in new]
    for j, reward in enumerate(rewards):
        for i, kept in enumerate(mask[j]):
            if not kept:
                continue
            log_ratio = new[j][i] - old[j][i]
            ratio, advantage = math.exp(log_ratio), reward - mean
            clipped = min(max(ratio, low), high)
            total += clipped * advantage - penalty * log_ratio**2
            if low <= ratio <= high:
                gradient[j][i] += ratio * advantage / count
            gradient[j][i] -= 2 * penalty * log_ratio / count
    return total / count, gradient


def compute(
    new: Tensor, old: Tensor, rewards: Tensor, mask: Tensor, penalty: float = 0.0
) -> Tensor:
    """The objective of one group [K, tokens]."""
    (advantages,) = objective.advantages(rewards[None])
    terms = objective.token_objective(new, old, advantages, log_ratio_penalty=penalty, **LIMITS)
    return objective.mean_over_tokens(terms, mask)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[float]], ...]:
    k, tokens = draw(st.integers(2, 4)), draw(st.integers(1, 5))

    def matrix(numbers: st.SearchStrategy[Any]) -> list[list[Any]]:
        row = st.lists(numbers, min_size=tokens, max_size=tokens)
        return draw(st.lists(row, min_size=k, max_size=k))

    rewards = draw(st.lists(st.floats(0, 1), min_size=k, max_size=k))
    return matrix(finite), matrix(finite), [rewards], matrix(st.integers(0, 1))


@settings(max_examples=50)
@given(groups(), st.floats(0, 2))
def test_it_equals_the_reference(group: tuple[Any, ...], penalty: float) -> None:
    new, old, (rewards,), mask = group
    parameter = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    value = compute(
        parameter,
        torch.tensor(old, dtype=torch.float64),
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(mask),
        penalty,
    )
    value.backward()
    expected, gradient = reference(new, old, rewards, mask, 0.8, 1.25, penalty)
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(
        parameter.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_one_group_by_hand() -> None:
    """Two responses, rewards 1 and 0: advantages ±1/2; ratios 1, 1.5 (masked), 0.5 (masked), 1.1;
    the last token is padding; τ = 0.1."""
    ratios = torch.tensor([[1.0, 1.5, 1.0], [0.5, 1.1, 9.0]], dtype=torch.float64)
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    new = (old + ratios.log()).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    value = compute(new, old, torch.tensor([1.0, 0.0], dtype=torch.float64), mask, 0.1)
    squares = math.log(1.5) ** 2 + math.log(0.5) ** 2 + math.log(1.1) ** 2
    policy = 0.5 * 1 + 0.5 * 1.25 - 0.5 * 0.8 - 0.5 * 1.1
    assert value.item() == pytest.approx((policy - 0.1 * squares) / 4)
    value.backward()
    assert new.grad is not None
    expected = torch.tensor(
        [
            [0.5 / 4, -0.2 * math.log(1.5) / 4, 0],
            [-0.2 * math.log(0.5) / 4, (-0.5 * 1.1 - 0.2 * math.log(1.1)) / 4, 0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(new.grad, expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_advantages_sum_to_zero_and_are_not_scaled(rewards: list[float]) -> None:
    found = objective.advantages(torch.tensor([rewards], dtype=torch.float64))
    assert float(found.sum()) == pytest.approx(0, abs=1e-12)
    spread = max(rewards) - min(rewards)
    assert float(found.max() - found.min()) == pytest.approx(spread, abs=1e-12)


def test_on_policy_the_gradient_is_that_of_reinforce() -> None:
    """The first update of a batch: every ratio is 1, and the log-ratio's penalty is flat."""
    new = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 2)
    compute(new, new.detach(), torch.tensor([1.0, 0.0], dtype=torch.float64), mask, 5.0).backward()
    expected = torch.tensor([[0.5, 0.5], [-0.5, -0.5]], dtype=torch.float64) / 4
    assert torch.equal(new.grad, expected)  # type: ignore[arg-type]


def test_tokens_out_of_range_have_no_policy_gradient_whatever_the_advantage() -> None:
    for ratio in (0.79, 1.26, 1e300):
        for reward in (0.0, 1.0):
            new = torch.full((2, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
            rewards = torch.tensor([reward, 1 - reward], dtype=torch.float64)
            compute(
                new, torch.zeros(2, 1, dtype=torch.float64), rewards, torch.ones(2, 1)
            ).backward()
            assert torch.equal(new.grad, torch.zeros(2, 1, dtype=torch.float64))  # type: ignore[arg-type]


def test_infinite_ratios_and_masked_tokens_do_not_spread() -> None:
    """A ratio that overflows float32 in a token of padding, and in one that counts."""
    new = torch.tensor([[0.0, 200.0], [200.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1]])
    value = compute(new, torch.zeros(2, 2), torch.tensor([1.0, 0.0]), mask)
    value.backward()
    assert value.isfinite() and new.grad is not None and new.grad.isfinite().all()


def test_parts_of_a_batch_add_up_to_the_mean_over_all_tokens() -> None:
    terms = torch.arange(12, dtype=torch.float64).view(4, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    whole = objective.mean_over_tokens(terms, mask)
    parts = [
        objective.mean_over_tokens(terms[rows], mask[rows], mask.sum())
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert whole.item() == pytest.approx(float(sum(parts)))
    assert float(objective.mean_over_tokens(terms, 0 * mask)) == 0


def test_share_out_of_range() -> None:
    new = torch.tensor([[0.79, 0.8, 1.0], [1.25, 1.26, 9.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    share = objective.share_out_of_range(new, torch.zeros_like(new), mask, 0.79999, 1.25001)
    assert float(share) == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    "wrong",
    [{"ratio_low": 1.0}, {"ratio_low": 0.0}, {"ratio_high": 1.0}, {"log_ratio_penalty": -1.0}],
)
def test_constants_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        objective.token_objective(
            zeros, zeros, zeros[0], **{**LIMITS, "log_ratio_penalty": 0.0, **wrong}
        )
