"""megatron-core's configuration of the language model, from the settings of a run."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import nn

from pretrain.config import (
    Config,
    LanguageConfig,
    ParallelConfig,
    RecomputeConfig,
    RopeScalingConfig,
)
from pretrain.errors import PretrainError
from pretrain.model.kernels import Kernels, choose_kernels, configuration_problem
from pretrain.model.pass_through import OFF, build_config, check_options

# Of the norms of MLA's latents, as in DeepSeek-V3's code.
LATENT_EPSILON = 1e-6


def check_megatron(config: Config) -> Kernels:
    """Check what this machine and megatron-core can do with a configuration.

    Returns:
        The kernels of the run.

    Raises:
        PretrainError: the kernels or an option are not available here, or megatron-core refuses
            the configuration.
    """
    kernels = choose_kernels(config)
    dtype: torch.dtype = getattr(torch, config.precision)
    transformer_config(
        config.language, config.parallel, config.recompute, dtype, kernels, config.megatron
    )
    ddp_config(dtype, config.ddp, kernels)
    return kernels


def check_planned(config: Config) -> None:
    """Check ``megatron`` and ``ddp`` for a run on another machine, with what that may have.

    Raises:
        PretrainError: an option cannot be passed on, on any machine.
    """
    problem = configuration_problem(config)
    if config.kernels == "transformer_engine" and problem is not None:
        raise PretrainError(f"kernels=transformer_engine cannot be used: {problem}")
    with_engine = config.kernels != "torch" and problem is None
    kernels: Kernels = "transformer_engine" if with_engine else "torch"
    dtype: torch.dtype = getattr(torch, config.precision)
    language, megatron, parallel = config.language, config.megatron, config.parallel
    controlled = _controlled(language, parallel, config.recompute, dtype, kernels, megatron)
    config_class = _config_class(language)
    check_options("megatron", megatron, config_class, kernels, [*controlled], here=False)
    _check_combinations(megatron, language, parallel, config.recompute, dtype)
    check_options("ddp", config.ddp, DistributedDataParallelConfig, kernels, here=False)


def transformer_config(
    config: LanguageConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    dtype: torch.dtype,
    kernels: Kernels = "torch",
    megatron: Mapping[str, Any] = MappingProxyType({}),
) -> TransformerConfig:
    """megatron-core's configuration of the language model.

    Args:
        megatron: options to pass on.

    Raises:
        PretrainError: an option cannot be passed on, or megatron-core refuses the settings.
    """
    defaults = _default_options(kernels)
    controlled = _controlled(config, parallel, recompute, dtype, kernels, defaults | dict(megatron))
    # `recompute.modules` can name those that `plan` knows, `megatron.recompute_modules` all.
    if recompute.granularity == "selective":
        defaults["recompute_modules"] = list(recompute.modules)
    config_class = _config_class(config)
    options = check_options("megatron", megatron, config_class, kernels, [*controlled])
    _check_combinations(options, config, parallel, recompute, dtype)
    return build_config(config_class, "megatron", {**controlled, **defaults, **options})


def _config_class(config: LanguageConfig) -> type[TransformerConfig]:
    return MLATransformerConfig if config.attention == "mla" else TransformerConfig  # type: ignore[no-any-return]


def _controlled(
    config: LanguageConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    dtype: torch.dtype,
    kernels: Kernels,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings that follow from those of the run; ``megatron`` cannot replace them."""
    mla, fused_rope = config.attention == "mla", bool(options.get("apply_rope_fusion"))
    return dict(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        **(_mla_settings(config, fused_rope) if mla else _gqa_settings(config)),
        **(_expert_settings(config, dtype) if config.moe_layers else {}),
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.interleave if parallel.interleave > 1 else None
        ),
        pipeline_model_parallel_layout=_pipeline_layout(config, parallel),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        **_recompute_settings(recompute),
        # Of two stages, each is the next and the previous of the other: with batched messages they
        # could confuse activations and gradients.
        batch_p2p_comm=parallel.interleave == 1,
        overlap_p2p_comm=parallel.interleave > 1,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Losses are sums over tokens, divided once by the token count of the global batch, so that
        # the result does not depend on the distribution of sequences to ranks and micro-batches.
        calculate_per_token_loss=True,
        # pretrain.model.initialize gives the same weights in every parallel layout.
        perform_initialization=False,
        use_cpu_initialization=True,
        transformer_impl="local" if kernels == "torch" else "transformer_engine",
        moe_grouped_gemm=kernels == "transformer_engine",
        # Its attention then returns max logits.
        log_max_attention_logit=kernels == "transformer_engine",
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _check_combinations(
    megatron: Mapping[str, Any],
    config: LanguageConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    dtype: torch.dtype,
) -> None:
    """Refuse options that contradict the run's other settings, or have no effect with them."""

    def refuse(name: str, reason: str) -> None:
        raise PretrainError(f"megatron.{name} {reason}")

    active = {name for name, value in megatron.items() if value not in OFF}
    if (modules := megatron.get("recompute_modules")) is not None:
        if recompute.granularity != "selective":
            refuse("recompute_modules", "needs recompute.granularity=selective")
        if not modules:
            refuse("recompute_modules", "must name at least one module: leave it out")
        for module in modules:
            if not config.has_module(module):
                refuse("recompute_modules", f"has {module}, which no layer has: leave it out")
    if "mla_down_proj_fusion" in active and parallel.tensor > 1:
        refuse(
            "mla_down_proj_fusion",
            "splits both projections over ranks, but the trainer keeps them whole: leave it out, "
            "or set parallel.tensor=1",
        )
    if "mla_down_proj_fusion" in active and "gradient_accumulation_fusion" in active:
        refuse(
            "mla_down_proj_fusion",
            "has two weights in one layer, which megatron.gradient_accumulation_fusion does not "
            "support: leave one of them out",
        )
    if "cross_entropy_loss_fusion" in active and dtype != torch.bfloat16:
        refuse(
            "cross_entropy_loss_fusion",
            "rounds the gradient of the loss to bfloat16: leave it out, or set precision=bfloat16",
        )
    if "deallocate_pipeline_outputs" in active and parallel.interleave > 1:
        # Since 0.19, megatron-core waits for some of the messages.
        refuse(
            "deallocate_pipeline_outputs",
            "frees outputs that the interleaved schedule is still sending: leave it out, or set "
            "parallel.interleave=1",
        )
    if "microbatch_group_size_per_vp_stage" in active and parallel.interleave == 1:
        refuse(
            "microbatch_group_size_per_vp_stage",
            "has no effect with parallel.interleave=1: leave it out",
        )
    for name in sorted(active):
        if name.startswith("moe_") and not config.moe_layers:
            refuse(name, "has no effect without layers of experts: leave it out")
        if name == "moe_shared_expert_overlap" and not config.shared_expert_ffn_hidden_size:
            refuse(name, "has no effect without shared experts: leave it out")


