"""What a step shows of itself: logits, clipped heads, expert load, updates, memory, utilisation.

Ranks hold different layers, heads and experts. Each puts its part of every measure at its place in
two vectors for the whole model; one maximum and one sum over all ranks a step complete them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip import ClipResult, MuonClip
from pretrain.config import Config
from pretrain.encoder_process.cost import analytic_cost
from pretrain.model.multimodal import MicroBatch
from pretrain.parallel import ParallelContext
from pretrain.plan.flops import FORWARD_AND_BACKWARD, flops_per_token
from pretrain.runtime.machine import matmul_flops, peak_memory_gib

# Entries of each parameter that its update's RMS is estimated from.
_SAMPLE = 4096
_ALGORITHMS = ("muon", "adamw")


class ExpertTokens:
    """The tokens that this rank sent to each expert in the last step.

    megatron-core's routers count them for their load balancing, and forget them when the step's
    gradients are finalized: :meth:`record` is called just before.

    Args:
        chunks: this rank's runs of layers.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self._routers: list[Any] = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if getattr(module, "local_tokens_per_expert", None) is not None
        ]
        self.layers = [router.layer_number - 1 for router in self._routers]
        """Of the whole model, from 0."""
        self.tokens: Tensor | None = None
        """[routers, experts] float32; None before the first step."""

    def record(self) -> None:
        if self._routers:
            self.tokens = torch.stack([r.local_tokens_per_expert for r in self._routers])


