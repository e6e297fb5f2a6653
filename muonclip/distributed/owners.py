"""Owners of the parts of the optimizer's state, with ``shard_state``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed import muon
from muonclip.distributed.exchange import (
    BucketExchange,
    ResultExchange,
    arrivals,
    result_exchanges,
)
from muonclip.distributed.groups import ConnectedRanks, group_of_ranks, order_of
from muonclip.distributed.muon import (
    Balance,
    SharedParam,
    all_shardings,
    make_param_units,
    unit_part,
)
from muonclip.distributed.plan import WorkUnit, make_buckets
from muonclip.distributed.sharded_state import (
    ShardedState,
    StateLayout,
    flat_boxes,
    flat_range,
    write_flat,
)
from muonclip.distributed.sharding import (
    Sharding,
    TensorShard,
    is_dtensor,
    local_tensor,
    reduced_shape,
)
from muonclip.precision import get_master, refresh_master

# At most this many elements of AdamW's parameters are gathered at once.
BUCKET_ELEMENTS = 2**26

_T = TypeVar("_T")


class StateOwners:
    """Owners of the state of parameters of which several ranks have a copy, or equal shards.

    A matrix, or some slices of a stack, have one owner, which also orthogonalizes them. AdamW's
    parameters are cut evenly over the ranks that have copies. A rank that owns much in one group is
    given less in the next. Owners are a function of the parameters' order, never change, and do not
    depend on which parameters have gradients.

    Args:
        process_group: ranks that have copies of the plain tensors without a sharding, or None.
        shardings: of plain tensors that are shards.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None, shardings: Mapping[Tensor, Sharding]
    ) -> None:
        self._process_group, self._shardings = process_group, shardings
        self._balance = Balance()
        self._known: set[Tensor] = set()
        self._sharding_of: dict[Tensor, Sharding] = {}
        self._layouts: dict[Tensor, StateLayout] = {}
        self._shards: dict[Tensor, StateLayout] = {}
        self._owners: dict[Tensor, tuple[int, ...]] = {}
        self._ranges: dict[Tensor, list[tuple[int, int]]] = {}
        self._buckets: list[FlatBucket] = []
        self._shared: dict[Tensor, SharedParam] = {}
        self._scaling: _Scaling | None = None

    def add(
        self,
        params: Sequence[SharedParam],
        groups: Sequence[dist.ProcessGroup],
        connected: ConnectedRanks,
    ) -> None:
        """Assign owners to the parameters that have none. A collective call of ``connected``.

        Args:
            params: of the optimizer, in the same order on every rank that shares them.
            groups: all groups in which this rank shares parameters, sorted by ``order_of``.
            connected: the ranks that ``groups`` connect.
        """
        new = [param for param in params if param.param not in self._known]
        found = all_shardings(new, groups, connected, self._process_group, self._shardings)
        # Frozen parameters have no state now: those that are trained are balanced without them.
        for is_trained in (True, False):
            indices = [i for i in found if new[i].param.requires_grad == is_trained]
            replicated = {i: (new[i], found[i]) for i in sorted(indices) if _has_replicas(found[i])}
            self._assign_matrices(replicated)
            self._cut_flat(replicated)
            self._shared |= {param.param: param for param, _ in replicated.values()}
            for i in indices:
                self._sharding_of[new[i].param] = found[i]
                is_shard = i not in replicated and len(found[i].shards) > 1
                if is_shard and not is_dtensor(new[i].param):
                    boxes = tuple((box,) for box in (found[i].local,) if box.numel)
                    layout = StateLayout(found[i].shape, found[i].group, boxes, self)
                    self._shards[new[i].param] = layout
        self._known.update(param.param for param in new)

    def layout(self, param: Tensor) -> StateLayout | None:
        """The parts of a parameter's state that this rank has; None if it is not sharded here."""
        return self._layouts.get(param)

    def whole_shard(self, param: Tensor, value: Tensor, dims: tuple[int, ...]) -> Tensor:
        """A tensor of state as ``torch.distributed.checkpoint`` must save it.

        Where each rank has another shard of a plain tensor, it would take the shards for copies.

        Args:
            param: its parameter.
            value: has one element along ``dims``, in place of the parameter's.
            dims: dimensions of the parameter.

        Returns:
            A ``ShardedState`` of the memory of ``value``; for other parameters, ``value``.
        """
        is_step = value.shape != reduced_shape(param.shape, dims)
        if param not in self._shards or is_step:
            return value
        layout = self._shards[param].reduced(dims)
        sharding = self._sharding_of[param].reduced(dims)
        if sharding.shards.index(sharding.local) != sharding.rank:  # the first of several copies
            layout = StateLayout(layout.shape, layout.group, (), self)
        parts = [value.reshape(-1)] * len(layout.parts)
        return ShardedState(layout, parts, value.dtype, value.device)

    def owners(self, param: Tensor) -> tuple[int, ...]:
        """The owner of each unit of a parameter of Muon whose state is sharded."""
        return self._owners[param]

    def local_ranges(self, param: Tensor) -> list[tuple[int, int]]:
        """The parts of a parameter of AdamW, as ranges of its flat local tensor."""
        return self._ranges[param]

    def collect(
        self, param: SharedParam, local: Tensor, dims: tuple[int, ...] = ()
    ) -> ShardedState:
        """The parts of a tensor that this rank stores, given its local shard of the tensor.

        A collective call of the ranks that share the parameter.

        Args:
            param: a parameter whose state is sharded.
            local: placed as the parameter is; not changed.
            dims: dimensions along which it has one element, in place of the parameter's.
        """
        layout, sharding = self._layouts[param.param], self._sharding_of[param.param]
        if dims:  # small
            return layout.reduced(dims).select(sharding.reduced(dims).gather_whole(local))
        if param.param not in self._owners:
            ranges = self.local_ranges(param.param)
            parts = [flat_range(local, start, stop).clone() for start, stop in ranges]
            return ShardedState(layout, parts, local.dtype, local.device)
        if all(shard.sizes == sharding.shape for shard in sharding.shards):
            return layout.select(local)
        units = make_param_units(0, param, sharding)
        bucket = list(zip(units, self._owners[param.param], strict=True))
        exchange = BucketExchange(bucket, sharding.group, local.dtype, local.device)
        rank, first = sharding.rank, sharding.local.offsets[0]
        exchange.send(
            lambda units: [local.narrow(0, *unit.local_range(rank, first)) for unit in units]
        )
        parts = [received.reshape(-1).clone() for received in exchange.receive()]
        return ShardedState(layout, parts, local.dtype, local.device)

    def gather(self, params: Iterable[Tensor], found_inf: Tensor | None) -> None:
        """Send the new values of AdamW's parameters to the ranks that have copies.

        A collective call of these ranks.

        Args:
            params: parameters of AdamW that were updated, the same on all ranks that share them.
            found_inf: 1 if the step is skipped, and nothing must change; None: it is not.
        """
        updated = set(params)
        for bucket in self._buckets:
            if any(param in updated for param, _, _ in bucket.entries):
                bucket.gather(found_inf)

    def attend(self, params: Mapping[Tensor, tuple[torch.dtype, torch.device]]) -> None:
        """Take part in ``gather`` of a step that is skipped, and change nothing.

        Args:
            params: those of ``gather`` on other ranks, with the dtype and device they have there.
        """
        for bucket in self._buckets:
            kinds = [params[param] for param, _, _ in bucket.entries if param in params]
            if kinds:
                bucket.attend(*kinds[0])

    def scale(self, factors: Mapping[Tensor, Tensor]) -> None:
        """Multiply master copies by factors, and round them into the weights of all ranks.

        A collective call of the ranks that share the parameters. Weights whose factor is one keep
        their bits, and weights written since the last step replace the master copy's.

        Args:
            factors: of parameters with a sharded master copy, in the same order on all ranks:
                broadcastable to the local tensor.
        """
        flat = [param for param in factors if param in self._ranges]
        for param in flat:
            local, master = local_tensor(param), _master(param)
            by_element = factors[param].expand_as(local)
            for part, (start, stop) in zip(master.parts, self._ranges[param], strict=True):
                weights = flat_range(local, start, stop)
                scaled = _scale(part, weights, flat_range(by_element, start, stop))
                write_flat(local, start, scaled)
        self.gather(flat, None)
        matrices = [param for param in factors if param in self._owners]
        if self._scaling is None or not self._scaling.matches(matrices):
            self._scaling = _Scaling(matrices, self._sharding_of, self._owners, self._shared)
        self._scaling.scale(factors)

    def _assign_matrices(self, params: Mapping[int, tuple[SharedParam, Sharding]]) -> None:
        by_group: dict[int, list[int]] = defaultdict(list)
        for index, (param, sharding) in params.items():
            if param.group["algorithm"] == "muon":
                by_group[id(sharding.group)].append(index)
        groups = {id(sharding.group): sharding.group for _, sharding in params.values()}
        for key in sorted(by_group, key=lambda key: order_of(groups[key])):
            indices, group = by_group[key], groups[key]
            units = [u for i in indices for u in make_param_units(i, *params[i])]
            owned: dict[int, list[tuple[WorkUnit, int]]] = defaultdict(list)
            for unit, owner in zip(units, self._balance.assign(units, group), strict=True):
                owned[unit.index].append((unit, owner))
            for index, pairs in owned.items():
                param, sharding = params[index]
                owners = tuple(owner for _, owner in pairs)
                parts = tuple(
                    (TensorShard((unit.first, *(0 for _ in unit.shape[1:])), unit.shape),)
                    for unit, owner in pairs
                    if owner == sharding.rank
                )
                self._owners[param.param] = owners
                self._sharding_of[param.param] = sharding
                self._layouts[param.param] = StateLayout(
                    sharding.shape, sharding.group, parts, self
                )

    def _cut_flat(self, params: Mapping[int, tuple[SharedParam, Sharding]]) -> None:
        by_kind: dict[Any, list[SharedParam]] = defaultdict(list)
        groups = {id(sharding.group): sharding.group for _, sharding in params.values()}
        for param, sharding in params.values():
            if param.group["algorithm"] != "adamw":
                continue
            self._sharding_of[param.param] = sharding
            # The set of each rank, the same on all of them: they must meet in the same order.
            sets: dict[TensorShard, int] = {}
            set_of = tuple(sets.setdefault(shard, len(sets)) for shard in sharding.shards)
            local = local_tensor(param.param)
            # Biases of queries and keys are sent once more by QK-Clip: not with whole embeddings.
            kind = (id(sharding.group), set_of, local.dtype, local.device, local.ndim > 1)
            by_kind[kind].append(param)
        ordered = sorted(by_kind, key=lambda kind: (order_of(groups[kind[0]]), *map(str, kind[1:])))
        for kind in ordered:
            group, set_of = groups[kind[0]], kind[1]
            holders = [rank for rank, other in enumerate(set_of) if other == set_of[group.rank()]]
            if len(holders) < group.size():
                ranks = dist.get_process_group_ranks(group)
                group = group_of_ranks([ranks[holder] for holder in holders], [group])
            members = by_kind[kind]
            parts: dict[Tensor, list[tuple[TensorShard, ...]]] = {p.param: [] for p in members}
            self._ranges |= {param.param: [] for param in members}
            sizes = [local_tensor(member.param).numel() for member in members]
            for indices in cut_flat(sizes, BUCKET_ELEMENTS):
                entries = [(members[i].param, start, stop) for i, start, stop in indices]
                bucket = FlatBucket(group, entries)
                self._buckets.append(bucket)
                for tensor, start, stop in bucket.local_ranges():
                    shard = self._sharding_of[tensor].local
                    self._ranges[tensor].append((start, stop))
                    boxes = flat_boxes(shard.sizes, start, stop)
                    parts[tensor].append(tuple(_moved(box, shard.offsets) for box in boxes))
            for param in members:
                sharding = self._sharding_of[param.param]
                self._layouts[param.param] = StateLayout(
                    sharding.shape, sharding.group, tuple(parts[param.param]), self
                )


