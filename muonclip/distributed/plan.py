"""Assignment of matrices to ranks: pure functions with the same result on every rank."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TypeAlias

from muonclip.distributed.sharding import TensorShard

# Units that travel together, and the owner of each.
Bucket: TypeAlias = list[tuple["WorkUnit", int]]


@dataclass(frozen=True, eq=False)
class WorkUnit:
    """Matrices that one rank orthogonalizes: a whole parameter, or some slices of a stack.

    Attributes:
        index: of the parameter in the step.
        first: the first slice of the stack; 0 otherwise.
        shape: of the whole unit.
        shards: of each rank, in the unit's coordinates; None for a rank without one.
        cost: of the orthogonalization, in multiply-adds.
    """

    index: int
    first: int
    shape: tuple[int, ...]
    shards: tuple[TensorShard | None, ...]
    cost: float

    def shard_of(self, rank: int) -> TensorShard:
        """The shard of a rank that has one."""
        shard = self.shards[rank]
        assert shard is not None
        return shard

    def routes(self, owner: int) -> Iterator[tuple[int, list[int]]]:
        """For each shard: the rank that sends it to the owner, and all ranks that have it."""
        holders: dict[TensorShard, list[int]] = {}
        for rank, shard in enumerate(self.shards):
            if shard is not None:
                holders.setdefault(shard, []).append(rank)
        for ranks in holders.values():
            # The nearest of several copies is sent; neighbours in rank are so in the network.
            yield min(ranks, key=lambda rank: (abs(rank - owner), rank)), ranks


def make_units(
    index: int, shape: tuple[int, ...], shards: Sequence[TensorShard], count: int, cost: float
) -> list[WorkUnit]:
    """Split a stack [E, n, m] into up to ``count`` units; for a matrix, ``count`` is 1.

    The other arguments are those of a ``WorkUnit``, for the whole parameter.
    """
    length = shape[0]
    count = min(count, length)
    bounds = [length * number // count for number in range(count + 1)]
    units = []
    for first, last in pairwise(bounds):
        unit_shards: list[TensorShard | None] = []
        for shard in shards:
            start = max(first, shard.offsets[0])
            stop = min(last, shard.offsets[0] + shard.sizes[0])
            unit_shard = TensorShard(
                (start - first, *shard.offsets[1:]), (max(stop - start, 0), *shard.sizes[1:])
            )
            unit_shards.append(unit_shard if unit_shard.numel else None)
        unit_shape = (last - first, *shape[1:])
        share = (last - first) / length
        units.append(WorkUnit(index, first, unit_shape, tuple(unit_shards), cost * share))
    return units


def assign_owners(units: Sequence[WorkUnit], ranks: int) -> list[int]:
    """Assign every unit to a rank, the costliest first, each to the rank with the least load.

    The largest load is at most 4/3 of the least possible (Graham, 1969).

    Returns:
        The owner of each unit. Ties go to the earlier unit and the lower rank.
    """
    owners = [0] * len(units)
    heap = [(0.0, rank) for rank in range(ranks)]
    for index in sorted(range(len(units)), key=lambda i: (-units[i].cost, i)):
        load, rank = heapq.heappop(heap)
        owners[index] = rank
        heapq.heappush(heap, (load + units[index].cost, rank))
    return owners


def make_buckets(units: Sequence[WorkUnit], owners: Sequence[int], elements: int) -> list[Bucket]:
    """Divide the work into buckets, in each of which every owner has about the same share.

    Args:
        units: in any order.
        owners: the owner of each.
        elements: about the number of elements of whole units in a bucket.

    Returns:
        At least two if an owner has two units, so that one travels while another is worked on.
    """
    total = sum(prod(unit.shape) for unit in units)
    by_owner: dict[int, list[int]] = {}
    for index, owner in enumerate(owners):
        by_owner.setdefault(owner, []).append(index)
    most = max((len(indices) for indices in by_owner.values()), default=0)
    count = max(1, min(most, max(2, -(-total // elements))))
    buckets: list[Bucket] = [[] for _ in range(count)]
    for owner, indices in sorted(by_owner.items()):
        load = sum(units[index].cost for index in indices)
        before = 0.0
        for index in indices:
            middle = (before + units[index].cost / 2) / load if load else 0.0
            buckets[min(int(middle * count), count - 1)].append((units[index], owner))
            before += units[index].cost
    return [bucket for bucket in buckets if bucket]
