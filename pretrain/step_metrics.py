"""Metrics of a training step, gathered from all ranks; :mod:`pretrain.metrics` describes them.

Ranks hold different layers, heads and experts. Each rank writes its values into two vectors that
cover the whole model, at the positions of its layers and experts. Two all-reduces per step, a
maximum and a sum, complete them on every rank.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import Router
from torch import Tensor, nn

from muonclip import ClipResult, MuonClip
from muonclip.distributed import ShardedState
from muonclip.precision import get_master
from pretrain.config import Config
from pretrain.encoder_process.cost import analytic_cost
from pretrain.encoder_process.encoder import ColocatedEncoder, EncoderProcess
from pretrain.model.load_balancing import LoadBalancing
from pretrain.model.multimodal import MicroBatch
from pretrain.parallel import ParallelContext
from pretrain.plan.flops import FORWARD_AND_BACKWARD, flops_per_token
from pretrain.runtime.machine import matmul_flops, peak_memory_gib

_ALGORITHMS = ("muon", "adamw")


class ExpertTokens:
    """Number of tokens that this rank routed to each expert in the last step.

    Args:
        chunks: model chunks of this rank.

    Attributes:
        layers: layer numbers of this rank's routers in the whole model, from 0.
        counts: [routers, experts] int64; None without experts, and before the first step.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        modules = itertools.chain.from_iterable(chunk.modules() for chunk in chunks)
        routers: list[Any] = [module for module in modules if isinstance(module, Router)]
        self.layers: list[int] = [router.layer_number - 1 for router in routers]
        self.counts: Tensor | None = None
        self._running: Tensor | None = None
        if routers:
            shape, device = (len(routers), routers[0].num_experts), routers[0].weight.device
            self._running = torch.zeros(shape, dtype=torch.int64, device=device)
            for counts, router in zip(self._running, routers, strict=True):
                router.register_forward_hook(partial(self._count, counts))

    @staticmethod
    def _count(counts: Tensor, _router: nn.Module, _inputs: Any, output: Any) -> None:
        # Recomputed layers run twice in training, first without gradients.
        if torch.is_grad_enabled():
            _, routing_map = output  # bool [tokens, experts]
            counts.add_(routing_map.sum(0))

    def record(self) -> None:
        """Call at the end of a step's backward pass."""
        if self._running is not None:
            self.counts = self._running.clone()
            self._running.zero_()


