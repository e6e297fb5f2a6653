"""Muon's step over several ranks: plan once, then send, orthogonalize, send back, apply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed.exchange import BucketExchange
from muonclip.distributed.groups import ConnectedRanks, group_of, order_of
from muonclip.distributed.plan import WorkUnit, assign_owners, make_buckets, make_units
from muonclip.distributed.sharding import Sharding, TensorShard, local_shard
from muonclip.labels import label_of
from muonclip.muon import (
    MuonParam,
    apply_updates,
    orthogonalize_updates,
    pre_orthogonalize,
    step_local,
    update_momenta,
)

# About this many elements of whole parameters per rank are in a bucket.
BUCKET_ELEMENTS = 2**24


class DistributedMuon:
    """Muon's step for one list of parameters, of which ranks have shards or copies.

    Each matrix is orthogonalized by one rank, its owner; owners are balanced by cost. While some
    matrices are orthogonalized, buckets of others are on their way.

    The constructor is a collective call of all ranks of ``connected``.

    Args:
        params: the parameters of a step, in the same order on every rank that shares them.
        groups: all groups in which this rank shares parameters, with or without a gradient in
            this step, sorted by ``order_of``.
        connected: the ranks that ``groups`` connect.
        process_group: ranks that have copies of the plain tensors without a sharding, or None.
        shardings: of plain tensors that are shards.

    Raises:
        ValueError: on all ranks of ``connected``, if the ranks of a group have gradients for
            different parameters, or shards of one that its placements do not describe.
    """

    def __init__(
        self,
        params: Sequence[MuonParam],
        groups: Sequence[dist.ProcessGroup],
        connected: ConnectedRanks,
        process_group: dist.ProcessGroup | None,
        shardings: Mapping[Tensor, Sharding],
    ) -> None:
        self._params = [param.param for param in params]
        all_shardings = _all_shardings(params, groups, connected, process_group, shardings)
        self._local: list[int] = []  # indices of the parameters that need no other rank
        self._shards: dict[int, TensorShard] = {}
        shared: dict[tuple[int, torch.dtype, torch.dtype, torch.device], list[int]]
        shared = defaultdict(list)
        for index, param in enumerate(params):
            sharding = all_shardings.get(index)
            # This rank can orthogonalize what it has alone, and no other rank has it.
            if (
                sharding is None
                or len(sharding.shards) == 1
                or (sharding.has_whole_matrices and param.num_slices == param.shape[0])
            ):
                self._local.append(index)
                continue
            self._shards[index] = sharding.local
            key = (id(sharding.group), param.update_dtype, param.ns_dtype, param.local.device)
            shared[key].append(index)
        self._exchanges: list[BucketExchange] = []
        groups_by_id = {id(group): group for group in groups}
        # Ranks meet in several groups, and must come to them in the same order.
        for key in sorted(shared, key=lambda key: (order_of(groups_by_id[key[0]]), str(key[1:]))):
            group = groups_by_id[key[0]]
            size = dist.get_world_size(group)
            units = [
                unit
                for index in shared[key]
                for unit in make_units(
                    index,
                    all_shardings[index].shape,
                    all_shardings[index].shards,
                    min(size, params[index].num_slices),
                    _cost(params[index]),
                )
            ]
            owners = assign_owners(units, size)
            for bucket in make_buckets(units, owners, BUCKET_ELEMENTS * size):
                self._exchanges.append(BucketExchange(bucket, group, *key[1:]))

    def matches(self, params: Sequence[MuonParam]) -> bool:
        """Whether the plan was made for these parameters."""
        return len(params) == len(self._params) and all(
            param.param is planned for param, planned in zip(params, self._params, strict=True)
        )

    def step(self, params: Sequence[MuonParam], found_inf: Tensor | None) -> None:
        """Update the parameters. A collective call of all ranks that share any of them."""
        exchanges = self._exchanges
        if exchanges:
            self._send(exchanges[0], params, found_inf)
        step_local([params[index] for index in self._local], found_inf)
        for number, exchange in enumerate(exchanges):
            if number + 1 < len(exchanges):
                self._send(exchanges[number + 1], params, found_inf)
            self._orthogonalize(exchange, params)
            if number:
                self._apply(exchanges[number - 1], params, found_inf)
        if exchanges:
            self._apply(exchanges[-1], params, found_inf)

    def _shard_of(self, unit: WorkUnit, param: MuonParam, rank: int) -> MuonParam:
        """A unit's part of this rank's shard of a parameter."""
        shard = unit.shard_of(rank)
        start = unit.first + shard.offsets[0] - self._shards[unit.index].offsets[0]
        return param.narrow(start, shard.sizes[0], unit.first)

    def _send(
        self, exchange: BucketExchange, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> None:
        def shards(units: Sequence[WorkUnit]) -> list[MuonParam]:
            return [self._shard_of(unit, params[unit.index], exchange.rank) for unit in units]

        # All copies of a shard keep the momentum; one of them sends it.
        update_momenta(shards(exchange.unsent), found_inf)
        exchange.send(lambda units: pre_orthogonalize(shards(units), found_inf))

    def _orthogonalize(self, exchange: BucketExchange, params: Sequence[MuonParam]) -> None:
        updates = exchange.receive()
        owned = [params[unit.index] for unit in exchange.owned]
        exchange.send_back(orthogonalize_updates(owned, updates))

    def _apply(
        self, exchange: BucketExchange, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> None:
        results = exchange.receive_back()
        shards = [self._shard_of(unit, params[unit.index], exchange.rank) for unit, _ in results]
        apply_updates(shards, [update for _, update in results], found_inf)


def _all_shardings(
    params: Sequence[MuonParam],
    groups: Sequence[dist.ProcessGroup],
    connected: ConnectedRanks,
    process_group: dist.ProcessGroup | None,
    shardings: Mapping[Tensor, Sharding],
) -> dict[int, Sharding]:
    """The sharding of each parameter that other ranks share, by its index in the step."""
    by_group: dict[int, list[int]] = {id(group): [] for group in groups}
    error: ValueError | None = None
    shards: dict[int, TensorShard] = {}
    for index, param in enumerate(params):
        if (group := group_of(param.param, process_group, shardings)) is None:
            continue
        by_group[id(group)].append(index)
        try:
            sharding = shardings.get(param.param)
            shards[index] = local_shard(param.param) if sharding is None else sharding.local
        except ValueError as exception:
            message = f"{label_of(param.group, param.param)}: {exception}"
            error = error or ValueError(message)
    _raise_on_all_ranks(error, connected)
    found: dict[int, Sharding] = {}
    # All groups, also those without a gradient on this rank: its other ranks may have some, and
    # would wait. For the same reason ranks gather what each could compute by itself.
    for group in groups:
        indices = by_group[id(group)]
        local = [(params[index].shape, shards[index]) for index in indices]
        try:
            found |= dict(zip(indices, Sharding.gather(local, group), strict=True))
        except ValueError as exception:
            error = error or exception
    _raise_on_all_ranks(error, connected)
    return found


def _raise_on_all_ranks(error: ValueError | None, connected: ConnectedRanks) -> None:
    """Raise the error of one rank on all of them."""
    if (message := connected.first_error(None if error is None else str(error))) is not None:
        raise ValueError(message)


def _cost(param: MuonParam) -> float:
    """Approximate multiply-adds of one Newton-Schulz step of all matrices of a parameter."""
    matrices = param.layout.split(torch.empty(param.shape, device="meta"))
    return float(sum(m.size(0) * min(m.shape[-2:]) ** 2 * sum(m.shape[-2:]) for m in matrices))
