"""A step of Muon over several ranks: plan once, then exchange, orthogonalize, exchange, apply."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from muonclip import validation
from muonclip.distributed.exchange import Exchange
from muonclip.distributed.plan import Unit, assign_owners, make_buckets, make_units
from muonclip.distributed.sharding import (
    Block,
    ConnectedRanks,
    Sharding,
    check_placements,
    group_of,
    order_of,
    own_block,
)
from muonclip.muon import Item, apply, orthogonalize_parameters, pre_orthogonalize, step_alone

# Whole parameters of about this many elements a rank travel at a time.
_BUCKET_ELEMENTS = 2**24


class SharedWork:
    """Who orthogonalizes what, for one list of parameters, and the step itself.

    Matrices of which ranks hold parts, or copies, get an owner each, balanced by cost. Buckets of
    them are under way to their owners while others are worked on.

    Making the plan is a collective call of all ranks of ``connected``.

    Args:
        items: the parameters of a step, in the same order on every rank that holds them.
        groups: all groups in which this rank shares parameters, with or without a gradient in
            this step, sorted by ``order_of``.
        connected: the ranks that ``groups`` connect.
        process_group: ranks that hold copies of the plain tensors without a sharding, or None.
        shardings: of plain tensors that are parts.

    Raises:
        ValueError: on all ranks of ``connected``, if the ranks of a group have gradients for
            different parameters, or hold parts of one that its placement does not describe.
    """

    def __init__(
        self,
        items: Sequence[Item],
        groups: Sequence[dist.ProcessGroup],
        connected: ConnectedRanks,
        process_group: dist.ProcessGroup | None,
        shardings: Mapping[Tensor, Sharding],
    ) -> None:
        self._handles = [item.handle for item in items]
        placed = _shardings_of(items, groups, connected, process_group, shardings)
        self._alone = [
            index
            for index, item in enumerate(items)
            if (found := placed.get(index)) is None or _is_whole(item, found)
        ]
        self._block: dict[int, Block] = {}
        self._exchanges: list[Exchange] = []
        shared: dict[tuple[int, torch.dtype, torch.dtype, torch.device], list[int]]
        shared = defaultdict(list)
        groups_by_id = {id(group): group for group in groups}
        for index in sorted(set(range(len(items))) - set(self._alone)):
            sharding = placed[index]
            self._block[index] = sharding.blocks[sharding.rank]
            item = items[index]
            key = (id(sharding.group), item.update_dtype, item.ns_dtype, item.param.device)
            shared[key].append(index)
        # Ranks meet in several groups: all must come to them in the same order.
        for key in sorted(shared, key=lambda key: (order_of(groups_by_id[key[0]]), str(key[1:]))):
            group = groups_by_id[key[0]]
            size = dist.get_world_size(group)
            units = [
                unit
                for index in shared[key]
                for unit in make_units(
                    index,
                    placed[index].shape,
                    placed[index].blocks,
                    min(size, items[index].layout.slices(items[index].shape)),
                    _cost(items[index]),
                )
            ]
            owners = assign_owners(units, size)
            for bucket in make_buckets(units, owners, _BUCKET_ELEMENTS * size):
                self._exchanges.append(Exchange(bucket, group, *key[1:]))

    def fits(self, items: Sequence[Item]) -> bool:
        """Whether the plan is for these parameters."""
        return len(items) == len(self._handles) and all(
            item.handle is handle for item, handle in zip(items, self._handles, strict=True)
        )

    def step(self, items: Sequence[Item], found: Tensor | None) -> None:
        """Update the parameters. A collective call of all ranks that hold any of them."""
        pipeline = self._exchanges
        if pipeline:
            self._send(pipeline[0], items, found)
        step_alone([items[index] for index in self._alone], found)
        for place, exchange in enumerate(pipeline):
            if place + 1 < len(pipeline):
                self._send(pipeline[place + 1], items, found)
            self._work(exchange, items)
            if place:
                self._apply(pipeline[place - 1], items, found)
        if pipeline:
            self._apply(pipeline[-1], items, found)

    def _part(self, unit: Unit, item: Item, rank: int) -> Item:
        """This rank's part of a unit."""
        block = self._block[unit.item]
        return item.narrow(lambda tensor: unit.view(tensor, rank, block), unit.first)

    def _send(self, exchange: Exchange, items: Sequence[Item], found: Tensor | None) -> None:
        # Copies of a block all keep the momentum; one of them sends it.
        silent = [self._part(unit, items[unit.item], exchange.rank) for unit in exchange.unsent]
        pre_orthogonalize(silent, found, ahead=False)

        def blocks(units: Sequence[Unit]) -> list[Tensor]:
            parts = [self._part(unit, items[unit.item], exchange.rank) for unit in units]
            return pre_orthogonalize(parts, found)

        exchange.send(blocks)

    def _work(self, exchange: Exchange, items: Sequence[Item]) -> None:
        whole = exchange.receive()
        mine = [items[unit.item] for unit in exchange.mine]
        exchange.send_back(orthogonalize_parameters(mine, whole))

    def _apply(self, exchange: Exchange, items: Sequence[Item], found: Tensor | None) -> None:
        results = exchange.receive_back()
        parts = [self._part(unit, items[unit.item], exchange.rank) for unit, _ in results]
        apply(parts, [update for _, update in results], found)


