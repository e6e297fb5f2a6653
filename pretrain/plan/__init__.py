"""Cost of a configuration, computed before anything is allocated.

Parameters, memory of a rank, FLOPs and traffic of a step; ``python -m pretrain plan`` prints them.
"""

from dataclasses import asdict
from typing import Any

from pretrain.config import Config
from pretrain.errors import PretrainError
from pretrain.model.geometry import PATCHES_PER_TOKEN
from pretrain.model.megatron_config import check_planned
from pretrain.plan.flops import step_flops
from pretrain.plan.memory import step_memory
from pretrain.plan.optimizer_costs import OptimizerCosts
from pretrain.plan.parameters import count_parameters
from pretrain.plan.ranks import ranks_of
from pretrain.plan.search import find_layouts
from pretrain.plan.table import check_memory, format_fit, format_plan
from pretrain.plan.traffic import step_traffic
from pretrain.plan.workload import images_per_step, tokens_per_step

__all__ = ["fit", "format_fit", "format_plan", "plan"]


def plan(
    config: Config, processes: int | None = None, patches_per_image: int | None = None
) -> dict[str, Any]:
    """Return the plan as plain values, in bytes and FLOPs.

    Args:
        processes: number of processes; default: the smallest that the parallel sizes allow.
        patches_per_image: size of every image; default: see
            :func:`~pretrain.plan.workload.images_per_step`.

    Raises:
        PretrainError: the configuration does not fit the processes, kernels or options cannot be
            used on any machine, a number is not above 0, or an image is larger than a sequence.
    """
    _check(config, processes, patches_per_image)
    check_planned(config)
    ranks = ranks_of(config, processes)
    images = images_per_step(config, patches_per_image)
    optimizer = OptimizerCosts(config, ranks, images)
    return {
        "layout": {
            "processes": ranks.world,
            "tensor": ranks.tensor,
            "context": ranks.context,
            "pipeline": ranks.pipeline,
            "expert": ranks.expert,
            "data": ranks.data,
            "expert_data": ranks.expert_data,
            "micro_batches": ranks.micro_batches,
            "layers_of_stages": [sum(map(len, chunks)) for chunks in ranks.stages],
        },
        "parameters": count_parameters(config),
        "memory": step_memory(config, ranks, images, optimizer),
        "tokens": tokens_per_step(config),
        "images": {
            "count": images.count,
            "patches_per_image": images.patches_per_image,
            "features": images.features,
        },
        "flops": step_flops(config, ranks, images),
        "messages": step_traffic(config, ranks, images, optimizer),
    }


def fit(
    config: Config,
    memory_gib: float,
    processes: int | None = None,
    patches_per_image: int | None = None,
) -> dict[str, Any]:
    """Find parallel sizes with which a rank fits a device; see :mod:`pretrain.plan.search`.

    Args:
        memory_gib: memory of a device in GiB.
        processes, patches_per_image: as for :func:`plan`.

    Returns:
        ``processes``, and lists of layouts: all that ``fit``, the fastest first; if there are none,
        the smallest that do ``not_fit``.

    Raises:
        PretrainError: a number is not above 0, an image is larger than a sequence, or no layout is
            possible with these processes.
    """
    _check(config, processes, patches_per_image, memory_gib)
    processes = config.parallel.min_world_size if processes is None else processes
    images = images_per_step(config, patches_per_image)
    fitting, closest = find_layouts(config, images, memory_gib * 2**30, processes)
    if not fitting and not closest:
        raise PretrainError(
            f"no layout is possible with {processes} processes, global_batch_size="
            f"{config.global_batch_size} and micro_batch_size={config.micro_batch_size}: change "
            "one of them"
        )
    return {
        "processes": processes,
        "fit": [asdict(layout) for layout in fitting],
        "not_fit": [asdict(layout) for layout in closest],
    }


def _check(
    config: Config,
    processes: int | None,
    patches_per_image: int | None,
    memory_gib: float | None = None,
) -> None:
    """Refuse numbers that are not above 0, and images that are larger than a sequence."""
    for name, value in (("processes", processes), ("image-patches", patches_per_image)):
        if value is not None and value <= 0:
            raise PretrainError(f"{name} must be > 0, not {value}")
    length = config.data.seq_length
    if patches_per_image is not None and patches_per_image > length * PATCHES_PER_TOKEN:
        raise PretrainError(
            f"image-patches must be at most {length * PATCHES_PER_TOKEN}, as a sequence has "
            f"seq_length={length} tokens of {PATCHES_PER_TOKEN} patches, not {patches_per_image}"
        )
    if memory_gib is not None:
        check_memory(memory_gib)
