"""Putting a run together: model, encoder, optimizer and clip, from the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor, nn

import muonclip
from muonclip import AttentionLayout, MuonClip, QKClip
from muonclip.integrations.megatron_core import attention_layouts, matrix_layouts
from pretrain.config import Config, OptimizerConfig
from pretrain.data import Data
from pretrain.encoder_process import ColocatedEncoder, EncoderProcess
from pretrain.model.language import build_language_model
from pretrain.model.names import global_names, initialize
from pretrain.model.projector import VisionTower
from pretrain.model.vision import VisionAttention
from pretrain.runtime.processes import Processes


@dataclass(frozen=True)
class Run:
    """Everything a step needs, on this rank.

    Attributes:
        language: megatron-core's data-parallel wrapper of the GPTModel.
        tower: vision encoder and projector, a full copy on every rank.
        encoder: who encodes which image: the Decoupled Encoder Process, or each its own.
        named: every trained parameter and kept buffer by its name in the whole model.
        assignment: which parameter went to Muon, which to AdamW, and why; for people.
    """

    config: Config
    processes: Processes
    data: Data
    language: DistributedDataParallel
    tower: VisionTower
    encoder: EncoderProcess | ColocatedEncoder
    optimizer: MuonClip
    clip: QKClip
    named: dict[str, Tensor]
    assignment: str

    def train(self, mode: bool = True) -> None:
        self.language.train(mode)
        self.tower.train(mode)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, tensor in self.named.items():
            if isinstance(tensor, nn.Parameter):
                yield name, tensor


def build(config: Config, processes: Processes, data: Data) -> Run:
    """Build this rank's part of everything, with its weights as at step 0."""
    language = build_language_model(
        config.language, data.tokenizer.vocab_size, config.data.seq_length, config.parallel.expert
    )
    tower = VisionTower(config.vision, config.language.hidden_size)
    model = nn.ModuleDict({"language": language, "vision": tower}).to(processes.device)

    local_experts = config.language.num_experts // config.parallel.expert
    named = dict(global_names(model, first_expert=processes.expert_rank * local_experts))
    initialize(named, config.seed, config.language.init_std, config.language.num_layers)

    replicas = DistributedDataParallel(
        language.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), language
    )
    language.config.finalize_model_grads_func = finalize_model_grads
    language.config.no_sync_func = replicas.no_sync

    make_encoder = EncoderProcess if config.encoder_process.enabled else ColocatedEncoder
    optimizer, clip = build_optimizer(config.optimizer, model)
    return Run(
        config=config,
        processes=processes,
        data=data,
        language=replicas,
        tower=tower,
        encoder=make_encoder(tower, dist.group.WORLD),
        optimizer=optimizer,
        clip=clip,
        named=named,
        assignment=muonclip.describe(muonclip.assign(model, layouts=matrix_layouts(model))),
    )


def build_optimizer(config: OptimizerConfig, model: nn.ModuleDict) -> tuple[MuonClip, QKClip]:
    """MuonClip over language model and vision tower, and QK-Clip watching all their heads."""
    optimizer = MuonClip(
        muonclip.param_groups(model, layouts=matrix_layouts(model)),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        ns_steps=config.ns_steps,
        ns_dtype=getattr(torch, config.ns_dtype),
        adamw_lr=config.adamw_lr,
        adamw_betas=(config.adamw_beta1, config.adamw_beta2),
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    layouts = attention_layouts(model)
    for name, module in model.named_modules():
        if isinstance(module, VisionAttention):
            layouts[name] = AttentionLayout.separate(
                module.q_proj, module.k_proj, num_heads=module.num_heads
            )
    clip = QKClip(layouts, threshold=config.qk_clip_threshold)
    for name in layouts:
        layer: Any = model.get_submodule(name)
        # megatron-core's attention computes logits in a module of its own, the encoder's itself.
        getattr(layer, "core_attention", layer).observer = partial(clip.observe, name)
    return optimizer, clip
