"""Muon's step over several ranks: plan once, then send, orthogonalize, send back, apply."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed.exchange import (
    BucketExchange,
    ResultExchange,
    arrivals,
    result_exchanges,
)
from muonclip.distributed.groups import (
    ConnectedRanks,
    group_of,
    nodes_of,
    order_of,
    values_of_ranks,
)
from muonclip.distributed.plan import (
    Bucket,
    WorkUnit,
    assign_owners,
    make_buckets,
    make_units,
    of_neurons,
)
from muonclip.distributed.sharded_state import ShardedState
from muonclip.distributed.sharding import Sharding, TensorShard, local_shard
from muonclip.labels import label_of
from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.muon import (
    LocalMuon,
    MuonParam,
    apply_updates,
    orthogonalize_updates,
    pre_orthogonalize,
    state_on_device,
    update_momenta,
    weights_on_device,
)
from muonclip.precision import neuron_dtype, refresh_master

# About this many elements of whole parameters per rank are in a bucket.
BUCKET_ELEMENTS = 2**24
# Multiply-adds of one of five steps that an H100 computes (at 600 TFLOP/s) in the time in which it
# reads and writes an element of gradient, momentum, master copy and result (40 bytes at 3 TB/s) and
# sends the result to other nodes (2 bytes at 50 GB/s).
ELEMENT_COST = 2**12


class SharedParam(NamedTuple):
    """A parameter, its group, and the shape of the whole parameter."""

    param: Tensor
    group: dict[str, Any]
    shape: tuple[int, ...]

    @property
    def layout(self) -> MatrixLayout:
        return self.group["layout"] or WHOLE

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Dimensions along which the parameter's state of neurons has one element."""
        return self.layout.input_dims(self.shape)


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
        owners: the owner of each unit of the parameters whose state the owners keep
            (``shard_state``); those of other parameters are chosen here.
        others: parameters of AdamW in the step whose state is sharded.

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
        owners: Mapping[Tensor, Sequence[int]],
        others: Sequence[SharedParam],
    ) -> None:
        listed = [SharedParam(param.param, param.group, param.shape) for param in params]
        listed += others
        found = all_shardings(listed, groups, connected, process_group, shardings)
        self._local: list[int] = []  # indices of the parameters that need no other rank
        self._local_muon = LocalMuon()
        by_kind: dict[_Kind, list[int]] = defaultdict(list)
        for index, param in enumerate(params):
            sharding = found.get(index)
            # This rank can orthogonalize what it has alone, and no other rank has it.
            if (
                sharding is None
                or len(sharding.shards) == 1
                or (sharding.has_whole_matrices and param.num_slices == param.shape[0])
            ):
                self._local.append(index)
            else:
                by_kind[_Kind.of(param, id(sharding.group))].append(index)
        self._work: list[_Work] = []
        groups_by_id = {id(group): group for group in groups}
        units = {
            kind: [u for i in indices for u in make_param_units(i, listed[i], found[i])]
            for kind, indices in by_kind.items()
        }
        given = {
            kind: [owner for i in indices for owner in owners[params[i].param]]
            for kind, indices in by_kind.items()
            if kind.is_sharded
        }
        balance = Balance()
        for kind, unit_owners in given.items():
            balance.add(units[kind], unit_owners, groups_by_id[kind.group])
        # Ranks meet in several groups, and must come to them in the same order.
        for kind in sorted(
            by_kind, key=lambda kind: (order_of(groups_by_id[kind[0]]), str(kind[1:]))
        ):
            group = groups_by_id[kind.group]
            size = dist.get_world_size(group)
            unit_owners = given[kind] if kind in given else balance.assign(units[kind], group)
            of_params = {index: (found[index], listed[index]) for index in by_kind[kind]}
            variant = _VariantWork if kind.state else _Work
            work = _OwnersWork if kind.is_sharded else variant
            for bucket in make_buckets(units[kind], unit_owners, BUCKET_ELEMENTS * size):
                self._work.append(work(bucket, group, kind, of_params))

    def step(self, params: Sequence[MuonParam], found_inf: Tensor | None) -> None:
        """Update the parameters. A collective call of all ranks that share any of them."""
        if self._work:
            self._work[0].send(params, found_inf)
        self._local_muon.step([params[index] for index in self._local], found_inf)
        for apply, results in arrivals(self._results(params, found_inf)):
            apply(results, params, found_inf)

    def attend(self) -> None:
        """Exchange zeros in place of a step that all ranks skip, and change nothing.

        For a rank that cannot take the step, while others do not know yet that they must skip it.
        """
        for results in arrivals(self._zeros()):
            results[1].receive()

    def _results(
        self, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> Iterator[tuple[_Apply, ResultExchange]]:
        """Orthogonalize the units, and send results and the shards of the next units."""
        for number, work in enumerate(self._work):
            if number + 1 < len(self._work):
                self._work[number + 1].send(params, found_inf)
            results = work.orthogonalize(params, found_inf)
            for apply, exchange in work.returns:
                exchange.send({unit: results.pop(unit) for unit in exchange.owned})
                yield apply, exchange

    def _zeros(self) -> Iterator[tuple[_Apply, ResultExchange]]:
        """Send zeros, in the order of ``step``."""
        if self._work:
            self._work[0].send_zeros()
        for number, work in enumerate(self._work):
            if number + 1 < len(self._work):
                self._work[number + 1].send_zeros()
            work.discard()
            for apply, exchange in work.returns:
                exchange.send_zeros()
                yield apply, exchange


class Balance:
    """Assigns owners group by group, by the work that this rank has in all of them."""

    def __init__(self) -> None:
        self._load = 0.0

    def assign(self, units: Sequence[WorkUnit], group: dist.ProcessGroup) -> list[int]:
        """The owner of each unit. A collective call of the group."""
        # A number of each rank, once for each group and kind of parameters.
        loads = values_of_ranks(self._load, group)
        owners = assign_owners(units, nodes_of(group), loads)
        self.add(units, owners, group)
        return owners

    def add(
        self, units: Sequence[WorkUnit], owners: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        """Count units whose owners are known."""
        rank = dist.get_rank(group)
        pairs = zip(units, owners, strict=True)
        self._load += sum(unit.cost for unit, owner in pairs if owner == rank)


# Applies the results of an exchange to parameters.
_Apply: TypeAlias = Callable[[ResultExchange, Sequence[MuonParam], Tensor | None], None]
# The sharding of each parameter, and the parameter, by its index in the step.
_Params: TypeAlias = Mapping[int, tuple[Sharding, SharedParam]]


class _Kind(NamedTuple):
    """Parameters that may travel together."""

    group: int  # its id
    is_sharded: bool
    has_master: bool
    send_dtype: torch.dtype
    is_scaled: bool  # sent as scaled float16
    return_dtype: torch.dtype
    update_dtype: torch.dtype
    ns_dtype: torch.dtype
    weight_dtype: torch.dtype
    device: torch.device
    state: tuple[str, ...]  # of the variant
    state_dtype: torch.dtype

    @classmethod
    def of(cls, param: MuonParam, group: int) -> _Kind:
        has_master = param.is_sharded and param.master is not None
        return cls(
            group,
            param.is_sharded,
            has_master,
            # Updates, or gradients for an owner that keeps the momentum.
            param.gradient.dtype if param.is_sharded else param.update_dtype,
            not param.is_sharded and is_sent_scaled(param),
            # Updates, or weights of an owner that keeps the master copy.
            param.local.dtype if has_master else param.ns_dtype,
            param.update_dtype,
            param.ns_dtype,
            param.local.dtype if param.is_sharded else param.update_dtype,
            param.device,
            tuple(param.neurons),
            neuron_dtype(param.local.dtype),
        )


class _Work:
    """The units of one bucket, whose momentum is with the ranks that have their shards.

    Args:
        bucket: the units and their owners.
        group, kind, params: of their parameters.

    Attributes:
        returns: the exchanges by which results return, and what applies them.
    """

    def __init__(
        self, bucket: Bucket, group: dist.ProcessGroup, kind: _Kind, params: _Params
    ) -> None:
        self._kind = kind
        self._first = {i: sharding.local.offsets[0] for i, (sharding, _) in params.items()}
        scaled = None
        if kind.is_scaled:  # rows of matrices: several in one scale could differ in size
            scaled = {i: param.input_dims for i, (_, param) in params.items()}
        self._exchange = BucketExchange(bucket, group, kind.send_dtype, kind.device, scaled)
        self._exchanges = [self._exchange]
        results = result_exchanges(bucket, group, kind.return_dtype, kind.device)
        self.returns: list[tuple[_Apply, ResultExchange]] = [(self.apply, r) for r in results]

    def send_zeros(self) -> None:
        """Start sending zeros in place of this rank's shards."""
        for exchange in self._exchanges:
            exchange.send_zeros()

    def discard(self) -> None:
        """Wait for the units that this rank owns, and drop them."""
        for exchange in self._exchanges:
            exchange.receive()

    def send(self, params: Sequence[MuonParam], found_inf: Tensor | None) -> None:
        """Start sending this rank's shards to the owners."""
        shards = partial(self._shards_of, params)
        # All copies of a shard keep the momentum; one of them sends it.
        for batch in _in_batches(shards(self._exchange.unsent)):
            with state_on_device(batch) as moved:
                update_momenta(moved, found_inf)

        def updates(units: Sequence[WorkUnit]) -> list[Tensor]:
            with state_on_device(shards(units)) as moved:
                return pre_orthogonalize(moved, found_inf)

        self._exchange.send(updates)

    def orthogonalize(
        self, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> dict[WorkUnit, Tensor]:
        """Orthogonalize the units that this rank owns, and return what their holders need."""
        return self._orthogonalize([params[u.index] for u in self._exchange.owned], found_inf)

    def _orthogonalize(
        self, owned: Sequence[MuonParam], found_inf: Tensor | None
    ) -> dict[WorkUnit, Tensor]:
        """Orthogonalize the units that this rank owns, given the parameter of each."""
        updates = orthogonalize_updates(owned, self._exchange.receive(), found_inf)
        return dict(zip(self._exchange.owned, updates, strict=True))

    def apply(
        self, results: ResultExchange, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> None:
        """Update this rank's shards of the weights."""
        received = results.receive()
        shards = self._shards_of(params, [unit for unit, _ in received])
        updates = iter([update for _, update in received])
        for batch in _in_batches(shards):
            with weights_on_device(batch) as moved:
                apply_updates(moved, list(islice(updates, len(batch))), found_inf)

    def _shards_of(self, params: Sequence[MuonParam], units: Sequence[WorkUnit]) -> list[MuonParam]:
        return [self._shard_of(unit, params[unit.index]) for unit in units]

    def _shard_of(self, unit: WorkUnit, param: MuonParam) -> MuonParam:
        """A unit's part of this rank's shard of a parameter."""
        start, length = unit.local_range(self._exchange.rank, self._first[unit.index])
        return param.narrow(start, length, unit.first)


class _VariantWork(_Work):
    """The units of one bucket, and the state of their variant, which travels to owners and back.

    Args:
        bucket, group, kind, params: as for ``_Work``.
    """

    def __init__(
        self, bucket: Bucket, group: dist.ProcessGroup, kind: _Kind, params: _Params
    ) -> None:
        super().__init__(bucket, group, kind, params)
        dims = {i: param.input_dims for i, (_, param) in params.items()}
        reduced = {i: sharding.reduced(dims[i]) for i, (sharding, _) in params.items()}
        self._first_of_state = {i: sharding.local.offsets[0] for i, sharding in reduced.items()}
        self._states: dict[str, BucketExchange] = {}
        for name in kind.state:
            of_state = [
                (of_neurons(unit, params[unit.index][0], dims[unit.index]), owner)
                for unit, owner in bucket
            ]
            exchange = BucketExchange(of_state, group, kind.state_dtype, kind.device)
            results = result_exchanges(of_state, group, kind.state_dtype, kind.device)
            self._states[name] = exchange
            self.returns += [(partial(self._store, name), result) for result in results]
        self._exchanges += self._states.values()

    def send(self, params: Sequence[MuonParam], found_inf: Tensor | None) -> None:
        super().send(params, found_inf)
        for name, exchange in self._states.items():
            exchange.send(partial(self._shards_of_state, name, params))

    def orthogonalize(
        self, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> dict[WorkUnit, Tensor]:
        received = {name: exchange.receive() for name, exchange in self._states.items()}
        owned = [
            params[unit.index]._replace(neurons={name: s[i] for name, s in received.items()})
            for i, unit in enumerate(self._exchange.owned)
        ]
        results = self._orthogonalize(owned, found_inf)
        for name, exchange in self._states.items():
            results |= zip(exchange.owned, received[name], strict=True)
        return results

    def _store(
        self,
        name: str,
        results: ResultExchange,
        params: Sequence[MuonParam],
        found_inf: Tensor | None,
    ) -> None:
        """Write new state into this rank's shards of it."""
        received = results.receive()
        shards = self._shards_of_state(name, params, [unit for unit, _ in received])
        for shard, (_, values) in zip(shards, received, strict=True):
            # In a step that is skipped, an owner that could not take it has sent zeros.
            shard.copy_(values if found_inf is None else values.where(found_inf == 0, shard))

    def _shards_of_state(
        self, name: str, params: Sequence[MuonParam], units: Sequence[WorkUnit]
    ) -> list[Tensor]:
        rank, first = self._exchange.rank, self._first_of_state
        return [
            params[unit.index].neurons[name].narrow(0, *unit.local_range(rank, first[unit.index]))
            for unit in units
        ]


class _OwnersWork(_Work):
    """The units of one bucket, whose momentum and master copy are with their owners.

    Gradients travel to the owners, and rounded weights back; updates, without a master copy.
    """

    def __init__(
        self, bucket: Bucket, group: dist.ProcessGroup, kind: _Kind, params: _Params
    ) -> None:
        super().__init__(bucket, group, kind, params)
        self._weights: BucketExchange | None = None
        if kind.has_master:  # owners compare it with the weights, which others may have written to
            dtype = kind.weight_dtype
            self._weights = BucketExchange(bucket, group, dtype, kind.device)
            self._exchanges.append(self._weights)

    def send(self, params: Sequence[MuonParam], found_inf: Tensor | None) -> None:
        shards = partial(self._shards_of, params)
        self._exchange.send(lambda units: [shard.gradient for shard in shards(units)])
        if self._weights is not None:
            self._weights.send(lambda units: [shard.local for shard in shards(units)])

    def orthogonalize(
        self, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> dict[WorkUnit, Tensor]:
        gradients = self._exchange.receive()
        weights = gradients if self._weights is None else self._weights.receive()
        owned = [
            _owned(unit, params[unit.index], gradient, weight)
            for unit, gradient, weight in zip(self._exchange.owned, gradients, weights, strict=True)
        ]
        # No name for the updates: they are freed before the weights are computed.
        results = orthogonalize_updates(owned, pre_orthogonalize(owned, found_inf), found_inf)
        if self._kind.has_master:
            apply_updates(owned, results, found_inf)
            results = [param.local for param in owned]
        return dict(zip(self._exchange.owned, results, strict=True))

    def apply(
        self, results: ResultExchange, params: Sequence[MuonParam], found_inf: Tensor | None
    ) -> None:
        if not self._kind.has_master:
            super().apply(results, params, found_inf)
            return
        for unit, weights in results.receive():
            local = self._shard_of(unit, params[unit.index]).local
            # In a step that is skipped, an owner that could not take it has sent zeros.
            local.copy_(weights if found_inf is None else weights.where(found_inf == 0, local))


def is_sent_scaled(param: MuonParam) -> bool:
    """Whether the update of a parameter travels to owners as scaled float16.

    Newton-Schulz in float16 needs no more bits, but an update has float32's range until the norm of
    the whole matrix is known.
    """
    needs_range = param.ns_dtype == torch.float16 and param.update_dtype == torch.float32
    return needs_range and param.layout.has_input_dims(param.shape)


def _in_batches(params: Sequence[MuonParam]) -> Iterator[list[MuonParam]]:
    """The same in order, few enough at a time for the temporary tensors of their elements."""
    batch: list[MuonParam] = []
    elements = 0
    for param in params:
        if batch and elements + param.local.numel() > BUCKET_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(param)
        elements += param.local.numel()
    if batch:
        yield batch


def _owned(unit: WorkUnit, param: MuonParam, gradient: Tensor, weight: Tensor) -> MuonParam:
    """A unit on its owner, whose state it has.

    Args:
        gradient, weight: of the whole unit; without a master copy, the weight is not read.
    """
    param = param._replace(momentum_buffer=unit_part(param.momentum_buffer, unit))
    if param.momentum_scale is not None:
        param = param._replace(momentum_scale=unit_part(param.momentum_scale, unit))
    param = param._replace(
        neurons={name: unit_part(value, unit) for name, value in param.neurons.items()}
    )
    if param.master is None:
        return param._replace(local=gradient, to_update=gradient, gradient=gradient)
    master = unit_part(param.master, unit)
    refresh_master(master, weight)
    group = param.group
    if group["weight_decay_mode"] == "l2" and group["weight_decay"]:
        gradient = gradient.to(master.dtype).add(master, alpha=group["weight_decay"])
    return param._replace(
        local=weight,
        to_update=master,
        gradient=gradient,
        seed=(*param.seed, unit.first),
    )


def unit_part(state: Tensor, unit: WorkUnit) -> Tensor:
    """The state of a unit, on its owner."""
    assert isinstance(state, ShardedState)
    return next(values for box, values in state.pieces() if box.offsets[0] == unit.first)


def make_param_units(index: int, param: SharedParam, sharding: Sharding) -> list[WorkUnit]:
    """The units of a parameter: slices of a stack, or the whole parameter.

    Args:
        index: the parameter's number, which the units are given.
    """
    count = min(len(sharding.shards), param.layout.slices(param.shape))
    return make_units(
        index,
        sharding.shape,
        sharding.copies,
        sharding.distinct,
        count,
        work_on(param.shape, param.layout),
    )


def all_shardings(
    params: Sequence[SharedParam],
    groups: Sequence[dist.ProcessGroup],
    connected: ConnectedRanks,
    process_group: dist.ProcessGroup | None,
    shardings: Mapping[Tensor, Sharding],
) -> dict[int, Sharding]:
    """The sharding of each parameter that other ranks share, by its index.

    A collective call of all ranks of ``connected``; arguments and errors are those of
    ``DistributedMuon``.
    """
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


@lru_cache
def work_on(shape: tuple[int, ...], layout: MatrixLayout) -> float:
    """Approximate cost of a parameter to the owner of its matrices.

    Returns:
        Multiply-adds of one Newton-Schulz step, and the time to update the state of all elements
        and to send the results, in multiply-adds.
    """
    matrices = layout.split(torch.empty(shape, device="meta"))
    products = sum(m.size(0) * min(m.shape[-2:]) ** 2 * sum(m.shape[-2:]) for m in matrices)
    return float(products + ELEMENT_COST * prod(shape))
