"""Who encodes what: pure, and the same on every rank."""

import heapq
from collections.abc import Sequence


def plan(loads: Sequence[int], num_ranks: int) -> list[int]:
    """Give every item to a rank, the heaviest first, each to the rank with the least so far.

    The largest load is at most 4/3 of the least possible (Graham, 1969).

    Args:
        loads: cost of each item, such as its number of patches.
        num_ranks: at least 1.

    Returns:
        The rank of each item. Ties go to the earlier item and the lower rank.
    """
    ranks = [0] * len(loads)
    heap = [(0, rank) for rank in range(num_ranks)]
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        load, rank = heapq.heappop(heap)
        ranks[item] = rank
        heapq.heappush(heap, (load + loads[item], rank))
    return ranks


def balance(loads: Sequence[int], ranks: Sequence[int], num_ranks: int) -> float:
    """The largest rank's load over the mean: 1 is perfect; 1 also where there is no load."""
    totals = [0] * num_ranks
    for load, rank in zip(loads, ranks, strict=True):
        totals[rank] += load
    return max(totals) * num_ranks / sum(totals) if sum(totals) else 1.0
