"""The optimizer's part of a rank's memory and messages, by pipeline stage."""

from functools import cached_property

from pretrain.config import Config
from pretrain.plan.muon_step import sent_by_owners, step_buffers
from pretrain.plan.optimizer_state import gathered_bytes, state_of_ranks
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import Ranks
from pretrain.plan.shared_matrices import shared_matrices
from pretrain.plan.workload import Images


class OptimizerCosts:
    """Costs of every stage; stages with the same layers have the same, which is computed once.

    They do not depend on recomputation.
    """

    def __init__(self, config: Config, ranks: Ranks, images: Images) -> None:
        self._arguments = config, ranks, images
        self._stages: dict[int, StageCosts] = {}

    def of(self, stage: int) -> "StageCosts":
        """The costs of a stage."""
        config, ranks, _ = self._arguments
        first = ranks.first_like(stage, config.language.dense_layers)
        if first not in self._stages:
            self._stages[first] = StageCosts(*self._arguments, first)
        return self._stages[first]


class StageCosts:
    """Costs of a rank of one stage, in bytes, computed when they are first read."""

    def __init__(self, config: Config, ranks: Ranks, images: Images, stage: int) -> None:
        weights = [weight for weight in trained_weights(config) if ranks.has(stage, weight)]
        self._arguments = config, ranks, weights, images.update
        self._shared = shared_matrices(*self._arguments)

    @cached_property
    def state(self) -> float:
        """Optimizer state of the fullest rank."""
        return float(max(state_of_ranks(*self._arguments, self._shared)))

    @cached_property
    def buffers(self) -> float:
        """Temporary tensors of a step, at most."""
        return step_buffers(*self._arguments, self._shared)

    @cached_property
    def sent(self) -> float:
        """Messages of a step, on average."""
        config, ranks, *_ = self._arguments
        return sent_by_owners(config, ranks, self._shared) + gathered_bytes(*self._arguments)
