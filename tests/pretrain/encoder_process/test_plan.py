"""Plans are balanced, move little data, and respect the capacity of the ranks."""

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.encoder_process.plan import (
    balance,
    balance_lower_bound,
    load_lower_bound,
    oversized,
    plan,
)

# With and without ties.
some_loads = st.one_of(
    st.lists(st.integers(0, 5000), max_size=60), st.lists(st.integers(1, 4), max_size=60)
)


def longest_first(loads: Sequence[int], num_ranks: int) -> list[int]:
    """LPT: the slow, simple reference."""
    ranks, totals = [0] * len(loads), [0] * num_ranks
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        ranks[item] = totals.index(min(totals))
        totals[ranks[item]] += loads[item]
    return ranks


def sums(values: Sequence[int], ranks: Sequence[int], num_ranks: int) -> list[int]:
    return [
        sum(v for v, r in zip(values, ranks, strict=True) if r == rank) for rank in range(num_ranks)
    ]


def largest(loads: Sequence[int], ranks: Sequence[int], num_ranks: int) -> int:
    return max(sums(loads, ranks, num_ranks))


def moved(traffic: Sequence[int], ranks: Sequence[int], owners: Sequence[int]) -> int:
    return sum(t for t, r, o in zip(traffic, ranks, owners, strict=True) if r != o)


def skewed(number: int, sigma: float, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [max(1, int(generator.lognormvariate(9, sigma))) for _ in range(number)]


@st.composite
def owned(draw: st.DrawFn) -> tuple[list[int], int, list[int], list[int]]:
    """(loads, ranks, owners, traffic)."""
    loads, num_ranks = draw(some_loads), draw(st.integers(1, 9))
    owners = draw(st.lists(st.integers(0, num_ranks - 1), min_size=len(loads), max_size=len(loads)))
    traffic = draw(st.lists(st.integers(0, 99), min_size=len(loads), max_size=len(loads)))
    return loads, num_ranks, owners, traffic


# ---------------------------------------------------------------------- balance


@settings(deadline=None)
@given(some_loads, st.integers(1, 9))
def test_the_largest_load_is_not_above_that_of_lpt(loads: list[int], num_ranks: int) -> None:
    ranks = plan(loads, num_ranks)
    assert len(ranks) == len(loads)
    assert all(0 <= rank < num_ranks for rank in ranks)
    lpt = longest_first(loads, num_ranks)
    assert largest(loads, ranks, num_ranks) <= largest(loads, lpt, num_ranks)
    assert load_lower_bound(loads, num_ranks) <= largest(loads, ranks, num_ranks)
    assert plan(loads, num_ranks) == plan(np.array(loads, np.int32), num_ranks) == ranks


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_largest_load_is_within_a_third_of_the_optimum(
    loads: list[int], num_ranks: int
) -> None:
    every = itertools.product(range(num_ranks), repeat=len(loads))
    optimum = min(largest(loads, ranks, num_ranks) for ranks in every)
    assert load_lower_bound(loads, num_ranks) <= optimum
    bound = (4 / 3 - 1 / (3 * num_ranks)) * optimum
    assert optimum <= largest(loads, plan(loads, num_ranks), num_ranks) <= bound


@pytest.mark.parametrize("num_ranks", range(2, 9))
def test_the_worst_case_of_lpt_is_solved_optimally(num_ranks: int) -> None:
    # Graham's example: two items of each load from 2m - 1 to m + 1, three of load m.
    loads = [*range(num_ranks + 1, 2 * num_ranks), *range(num_ranks, 2 * num_ranks)]
    loads = [*loads, num_ranks, num_ranks]
    assert largest(loads, longest_first(loads, num_ranks), num_ranks) == 4 * num_ranks - 1
    assert largest(loads, plan(loads, num_ranks), num_ranks) == 3 * num_ranks


def test_most_of_a_large_imbalance_of_lpt_is_removed() -> None:
    """LPT places the small ones of a few similar items, which come last, badly."""
    excesses = []
    for per_rank, sigma, seed in itertools.product((2.5, 3, 4, 5, 6), (0.2, 0.3, 0.4), range(3)):
        loads = skewed(int(per_rank * 128), sigma, seed)
        bound = load_lower_bound(loads, 128)
        lpt = largest(loads, longest_first(loads, 128), 128) / bound - 1
        if lpt > 0.05:
            planned = largest(loads, plan(loads, 128), 128) / bound - 1
            assert planned < lpt
            excesses.append((lpt, planned))
    assert len(excesses) > 15
    assert sum(planned for _, planned in excesses) < 0.3 * sum(lpt for lpt, _ in excesses)


def test_many_skewed_items_are_balanced() -> None:
    loads = skewed(2000, 1.0)
    assert balance(loads, plan(loads, 16), 16) < 1.001


@settings(deadline=None)
@given(some_loads, st.integers(1, 9), st.data())
def test_balance_is_the_largest_load_over_the_mean(
    loads: list[int], num_ranks: int, data: st.DataObject
) -> None:
    size = len(loads)
    ranks = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=size, max_size=size))
    ratio = balance(loads, ranks, num_ranks)
    if sum(loads):
        assert ratio == pytest.approx(largest(loads, ranks, num_ranks) * num_ranks / sum(loads))
        assert balance(loads, [0] * size, num_ranks) == num_ranks
    else:
        assert ratio == 1.0
    assert (
        1.0
        <= balance_lower_bound(loads, num_ranks)
        <= balance(loads, plan(loads, num_ranks), num_ranks)
    )