class UpdateRms:
    """RMS of the updates by algorithm: (before · (1 - lr · weight decay) - after) / lr.

    Estimated from up to 4,096 evenly spaced entries of each parameter; comparing whole parameters
    would need the memory of a second model. A rank that has parts of a master copy takes them from
    these parts.

    Args:
        optimizer: an optimizer with decoupled weight decay.
        copies: number of ranks that have the same copy of each parameter.
    """

    _MAX_SAMPLES = 4096

    def __init__(self, optimizer: MuonClip, copies: Mapping[Tensor, int]) -> None:
        self._optimizer, self._copies = optimizer, copies
        self._before: list[tuple[dict[str, Any], Tensor, Tensor]] = []

    def before_step(self) -> None:
        """Copy the samples; every rank calls this before the optimizer's step."""
        if self._optimizer.shard_state:
            self._optimizer.create_state()  # before the first step: where master copies are
        self._before = [
            (group, parameter, self._sample(parameter).to(torch.float32, copy=True))
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and self._has_sample(parameter)
        ]

    def after_step(self, device: torch.device) -> Tensor:
        """Compare with the samples; call after the optimizer's step and before QK-Clip.

        Returns:
            [2, 2] float64: for Muon and for AdamW the sum of squared updates over all entries, and
            the number of entries. Copies of a parameter on several ranks count once in the sum
            over ranks. Zeros if :meth:`before_step` was not called.
        """
        totals = torch.zeros(len(_ALGORITHMS), 2, dtype=torch.float64, device=device)
        for row, algorithm in enumerate(_ALGORITHMS):
            samples = [entry for entry in self._before if entry[0]["algorithm"] == algorithm]
            if not samples:
                continue
            updates = [
                before * (1 - group["lr"] * group["weight_decay"]) - self._sample(parameter)
                for group, parameter, before in samples
            ]
            norms = torch.stack(torch._foreach_norm(updates)).double()
            lrs, weights, sample_sizes = torch.tensor(
                [
                    (group["lr"], self._weight(parameter), before.numel())
                    for group, parameter, before in samples
                ],
                dtype=torch.float64,
                device=device,
            ).unbind(1)
            totals[row, 0] = ((norms / lrs).square() / sample_sizes * weights).sum()
            totals[row, 1] = weights.sum()
        self._before = []
        return totals

    def _has_sample(self, parameter: Tensor) -> bool:
        master = get_master(parameter)
        if isinstance(master, ShardedState):
            return master.state_layout.numel > 0
        return parameter.numel() > 0

    def _weight(self, parameter: Tensor) -> float:
        """Number of entries of which :meth:`_sample` is a sample, divided by their copies."""
        master, copies = get_master(parameter), self._copies[parameter]
        if not isinstance(master, ShardedState):
            return parameter.numel() / copies
        # Each pipeline stage has the whole encoder.
        return master.state_layout.numel / max(1, copies // master.state_layout.group.size())

    @classmethod
    def _sample(cls, parameter: Tensor) -> Tensor:
        """Evenly spaced entries of a parameter, or of its master copy, of parts that it has here;
        a view unless there are several parts."""
        master = get_master(parameter)
        if isinstance(master, ShardedState):
            stride = -(-master.state_layout.numel // cls._MAX_SAMPLES)
            parts = [part[::stride] for part in master.parts]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        flat = (parameter if master is None else master).detach().flatten()
        return flat[:: -(-flat.numel() // cls._MAX_SAMPLES)]


class StepMetrics:
    """Gathers the metrics of a step from all ranks.

    Args:
        config: configuration of the run.
        context: the ranks of the run.
        expert_tokens: token counts of this rank's routers.
        load_balancing: the load-balancing loss of this rank's routers, if the model has it.
        update_rms: updates of this rank's parameters.
        language_layers: number in the whole model, from 0, of each of this rank's language layers,
            in the order of QK-Clip's results.
        vocab_size: number of columns of the output layer.
        dtype: dtype of the matrix products that measure the peak FLOP/s, unless ``peak_tflops``
            is configured.

    Attributes:
        expert_tokens: as given.
        peak_flops: peak FLOP/s of all ranks together, the reference of the utilization.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        expert_tokens: ExpertTokens,
        load_balancing: LoadBalancing | None,
        update_rms: UpdateRms,
        language_layers: Mapping[str, int],
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        language, vision, device = config.language, config.vision, context.device
        self._context, self._log_every = context, config.log_every
        self.expert_tokens, self._update_rms = expert_tokens, update_rms
        self._load_balancing = load_balancing
        # int64 [sources], tokens of each source in all steps so far.
        self.source_tokens = torch.zeros(len(config.data.sources), dtype=torch.int64)
        self._layer_sequences = config.global_batch_size * language.moe_layers
        self._tokens = config.global_batch_size * config.data.seq_length
        self._assignments = self._tokens * language.experts_per_token
        self._num_heads = (
            language.num_layers * language.num_heads + vision.num_layers * vision.num_heads
        )
        self._flops_per_token = flops_per_token(language, vocab_size, config.data.seq_length)
        self._encoder_cost = analytic_cost(vision, language.hidden_size)

        self._num_layers = language.num_layers, vision.num_layers
        self._layers = torch.tensor(list(language_layers.values()), device=device)
        self._moe_layers = torch.tensor(expert_tokens.layers, device=device) - language.dense_layers
        self._moe_shape = language.moe_layers, language.num_experts

        peak = config.peak_tflops
        local_peak = matmul_flops(device, dtype) if peak is None else peak * 1e12
        total = torch.tensor(local_peak, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        self.peak_flops = total.item()

    def before_update(self, step: int) -> None:
        """Call before the optimizer's step."""
        if step == 1 or step % self._log_every == 0:
            self._update_rms.before_step()

    def after_update(self) -> Tensor:
        """Call between the optimizer's step and QK-Clip; the result is for :meth:`gather`."""
        return self._update_rms.after_step(self._context.device)

    def gather(
        self,
        micro_batches: Sequence[MicroBatch],
        clipped: Sequence[ClipResult],
        updates: Tensor,
        encoder: EncoderProcess | ColocatedEncoder,
    ) -> dict[str, Any]:
        """The metrics of a step, the same on every rank; a collective call of all ranks.

        Args:
            micro_batches: the micro-batches of this rank.
            clipped: QK-Clip's results of the language model (none on a pipeline stage without
                layers) and of the encoder.
            updates: the result of :meth:`after_update`.
            encoder: has the images' assignment to ranks, which all ranks of its group share.
        """
        *language, vision = clipped
        maxima = self._local_maxima(language, vision, encoder)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        # Data- and context-parallel ranks clip the same heads of the language model.
        same_heads = self._context.data_size * self._context.context_size
        heads_clipped = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for result in language:
            heads_clipped += result.num_clipped / same_heads
        flops = heads_clipped.new_tensor(self._encoder_flops(micro_batches))
        routed = self._local_routed_tokens().flatten()
        balance = torch.zeros_like(flops)
        if self._load_balancing is not None:
            balance = self._load_balancing.total
        assigned = flops.new_tensor([encoder.mean_load, encoder.oversized])
        local = torch.stack([heads_clipped, flops, balance, *assigned])
        of_sources = self._local_source_tokens(micro_batches).to(local)
        sums = torch.cat([local, updates.flatten(), routed, of_sources])
        dist.all_reduce(sums)

        *logits, memory, load, least_load = maxima.tolist()
        layers = self._num_layers[0]
        max_logits = [_rounded(value) for value in logits]
        sizes = [local.numel(), updates.numel(), routed.numel(), of_sources.numel()]
        counts, squares, tokens, of_sources = torch.split(sums.cpu(), sizes)
        self.source_tokens += of_sources.long()
        num_clipped, encoder_flops, balance, total_load, oversized = counts.tolist()
        tokens, ranks = tokens.view(self._moe_shape), self._context.world_size
        mean_load = total_load / ranks
        model_flops = self._tokens * self._flops_per_token + encoder_flops
        return {
            "max_logit": max(logits),
            "language_max_logits": max_logits[:layers],
            "vision_max_logits": max_logits[layers:],
            # All ranks clip the encoder's heads.
            "heads_clipped": round(num_clipped) + int(vision.num_clipped),
            "heads": self._num_heads,
            **self._expert_metrics(tokens, balance),
            **{
                f"update_rms_{algorithm}": (total / entries) ** 0.5
                for algorithm, (total, entries) in zip(
                    _ALGORITHMS, squares.view(updates.shape).tolist(), strict=True
                )
                if entries
            },
            "memory_gib": memory,
            "encoder_balance": load / mean_load if mean_load else 1.0,
            "encoder_least_balance": least_load / mean_load if mean_load else 1.0,
            "encoder_oversized": round(oversized * encoder.num_groups / ranks),
            "model_flops": FORWARD_AND_BACKWARD * model_flops,
            **({"source_tokens": self.source_tokens.tolist()} if len(of_sources) else {}),
        }

    def _expert_metrics(self, tokens: Tensor, balance: float) -> dict[str, Any]:
        """Metrics of the routers; none without experts.

        Args:
            tokens: [layers with experts, experts], routed by all ranks.
            balance: load-balancing loss, summed over layers and sequences.
        """
        if not len(tokens):
            return {}
        loads = (tokens.amax(1) / tokens.mean(1)).tolist()
        loss = {"load_balancing_loss": balance / self._layer_sequences}
        return {
            **(loss if self._load_balancing is not None else {}),
            "expert_load": sum(loads) / len(loads),
            "expert_loads": [_rounded(load) for load in loads],
            "dropped_tokens": self._assignments * len(loads) - round(float(tokens.sum())),
        }

    def _local_maxima(
        self,
        language: Sequence[ClipResult],
        vision: ClipResult,
        encoder: EncoderProcess | ColocatedEncoder,
    ) -> Tensor:
        """[language layers + vision layers + 3] float64: max logits by layer, peak memory in GiB,
        and the largest load of the encoder on a rank of this rank's group, and its lower bound."""
        layers, vision_layers = self._num_layers
        options: Any = {"dtype": torch.float64, "device": self._context.device}
        maxima = torch.full((layers + vision_layers + 3,), -torch.inf, **options)
        for result in language:
            maxima[self._layers] = _by_layer(result).double()
        maxima[layers:-3] = _by_layer(vision)
        loads = [encoder.mean_load * x for x in (encoder.balance, encoder.balance_lower_bound)]
        maxima[-3:] = maxima.new_tensor([peak_memory_gib(self._context.device), *loads])
        return maxima

    def _encoder_flops(self, micro_batches: Sequence[MicroBatch]) -> float:
        """FLOPs of the encoder's forward pass for this rank's images, each counted on one rank."""
        context = self._context
        if not context.first_stage or context.tensor_rank or context.context_rank:
            return 0.0
        grids = torch.cat([batch.grids for batch in micro_batches])
        return float(self._encoder_cost.costs(grids).sum())

    def _local_source_tokens(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """int64 [sources]: tokens of each source in this rank's sequences, each counted on one
        rank."""
        context, count = self._context, len(self.source_tokens)
        if not count or not context.first_stage or context.tensor_rank or context.context_rank:
            return torch.zeros(count, dtype=torch.int64)
        sources = torch.cat([batch.sources.flatten() for batch in micro_batches])
        return torch.bincount(sources[sources >= 0], minlength=count)

    def _local_routed_tokens(self) -> Tensor:
        """[layers with experts, experts] float64: tokens that this rank routed; zeros elsewhere."""
        routed = torch.zeros(self._moe_shape, dtype=torch.float64, device=self._context.device)
        if self.expert_tokens.counts is not None:
            routed[self._moe_layers] = self.expert_tokens.counts.double()
        return routed


def _by_layer(clipped: ClipResult) -> Tensor:
    """[layers]: the max logit of each layer, in QK-Clip's order."""
    return torch.stack([logits.max() for logits in clipped.max_logits.values()])


def _rounded(value: float) -> float | None:
    """Five significant digits, since there is a value per layer and step; None if not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