class _ScalingExchanges(NamedTuple):
    """Factors and weights of a bucket on their way to the owners, and weights back."""

    factors: BucketExchange
    weights: BucketExchange
    results: list[ResultExchange]


class _Scaling:
    """Scales the master copies of matrices on their owners, and sends the weights to all holders.

    Args:
        params: the parameters, in the same order on all ranks that share them.
        shardings, owners, shared: of each parameter.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        shardings: Mapping[Tensor, Sharding],
        owners: Mapping[Tensor, tuple[int, ...]],
        shared: Mapping[Tensor, SharedParam],
    ) -> None:
        self._params = list(params)
        self._first = [shardings[param].local.offsets[0] for param in params]
        by_kind: dict[Any, list[int]] = defaultdict(list)
        groups = {id(shardings[param].group): shardings[param].group for param in params}
        for index, param in enumerate(params):
            local = local_tensor(param)
            by_kind[id(shardings[param].group), local.dtype, local.device].append(index)
        self._exchanges: list[_ScalingExchanges] = []
        for kind in sorted(by_kind, key=lambda kind: (order_of(groups[kind[0]]), str(kind[1:]))):
            (key, dtype, device), indices = kind, by_kind[kind]
            group = groups[key]
            units = [
                unit
                for i in indices
                for unit in make_param_units(i, shared[params[i]], shardings[params[i]])
            ]
            unit_owners = [owner for i in indices for owner in owners[params[i]]]
            for bucket in make_buckets(units, unit_owners, muon.BUCKET_ELEMENTS * group.size()):
                self._exchanges.append(
                    _ScalingExchanges(
                        BucketExchange(bucket, group, torch.float32, device),
                        BucketExchange(bucket, group, dtype, device),
                        result_exchanges(bucket, group, dtype, device),
                    )
                )

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether the exchanges are of these parameters."""
        return len(params) == len(self._params) and all(
            param is planned for param, planned in zip(params, self._params, strict=True)
        )

    def scale(self, factors: Mapping[Tensor, Tensor]) -> None:
        """As ``StateOwners.scale``."""
        for rank, results in arrivals(self._results(factors)):
            for unit, weights in results.receive():
                (local,) = self._shards(rank, None, [unit])
                local.copy_(weights)

    def _results(self, factors: Mapping[Tensor, Tensor]) -> Iterator[tuple[int, ResultExchange]]:
        """Scale the master copies, and send the weights."""
        for by_factor, by_weight, returns in self._exchanges:
            by_factor.send(partial(self._shards, by_factor.rank, factors))
            by_weight.send(partial(self._shards, by_weight.rank, None))
            scaled = {}
            received = zip(by_factor.owned, by_factor.receive(), by_weight.receive(), strict=True)
            for unit, factor, weights in received:
                master = unit_part(_master(self._params[unit.index]), unit)
                scaled[unit] = _scale(master, weights, factor)
            for results in returns:
                results.send({unit: scaled[unit] for unit in results.owned})
                yield by_weight.rank, results

    def _shards(
        self, rank: int, factors: Mapping[Tensor, Tensor] | None, units: Sequence[WorkUnit]
    ) -> list[Tensor]:
        """The parts of units in this rank's weights, or in factors broadcast to them."""
        shards = []
        for unit in units:
            param = self._params[unit.index]
            values = local_tensor(param)
            if factors is not None:
                values = factors[param].expand_as(values)
            start, length = unit.local_range(rank, self._first[unit.index])
            shards.append(values.narrow(0, start, length))
        return shards


