"""Assignment of matrices to ranks: pure functions with the same result on every rank."""

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple, TypeAlias

from muonclip.distributed.sharding import Copies, Sharding, TensorShard, reduced_shape

# Units that are worked on together, and the owner of each.
Bucket: TypeAlias = list[tuple["WorkUnit", int]]

# Parts of a message begin at multiples of this many elements, at which NCCL copies fastest.
ALIGNMENT = 8


@dataclass(frozen=True, eq=False)
class WorkUnit:
    """Matrices that one rank orthogonalizes: a whole parameter, or some slices of a stack.

    Attributes:
        index: of the parameter in the step.
        first: the first slice of the stack; 0 otherwise.
        shape: of the whole unit.
        copies: the ranks that have the same shard.
        shards: of each set of ``copies``, in the unit's coordinates; None for a set without one.
        cost: of the owner's work.
    """

    index: int
    first: int
    shape: tuple[int, ...]
    copies: Copies
    shards: tuple[TensorShard | None, ...]
    cost: float

    def shard_of(self, rank: int) -> TensorShard:
        """The shard of a rank that has one."""
        shard = self.shards[self.copies.set_of[rank]]
        assert shard is not None
        return shard

    def is_on(self, rank: int) -> bool:
        """Whether a rank has a shard."""
        return self.shards[self.copies.set_of[rank]] is not None

    def is_whole_on(self, rank: int) -> bool:
        """Whether a rank has the whole unit."""
        shard = self.shards[self.copies.set_of[rank]]
        return shard is not None and shard.sizes == self.shape

    def local_range(self, rank: int, first: int) -> tuple[int, int]:
        """Start and length of a rank's shard in its local tensor, along the first dimension.

        Args:
            rank: one that has a shard.
            first: the index of the local tensor's first slice in the whole parameter.
        """
        shard = self.shard_of(rank)
        return self.first + shard.offsets[0] - first, shard.sizes[0]

    @property
    def held(self) -> Iterator[tuple[TensorShard, tuple[int, ...]]]:
        """The different shards, each with the ranks that have it."""
        for shard, ranks in zip(self.shards, self.copies.sets, strict=True):
            if shard is not None:
                yield shard, ranks