class UpdateRms:
    """How far the optimizer moves the weights: (W - decay - W_after) / lr, by algorithm.

    Estimated from up to 4,096 entries of every parameter, spread evenly over it: copying all of
    them would cost a second model in memory.

    Args:
        optimizer: with decoupled weight decay.
        copies: of a parameter: how many ranks hold the same.
    """

    def __init__(self, optimizer: MuonClip, copies: Mapping[Tensor, int]) -> None:
        self._optimizer, self._copies = optimizer, copies
        self._before: list[tuple[dict[str, Any], Tensor, Tensor]] = []

    def before(self) -> None:
        """Remember samples; call before the optimizer's step."""
        self._before = [
            (group, parameter, _sample(parameter).to(torch.float32, copy=True))
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def after(self, device: torch.device) -> Tensor:
        """Call after the optimizer's step, and before QK-Clip's.

        Returns:
            [2, 2] float64, of Muon and of AdamW: the sum over entries of squared updates, and
            their number; copies on several ranks add up to one. Zeros without a sample.
        """
        totals = torch.zeros(len(_ALGORITHMS), 2, dtype=torch.float64, device=device)
        for row, algorithm in enumerate(_ALGORITHMS):
            samples = [entry for entry in self._before if entry[0]["algorithm"] == algorithm]
            if not samples:
                continue
            moved = [
                before * (1 - group["lr"] * group["weight_decay"]) - _sample(parameter)
                for group, parameter, before in samples
            ]
            rms = torch.stack(torch._foreach_norm(moved)).double()
            lrs, elements, sizes, copies = torch.tensor(
                [
                    (group["lr"], parameter.numel(), before.numel(), self._copies[parameter])
                    for group, parameter, before in samples
                ],
                dtype=torch.float64,
                device=device,
            ).unbind(1)
            weights = elements / copies
            totals[row, 0] = ((rms / lrs).square() / sizes * weights).sum()
            totals[row, 1] = weights.sum()
        self._before = []
        return totals


def _sample(parameter: Tensor) -> Tensor:
    """Up to 4,096 entries of a parameter, or of its master copy, evenly spread; a view."""
    flat = getattr(parameter, "main_param", parameter).detach().flatten()
    return flat[:: -(-flat.numel() // _SAMPLE)]


class StepMetrics:
    """Gathers what all ranks saw of a step; see the module.

    Args:
        config: the run's.
        processes: where this rank stands.
        expert_tokens: its routers' counts.
        updates: its parameters' moves.
        language_layers: of this rank's language layers by QK-Clip's name: their numbers in the
            whole model, from 0.
        vocab_size: columns of the output layer.
        dtype: of the matrix products that the peak is measured with, unless it is configured.

    Attributes:
        expert_tokens: as given.
        peak_flops: FLOP/s of all ranks together, of which utilisation is the used share.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        expert_tokens: ExpertTokens,
        updates: UpdateRms,
        language_layers: Mapping[str, int],
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        language, vision, device = config.language, config.vision, context.device
        self._context, self._log_every = context, config.log_every
        self.expert_tokens, self._updates = expert_tokens, updates
        self._tokens = config.global_batch_size * config.data.seq_length
        self._assignments = self._tokens * language.experts_per_token
        self._heads = (
            language.num_layers * language.num_heads + vision.num_layers * vision.num_heads
        )
        self._flops_per_token = flops_per_token(language, vocab_size, config.data.seq_length)
        self._encoder_flops = analytic_cost(vision, language.hidden_size)

        self._depths = language.num_layers, vision.num_layers
        self._layers = torch.tensor(list(language_layers.values()), device=device)
        self._sparse = torch.tensor(expert_tokens.layers, device=device) - language.dense_layers
        self._experts = language.num_layers - language.dense_layers, language.num_experts

        given = config.peak_tflops
        peak = matmul_flops(device, dtype) if given is None else given * 1e12
        total = torch.tensor(peak, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        self.peak_flops = total.item()

    def before_update(self, step: int) -> None:
        """Call before the optimizer's step."""
        if step == 1 or step % self._log_every == 0:
            self._updates.before()

    def after_update(self) -> Tensor:
        """Call between the optimizer's step and QK-Clip's; for :meth:`gather`."""
        return self._updates.after(self._context.device)

    def gather(
        self, micro_batches: Sequence[MicroBatch], clipped: Sequence[ClipResult], moved: Tensor
    ) -> dict[str, Any]:
        """A step's measures, the same on every rank; two collectives of all ranks.

        Args:
            micro_batches: of this rank.
            clipped: what QK-Clip did to the language model's heads, and to the encoder's.
            moved: from :meth:`after_update`.

        Returns:
            ``max_logit`` of the model, ``language_max_logits`` and ``vision_max_logits`` by layer
            (None where nothing was seen: a step without images); ``heads_clipped`` of ``heads``;
            ``expert_loads``: of each layer of experts, the tokens of its busiest expert over the
            mean, and ``expert_load``, their average; ``dropped_tokens``: assignments of a token to
            an expert that the routers did not make good, counted; ``update_rms_muon`` and
            ``update_rms_adamw``, in steps that sample them; ``memory_gib``, the peak of the
            process that used most; ``model_flops`` of the step.
        """
        language, vision = clipped
        device = self._context.device
        depth, vision_depth = self._depths
        largest = torch.full((depth + vision_depth + 1,), -torch.inf, device=device)
        largest[self._layers] = _by_layer(language)
        largest[depth:-1] = _by_layer(vision)
        largest[-1] = peak_memory_gib(device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)

        flops = 0.0
        if self._context.first_stage and self._context.tensor_rank == 0:
            grids = torch.cat([batch.grids for batch in micro_batches])
            flops = float(self._encoder_flops.costs(grids).sum())
        routed = torch.zeros(self._experts, dtype=torch.float64, device=device)
        if self.expert_tokens.tokens is not None:
            routed[self._sparse] = self.expert_tokens.tokens.double()
        # Data-parallel ranks clip the same heads of the language model; all ranks the encoder's.
        own = language.num_clipped.double() / self._context.data_size
        own = torch.stack([own, own.new_tensor(flops)])
        sums = torch.cat([own, moved.flatten(), routed.flatten()])
        dist.all_reduce(sums)

        *logits, memory = largest.tolist()
        seen = [_number(value) for value in logits]
        heads_clipped, flops, *rest = sums[: 2 + moved.numel()].tolist()
        moves = dict(zip(_ALGORITHMS, zip(rest[::2], rest[1::2], strict=True), strict=True))
        routed = sums[2 + moved.numel() :].view(self._experts)
        loads = (routed.amax(1) / routed.mean(1)).tolist()
        return {
            "max_logit": max(logits),
            "language_max_logits": seen[:depth],
            "vision_max_logits": seen[depth:],
            "heads_clipped": round(heads_clipped) + int(vision.num_clipped),
            "heads": self._heads,
            "expert_load": sum(loads) / len(loads),
            "expert_loads": [_number(load) for load in loads],
            "dropped_tokens": self._assignments * len(loads) - round(float(routed.sum())),
            **{
                f"update_rms_{algorithm}": (squares / entries) ** 0.5
                for algorithm, (squares, entries) in moves.items()
                if entries
            },
            "memory_gib": memory,
            "model_flops": FORWARD_AND_BACKWARD * (self._tokens * self._flops_per_token + flops),
        }


def _by_layer(clipped: ClipResult) -> Tensor:
    """[layers]: the largest logit of each, in QK-Clip's order."""
    return torch.stack([logits.max() for logits in clipped.max_logits.values()])


def _number(value: float) -> float | None:
    """Rounded for people, since there is one for each layer of each step; None for no finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