def test_no_items_and_fewer_items_than_ranks() -> None:
    assert plan([], 4) == plan([], 4, owners=[], sizes=[], capacity=1) == []
    assert balance([], [], 4) == balance_lower_bound([], 4) == 1.0
    assert plan([7, 9], 4) == [1, 0]
    assert balance_lower_bound([7, 9], 4) == 9 / 4
    assert plan([0, 0], 2, owners=[1, 0]) == [1, 0]


def test_oversized_items_are_those_above_the_mean_load() -> None:
    loads = [10, 1, 30, 1, 14]
    assert oversized(loads, 4) == [2]
    assert oversized(loads, 1) == oversized([5, 5], 2) == oversized([], 3) == []
    ranks = plan(loads, 4)
    assert ranks.count(ranks[2]) == 1


# ---------------------------------------------------------------------- traffic


@settings(deadline=None)
@given(owned())
def test_local_items_cost_no_balance_and_no_more_traffic_than_lpt(
    case: tuple[list[int], int, list[int], list[int]],
) -> None:
    loads, num_ranks, owners, traffic = case
    ranks = plan(loads, num_ranks, owners=owners, traffic=traffic)
    assert len(ranks) == len(loads)
    assert all(0 <= rank < num_ranks for rank in ranks)
    load = largest(loads, ranks, num_ranks)
    lpt = longest_first(loads, num_ranks)
    lpt_load = largest(loads, lpt, num_ranks)
    assert load <= 1.01 * max(lpt_load, load_lower_bound(loads, num_ranks))
    if lpt_load <= load:
        assert moved(traffic, ranks, owners) <= moved(traffic, lpt, owners)


@settings(deadline=None)
@given(some_loads, st.integers(1, 9))
def test_nothing_moves_if_owners_are_balanced(loads: list[int], num_ranks: int) -> None:
    owners = plan(loads, num_ranks)
    if largest(loads, owners, num_ranks) <= 1.01 * load_lower_bound(loads, num_ranks) - 1:
        assert plan(loads, num_ranks, owners=owners) == owners


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
def test_at_scale_few_items_move_and_loads_are_balanced(sigma: float) -> None:
    loads = skewed(10_000, sigma)
    owners = sorted(random.Random(1).choices(range(1024), k=10_000))
    ranks = plan(loads, 1024, owners=owners)
    assert balance(loads, ranks, 1024) <= 1.0101 * balance_lower_bound(loads, 1024)
    owned = np.bincount(owners, loads, 1024)
    # Lower bound of the load that a plan with this balance moves.
    bound = np.maximum(owned - 1.01 * load_lower_bound(loads, 1024), 0).sum()
    traffic = moved(loads, ranks, owners)
    assert bound <= traffic < 1.6 * bound
    assert traffic < 0.3 * moved(loads, plan(loads, 1024), owners)


def test_a_large_tolerance_keeps_all_items_local() -> None:
    owners = [0, 0, 0, 2]
    assert plan([9, 8, 7, 1], 3, owners=owners, tolerance=float("inf")) == owners
    assert plan([9, 8, 7, 1], 3, owners=owners, tolerance=2.0) == owners
    assert plan([9, 8, 7, 1], 3, owners=owners) != owners


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.data())
def test_as_many_equal_items_stay_local_as_balance_allows(
    per_rank: int, num_ranks: int, data: st.DataObject
) -> None:
    number = per_rank * num_ranks
    owners = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=number, max_size=number))
    ranks = plan([7] * number, num_ranks, owners=owners)
    for rank in range(num_ranks):
        assert ranks.count(rank) == per_rank
        stay = sum(r == o == rank for r, o in zip(ranks, owners, strict=True))
        assert stay == min(per_rank, owners.count(rank))


