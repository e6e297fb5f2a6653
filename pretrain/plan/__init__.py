"""Cost of a configuration, computed before anything is allocated.

Parameters, memory of a rank, FLOPs and traffic of a step; ``python -m pretrain plan`` prints them.
"""

from typing import Any

from pretrain.config import Config
from pretrain.errors import PretrainError
from pretrain.plan.flops import step_flops
from pretrain.plan.memory import step_memory
from pretrain.plan.parameters import count_parameters
from pretrain.plan.ranks import ranks_of
from pretrain.plan.table import format_plan
from pretrain.plan.traffic import step_traffic
from pretrain.plan.workload import images_per_step, tokens_per_step

__all__ = ["format_plan", "plan"]


def plan(
    config: Config, processes: int | None = None, patches_per_image: int | None = None
) -> dict[str, Any]:
    """Return the plan as plain values, in bytes and FLOPs.

    Args:
        processes: number of processes; default: the smallest that the parallel sizes allow.
        patches_per_image: size of every image; default: see
            :func:`~pretrain.plan.workload.images_per_step`.

    Raises:
        PretrainError: the configuration does not fit the processes, or a number is not above 0.
    """
    for name, value in (("processes", processes), ("image-patches", patches_per_image)):
        if value is not None and value <= 0:
            raise PretrainError(f"{name} must be > 0, not {value}")
    ranks = ranks_of(config, processes)
    images = images_per_step(config, patches_per_image)
    return {
        "layout": {
            "processes": ranks.world,
            "tensor": ranks.tensor,
            "pipeline": ranks.pipeline,
            "expert": ranks.expert,
            "data": ranks.data,
            "expert_data": ranks.expert_data,
            "micro_batches": ranks.micro_batches,
            "layers_of_stages": [sum(map(len, chunks)) for chunks in ranks.stages],
        },
        "parameters": count_parameters(config),
        "memory": step_memory(config, ranks, images),
        "tokens": tokens_per_step(config),
        "images": {
            "count": images.count,
            "patches_per_image": images.patches_per_image,
            "features": images.features,
        },
        "flops": step_flops(config, ranks, images),
        "messages": step_traffic(config, ranks, images),
    }
