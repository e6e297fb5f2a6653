"""Ranks of a run: sizes of the parallel groups, and the layers of each pipeline stage."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from pretrain.config import Config
from pretrain.model.weights import Weight


@dataclass(frozen=True)
class Ranks:
    """Sizes of the parallel groups.

    Attributes:
        world: number of ranks.
        data: ranks with the same dense weights, which see different sequences.
        context: ranks with the same dense weights, which share sequences.
        expert_data: ranks with the same experts.
        local_experts: experts of a layer on one rank.
        stages: layers of the model chunks of each pipeline stage; one chunk per stage unless the
            pipeline is interleaved.
        micro_batches: micro-batches of one rank per step.
    """

    world: int
    tensor: int
    expert: int
    expert_tensor: int
    data: int
    context: int
    expert_data: int
    local_experts: int
    stages: tuple[tuple[range, ...], ...]
    micro_batches: int

    @property
    def pipeline(self) -> int:
        return len(self.stages)

    @property
    def replicas(self) -> int:
        """Number of ranks with the same dense weights."""
        return self.data * self.context

    @property
    def communicators(self) -> int:
        """Number of groups of more than one rank that a rank exchanges tensors with: all, those of
        each kind of parallelism, and those with the same dense weights or experts."""
        sizes = [self.world, self.tensor, self.context, self.pipeline, self.expert]
        return sum(size > 1 for size in [*sizes, self.replicas, self.expert_data])

    def tokens(self, config: Config) -> int:
        """Tokens of a micro-batch on a rank; with tensor parallelism, those of its group."""
        return config.micro_batch_size * config.data.seq_length // self.context

    def has(self, stage: int, weight: Weight) -> bool:
        """Whether the ranks of a pipeline stage have a weight, or an expert's weight like it."""
        if weight.layer is None:
            return True
        if weight.layer < 0:
            return stage == 0
        if weight.layer == self.stages[-1][-1].stop:
            return stage == self.pipeline - 1
        return any(weight.layer in chunk for chunk in self.stages[stage])

    def first_like(self, stage: int, dense_layers: int) -> int:
        """The first pipeline stage with the same weights as this one, apart from their layers.

        Args:
            dense_layers: number of layers without experts, the first of the model.
        """
        kind = self._kind(stage, dense_layers)
        return next(s for s in range(stage + 1) if self._kind(s, dense_layers) == kind)

    def _kind(self, stage: int, dense_layers: int) -> tuple[Any, ...]:
        chunks = [
            (len(chunk), sum(layer < dense_layers for layer in chunk))
            for chunk in self.stages[stage]
        ]
        return (stage == 0, stage == self.pipeline - 1, *chunks)

    def tensors(self, weight: Weight) -> int:
        """Number of tensors like this one on a rank: one, or one for each local expert."""
        return 1 if weight.expert is None else self.local_experts

    def local_numel(self, weight: Weight) -> int:
        """Elements of these tensors on a rank."""
        split = self.tensor if weight.expert is None else self.expert_tensor
        return self.tensors(weight) * weight.numel // (split if weight.split else 1)


def ranks_of(config: Config, processes: int | None = None) -> Ranks:
    """Return the ranks of a run.

    Args:
        processes: number of ranks; default: the smallest number that the parallel sizes allow.

    Raises:
        PretrainError: the configuration does not fit the number of processes.
    """
    parallel = config.parallel
    processes = parallel.min_world_size if processes is None else processes
    config.check_world_size(processes)
    ends = [0, *accumulate(parallel.layers(config.language.num_layers))]
    chunks = [range(start, end) for start, end in pairwise(ends)]
    return Ranks(
        world=processes,
        tensor=parallel.tensor,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        data=parallel.data_size(processes),
        context=parallel.context,
        expert_data=parallel.expert_data_size(processes),
        local_experts=config.language.num_experts // parallel.expert,
        stages=tuple(tuple(chunks[s :: parallel.pipeline]) for s in range(parallel.pipeline)),
        micro_batches=config.micro_batches(processes),
    )
