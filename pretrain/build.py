"""Building a run from its configuration: model, encoder, optimizer and QK-Clip."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    finalize_model_grads,
)
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

import muonclip
from muonclip import AttentionLayout, MatrixLayout, MuonClip, QKClip
from muonclip.integrations.megatron_core import attention_layouts, matrix_layouts, shardings
from pretrain.config import Config, EncoderProcessConfig
from pretrain.data import Data
from pretrain.encoder_process import ColocatedEncoder, EncoderProcess
from pretrain.encoder_process.cost import measured_cost
from pretrain.encoder_process.encoder import ACTIVATION_MEMORY
from pretrain.errors import PretrainError
from pretrain.model.initialize import initialize
from pretrain.model.kernels import choose_kernels
from pretrain.model.language import build_language_model
from pretrain.model.load_balancing import LoadBalancing
from pretrain.model.megatron_config import ddp_config
from pretrain.model.multimodal import is_packed
from pretrain.model.names import named_tensors
from pretrain.model.projector import VisionTower
from pretrain.model.vision import VisionAttention
from pretrain.model.weights import Weight, language_weights, vision_weights
from pretrain.parallel import ImageGroups, ParallelContext, image_groups
from pretrain.plan.memory import free_memory
from pretrain.step_metrics import ExpertTokens, StepMetrics, UpdateRms

# The vision encoder's attention has separate query, key and value matrices.
_SEPARATE_QKV = "vision.encoder.blocks.*.attention"

# A threshold of QK-Clip above all logits.
_UNREACHABLE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Run:
    """Everything that a training step needs on this rank.

    Attributes:
        language: this rank's model chunks, each in megatron-core's data-parallel wrapper.
        tower: vision encoder and projector, replicated on every rank.
        encoder: runs the tower: the Decoupled Encoder Process, or each rank on its own images.
        clips: QK-Clip for the language model, unless this pipeline stage has no layers, and for the
            vision encoder, whose heads are replicated on different ranks.
        named_tensors: every parameter and every buffer in a checkpoint, by its name in the whole
            model.
        weights: entry of each of these tensors in the catalogue of weights, by name.
        copies: number of ranks with the same tensor, or the same shard of it, by name.
        load_balancing: the load-balancing loss of the routers, if the model has it.
        step_metrics: gathers the metrics of a step from all ranks.
        assignment: table of the algorithm that updates each parameter, and why.
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
    weights: dict[str, Weight]
    copies: dict[str, int]
    load_balancing: LoadBalancing | None
    step_metrics: StepMetrics
    assignment: str

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode."""
        for module in (*self.language, self.tower):
            if module.training != mode:  # setting the mode of every submodule takes milliseconds
                module.train(mode)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) pairs of this rank."""
        for name, tensor in self.named_tensors.items():
            if isinstance(tensor, nn.Parameter):
                yield name, tensor


