"""Messages and buffers of Muon's step, whose matrices are shared by the ranks that have them.

Matrices, owners and buckets are those of :mod:`muonclip.distributed`, which this module describes.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from muonclip.distributed.exchange import RESULT_ELEMENTS
from muonclip.distributed.muon import BUCKET_ELEMENTS
from muonclip.distributed.plan import (
    Bucket,
    Cut,
    WorkUnit,
    assign_owners,
    make_buckets,
    segments,
    split_results,
)
from muonclip.distributed.sharding import Copies, TensorShard
from muonclip.muon import BATCH_ELEMENTS_ELSEWHERE
from pretrain.config import Config
from pretrain.model.weights import Weight
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.ranks import Ranks


class MuonStep(NamedTuple):
    """Cost of Muon's step on a rank, in bytes.

    Attributes:
        sent: on average over the ranks.
        buffers: memory of a rank, at most.
    """

    sent: float
    buffers: float


def muon_step(config: Config, ranks: Ranks, weights: Sequence[Weight]) -> MuonStep:
    """Return the cost of the step of ranks with these weights.

    Every rank orthogonalizes the matrices of encoder and projector itself.
    """
    dense: list[Weight] = []
    experts: list[Weight] = []
    encoder: list[Weight] = []
    for weight in weights:
        if weight.optimizer == "muon":
            kind = encoder if weight.layer is None else dense if weight.expert is None else experts
            kind.append(weight)
    steps = [
        _step(config, ranks, encoder, 1, 1),
        _step(config, ranks, dense, ranks.tensor, ranks.replicas),
        _step(config, ranks, experts, ranks.expert_tensor, ranks.expert_data),
    ]
    return MuonStep(sum(step.sent for step in steps), max(step.buffers for step in steps))


def _step(
    config: Config, ranks: Ranks, weights: Sequence[Weight], shards: int, replicas: int
) -> MuonStep:
    """The step of weights of which each rank has one of ``shards``, and ``replicas`` have it."""
    dtype, size = config.optimizer.ns_dtype, shards * replicas
    itemsize = ITEMSIZE["bfloat16" if dtype == "auto" else dtype]  # auto, on an accelerator
    if not weights:
        return MuonStep(0.0, 0.0)
    if size == 1:
        elements = sum(ranks.tensors(weight) * weight.numel for weight in weights)
        at_a_time = min(elements, BATCH_ELEMENTS_ELSEWHERE)
        at_a_time = max(at_a_time, *(weight.numel for weight in weights))
        # The updates in float32 and rounded, Newton-Schulz's two buffers, and its result.
        return MuonStep(0.0, float(at_a_time * (FLOAT32 + 4 * itemsize)))
    units = [
        make_unit(index, weight, shards if weight.split else 1, size)
        for index, weight in enumerate(weights)
        for _ in range(ranks.tensors(weight))
    ]
    buckets = make_buckets(units, assign_owners(units, [0] * size), BUCKET_ELEMENTS * size)
    messages = [split_results(bucket, RESULT_ELEMENTS) for bucket in buckets]
    sent = sum(
        sum(unit.shape[0] * (1 - 1 / len(unit.copies.sets)) for unit, _ in bucket)
        + sum(map(_sent_back, results))
        for bucket, results in zip(buckets, messages, strict=True)
    )
    # Of all ranks, one that owns most of a bucket needs most.
    busiest = {max(_owned(bucket).items(), key=lambda item: item[1])[0] for bucket in buckets}
    buffers = max(_buffers(buckets, messages, rank) for rank in busiest)
    return MuonStep(sent / size * itemsize, float(buffers * itemsize))


def make_unit(index: int, weight: Weight, parts: int, size: int) -> WorkUnit:
    """A flat matrix, in parts on the ranks of a group: what it is cut along does not matter."""
    part = weight.numel // parts
    shards = tuple(TensorShard((number * part,), (part,)) for number in range(parts))
    cost = _newton_schulz_cost(weight)
    return WorkUnit(index, 0, (weight.numel,), _copies(parts, size), shards, cost)


@lru_cache
def _copies(parts: int, size: int) -> Copies:
    """Neighbouring ranks have the parts of a matrix."""
    sets = tuple(tuple(range(number, size, parts)) for number in range(parts))
    return Copies(sets, tuple(rank % parts for rank in range(size)))


def _newton_schulz_cost(weight: Weight) -> float:
    matrices = 1 if weight.split is None else weight.split.stacked
    rows, columns = weight.shape[0] // matrices, weight.shape[1]
    return float(matrices * min(rows, columns) ** 2 * (rows + columns))


def _owned(bucket: Iterable[tuple[WorkUnit, int]]) -> dict[int, int]:
    """Elements of the units of each owner."""
    owned: dict[int, int] = defaultdict(int)
    for unit, owner in bucket:
        owned[owner] += unit.shape[0]
    return owned


def _cut(message: Bucket) -> Cut:
    """The cut of a message's results, on every rank: all sets of copies have equally many."""
    total = sum(unit.shape[0] for unit, _ in message)
    sets = message[0][0].copies.sets
    return Cut.of(total // len(sets), len(sets[0]))


def _sent_back(message: Bucket) -> float:
    """Elements that all ranks together send, to return a message's results."""
    cut, copies = _cut(message), message[0][0].copies
    # Every part to its rank, but what the owner keeps; then all parts to all ranks of a set.
    kept = sum(
        cut.overlap(owner // len(copies.sets), start, stop)
        for number in range(len(copies.sets))
        for owner, start, stop in segments(message, number)
        if copies.set_of[owner] == number
    )
    scattered = cut.total * len(copies.sets) - kept
    return scattered + cut.part * (cut.ranks - 1) * len(copies.set_of)


def _buffers(buckets: Sequence[Bucket], messages: Sequence[list[Bucket]], rank: int) -> int:
    """Elements of all buffers on a rank, at most.

    While a bucket is orthogonalized, the next one is on its way to the owners, and the results of
    messages before are being gathered, or have been.
    """
    incoming = [_incoming(bucket, rank) for bucket in [*buckets[1:], []]]
    most = arrived = sent = to_gather = 0  # sent: of the message before, which is to be gathered
    for bucket, results, after in zip(buckets, messages, incoming, strict=True):
        owned = _owned(bucket)[rank]
        # Newton-Schulz has its input, its result and a spare buffer.
        most = max(most, arrived + sent + after + 3 * owned)
        for message in results:
            cut, packed = _cut(message), _owned(message)[rank]
            most = max(most, arrived + sent + after + owned + packed + cut.part)
            owned -= packed
            most = max(most, arrived + to_gather + after + owned + packed + cut.part)
            # Parts that no other rank has a copy of are received where they stay.
            arrived, to_gather = to_gather, cut.gathered
            sent = packed + cut.part
    return max(most, arrived + to_gather)


def _incoming(bucket: Bucket, rank: int) -> int:
    """Elements of the shards that a rank sends to owners, and of those that it receives."""
    neighbours = 0
    owned = _owned(bucket)
    is_split = any(len(unit.copies.sets) > 1 for unit, _ in bucket)
    if not is_split:
        return owned[rank]  # the whole is there already
    for unit, owner in bucket:
        parts = len(unit.copies.sets)
        neighbours += unit.shape[0] // parts if owner // parts == rank // parts else 0
    return owned[rank] + neighbours
