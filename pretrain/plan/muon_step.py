"""Messages and memory of the optimizer's step on an accelerator.

Owners, buckets and messages are made by the functions of :mod:`muonclip.distributed`, and tensors
are counted as :mod:`muonclip.muon` makes them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from muonclip.distributed.exchange import RESULT_ELEMENTS
from muonclip.distributed.muon import BUCKET_ELEMENTS
from muonclip.distributed.plan import (
    Bucket,
    Cut,
    WorkUnit,
    make_buckets,
    nearest,
    segments,
    split_results,
)
from muonclip.distributed.scaled_float16 import message_size
from muonclip.distributed.sharding import TensorShard
from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.muon import BATCH_ELEMENTS_ELSEWHERE
from muonclip.orthogonalize import prefers_gram
from pretrain.config import Config
from pretrain.model.weights import Weight
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.ranks import Ranks
from pretrain.plan.shared_matrices import (
    SharedMatrices,
    copies_of,
    has_sharded_state,
    ns_dtype,
    numel,
    stage_size,
)


class Sizes(NamedTuple):
    """Bytes of an element of some matrices.

    Attributes:
        gradient: of a gradient or update on its way to an owner.
        weight: of a weight on its way to an owner; 0 if it has no master copy.
        update: of the update that is orthogonalized.
        result: of the orthogonalized update.
        returned: of a result on its way back.
        has_sharded_state: whether the owner updates momentum and master copy.
    """

    gradient: int
    weight: int
    update: int
    result: int
    returned: int
    has_sharded_state: bool

    @classmethod
    def of(cls, config: Config, dtype: str, has_sharded_state: bool) -> "Sizes":
        """Those of matrices with Newton-Schulz in ``dtype``."""
        weight, result = ITEMSIZE[config.precision], ITEMSIZE[dtype]
        update = FLOAT32 if dtype == "float16" else result
        if not has_sharded_state:  # travels in 16 bits, see ``muonclip.distributed.scaled_float16``
            return cls(result, 0, update, result, result, False)
        has_master = weight != FLOAT32
        returned = weight if has_master else result
        return cls(FLOAT32, weight if has_master else 0, update, result, returned, True)

    @property
    def is_scaled(self) -> bool:
        """Whether the exponents of scaled float16 travel to owners, too."""
        return self.gradient < self.update


def sent_by_owners(config: Config, ranks: Ranks, shared: Iterable[SharedMatrices]) -> float:
    """Bytes of matrices that a rank of a stage sends in a step, on average."""
    sent = 0
    for matrices in shared:
        for work in (_Work(config, matrices, bucket) for bucket in _buckets(matrices)):
            sent += work.sent_to_owners() * (work.sizes.gradient + work.sizes.weight)
            for message in work.messages:
                sent += _sent_back(message) * work.sizes.returned
    return sent / stage_size(ranks)


def _buckets(matrices: SharedMatrices) -> list[Bucket]:
    elements = BUCKET_ELEMENTS * len(matrices.places)
    return make_buckets(matrices.units, matrices.owners, elements)


def _sent_back(message: Bucket) -> int:
    """Elements that all ranks together send, to return a message's results.

    Every part to its rank, but what the owner keeps; then all parts to all ranks of a set.
    """
    copies = message[0][0].copies
    sent = 0
    for number, holders in enumerate(copies.sets):
        places = list(segments(message, number))
        cut = Cut.of(places[-1][2], len(holders))
        numbers = {rank: index for index, rank in enumerate(holders)}
        kept = sum(
            cut.overlap(numbers[owner], start, stop)
            for owner, start, stop in places
            if owner in numbers
        )
        sent += cut.total - kept + cut.part * (cut.ranks - 1) * cut.ranks
    return sent


def step_buffers(
    config: Config,
    ranks: Ranks,
    weights: Sequence[Weight],
    is_updated: Callable[[Weight], bool],
    shared: Sequence[SharedMatrices],
) -> float:
    """Bytes of temporary tensors of a step on a rank, at most.

    Args:
        weights: trained weights of the stage, with one expert in place of all.
        is_updated: whether a step updates a weight.
        shared: the matrices that ranks share.
    """
    updated = list(filter(is_updated, weights))
    works = [_Work(config, kind, bucket) for kind in shared for bucket in _buckets(kind)]
    # Of all ranks, those that own most of a bucket need most.
    owned: Counter[int] = Counter()
    for work in works:
        for rank, elements in work.owned_elements.items():
            place = work.matrices.places[rank]
            owned[place] = max(owned[place], elements)
    most = max((_buffers(works, place) for place, _ in owned.most_common(4)), default=0)
    return float(max(most, _alone(config, ranks, updated), _refreshed(config, ranks, updated)))


class _Work:
    """A bucket, and bytes of its tensors on a rank, by the rank's number in the group."""

    def __init__(self, config: Config, matrices: SharedMatrices, bucket: Bucket) -> None:
        self.matrices, self.bucket = matrices, bucket
        self.sizes = Sizes.of(config, matrices.ns_dtype, matrices.has_sharded_state)
        self.owned_elements: Counter[int] = Counter()
        for unit, owner in bucket:
            self.owned_elements[owner] += numel(unit)

    @cached_property
    def layouts(self) -> dict[WorkUnit, MatrixLayout]:
        """The layout of each unit."""
        return dict(zip(self.matrices.units, self.matrices.layouts, strict=True))

    @cached_property
    def messages(self) -> list[Bucket]:
        """Messages of results."""
        return split_results(self.bucket, RESULT_ELEMENTS)

    @cached_property
    def owners_have_all(self) -> bool:
        """Whether nothing is sent to owners."""
        return all(unit.is_whole_on(owner) for unit, owner in self.bucket)

    @cached_property
    def _outgoing(self) -> dict[int, list[tuple[WorkUnit, TensorShard]]]:
        """The shards that each rank sends, also to itself."""
        nodes = [0] * len(self.matrices.places)
        sent: dict[int, list[tuple[WorkUnit, TensorShard]]] = {}
        for unit, owner in self.bucket:
            for shard, holders in unit.held:
                sender = nearest(holders, owner, nodes)
                sent.setdefault(sender, []).append((unit, shard))
        return sent

    def _message_size(self, unit: WorkUnit, shard: TensorShard) -> int:
        """Elements of a message to an owner that is not this rank."""
        if not self.sizes.is_scaled:
            return shard.numel
        return message_size(shard.sizes, self.layouts[unit].input_dims(unit.shape))

    def sent_to_owners(self) -> int:
        """Elements in messages that owners do not send themselves."""
        return sum(
            self._message_size(unit, shard)
            for unit, owner in self.bucket
            for number, shard in enumerate(unit.shards)
            if shard is not None and unit.copies.set_of[owner] != number
        )

    def travelling(self, rank: int) -> int:
        """Shards on their way to owners."""
        outgoing = self._outgoing.get(rank, [])
        size = self.sizes.gradient + self.sizes.weight
        if not self.owners_have_all:
            elements = sum(self._message_size(unit, shard) for unit, shard in outgoing)
            elements += sum(
                self._message_size(unit, shard)
                for unit, owner in self.bucket
                if owner == rank
                for shard, _ in unit.held
            )
            return elements * size
        if self.sizes.has_sharded_state and len(outgoing) == 1:
            return 0  # the gradient and the weights themselves
        if self.sizes.is_scaled:  # only what is sent
            size = self.sizes.update
        return sum(shard.numel for _, shard in outgoing) * size

    def sending(self, rank: int) -> int:
        """Temporary tensors while shards are sent; with sharded state, none."""
        if self.sizes.has_sharded_state:
            return 0
        outgoing = self._outgoing.get(rank, [])
        temporary = _pre_orthogonalizing(
            [(self.layouts[unit], shard.numel) for unit, shard in outgoing], self.sizes.update
        )
        if self.sizes.is_scaled and not self.owners_have_all:  # the updates before they are scaled
            temporary += sum(shard.numel for _, shard in outgoing) * self.sizes.update
        return temporary

    def orthogonalizing(self, rank: int) -> int:
        """Tensors while units are orthogonalized, at most."""
        units = [unit for unit, owner in self.bucket if owner == rank]
        if not units:
            return 0
        sizes, elements = self.sizes, self.owned_elements[rank]
        kinds = [(self.layouts[unit], numel(unit)) for unit in units]
        shapes = [(self.layouts[unit], unit.shape) for unit in units]
        products = _orthogonalizing(shapes, self.matrices.ns_dtype)
        flat = elements * sizes.update
        if not sizes.has_sharded_state:
            return flat + products
        held = elements * (sizes.gradient + sizes.weight)
        if len(units) == 1 and self.owners_have_all:
            held = 0
        most = max(flat + _pre_orthogonalizing(kinds, sizes.update), flat + products)
        if sizes.weight:
            refreshing = max(map(numel, units)) * (sizes.weight + 1 + FLOAT32)
            results = elements * sizes.result
            applying = results + 2 * FLOAT32 * max(_by_layout(kinds).values())
            most = max(most, refreshing, applying)
        return held + most

    def results(self, rank: int) -> int:
        """Results of the units that a rank owns."""
        return self.owned_elements[rank] * self.sizes.returned

    def message_buffers(self, message: Bucket, rank: int) -> tuple[int, int, int]:
        """Bytes that a rank packs for a message of results, receives of it, and then gathers."""
        packed = sum(numel(unit) for unit, owner in message if owner == rank)
        copies = message[0][0].copies
        own = copies.set_of[rank]
        cut = Cut.of(list(segments(message, own))[-1][2], len(copies.sets[own]))
        # Parts that no other rank has a copy of are received where they stay.
        size = self.sizes.returned
        return packed * size, cut.part * size, cut.gathered * size

    def applying(self, message: Bucket, rank: int) -> int:
        """Temporary tensors while a rank applies results that it has received."""
        if self.sizes.has_sharded_state and self.sizes.weight:
            return 0
        shards = [unit.shard_of(rank).numel for unit, _ in message]
        return 2 * FLOAT32 * max(min(sum(shards), BUCKET_ELEMENTS), *shards)


