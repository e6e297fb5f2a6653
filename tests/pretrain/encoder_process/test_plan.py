"""Every item is encoded once, by a rank whose load is close to everybody's."""

import random

from hypothesis import given
from hypothesis import strategies as st

from pretrain.encoder_process.plan import balance, plan

loads = st.lists(st.integers(1, 5000), max_size=60)


@given(loads, st.integers(1, 9))
def test_the_largest_load_exceeds_the_mean_by_less_than_a_light_item(
    costs: list[int], num_ranks: int
) -> None:
    ranks = plan(costs, num_ranks)
    assert len(ranks) == len(costs)
    assert all(0 <= rank < num_ranks for rank in ranks)
    totals = [sum(c for c, r in zip(costs, ranks, strict=True) if r == k) for k in range(num_ranks)]
    # The item that ends last started on the least loaded rank; beyond the first of each rank it
    # is no heavier than the (num_ranks + 1)-th.
    ordered = sorted(costs, reverse=True)
    later = ordered[num_ranks] if len(costs) > num_ranks else 0
    bound = sum(costs) / num_ranks + (1 - 1 / num_ranks) * later
    assert max(totals) <= max(bound, max(costs, default=0)) + 1e-9
    assert plan(costs, num_ranks) == ranks


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(1, 9))
def test_balance_is_the_largest_load_over_the_mean(costs: list[int], num_ranks: int) -> None:
    assert balance(costs, [0] * len(costs), num_ranks) == num_ranks
    assert 1 <= balance(costs, plan(costs, num_ranks), num_ranks) <= num_ranks


def test_nothing_to_do_and_more_ranks_than_items() -> None:
    assert plan([], 4) == []
    assert balance([], [], 4) == 1.0
    assert plan([7, 9], 4) == [1, 0]


def test_many_skewed_items_come_out_even() -> None:
    generator = random.Random(0)
    costs = [max(1, int(generator.lognormvariate(5, 1))) for _ in range(2000)]
    assert balance(costs, plan(costs, 16), 16) < 1.001