def build(config: Config, context: ParallelContext, data: Data) -> Run:
    """Build this rank's part of a run, with the initial weights."""
    dtype: torch.dtype = getattr(torch, config.precision)
    vocab_size = config.language.vocab_rows(data.tokenizer.vocab_size)
    seq_length, parallel = config.data.seq_length, config.parallel
    kernels = choose_kernels(config)
    chunks = build_language_model(
        config.language,
        vocab_size,
        seq_length,
        parallel,
        config.recompute,
        dtype,
        kernels,
        config.megatron,
    )
    tower = VisionTower(config.vision, config.language.hidden_size)
    language = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    model = nn.ModuleDict({"language": language, "vision": tower}).to(context.device)
    set_precision(model, dtype)

    local_experts = config.language.num_experts // parallel.expert
    first_expert = context.expert_rank * local_experts
    named = named_tensors(chunks, tower, first_expert)
    experts = range(first_expert, first_expert + local_experts)
    catalogue = (
        *language_weights(config.language, vocab_size, experts),
        *vision_weights(config.vision, config.language.hidden_size),
    )
    weights = {weight.name: weight for weight in catalogue if weight.name in named}
    copies = {n: w.copies(parallel, context.world_size) for n, w in weights.items()}
    initialize(named, weights, config, context.tensor_rank)

    reduction = ddp_config(dtype, config.ddp, kernels)
    replicas = [DistributedDataParallel(chunks[0].config, reduction, c) for c in chunks]
    expert_tokens = ExpertTokens(chunks)
    balancing = None
    if config.language.load_balancing_loss:
        is_softmax = config.language.router_score == "softmax"
        coefficient = config.language.load_balancing_loss
        packed_length = seq_length if is_packed(chunks[0].config) else None
        balancing = LoadBalancing(
            chunks, coefficient, softmax=is_softmax, packed_length=packed_length
        )
    _configure_schedule(chunks[0].config, replicas, expert_tokens)

    layouts = matrix_layouts(model, exclude=_SEPARATE_QKV)
    optimizer, clips = build_optimizer(config, model, layouts)
    step_metrics = StepMetrics(
        config,
        context,
        expert_tokens,
        balancing,
        UpdateRms(optimizer, {tensor: copies[name] for name, tensor in named.items()}),
        {name: _layer_number(model, name) for clip in clips[:-1] for name in clip.layouts},
        vocab_size,
        tower.projector.fc2.weight.dtype,
    )
    assignment = muonclip.assign_parameters(model, layouts=layouts, shardings=optimizer.shardings)
    return Run(
        config=config,
        context=context,
        data=data,
        language=replicas,
        tower=tower,
        encoder=make_encoder(
            config.encoder_process,
            tower,
            context,
            Path(config.run_dir, "encoder_cost.json"),
            _activation_memory(config, context),
            image_groups(
                config.image_group_size(context.world_size),
                context,
                config.parallel.pipeline,
                config.faults.collective_limit,
            ),
        ),
        optimizer=optimizer,
        clips=clips,
        named_tensors=named,
        weights=weights,
        copies=copies,
        load_balancing=balancing,
        step_metrics=step_metrics,
        assignment=muonclip.describe_assignment(
            assignment, ns_dtype=config.optimizer.muonclip_options()["ns_dtype"]
        ),
    )


def _configure_schedule(
    settings: Any, replicas: Sequence[DistributedDataParallel], expert_tokens: ExpertTokens
) -> None:
    """Set the functions that megatron-core's schedule calls, in the model's configuration."""

    def finalize(*arguments: Any, **options: Any) -> None:
        expert_tokens.record()
        finalize_model_grads(*arguments, **options)

    settings.finalize_model_grads_func = finalize
    no_sync = [chunk.no_sync for chunk in replicas]
    settings.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync


def _layer_number(model: nn.ModuleDict, name: str) -> int:
    """Index in the whole model, from 0, of the layer that an attention module belongs to."""
    attention: Any = model.get_submodule(name)
    return int(attention.layer_number) - 1


def set_precision(model: nn.ModuleDict, dtype: torch.dtype) -> None:
    """Convert parameters to ``dtype``, with gradients in at least float32; buffers are unchanged.

    The vision tower's gradients accumulate in ``.grad``. megatron-core's wrapper accumulates those
    of the language model in buffers, which become ``.grad`` after the backward pass.

    Raises:
        PretrainError: for 16-bit parameters with torch < 2.10, which has no wider gradients.
    """
    if dtype.itemsize < 4 and not hasattr(Tensor, "grad_dtype"):
        raise PretrainError(f"precision={str(dtype).removeprefix('torch.')} needs torch >= 2.10")
    for name, grad_dtype in (("language", None), ("vision", torch.float32)):
        for parameter in model[name].parameters():
            parameter.data = parameter.data.to(dtype)
            if dtype.itemsize < 4:
                parameter.grad_dtype = grad_dtype