def make_units(
    index: int,
    shape: tuple[int, ...],
    copies: Copies,
    shards: Sequence[TensorShard],
    count: int,
    cost: float,
) -> list[WorkUnit]:
    """Split a stack [E, n, m] into up to ``count`` units; for a matrix, ``count`` is 1.

    The other arguments are those of a ``WorkUnit``, for the whole parameter.
    """
    length = shape[0]
    count = min(count, length)
    bounds = [length * number // count for number in range(count + 1)]
    units = []
    for first, last in pairwise(bounds):
        unit_shards = tuple(_slices(shard, first, last) for shard in shards)
        unit_shape = (last - first, *shape[1:])
        share = (last - first) / length
        units.append(WorkUnit(index, first, unit_shape, copies, unit_shards, cost * share))
    return units


def of_neurons(unit: WorkUnit, sharding: Sharding, dims: tuple[int, ...]) -> WorkUnit:
    """The unit of a tensor with a number for each neuron that goes with a unit of its parameter.

    Args:
        unit: of the parameter.
        sharding: of the parameter.
        dims: the dimensions along which the tensor has one element; see ``MatrixLayout``.
    """
    reduced = sharding.reduced(dims)
    shape = reduced_shape(unit.shape, dims)
    shards = tuple(_slices(shard, unit.first, unit.first + shape[0]) for shard in reduced.distinct)
    return replace(unit, shape=shape, copies=reduced.copies, shards=shards)


def _slices(shard: TensorShard, first: int, last: int) -> TensorShard | None:
    """The part of a shard in slices ``first`` to ``last``, in their coordinates."""
    if not shard.numel:
        return None
    if first == 0 and shard.offsets[0] + shard.sizes[0] <= last:  # as of a matrix, on many ranks
        return shard
    start = max(first, shard.offsets[0])
    stop = min(last, shard.offsets[0] + shard.sizes[0])
    part = TensorShard(
        (start - first, *shard.offsets[1:]), (max(stop - start, 0), *shard.sizes[1:])
    )
    return part if part.numel else None


def nearest(ranks: Sequence[int], rank: int, nodes: Sequence[int]) -> int:
    """The nearest to ``rank`` of some ascending ranks: on its node, or else by number.

    Args:
        ranks: ascending.
        rank: any rank.
        nodes: the node of each rank of the group.
    """
    right = bisect_left(ranks, rank)
    neighbours = ranks[max(right - 1, 0) : right + 1]
    return min(neighbours, key=lambda r: (nodes[r] != nodes[rank], abs(r - rank), r))


def assign_owners(
    units: Sequence[WorkUnit], nodes: Sequence[int], loads: Sequence[float] | None = None
) -> list[int]:
    """Assign every unit to a rank, the costliest first, each to the rank with the least load.

    A unit stays on the nodes that have most of it, unless their ranks have too much to do. If every
    node has the whole of all units and no rank has other work, the largest load is at most 4/3 of
    the least possible (Graham, 1969); otherwise at most twice.

    Args:
        units: in any order.
        nodes: the node of each rank.
        loads: cost of the other work that each rank has; default: none.

    Returns:
        The owner of each unit. Ties go to the earlier unit and the lower rank.
    """
    owners, loads = [0] * len(units), [0.0] * len(nodes) if loads is None else list(loads)
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    most = max((unit.cost for unit in units), default=0.0)
    limit = 4 / 3 * max(most, (sum(loads) + sum(unit.cost for unit in units)) / len(nodes))
    near = _NearRanks(nodes)
    for index in sorted(range(len(units)), key=lambda i: (-units[i].cost, i)):
        cost = units[index].cost
        candidates = near.of(units[index])
        rank = min(candidates, key=lambda rank: (loads[rank], rank), default=-1)
        if rank < 0 or loads[rank] + cost > limit:
            while heap[0][0] != loads[heap[0][1]]:  # has been given units since
                heapq.heappop(heap)
            rank = heap[0][1]
        owners[index] = rank
        loads[rank] += cost
        heapq.heappush(heap, (loads[rank], rank))
    return owners


class _NearRanks:
    """The ranks of the nodes that have most of a unit."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = nodes
        self._by_node: dict[int, list[int]] = {}
        for rank, node in enumerate(nodes):
            self._by_node.setdefault(node, []).append(rank)
        self._nodes_of_sets: dict[Copies, list[set[int]]] = {}

    def of(self, unit: WorkUnit) -> list[int]:
        """These ranks, ascending; none if all nodes have as much."""
        if len(self._by_node) == 1:
            return []
        sets = self._nodes_of_sets.get(unit.copies)
        if sets is None:
            sets = [{self._nodes[rank] for rank in ranks} for ranks in unit.copies.sets]
            self._nodes_of_sets[unit.copies] = sets
        elements = dict.fromkeys(self._by_node, 0)
        for shard, nodes in zip(unit.shards, sets, strict=True):
            size = 0 if shard is None else shard.numel
            for node in nodes:
                elements[node] += size
        most = max(elements.values())
        found = [node for node, count in elements.items() if count == most]
        if len(found) == len(elements):
            return []
        return sorted(rank for node in found for rank in self._by_node[node])


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


def split_results(bucket: Bucket, elements: int) -> list[Bucket]:
    """Divide a bucket into messages of results.

    Args:
        bucket: the units.
        elements: that a rank receives in a message, at most, unless a single unit has more.

    Returns:
        Units of one message have the same ``copies``, and are in the order of their owners, in
        which results arrive. Owners with least work are in the first messages: the results of the
        others are not there yet.
    """
    work: dict[int, float] = {}
    for unit, owner in bucket:
        work[owner] = work.get(owner, 0.0) + unit.cost
    ordered = sorted(bucket, key=lambda member: (work[member[1]], member[1]))
    by_copies: dict[Copies, Bucket] = {}
    for unit, owner in ordered:
        by_copies.setdefault(unit.copies, []).append((unit, owner))
    messages: list[Bucket] = []
    for members in by_copies.values():
        received = 0
        for number, (unit, owner) in enumerate(members):
            size = max(shard.numel for shard, _ in unit.held)
            if not number or received + size > elements:
                messages.append([])
                received = 0
            messages[-1].append((unit, owner))
            received += size
    return [sorted(message, key=lambda member: member[1]) for message in messages]


class Cut(NamedTuple):
    """Results that some ranks receive, cut into a part for each of them.

    The owners send every rank its part, and the ranks gather the parts.

    Attributes:
        total: elements.
        part: elements of a part; the last ones are shorter, or empty.
        ranks: number of them.
    """

    total: int
    part: int
    ranks: int

    @classmethod
    def of(cls, total: int, ranks: int) -> "Cut":
        if ranks == 1:
            return cls(total, total, 1)
        return cls(total, -(-total // (ranks * ALIGNMENT)) * ALIGNMENT, ranks)

    @property
    def gathered(self) -> int:
        """Elements of all parts."""
        return self.part * self.ranks

    def overlap(self, number: int, start: int, stop: int) -> int:
        """Elements of a part that lie between two positions."""
        first, last = number * self.part, min((number + 1) * self.part, self.total)
        return max(0, min(stop, last) - max(start, first))

    def overlaps(self, start: int, stop: int) -> list[int]:
        """Elements of each part that lie between two positions."""
        return [self.overlap(number, start, stop) for number in range(self.ranks)]


def segments(units: Iterable[tuple[WorkUnit, int]], number: int) -> Iterator[tuple[int, int, int]]:
    """(owner, start, stop) of each unit's shard in the results of a set of ranks."""
    sizes = [
        (owner, 0 if (shard := unit.shards[number]) is None else shard.numel)
        for unit, owner in units
    ]
    ends = accumulate(size for _, size in sizes)
    for (owner, size), end in zip(sizes, ends, strict=True):
        yield owner, end - size, end