def ddp_config(
    dtype: torch.dtype, ddp: Mapping[str, Any] = MappingProxyType({}), kernels: Kernels = "torch"
) -> DistributedDataParallelConfig:
    """megatron-core's configuration of gradient reduction.

    Args:
        dtype: of the parameters. Gradients are reduced in at least float32.
        ddp: options to pass on.

    Raises:
        PretrainError: an option cannot be passed on, or megatron-core refuses the settings.
    """
    controlled = {"grad_reduce_in_fp32": dtype.itemsize < 4}
    options = check_options("ddp", ddp, DistributedDataParallelConfig, kernels, [*controlled])
    return build_config(DistributedDataParallelConfig, "ddp", {**controlled, **options})


def _default_options(kernels: Kernels) -> dict[str, Any]:
    """Options that ``Config.megatron`` can replace."""
    options: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if kernels == "transformer_engine":
        fusions = ("moe_permute", "moe_router", "apply_rope", "bias_activation")
        options |= {f"{name}_fusion": True for name in fusions}
        # megatron-core's own; 0.19 warns that Transformer Engine's is not stable.
        options |= {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"}
    return options


def _pipeline_layout(config: LanguageConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """Layers of each model chunk; None if all chunks have the same number of layers."""
    layers = parallel.layers(config.num_layers)
    if len(set(layers)) == 1:
        return None
    chunks = [["decoder"] * count for count in layers]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def _mla_settings(config: LanguageConfig, fused_rope: bool) -> dict[str, Any]:
    """Multi-head latent attention."""
    return {
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_head_dim": config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "qk_layernorm": True,
        "rotary_base": config.rope_base,
        **_rope_settings(config.rope_scaling, fused_rope),
    }


def _gqa_settings(config: LanguageConfig) -> dict[str, Any]:
    """Grouped-query attention. GPTModel itself takes the settings of its rotary embedding."""
    return {
        "num_query_groups": config.gqa_kv_heads,
        "kv_channels": config.gqa_head_dim,
        "qk_layernorm": config.qk_norm,
    }


def _expert_settings(config: LanguageConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Layers of experts and their routers."""
    normalized = config.normalize_expert_weights and config.experts_per_token > 1
    softmax = {
        "moe_router_score_function": "softmax",
        # The softmax over all experts, not over those of the token.
        "moe_router_pre_softmax": not normalized,
    }
    sigmoid = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": config.expert_bias_update_rate,
    }
    groups = {
        "moe_router_num_groups": config.expert_groups,
        "moe_router_group_topk": config.expert_groups_per_token,
    }
    return {
        "num_moe_experts": config.num_experts,
        "moe_layer_freq": [0] * config.dense_layers + [1] * config.moe_layers,
        "moe_router_topk": config.experts_per_token,
        "moe_ffn_hidden_size": config.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_ffn_hidden_size or None,
        **(softmax if config.router_score == "softmax" else sigmoid),
        **(groups if config.expert_groups_per_token < config.expert_groups else {}),
        "moe_router_topk_scaling_factor": config.router_scaling,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
    }


def _rope_settings(config: RopeScalingConfig, fused: bool) -> dict[str, Any]:
    """Rotary embedding, with YaRN (arXiv 2309.00071) if the context is extended.

    megatron-core's MLA multiplies the softmax scale by m(mscale_all_dim)², and the rotary table by
    m(mscale) / m(mscale_all_dim). Max logits include both factors. Its fused kernel knows only
    YaRN, which with a factor of 1 is the plain embedding.
    """
    if config.factor == 1:
        return (
            {"rope_type": "yarn", "rotary_scaling_factor": 1.0} if fused else {"rope_type": "rope"}
        )
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": config.factor,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
        "mscale": config.mscale,
        "mscale_all_dim": config.mscale_all_dim,
    }


def _recompute_settings(config: RecomputeConfig) -> dict[str, Any]:
    if config.granularity == "none":
        return {}
    if config.granularity == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": config.method,
        "recompute_num_layers": config.num_layers,
    }
