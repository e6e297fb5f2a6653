"""Putting a run together: model, encoder, optimizer and clip, from the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor, nn

import muonclip
from muonclip import AttentionLayout, MuonClip, QKClip
from muonclip.integrations.megatron_core import attention_layouts, matrix_layouts, shardings
from pretrain.config import Config, EncoderProcessConfig, OptimizerConfig
from pretrain.data import Data
from pretrain.encoder_process import ColocatedEncoder, EncoderProcess
from pretrain.encoder_process.cost import measured_cost
from pretrain.errors import PretrainError
from pretrain.model.initialize import initialize
from pretrain.model.language import build_language_model
from pretrain.model.names import named_tensors
from pretrain.model.projector import VisionTower
from pretrain.model.vision import VisionAttention
from pretrain.model.weights import TensorShard, language_weights
from pretrain.parallel import ParallelContext
from pretrain.step_metrics import ExpertTokens, StepMetrics, UpdateRms

# Attention of the vision encoder, whose query, key and value are matrices of their own.
_SEPARATE = "vision.encoder.blocks.*.attention"


@dataclass(frozen=True)
class Run:
    """Everything a step needs, on this rank.

    Attributes:
        language: this rank's runs of layers, each in megatron-core's data-parallel wrapper.
        tower: vision encoder and projector, a full copy on every rank.
        encoder: who encodes which image: the Decoupled Encoder Process, or each its own.
        clips: QK-Clip for the language model's heads and for the vision encoder's, which different
            ranks hold copies of.
        named_tensors: every trained parameter and kept buffer by its name in the whole model.
        shards: those of which this rank has a tensor-parallel shard.
        copies: how many ranks hold each of these, or the same part of it.
        step_metrics: gathers the metrics of a step from all ranks.
        assignment: which parameter went to Muon, which to AdamW, and why; for people.
    """

    config: Config
    context: ParallelContext
    data: Data
    language: list[DistributedDataParallel]
    tower: VisionTower
    encoder: EncoderProcess | ColocatedEncoder
    optimizer: MuonClip
    clips: list[QKClip]
    named_tensors: dict[str, Tensor]
    shards: dict[str, TensorShard]
    copies: dict[str, int]
    step_metrics: StepMetrics
    assignment: str

    def train(self, mode: bool = True) -> None:
        for chunk in self.language:
            chunk.train(mode)
        self.tower.train(mode)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tensor in self.named_tensors.items():
            if isinstance(tensor, nn.Parameter):
                yield name, tensor


def build(config: Config, context: ParallelContext, data: Data) -> Run:
    """Build this rank's part of everything, with its weights as at step 0."""
    dtype: torch.dtype = getattr(torch, config.precision)
    chunks = build_language_model(
        config.language,
        data.tokenizer.vocab_size,
        config.data.seq_length,
        config.parallel,
        config.recompute,
        dtype,
    )
    tower = VisionTower(config.vision, config.language.hidden_size)
    language = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    model = nn.ModuleDict({"language": language, "vision": tower}).to(context.device)
    set_precision(model, dtype)

    local_experts = config.language.num_experts // config.parallel.expert
    first_expert = context.expert_rank * local_experts
    named = named_tensors(chunks, tower, first_expert)
    experts = range(first_expert, first_expert + local_experts)
    shards = {
        weight.name: shard
        for weight in language_weights(config.language, data.tokenizer.vocab_size, experts)
        if weight.name in named
        and (shard := weight.shard(config.parallel, context.tensor_rank)) is not None
    }
    initialize(named, shards, config.seed, config.language.init_std, config.language.num_layers)

    def copies(name: str, tensor: Tensor) -> int:
        if name.startswith("vision."):
            return context.world_size
        if not getattr(tensor, "allreduce", True):
            return int(parallel_state.get_expert_data_parallel_world_size())
        return context.data_size * (1 if name in shards else context.tensor_size)

    settings = chunks[0].config
    replicas = [
        DistributedDataParallel(
            settings, DistributedDataParallelConfig(grad_reduce_in_fp32=dtype.itemsize < 4), chunk
        )
        for chunk in chunks
    ]
    expert_tokens = ExpertTokens(chunks)

    def finalize(*arguments: Any, **options: Any) -> None:
        expert_tokens.record()
        finalize_model_grads(*arguments, **options)

    settings.finalize_model_grads_func = finalize
    no_sync = [chunk.no_sync for chunk in replicas]
    settings.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync

    optimizer, clips = build_optimizer(config.optimizer, model)
    held_by = {name: copies(name, tensor) for name, tensor in named.items()}
    step_metrics = StepMetrics(
        config,
        context,
        expert_tokens,
        UpdateRms(optimizer, {tensor: held_by[name] for name, tensor in named.items()}),
        {name: _layer_number(model, name) for name in clips[0].layouts},
        data.tokenizer.vocab_size,
        tower.projector.fc2.weight.dtype,
    )
    return Run(
        config=config,
        context=context,
        data=data,
        language=replicas,
        tower=tower,
        encoder=make_encoder(
            config.encoder_process, tower, context, Path(config.run_dir, "encoder_cost.json")
        ),
        optimizer=optimizer,
        clips=clips,
        named_tensors=named,
        shards=shards,
        copies=held_by,
        step_metrics=step_metrics,
        assignment=muonclip.describe_assignment(
            muonclip.assign_parameters(
                model,
                layouts=matrix_layouts(model, exclude=_SEPARATE),
                shardings=optimizer.shardings,
            )
        ),
    )