def _master(param: Tensor) -> ShardedState:
    master = get_master(param)
    assert isinstance(master, ShardedState)
    return master


def _scale(master: Tensor, weights: Tensor, factors: Tensor) -> Tensor:
    """Scale a part of a master copy, and return the weights."""
    refresh_master(master, weights)
    master.mul_(factors)
    return torch.where(factors == 1, weights, master.to(weights.dtype))


class FlatBucket:
    """Parameters of AdamW, flat and one after another, cut evenly over ranks that have copies.

    Args:
        group: these ranks.
        entries: (parameter, start, stop): a range of its flat local tensor.

    Attributes:
        entries, group: as given.
        chunk: number of elements of each rank; the last ranks may have fewer.
    """

    def __init__(
        self, group: dist.ProcessGroup, entries: Sequence[tuple[Tensor, int, int]]
    ) -> None:
        self.group, self.entries = group, list(entries)
        self.chunk = _chunk(entries, group.size())

    def local_ranges(self) -> Iterator[tuple[Tensor, int, int]]:
        """The entries and parts of entries that this rank updates."""
        return chunk_ranges(self.entries, self.group.size(), self.group.rank())

    def gather(self, found_inf: Tensor | None) -> None:
        """Copy each rank's ranges into the parameters of all. A collective call of the group.

        Args:
            found_inf: as for ``StateOwners.gather``.
        """
        locals_ = [local_tensor(param) for param, _, _ in self.entries]
        packed = torch.zeros(self.chunk, dtype=locals_[0].dtype, device=locals_[0].device)
        position = 0
        for param, start, stop in self.local_ranges():
            packed[position : position + stop - start] = flat_range(
                local_tensor(param), start, stop
            )
            position += stop - start
        gathered = self._gather(packed)
        position = 0
        for local, (_, start, stop) in zip(locals_, self.entries, strict=True):
            values = gathered[position : position + stop - start]
            if found_inf is not None:  # a rank that could not take the step has sent zeros
                values = values.where(found_inf == 0, flat_range(local, start, stop))
            write_flat(local, start, values)
            position += stop - start

    def attend(self, dtype: torch.dtype, device: torch.device) -> None:
        """Send zeros in ``gather``, and drop what is received."""
        self._gather(torch.zeros(self.chunk, dtype=dtype, device=device))

    def _gather(self, packed: Tensor) -> Tensor:
        gathered = packed.new_empty(self.chunk * self.group.size())
        dist.all_gather_into_tensor(gathered, packed, group=self.group)
        return gathered


