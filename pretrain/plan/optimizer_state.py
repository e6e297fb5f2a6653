"""Optimizer state of the ranks of a pipeline stage, and AdamW's part of a step.

Owners are those of :mod:`pretrain.plan.shared_matrices`; AdamW's parts, those of
:mod:`muonclip.distributed.owners`.
"""

from collections.abc import Callable, Iterable, Sequence

from muonclip.distributed.owners import BUCKET_ELEMENTS, chunk_ranges, cut_flat
from pretrain.config import Config
from pretrain.model.weights import Weight
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.ranks import Ranks
from pretrain.plan.shared_matrices import (
    SharedMatrices,
    copies_of,
    has_sharded_state,
    numel,
    stage_size,
)


def state_of_ranks(
    config: Config,
    ranks: Ranks,
    weights: Sequence[Weight],
    is_updated: Callable[[Weight], bool],
    shared: Iterable[SharedMatrices],
) -> list[int]:
    """Bytes of optimizer state on each rank of a stage, in megatron-core's order of ranks.

    Muon's momentum, in float32 or ``optimizer.momentum_dtype``; AdamW's two moments and step count,
    in float32; for 16-bit weights a float32 master as well. Exact, but for what has one number a
    row and is not counted: an int8 momentum's scales, and NorMuon's averages.

    Args:
        weights: trained weights of the stage, with one expert in place of all.
        is_updated: whether a step updates a weight.
        shared: the matrices that ranks share.
    """
    master = 0 if config.precision == "float32" else FLOAT32
    dtype = config.optimizer.muonclip_options()["momentum_dtype"]
    momentum = FLOAT32 if dtype is None else dtype.itemsize
    same = 0  # on every rank
    for weight in filter(is_updated, weights):
        is_muon = weight.optimizer == "muon"
        if not is_muon:
            same += FLOAT32 * ranks.tensors(weight)
        if not has_sharded_state(config, ranks, weight):
            moments = momentum if is_muon else 2 * FLOAT32
            same += (master + moments) * ranks.local_numel(weight)
    stored = [same] * stage_size(ranks)
    for matrices in shared:
        if matrices.has_sharded_state:
            for unit, owner in zip(matrices.units, matrices.owners, strict=True):
                stored[matrices.places[owner]] += (master + momentum) * numel(unit)
    for size, tensors, entries in _flat_buckets(config, ranks, weights):
        shards = stage_size(ranks) // size
        for place in range(stage_size(ranks)):
            parts = chunk_ranges(entries, size, place // shards)
            own = sum(stop - start for index, start, stop in parts if is_updated(tensors[index]))
            stored[place] += (master + 2 * FLOAT32) * own
    return stored


def gathered_bytes(
    config: Config, ranks: Ranks, weights: Sequence[Weight], is_updated: Callable[[Weight], bool]
) -> float:
    """Bytes of AdamW's weights that a rank sends after a step, if ranks divide their state.

    Whole buckets are sent, also with weights that are not updated.
    """
    sent = 0
    for size, tensors, entries in _flat_buckets(config, ranks, weights):
        if any(is_updated(tensors[index]) for index, _, _ in entries):
            total = sum(stop - start for _, start, stop in entries)
            sent += -(-total // size) * (size - 1)
    return float(sent * ITEMSIZE[config.precision])


def _flat_buckets(
    config: Config, ranks: Ranks, weights: Sequence[Weight]
) -> list[tuple[int, list[Weight], list[tuple[int, int, int]]]]:
    """(number of ranks that divide it, weights, entries) of each bucket of AdamW's weights.

    Entries are (number of the weight, start, stop).
    """
    by_copies: dict[int, list[Weight]] = {}
    for weight in weights:
        if weight.optimizer == "adamw" and has_sharded_state(config, ranks, weight):
            by_copies.setdefault(copies_of(config, ranks, weight), []).append(weight)
    return [
        (size, tensors, entries)
        for size, tensors in by_copies.items()
        for entries in cut_flat([ranks.local_numel(w) for w in tensors], BUCKET_ELEMENTS)
    ]