def _buffers(works: Sequence[_Work], place: int) -> int:
    """Bytes on a rank, at most.

    While a bucket is orthogonalized, the next one is on its way to the owners, and the results of
    messages before are being gathered, or have been.
    """
    mine = [work for work in works if place in work.matrices.places]
    numbers = [work.matrices.places.index(place) for work in mine]
    most = arrived = sent = to_gather = 0  # sent: of the message before, which is to be gathered
    applying = 0  # of the message that arrived
    next_applying = 0
    for number, (work, rank) in enumerate(zip(mine, numbers, strict=True)):
        travelling = sending = 0
        if number + 1 < len(mine):
            travelling = mine[number + 1].travelling(numbers[number + 1])
            sending = mine[number + 1].sending(numbers[number + 1])
        before = arrived + sent + travelling
        most = max(most, before + work.travelling(rank) + sending)
        most = max(most, before + work.orthogonalizing(rank))
        owned = work.results(rank)
        for message in work.messages:
            packed, part, gathered = work.message_buffers(message, rank)
            most = max(most, arrived + sent + travelling + owned + packed + part)
            owned -= packed
            waiting = to_gather + travelling + owned + packed + part
            most = max(most, arrived + applying + waiting)
            arrived, to_gather, sent = to_gather, gathered, packed + part
            applying, next_applying = next_applying, work.applying(message, rank)
    return max(most, arrived + to_gather + max(applying, next_applying))


