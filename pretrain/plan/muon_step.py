"""Messages and buffers of Muon's step, whose matrices are shared by the ranks that have them.

Matrices, owners and buckets are those of :mod:`muonclip.distributed`, which this module describes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from muonclip.distributed.muon import BUCKET_ELEMENTS
from muonclip.distributed.plan import WorkUnit, assign_owners, make_buckets
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


class _Bucket(NamedTuple):
    """Elements of the matrices that travel together.

    Attributes:
        owned: matrices of a rank, at most.
        packed: results that a rank sends, at most.
        received: results that a rank receives.
        sent: by all ranks, in both directions.
    """

    owned: int = 0
    packed: int = 0
    received: int = 0
    sent: float = 0.0


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
        make_unit(index, weight)
        for index, weight in enumerate(weights)
        for _ in range(ranks.tensors(weight))
    ]
    buckets = [
        _bucket([(weights[unit.index], owner) for unit, owner in bucket], shards, replicas)
        for bucket in make_buckets(units, assign_owners(units, size), BUCKET_ELEMENTS * size)
    ]
    sent = sum(bucket.sent for bucket in buckets) / size * itemsize
    return MuonStep(sent, float(_buffers(buckets) * itemsize))


def make_unit(index: int, weight: Weight) -> WorkUnit:
    """A whole matrix, with its cost."""
    return WorkUnit(index, 0, weight.shape, (), _newton_schulz_cost(weight))


def _newton_schulz_cost(weight: Weight) -> float:
    matrices = 1 if weight.split is None else weight.split.stacked
    rows, columns = weight.shape[0] // matrices, weight.shape[1]
    return float(matrices * min(rows, columns) ** 2 * (rows + columns))


def _bucket(members: Sequence[tuple[Weight, int]], shards: int, replicas: int) -> _Bucket:
    """A bucket of these matrices and their owners."""
    size = shards * replicas
    owned, packed = [0] * size, [0] * size
    received, sent = 0, 0.0
    for weight, owner in members:
        parts = shards if weight.split else 1  # all of them go to the owner; results go to holders
        owned[owner] += weight.numel
        packed[owner] += weight.numel * size // parts
        received += weight.numel // parts
        sent += weight.numel * (1 - 1 / parts + (size - 1) / parts)
    longest = max(owned)
    if shards == 1 or not any(weight.split for weight, _ in members):
        # One all-gather, in which all ranks send as much as the one that owns most.
        return _Bucket(longest, longest, size * longest, float(size * (size - 1) * longest))
    return _Bucket(longest, max(packed), received, sent)


def _buffers(buckets: Sequence[_Bucket]) -> int:
    """Elements of all buffers, at most.

    While a bucket is orthogonalized, the next one is on its way to the owners, and the results of
    the previous one have not been applied.
    """
    most = 0
    for before, bucket, after in zip(
        [_Bucket(), *buckets], buckets, [*buckets[1:], _Bucket()], strict=False
    ):
        newton_schulz = 3 * bucket.owned  # input, result and a spare buffer
        return_trip = bucket.owned + bucket.packed + bucket.received
        most = max(most, before.received + after.owned + max(newton_schulz, return_trip))
    return most