def _has_replicas(sharding: Sharding) -> bool:
    """Whether several ranks have the same elements of a parameter."""
    return len(sharding.copies.sets) < len(sharding.shards)


def cut_flat(sizes: Sequence[int], elements: int) -> list[list[tuple[int, int, int]]]:
    """(index, start, stop): ranges of flat tensors of these sizes, in lists of up to ``elements``
    elements."""
    lists: list[list[tuple[int, int, int]]] = []
    room = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            if not room:
                lists.append([])
                room = elements
            stop = min(size, start + room)
            lists[-1].append((index, start, stop))
            room -= stop - start
            start = stop
    return lists


def chunk_ranges(
    entries: Sequence[tuple[_T, int, int]], ranks: int, rank: int
) -> Iterator[tuple[_T, int, int]]:
    """The entries (anything, start, stop), and parts of entries, of one of several ranks, to each
    of which equally many elements are given."""
    chunk = _chunk(entries, ranks)
    first, last, position = rank * chunk, (rank + 1) * chunk, 0
    for key, start, stop in entries:
        begin = max(start, start + first - position)
        end = min(stop, start + last - position)
        if begin < end:
            yield key, begin, end
        position += stop - start


def _chunk(entries: Sequence[tuple[Any, int, int]], ranks: int) -> int:
    return -(-sum(stop - start for _, start, stop in entries) // ranks)


def _moved(box: TensorShard, offsets: tuple[int, ...]) -> TensorShard:
    return TensorShard(tuple(a + b for a, b in zip(box.offsets, offsets, strict=True)), box.sizes)