def _shardings_of(
    items: Sequence[Item],
    groups: Sequence[dist.ProcessGroup],
    connected: ConnectedRanks,
    process_group: dist.ProcessGroup | None,
    shardings: Mapping[Tensor, Sharding],
) -> dict[int, Sharding]:
    """The sharding of every parameter that has one, by its place in the step."""
    indices_of: dict[int, list[int]] = {id(group): [] for group in groups}
    for index, item in enumerate(items):
        group: dist.ProcessGroup | None = process_group
        if isinstance(item.handle, DTensor):
            group = group_of(item.handle)
        elif item.handle in shardings:
            group = shardings[item.handle].group
        if group is not None:
            indices_of[id(group)].append(index)
    placed: dict[int, Sharding] = {}
    error = _wrong_placement(items)
    # All groups, also those without a gradient on this rank: its other ranks may have some, and
    # would wait. For the same reason ranks gather what each could compute by itself.
    for group in groups:
        indices = indices_of[id(group)]
        parts = [_part_of(items[index], shardings) for index in indices]
        try:
            placed |= dict(zip(indices, Sharding.gather(parts, group), strict=True))
        except ValueError as found:
            error = error or found
    if (message := connected.first_error(None if error is None else str(error))) is not None:
        raise ValueError(message)
    return placed


def _wrong_placement(items: Sequence[Item]) -> ValueError | None:
    for item in items:
        if isinstance(item.handle, DTensor) and group_of(item.handle) is not None:
            try:
                check_placements(item.handle)
            except ValueError as error:
                return ValueError(f"{validation.label_of(item.group, item.handle)}: {error}")
    return None


def _part_of(item: Item, shardings: Mapping[Tensor, Sharding]) -> tuple[tuple[int, ...], Block]:
    """The shape of the whole parameter, and what this rank holds of it."""
    handle = item.handle
    if isinstance(handle, DTensor):
        return item.shape, own_block(handle)
    if handle in shardings:
        declared = shardings[handle]
        return item.shape, declared.blocks[declared.rank]
    return item.shape, Block((0,) * handle.ndim, tuple(handle.shape))


def _is_whole(item: Item, sharding: Sharding) -> bool:
    """Whether this rank can orthogonalize what it holds by itself, and nobody else does."""
    return len(sharding.blocks) == 1 or (
        sharding.is_local and item.layout.slices(item.shape) == item.shape[0]
    )


def _cost(item: Item) -> float:
    """Multiply-adds of a Newton-Schulz step of all matrices of a parameter, about."""
    matrices = item.layout.split(torch.empty(item.shape, device="meta"))
    return float(sum(m.size(0) * min(m.shape[-2:]) ** 2 * sum(m.shape[-2:]) for m in matrices))