def _by_layout(kinds: Iterable[tuple[MatrixLayout, int]]) -> Counter[MatrixLayout]:
    """Elements of each group of parameters, which have one layout."""
    elements: Counter[MatrixLayout] = Counter()
    for layout, count in kinds:
        elements[layout] += count
    return elements


def _pre_orthogonalizing(kinds: Sequence[tuple[MatrixLayout, int]], update: int) -> int:
    """Bytes of temporary tensors, apart from the updates, when (layout, elements) are updated.

    Gradients as they would be in a step that is skipped, and the updates of a group in float32, if
    they are rounded afterwards.
    """
    elements = _by_layout(kinds)
    wide = max(elements.values(), default=0) if update < FLOAT32 else 0
    return FLOAT32 * (elements.total() + wide)


def _orthogonalizing(units: Sequence[tuple[MatrixLayout, tuple[int, ...]]], dtype: str) -> int:
    """Bytes of results and temporary tensors of Newton-Schulz steps, apart from their input.

    Matrices of one shape are orthogonalized together, with three symmetric products at a time, or
    five in the Gram form. Then those that are fused are joined.
    """
    elements = joined = 0
    by_shape: Counter[tuple[int, int]] = Counter()
    for layout, shape in units:
        matrices = [tuple(m.shape) for m in layout.split(torch.empty(shape, device="meta"))]
        for count, rows, columns in matrices:
            by_shape[rows, columns] += count
            elements += count * rows * columns
            joined += count * rows * columns if layout != WHOLE else 0
    most = 0
    before = 0
    for (rows, columns), count in by_shape.items():
        before += count * rows * columns
        uses_gram = dtype != "bfloat16" and prefers_gram(rows, columns, count)
        squares = (5 if uses_gram else 3) * count * min(rows, columns) ** 2
        # The input is in float32, and rounded.
        rounded = count * rows * columns if dtype == "float16" else 0
        most = max(most, before + rounded + squares)
    return max(most, elements + joined) * ITEMSIZE[dtype]


def _alone(config: Config, ranks: Ranks, weights: Iterable[Weight]) -> int:
    """Bytes of temporary tensors for matrices that a rank has alone, batch by batch."""
    by_dtype: dict[str, list[Weight]] = {}
    for weight in weights:
        shares = copies_of(config, ranks, weight) * weight.shards(config.parallel) > 1
        if weight.optimizer == "muon" and not shares:
            by_dtype.setdefault(ns_dtype(config, weight), []).append(weight)
    most = 0
    for dtype, alone in by_dtype.items():
        sizes = Sizes.of(config, dtype, False)
        total = sum(ranks.tensors(weight) * weight.numel for weight in alone)
        elements = max(min(total, BATCH_ELEMENTS_ELSEWHERE), *(weight.numel for weight in alone))
        wide = FLOAT32 if sizes.update < FLOAT32 else 0
        update, result = sizes.update, sizes.result
        size = max(update + FLOAT32 + wide, update + 2 * result, result + 2 * FLOAT32)
        most = max(most, elements * size)
    return most


def _refreshed(config: Config, ranks: Ranks, weights: Iterable[Weight]) -> int:
    """Bytes of temporary tensors when the largest master copy is compared with its weights."""
    if config.precision == "float32":
        return 0
    sizes = [
        ranks.local_numel(weight)
        // ranks.tensors(weight)
        // (copies_of(config, ranks, weight) if has_sharded_state(config, ranks, weight) else 1)
        for weight in weights
    ]
    return max(sizes, default=0) * (ITEMSIZE[config.precision] + 1 + FLOAT32)
