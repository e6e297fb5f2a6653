"""Who orthogonalizes what: pure, and the same on every rank."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import NamedTuple

from torch import Tensor

from muonclip.distributed.sharding import Block


class Route(NamedTuple):
    """One block of a unit: the rank that sends it to the owner, and all ranks that hold it."""

    block: Block
    sender: int
    holders: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Unit:
    """What one rank orthogonalizes as a whole: a parameter, or some slices of a stack.

    Attributes:
        item: the parameter's place in the step.
        first: the first slice of the stack; 0 otherwise.
        shape: of the whole unit.
        blocks: each rank's part of it, in the unit's coordinates; None where it has none.
        cost: of orthogonalizing it, in multiply-adds.
    """

    item: int
    first: int
    shape: tuple[int, ...]
    blocks: tuple[Block | None, ...]
    cost: float

    def view(self, part: Tensor, rank: int, block_of_parameter: Block) -> Tensor:
        """The unit's part of what a rank holds of the parameter."""
        block = self.blocks[rank]
        assert block is not None
        start = self.first + block.offsets[0] - block_of_parameter.offsets[0]
        return part[start : start + block.sizes[0]]

    def routes(self, owner: int) -> Iterator[Route]:
        """How the unit's blocks come to its owner, and who waits for the result."""
        holders: dict[Block, list[int]] = {}
        for rank, block in enumerate(self.blocks):
            if block is not None:
                holders.setdefault(block, []).append(rank)
        for block, ranks in holders.items():
            # Of several copies the nearest is sent; neighbours in rank are so in the network.
            sender = min(ranks, key=lambda rank: (abs(rank - owner), rank))
            yield Route(block, sender, tuple(ranks))


def make_units(
    item: int, shape: tuple[int, ...], blocks: Sequence[Block], pieces: int, cost: float
) -> list[Unit]:
    """A parameter as units: a stack [E, n, m] is cut into up to ``pieces``, a matrix stays whole.

    Args:
        item: the parameter's place in the step.
        shape: of the whole parameter.
        blocks: each rank's part.
        pieces: 1, or for a stack into how many parts it may be cut.
        cost: of the whole parameter.
    """
    length = shape[0]
    pieces = min(pieces, length)
    bounds = [length * piece // pieces for piece in range(pieces + 1)]
    units = []
    for first, last in pairwise(bounds):
        parts: list[Block | None] = []
        for block in blocks:
            start = max(first, block.offsets[0])
            stop = min(last, block.offsets[0] + block.sizes[0])
            part = Block(
                (start - first, *block.offsets[1:]), (max(stop - start, 0), *block.sizes[1:])
            )
            parts.append(part if part.numel else None)
        unit_shape = (last - first, *shape[1:])
        share = (last - first) / length
        units.append(Unit(item, first, unit_shape, tuple(parts), cost * share))
    return units


def assign_owners(units: Sequence[Unit], ranks: int) -> list[int]:
    """Give every unit to a rank, the costliest first, each to the rank with the least so far.

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


@dataclass
class Bucket:
    """Units that travel together, and the owner of each."""

    units: list[Unit] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


def make_buckets(units: Sequence[Unit], owners: Sequence[int], elements: int) -> list[Bucket]:
    """Cut the work into buckets in which every owner has about an equal share of its own.

    Args:
        units: in any order.
        owners: the owner of each.
        elements: about as many elements of the whole parameters go into one bucket.

    Returns:
        At least two where there are two units for some owner: one travels while another is
        worked on.
    """
    total = sum(prod(unit.shape) for unit in units)
    of_owner: dict[int, list[int]] = {}
    for index, owner in enumerate(owners):
        of_owner.setdefault(owner, []).append(index)
    most = max((len(indices) for indices in of_owner.values()), default=0)
    count = max(1, min(most, max(2, -(-total // elements))))
    buckets = [Bucket() for _ in range(count)]
    for owner, indices in sorted(of_owner.items()):
        load = sum(units[index].cost for index in indices)
        before = 0.0
        for index in indices:
            middle = (before + units[index].cost / 2) / load if load else 0.0
            bucket = buckets[min(int(middle * count), count - 1)]
            bucket.units.append(units[index])
            bucket.owners.append(owner)
            before += units[index].cost
    return [bucket for bucket in buckets if bucket.units]