# ---------------------------------------------------------------------- capacity


def fits(sizes: Sequence[int], ranks: Sequence[int], num_ranks: int, capacity: int) -> bool:
    """Whether every rank is within the capacity, or has a single item with a size."""
    for rank in range(num_ranks):
        local = [size for size, r in zip(sizes, ranks, strict=True) if r == rank and size]
        if sum(local) > capacity and len(local) > 1:
            return False
    return True


@st.composite
def sized(draw: st.DrawFn) -> tuple[list[int], int, list[int], list[int], int]:
    """(loads, ranks, owners, sizes, capacity); the sizes are the loads, or independent."""
    loads, num_ranks, owners, _ = draw(owned())
    sizes = loads
    if draw(st.booleans()):
        sizes = draw(st.lists(st.integers(0, 50), min_size=len(loads), max_size=len(loads)))
    mean = sum(sizes) // num_ranks
    return loads, num_ranks, owners, sizes, draw(st.integers(1, 2 * mean + 10))


@settings(deadline=None)
@given(sized(), st.booleans())
def test_capacity_is_respected_or_the_item_without_room_is_named(
    case: tuple[list[int], int, list[int], list[int], int], with_owners: bool
) -> None:
    loads, num_ranks, owners, sizes, capacity = case
    known_owners = owners if with_owners else None
    try:
        ranks = plan(loads, num_ranks, owners=known_owners, sizes=sizes, capacity=capacity)
    except ValueError as error:
        assert "capacity leaves no room for item" in str(error)
        # Otherwise the emptiest rank would always have room.
        largest_size = min(capacity, max(sizes))
        assert capacity < sum(min(size, capacity) for size in sizes) / num_ranks + largest_size
        return
    assert fits(sizes, ranks, num_ranks, capacity)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 20))
def test_items_that_fit_in_no_plan_are_an_error(
    sizes: list[int], num_ranks: int, capacity: int
) -> None:
    every = itertools.product(range(num_ranks), repeat=len(sizes))
    possible = any(fits(sizes, ranks, num_ranks, capacity) for ranks in every)
    if not possible:
        with pytest.raises(ValueError, match=r"no room for item \d of size .*\d+: .* raise it, or"):
            plan(sizes, num_ranks, sizes=sizes, capacity=capacity)


def test_a_small_capacity_is_planned_by_size() -> None:
    # Planned by load (9 | 8, 7), neither rank would have room for the last item.
    ranks = plan([9, 8, 7, 1], 2, sizes=[7, 3, 3, 5], capacity=10)
    assert sorted(sums([7, 3, 3, 5], ranks, 2)) == [8, 10]


def test_an_item_above_the_capacity_gets_its_own_rank() -> None:
    ranks = plan([1, 100, 1, 1], 2, owners=[1, 1, 1, 1], sizes=[1, 100, 1, 1], capacity=10)
    assert ranks.count(ranks[1]) == 1
    with pytest.raises(ValueError, match="no room for item 2 of size at least 10"):
        plan([5, 5, 5], 2, sizes=[99, 99, 99], capacity=10)


# ---------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_ranks": 0}, "num_ranks must be at least 1, got 0"),
        ({"loads": [1, -2]}, "loads must be at least 0: item 1 has -2"),
        ({"loads": [1.5, 2.0]}, "loads must be integers, got float64"),
        ({"loads": [2**60, 2**60]}, "loads add up to more than 2\\*\\*60 / 2 ranks"),
        ({"owners": [0]}, "owners must be one integer for each of 2 items"),
        ({"owners": [0, 2]}, "owners must be in 0..1: item 1 has 2"),
        ({"traffic": [0, -1], "owners": [0, 0]}, "traffic must be at least 0: item 1"),
        ({"sizes": [1, 1]}, "sizes and capacity go together"),
        ({"capacity": 3}, "sizes and capacity go together"),
        ({"sizes": [1, 1], "capacity": 0}, "capacity must be at least 1, got 0"),
        ({"tolerance": -0.1}, "tolerance must be at least 0, got -0.1"),
        ({"tolerance": float("nan")}, "tolerance must be at least 0, got nan"),
    ],
)
def test_errors_name_the_invalid_argument(arguments: dict[str, object], message: str) -> None:
    known: dict[str, object] = {"loads": [1, 2], "num_ranks": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        plan(**known)  # type: ignore[arg-type]