def _layer_number(model: nn.ModuleDict, name: str) -> int:
    """Number of a language layer's attention in the whole model, from 0."""
    attention: Any = model.get_submodule(name)
    return int(attention.layer_number) - 1


def set_precision(model: nn.ModuleDict, dtype: torch.dtype) -> None:
    """Keep parameters in ``dtype`` and their gradients in at least float32; leave buffers alone.

    The vision tower's gradients accumulate in ``.grad``. megatron-core's wrapper accumulates the
    language model's in buffers, which become ``.grad`` after the backward pass.

    Raises:
        PretrainError: 16-bit parameters, and a torch (before 2.10) without wider gradients.
    """
    if dtype.itemsize < 4 and not hasattr(Tensor, "grad_dtype"):
        raise PretrainError(f"precision={str(dtype).removeprefix('torch.')} needs torch >= 2.10")
    for part, own_buffers in (("language", True), ("vision", False)):
        for parameter in model[part].parameters():
            parameter.data = parameter.data.to(dtype)
            if dtype.itemsize < 4:
                parameter.grad_dtype = None if own_buffers else torch.float32


def make_encoder(
    config: EncoderProcessConfig,
    tower: VisionTower,
    context: ParallelContext,
    cost_file: Path | None = None,
) -> EncoderProcess | ColocatedEncoder:
    """Who encodes which image; a measured cost is kept in ``cost_file``: a run that goes on plans
    as before."""
    cost = None
    if config.enabled and config.cost == "measured":
        cost = measured_cost(tower, dist.group.WORLD, cache=cost_file)
    return (EncoderProcess if config.enabled else ColocatedEncoder)(
        tower,
        dist.group.WORLD,
        config,
        needs_features=context.first_stage,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        cost=cost,
    )


def build_optimizer(config: OptimizerConfig, model: nn.ModuleDict) -> tuple[MuonClip, list[QKClip]]:
    """MuonClip over language model and vision tower, and QK-Clip watching all their heads."""
    parts = shardings(model)
    optimizer = MuonClip(
        muonclip.param_groups(
            model, layouts=matrix_layouts(model, exclude=_SEPARATE), shardings=parts
        ),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        ns_steps=config.ns_steps,
        ns_dtype=None if config.ns_dtype == "auto" else getattr(torch, config.ns_dtype),
        adamw_lr=config.adamw_lr,
        adamw_betas=(config.adamw_beta1, config.adamw_beta2),
        master_weights=True,
        # Ranks share the orthogonalization of what several of them hold.
        shardings=parts,
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    seen_by = {
        "language": (
            attention_layouts(model["language"]),
            # Other tensor-parallel ranks hold other heads, other stages other layers.
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        ),
        "vision": (
            {
                name: AttentionLayout.separate(
                    module.q_proj, module.k_proj, num_heads=module.num_heads
                )
                for name, module in model["vision"].named_modules()
                if isinstance(module, VisionAttention)
            },
            dist.group.WORLD,
        ),
    }
    clips = []
    for part, (layouts, group) in seen_by.items():
        named = {f"{part}.{name}": layout for name, layout in layouts.items()}
        clip = QKClip(
            named,
            threshold=config.qk_clip_threshold,
            process_group=group,
            warn_unobserved=part != "vision",  # a run of text alone has no images
        )
        for name in named:
            layer: Any = model.get_submodule(name)
            # In megatron-core's attention a module of its own sees the logits.
            attention = getattr(layer, "core_attention", layer)
            attention.observer = partial(clip.observe, name)
            attention.clip_threshold = clip.threshold
        clips.append(clip)
    return optimizer, clips
