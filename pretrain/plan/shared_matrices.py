"""Matrices that the ranks of a pipeline stage share, and their owners.

Made by the functions of :mod:`muonclip.distributed` that make those of a training run.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from muonclip.distributed.muon import work_on
from muonclip.distributed.plan import WorkUnit, assign_owners, make_units
from muonclip.distributed.sharding import Copies, TensorShard
from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.orthogonalize import default_ns_dtype
from pretrain.config import Config
from pretrain.model.weights import Weight
from pretrain.plan.ranks import Ranks


class SharedMatrices(NamedTuple):
    """Matrices that a group of ranks share, and that travel together.

    Attributes:
        places: the ranks, by their numbers within the pipeline stage, in megatron-core's order.
        units: the matrices that a step updates.
        owners: of each unit, by its number in ``places``.
        layouts: of each unit's parameter.
        has_sharded_state: whether owners keep the state.
        ns_dtype: of Newton-Schulz.
    """

    places: Sequence[int]
    units: list[WorkUnit]
    owners: list[int]
    layouts: list[MatrixLayout]
    has_sharded_state: bool
    ns_dtype: str


def stage_size(ranks: Ranks) -> int:
    """Number of ranks of a pipeline stage."""
    return ranks.replicas * ranks.tensor


def copies_of(config: Config, ranks: Ranks, weight: Weight) -> int:
    """Number of ranks of a stage with the same part of a weight, or of an expert's weight."""
    of_expert = ranks.expert_data * ranks.expert_tensor
    size = stage_size(ranks) if weight.expert is None else of_expert
    return size // weight.shards(config.parallel)


def ns_dtype(config: Config, weight: Weight) -> str:
    """The dtype of Newton-Schulz for a weight, on an NVIDIA GPU."""
    if config.optimizer.ns_dtype != "auto":
        return config.optimizer.ns_dtype
    shapes = (weight.layout(config.parallel) or WHOLE).matrix_shapes(weight.shape)
    chosen = default_ns_dtype(torch.device("cuda"), torch.float32, shapes)
    return str(chosen).removeprefix("torch.")


def has_sharded_state(config: Config, ranks: Ranks, weight: Weight) -> bool:
    """Whether ranks divide the state of a weight among them."""
    # megatron-core's vectors have no sharding.
    has_sharding = len(weight.shape) > 1
    is_sharded = config.shards_state(ranks.world)
    return is_sharded and has_sharding and copies_of(config, ranks, weight) > 1


def shared_matrices(
    config: Config, ranks: Ranks, weights: Iterable[Weight], is_updated: Callable[[Weight], bool]
) -> list[SharedMatrices]:
    """The matrices of a stage that several ranks share, in the order of a step.

    Args:
        weights: trained weights of the stage, with one expert in place of all.
        is_updated: whether a step updates a weight. Others have owners, too.
    """
    families = _families(config, ranks, weights)
    found: dict[tuple[int, int, bool, str], SharedMatrices] = {}
    loads, step_loads = [0.0] * stage_size(ranks), [0.0] * stage_size(ranks)
    for sharded in (True, False):  # owners of state are fixed when other matrices are assigned
        balanced = loads if sharded else step_loads
        for family, (members, groups) in enumerate(families):
            chosen = [w for w in members if has_sharded_state(config, ranks, w) == sharded]
            if not sharded:
                chosen = list(filter(is_updated, chosen))
            dtypes = [ns_dtype(config, weight) for weight in chosen]
            layouts = [weight.layout(config.parallel) or WHOLE for weight in chosen]
            units = _units(config, chosen, layouts, len(groups[0]))
            # A step divides the work of one dtype after that of another.
            together = [{*dtypes}] if sharded else [{dtype} for dtype in sorted({*dtypes})]
            for (number, places), of_dtypes in product(enumerate(groups), together):
                assigned = [unit for unit in units if dtypes[unit.index] in of_dtypes]
                owners = assign_owners(assigned, [0] * len(places), [balanced[p] for p in places])
                for unit, owner in zip(assigned, owners, strict=True):
                    balanced[places[owner]] += unit.cost
                    if not is_updated(chosen[unit.index]):
                        continue
                    if sharded:
                        step_loads[places[owner]] += unit.cost
                    dtype = dtypes[unit.index]
                    matrices = found.setdefault(
                        (family, number, sharded, dtype),
                        SharedMatrices(places, [], [], [], sharded, dtype),
                    )
                    matrices.units.append(unit)
                    matrices.owners.append(owner)
                    matrices.layouts.append(layouts[unit.index])
    return [found[key] for key in sorted(found)]


def _families(
    config: Config, ranks: Ranks, weights: Iterable[Weight]
) -> list[tuple[list[Weight], list[Sequence[int]]]]:
    """Tensors of Muon, in the optimizer's order, and the groups of several ranks that have them."""
    stage = range(stage_size(ranks))
    by_layout: dict[MatrixLayout | None, list[Weight]] = {}
    for weight in weights:
        if weight.optimizer == "muon":
            tensors = by_layout.setdefault(weight.layout(config.parallel), [])
            tensors += [weight] * ranks.tensors(weight)
    every = [weight for tensors in by_layout.values() for weight in tensors]
    if ranks.expert == 1:  # the ranks with the same experts are the whole stage
        groups: list[tuple[list[Weight], list[Sequence[int]]]] = [(every, [stage])]
    else:
        of_expert: list[Sequence[int]] = [
            [place for place in stage if place // ranks.expert_tensor % ranks.expert == number]
            for number in range(ranks.expert)
        ]
        groups = [
            ([weight for weight in every if weight.expert is None], [stage]),
            ([weight for weight in every if weight.expert is not None], of_expert),
        ]
    return [(tensors, places) for tensors, places in groups if len(places[0]) > 1]


def _units(
    config: Config, tensors: Sequence[Weight], layouts: Sequence[MatrixLayout], size: int
) -> list[WorkUnit]:
    """The units of tensors that a group of ranks share; ``index`` is that of the tensor."""
    units: list[WorkUnit] = []
    for index, (weight, layout) in enumerate(zip(tensors, layouts, strict=True)):
        shape, parts = weight.shape, weight.shards(config.parallel)
        dim = 0 if weight.split is None else weight.split.dim
        local = tuple(length // (parts if d == dim else 1) for d, length in enumerate(shape))
        shards = [
            TensorShard(tuple(number * n if d == dim else 0 for d, n in enumerate(local)), local)
            for number in range(parts)
        ]
        count = min(size, layout.slices(shape))
        copies, cost = _copies(parts, size), work_on(shape, layout)
        units += make_units(index, shape, copies, shards, count, cost)
    return units


@lru_cache
def _copies(parts: int, size: int) -> Copies:
    """Neighbouring ranks have the parts of a matrix."""
    sets = tuple(tuple(range(number, size, parts)) for number in range(parts))
    return Copies(sets, tuple(rank % parts for rank in range(size)))


def numel(unit: WorkUnit) -> int:
    """Number of elements of a unit."""
    return prod(unit.shape)
