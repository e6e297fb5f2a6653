"""Parallel sizes with which a configuration fits a device."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from pretrain.config import Config, RecomputeConfig
from pretrain.errors import PretrainError
from pretrain.plan.flops import step_flops
from pretrain.plan.itemsize import FLOAT32, ITEMSIZE
from pretrain.plan.memory import fullest_memory, memory_without_optimizer
from pretrain.plan.optimizer_costs import OptimizerCosts
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import Ranks, ranks_of
from pretrain.plan.traffic import step_traffic
from pretrain.plan.workload import Images
from pretrain.runtime.progress import counted

# Of an H100, to order layouts only: matrix products in FLOP/s, and bytes per second that a GPU
# sends to GPUs of its machine and of others.
_FLOPS = 445e12
_WITHIN_MACHINE = 300e9
_BETWEEN_MACHINES = 45e9
_GPUS_OF_A_MACHINE = 8

# Limits of the search.
_MAX_EXPERT = 128
_TOKENS_OF_A_RANK = 4096
# Layouts to find if none fits.
_CLOSEST = 3


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and recomputation, and their cost.

    Attributes:
        settings: overrides of the configuration.
        memory: bytes of a rank of the fullest pipeline stage, by purpose.
        seconds: rough time of a step; 0 for a layout that does not fit.
    """

    settings: tuple[str, ...]
    memory: dict[str, float]
    seconds: float


def find_layouts(
    config: Config, images: Images, memory: float, processes: int
) -> tuple[list[Layout], list[Layout]]:
    """Try sizes of tensor, context, pipeline and expert parallelism, and full recomputation.

    Tensor parallelism stays within a machine of 8. ``interleave`` and ``layout`` are kept with the
    configured number of pipeline stages, and are not used with others.

    Args:
        memory: bytes of a device.

    Returns:
        Layouts that fit, the fastest first. If there are none, the smallest that do not, at most
        three, the smallest first.
    """
    fitting: list[Layout] = []
    closest: list[Layout] = []
    least_memory = partial(_Elements.of(config).least_memory, config)

    def limit() -> float:
        """Bytes above which a layout is of no interest."""
        enough = fitting or len(closest) == _CLOSEST
        return max(memory, _largest(closest)) if enough else math.inf

    sizes_to_try = sorted(_sizes(config, processes), key=least_memory)
    for sizes in counted(sizes_to_try, "searching parallel sizes", "combinations"):
        if least_memory(sizes) > limit():
            break  # all following sizes need at least as much
        optimizer: OptimizerCosts | None = None  # all candidates of these sizes have the same
        for candidate in _candidates(config, processes, sizes):
            ranks = ranks_of(candidate, processes)
            if memory_without_optimizer(candidate, ranks, images) > limit():
                continue
            optimizer = optimizer or OptimizerCosts(candidate, ranks, images)
            used = fullest_memory(candidate, ranks, images, optimizer)
            if used["total"] <= memory:
                seconds = _step_seconds(candidate, ranks, images, optimizer)
                fitting.append(Layout(_settings(candidate), used, seconds))
                closest.clear()
            elif not fitting:
                closest.append(Layout(_settings(candidate), used, 0.0))
                closest = sorted(closest, key=lambda layout: layout.memory["total"])[:_CLOSEST]
    return sorted(fitting, key=lambda layout: layout.seconds), closest


def _largest(layouts: Sequence[Layout]) -> float:
    return max((layout.memory["total"] for layout in layouts), default=0.0)


def _sizes(config: Config, processes: int) -> list[dict[str, int]]:
    """Powers of two. Context-parallel ranks have at least some thousand tokens."""
    language = config.language
    context = max(config.data.seq_length // _TOKENS_OF_A_RANK, 1)
    expert = _MAX_EXPERT if language.moe_layers else 1
    limits = (_GPUS_OF_A_MACHINE, context, min(processes, language.num_layers), expert)
    names = ("tensor", "context", "pipeline", "expert")
    return [
        dict(zip(names, sizes, strict=True))
        for sizes in itertools.product(*map(_powers_of_two, limits))
    ]


class _Elements(NamedTuple):
    """Elements of the language model's weights: of experts, and of others that tensor parallelism
    splits or not."""

    experts: int
    split: int
    whole: int

    @classmethod
    def of(cls, config: Config) -> "_Elements":
        counts = Counter[str]()
        for weight in trained_weights(config):
            if weight.expert is not None:
                counts["experts"] += weight.numel * config.language.num_experts
            elif weight.layer is not None:
                counts["split" if weight.split else "whole"] += weight.numel
        return cls(counts["experts"], counts["split"], counts["whole"])

    def least_memory(self, config: Config, sizes: dict[str, int]) -> float:
        """Bytes for weights, gradients, momentum and masters, averaged over pipeline stages."""
        tensor, expert = sizes["tensor"], sizes["expert"]
        experts = self.experts / (expert if expert > 1 else tensor)
        elements = experts + self.split / tensor + self.whole
        itemsize = ITEMSIZE[config.precision]
        master = 0 if itemsize == FLOAT32 else FLOAT32
        return elements / sizes["pipeline"] * (itemsize + 2 * FLOAT32 + master)


def _candidates(config: Config, processes: int, sizes: dict[str, int]) -> Iterator[Config]:
    """Configurations that fit the number of processes, with a micro-batch for every stage."""
    settings: dict[str, Any] = dict(sizes)
    if settings["pipeline"] != config.parallel.pipeline:
        settings |= {"interleave": 1, "layout": None}
    if processes % math.prod(settings[name] for name in ("tensor", "context", "pipeline")):
        return
    for recompute in dict.fromkeys((config.recompute, RecomputeConfig(), RecomputeConfig("full"))):
        try:
            parallel = replace(config.parallel, **settings)
            candidate = replace(config, parallel=parallel, recompute=recompute)
            candidate.check_world_size(processes)
        except (ValueError, PretrainError):
            continue
        if candidate.micro_batches(processes) >= parallel.pipeline:
            yield candidate


def _powers_of_two(limit: int) -> list[int]:
    return [2**exponent for exponent in range(limit.bit_length())]


def _step_seconds(config: Config, ranks: Ranks, images: Images, optimizer: OptimizerCosts) -> float:
    """Computation, with the pipeline's bubble, and messages, none of which overlap."""
    flops = step_flops(config, ranks, images)["total"] / ranks.world
    chunks = config.parallel.interleave
    bubble = (ranks.pipeline - 1) / (ranks.micro_batches * chunks)
    sent = max(step_traffic(config, ranks, images, optimizer), key=lambda stage: stage["total"])
    local = sent.get("tensor parallel", 0.0)
    messages = local / _WITHIN_MACHINE + (sent["total"] - local) / _BETWEEN_MACHINES
    return flops / _FLOPS * (1 + bubble) + messages


def _settings(config: Config) -> tuple[str, ...]:
    names = ("tensor", "context", "pipeline", "expert")
    sizes = [f"parallel.{name}={getattr(config.parallel, name)}" for name in names]
    return (*sizes, f"recompute.granularity={config.recompute.granularity}")