def make_encoder(
    config: EncoderProcessConfig,
    tower: VisionTower,
    context: ParallelContext,
    cost_file: Path | None = None,
    activation_memory: float = ACTIVATION_MEMORY,
    groups: ImageGroups | None = None,
) -> EncoderProcess | ColocatedEncoder:
    """Create the object that assigns images to ranks and encodes them.

    Args:
        cost_file: file of a measured cost, so that a resumed run plans as before.
        activation_memory: see :class:`EncoderProcess`.
        groups: ranks that share their images. Default: all, which cannot plan ahead.
    """
    groups = groups or ImageGroups(dist.group.WORLD, None, 1)
    cost = None
    if config.enabled and config.cost == "measured":
        cost = measured_cost(tower, dist.group.WORLD, cache=cost_file)
    return (EncoderProcess if config.enabled else ColocatedEncoder)(
        tower,
        groups.exchange,
        config,
        planning_group=groups.planning,
        num_groups=groups.number,
        needs_features=context.first_stage,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        cost=cost,
        activation_memory=activation_memory,
    )


def _activation_memory(config: Config, context: ParallelContext) -> float:
    """Default bytes for activations that the encoder keeps: on a GPU, what the plan leaves free."""
    if context.device.type != "cuda":
        return ACTIVATION_MEMORY
    total = torch.cuda.get_device_properties(context.device).total_memory
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return free_memory(config, context.world_size, stage, 0.9 * total)


def build_optimizer(
    config: Config, model: nn.ModuleDict, layouts: Mapping[str, MatrixLayout]
) -> tuple[MuonClip, list[QKClip]]:
    """Build MuonClip for language model and vision tower, and QK-Clip for their attention.

    With norms on queries and keys, QK-Clip observes the language model, but never clips it.

    Args:
        layouts: the matrices that fused parameters store, by name.
    """
    options, tensor_shardings = config.optimizer, shardings(model)
    groups = muonclip.param_groups(model, layouts=layouts, shardings=tensor_shardings)
    try:
        optimizer = MuonClip(
            groups,
            **options.muonclip_options(),
            master_weights=True,
            # Ranks with the same matrix share its orthogonalization.
            shardings=tensor_shardings,
            shard_state=config.shards_state(dist.get_world_size()),
        )
    except (TypeError, ValueError) as error:  # options that do not fit this model or machine
        raise PretrainError(f"optimizer: {error}") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    vision_layouts = {
        name: AttentionLayout.separate(module.q_proj, module.k_proj, num_heads=module.num_heads)
        for name, module in model["vision"].named_modules()
        if isinstance(module, VisionAttention)
    }
    threshold = options.qk_clip_threshold
    if config.language.qk_norm:
        language = _normalized_attention(model["language"]), _UNREACHABLE
    else:
        language = attention_layouts(model["language"]), threshold
    # Ranks of a tensor-parallel group have different heads; pipeline stages, different layers.
    same_heads = parallel_state.get_data_parallel_group(with_context_parallel=True)
    clips = []
    for part, attention_modules, limit, ranks in (
        ("language", *language, same_heads),
        ("vision", vision_layouts, threshold, dist.group.WORLD),
    ):
        if not attention_modules:  # a pipeline stage without layers
            continue
        clip = QKClip(
            {f"{part}.{name}": layout for name, layout in attention_modules.items()},
            threshold=limit,
            process_group=ranks,
            warn_unobserved=part != "vision",  # a run on text alone has no images
        )
        for name in clip.layouts:
            layer: Any = model.get_submodule(name)
            # In megatron-core's attention, a submodule computes the logits.
            attention = getattr(layer, "core_attention", layer)
            attention.observer = partial(clip.observe, name)
        clips.append(clip)
    return optimizer, clips


def _normalized_attention(language: nn.Module) -> dict[str, AttentionLayout]:
    """The heads of attention whose queries and keys are normalized, to observe their logits.

    The norms' gains are shared by all heads, and undo any scaling of a head's weights.
    """
    return {
        name: AttentionLayout.fused_by_group(
            module.linear_qkv,
            num_heads=module.num_attention_heads_per_partition,
            num_kv_groups=module.num_query_groups_per_partition,
        )
        for name, module in language.named_modules()
        if isinstance(module, SelfAttention)
    }
