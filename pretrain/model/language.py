"""The language model: megatron-core's GPTModel with the architecture of Kimi K2.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) and a mixture of experts with sigmoid
scores and aux-loss-free balancing (DeepSeek-V3, arXiv 2412.19437). The layer spec replaces the core
attention, which observes max logits, and the norms.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from muonclip import screened_max_logits
from pretrain.config import LanguageConfig, ParallelConfig, RecomputeConfig, RopeScalingConfig
from pretrain.runtime import apex

MaxLogitObserver = Callable[[Tensor], None]


class CoreAttention(nn.Module):
    """Softmax attention that reports every head's max logit.

    Attributes:
        observer: if set, called in training with the max logits of a micro-batch: the largest input
            of the softmax (scaled, rotated, masked) of every head, detached float32 [heads].
        clip_threshold: τ of QK-Clip. With 16-bit logits, max logits that may be above it are
            computed in float32; the others are those of the rounded logits, and at most τ.
    """

    def __init__(self, *, softmax_scale: float | None = None, config: Any, **_spec: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.observer: MaxLogitObserver | None = None
        self.clip_threshold = 0.0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_unused: Any
    ) -> Tensor:
        """query, key [s, b, heads, d] and value [s, b, heads, v] to [s, b, heads * v].

        ``attention_mask`` is bool, broadcast to [b, heads, s, s], True where attention is masked.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        logits = torch.matmul(query * self.softmax_scale, key.transpose(-1, -2))
        logits = logits.masked_fill(attention_mask, -torch.inf)
        if self.observer is not None and self.training and torch.is_grad_enabled():
            self.observer(self._max_logits(query, key, logits, attention_mask))
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.softmax(logits, dim=-1, dtype=wide).to(value.dtype)
        context = torch.matmul(weights, value)
        return context.permute(2, 0, 1, 3).flatten(2)

    @torch.no_grad()
    def _max_logits(self, query: Tensor, key: Tensor, logits: Tensor, masked: Tensor) -> Tensor:
        """float32 [heads]."""
        rounded = logits.amax(dim=(0, 2, 3)).float()
        if logits.dtype == torch.float32:
            return rounded
        screened = screened_max_logits(
            query, key, self.clip_threshold, scale=self.softmax_scale, mask=~masked
        )
        # The upper bound keeps rounding from lifting a max logit above the threshold.
        below = rounded.minimum(screened.bounds)
        return torch.where(screened.bounds <= self.clip_threshold, below, screened.max_logits)


class RMSNorm(nn.RMSNorm):
    """RMSNorm with the constructor that layer specs require."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_spec: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # With sequence parallelism, megatron-core sums the gradients of parameters with this
        # attribute over the tensor-parallel ranks, each of which has a part of the sequence.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (for mypy)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension, with NVIDIA's apex if it is installed."""
        assert self.eps is not None
        return apex.rms_norm(x, self.weight, self.eps)


class LatentRMSNorm(RMSNorm):
    """RMSNorm of MLA's latents, with DeepSeek-V3's fixed epsilon of 1e-6."""

    def __init__(self, config: Any, hidden_size: int, **_spec: Any) -> None:
        super().__init__(config, hidden_size, eps=1e-6)


class DuplicatedLinear(nn.Linear):
    """MLA's ``linear_kv_down_proj`` with the whole weight on every tensor-parallel rank.

    Its output contains the rotary key that all heads share. megatron-core 0.16 splits the layer
    and gathers the output without summing its gradient, so that the shared key would get the
    gradient of each rank's own heads only.
    """

    def __init__(self, split: ColumnParallelLinear) -> None:
        super().__init__(split.input_size, split.output_size, bias=False, dtype=split.weight.dtype)
        # See RMSNorm.
        setattr(self.weight, "sequence_parallel", True)  # noqa: B010 (for mypy)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Output and no bias, as megatron-core's linear layers return them."""
        return super().forward(x), None


def transformer_config(
    config: LanguageConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    dtype: torch.dtype,
) -> MLATransformerConfig:
    """megatron-core's configuration of the language model."""
    moe_layers = config.num_layers - config.dense_layers
    return MLATransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_head_dim=config.qk_nope_head_dim,
        qk_pos_emb_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        rotary_base=config.rope_base,
        **_rope_settings(config.rope_scaling),
        qk_layernorm=True,
        num_moe_experts=config.num_experts,
        moe_layer_freq=[0] * config.dense_layers + [1] * moe_layers,
        moe_router_topk=config.experts_per_token,
        moe_ffn_hidden_size=config.expert_ffn_hidden_size,
        moe_shared_expert_intermediate_size=config.shared_expert_ffn_hidden_size,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=config.router_scaling,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=config.expert_bias_update_rate,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp64" if dtype == torch.float64 else "fp32",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        tensor_model_parallel_size=parallel.tensor,
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
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _pipeline_layout(config: LanguageConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """Layers of each model chunk; None if all chunks have the same number of layers."""
    layers = parallel.layers(config.num_layers)
    if len(set(layers)) == 1:
        return None
    chunks = [["decoder"] * count for count in layers]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]


def _rope_settings(config: RopeScalingConfig) -> dict[str, Any]:
    """Rotary embedding, with YaRN (arXiv 2309.00071) if the context is extended.

    megatron-core's MLA multiplies the softmax scale by m(mscale_all_dim)², and the rotary table by
    m(mscale) / m(mscale_all_dim). Max logits include both factors.
    """
    if config.factor == 1:
        return {"rope_type": "rope"}
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
        return {"recompute_granularity": "selective", "recompute_modules": list(config.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": config.method,
        "recompute_num_layers": config.num_layers,
    }


def build_language_model(
    config: LanguageConfig,
    vocab_size: int,
    seq_length: int,
    parallel: ParallelConfig,
    recompute: RecomputeConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[GPTModel]:
    """Build this rank's model chunks; megatron-core's parallel state must be initialized.

    Args:
        recompute: activations to recompute. Default: none.
        dtype: of the parameters.

    Returns:
        One model chunk, or several with an interleaved pipeline.
    """
    settings = transformer_config(config, parallel, recompute or RecomputeConfig(), dtype)
    chunks = []
    for chunk in range(parallel.interleave):
        virtual = {"vp_stage": chunk} if parallel.interleave > 1 else {}
        model = GPTModel(
            config=settings,
            transformer_layer_spec=_layer_spec(settings, virtual),
            vocab_size=vocab_size,
            max_sequence_length=seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **virtual),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **virtual),
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            # multimodal.forward scatters the embeddings after it has inserted image features.
            scatter_embedding_sequence_parallel=False,
            **virtual,
        )
        if parallel.tensor > 1:
            for layer in model.decoder.layers:
                attention = layer.self_attention
                attention.linear_kv_down_proj = DuplicatedLinear(attention.linear_kv_down_proj)
        chunks.append(model)
    return chunks


def _layer_spec(settings: MLATransformerConfig, virtual: dict[str, int]) -> Any:
    """megatron-core's layer spec of a model chunk, with our core attention and norms."""
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, **virtual)
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CoreAttention
        attention.q_layernorm = LatentRMSNorm
        attention.kv_layernorm = LatentRMSNorm
    return spec
