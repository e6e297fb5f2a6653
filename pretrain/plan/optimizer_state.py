"""Optimizer state of the ranks of a pipeline stage.

Owners and parts are those of :mod:`muonclip.distributed.owners`, which this module describes.
"""

from collections.abc import Sequence

from muonclip.distributed.owners import BUCKET_ELEMENTS
from muonclip.distributed.plan import assign_owners
from pretrain.config import Config
from pretrain.model.weights import Weight
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.muon_step import make_unit
from pretrain.plan.ranks import Ranks


def state_of_ranks(config: Config, ranks: Ranks, weights: Sequence[Weight]) -> list[int]:
    """Bytes of optimizer state on each rank of a stage, in megatron-core's order of ranks.

    Muon's momentum, or AdamW's two moments and step count, in float32; for 16-bit weights a master
    as well. Their sum is exact. Matrices that are fused in one weight, such as MLA's down
    projections, are taken for one where owners are balanced by cost.

    Args:
        weights: weights of the stage that are updated, with one expert in place of all.
    """
    masters = 0 if config.precision == "float32" else 1
    is_sharded = config.shards_state(ranks.world)
    size, expert_size = ranks.replicas * ranks.tensor, ranks.expert_data * ranks.expert_tensor
    same = 0  # on every rank
    matrices: list[Weight] = []
    experts: list[Weight] = []
    whole = split = 0  # elements of a rank that AdamW's ranks divide, by the ranks that do
    for weight in weights:
        is_muon, numel = weight.optimizer == "muon", ranks.local_numel(weight)
        if not is_muon:
            same += ranks.tensors(weight)
        shards = weight.shards(config.parallel)
        copies = (size if weight.expert is None else expert_size) // shards
        # megatron-core's vectors have no sharding.
        if not is_sharded or copies == 1 or len(weight.shape) < 2:
            same += (masters + (1 if is_muon else 2)) * numel
        elif is_muon:
            (matrices if weight.expert is None else experts).append(weight)
        elif shards == 1:
            whole += numel
        else:
            split += numel
    by_rank = _owned(ranks, matrices, size)
    by_expert_rank = _owned(ranks, experts, expert_size)
    block = ranks.expert * ranks.expert_tensor

    def elements(place: int) -> int:
        expert_place = place // block * ranks.expert_tensor + place % ranks.expert_tensor
        owned = by_rank[place] + by_expert_rank[expert_place]
        parts = _part(whole, size, place) + _part(split, ranks.replicas, place // ranks.tensor)
        return same + (masters + 1) * owned + (masters + 2) * parts

    return [FLOAT32 * elements(place) for place in range(size)]


def gathered_bytes(config: Config, ranks: Ranks, weights: Sequence[Weight]) -> float:
    """Bytes of AdamW's weights that a rank sends after a step, if ranks divide their state."""
    if not config.shards_state(ranks.world):
        return 0.0
    sent = 0.0
    for weight in weights:
        size = ranks.replicas * ranks.tensor // weight.shards(config.parallel)
        if weight.optimizer == "adamw" and len(weight.shape) > 1:
            sent += ranks.local_numel(weight) * (size - 1) / size
    return sent * ITEMSIZE[config.precision]


def _owned(ranks: Ranks, weights: Sequence[Weight], size: int) -> list[int]:
    """Elements of the matrices that each rank of a group owns."""
    members = [weight for weight in weights for _ in range(ranks.tensors(weight))]
    units = [make_unit(index, weight, 1, size) for index, weight in enumerate(members)]
    owned = [0] * size
    for weight, owner in zip(members, assign_owners(units, [0] * size), strict=True):
        owned[owner] += weight.numel
    return owned


def _part(elements: int, size: int, rank: int) -> int:
    """Elements of a rank if ``size`` ranks divide some, bucket by bucket."""
    full, rest = divmod(elements, BUCKET_ELEMENTS)
    return full * _chunk(BUCKET_ELEMENTS, size, rank) + _chunk(rest, size, rank)


def _chunk(elements: int, size: int, rank: int) -> int:
    chunk = -(-elements // size)
    return max(0, min(chunk, elements - rank * chunk))
