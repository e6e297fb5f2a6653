"""The language model: megatron-core's GPTModel with MLA and MoE layers, as in Kimi K2.

megatron-core is entered through its layer spec alone: the core attention is ours, because it is
where attention logits can be seen, and so are the norms.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor, nn

from muonclip import screened_max_logits
from pretrain.config import (
    LanguageConfig,
    ParallelConfig,
    RecomputeConfig,
    RopeScalingConfig,
)
from pretrain.model.weights import TensorShard
from pretrain.runtime import apex

MaxLogitObserver = Callable[[Tensor], None]


class CoreAttention(nn.Module):
    """Softmax attention that can report every head's largest logit.

    ``observer``, where set, is called in training with the maximum over the micro-batch of what
    enters the softmax (scaled, rotated, masked), a detached float32 tensor [heads]. In bfloat16
    only heads that may be above ``clip_threshold`` are computed in float32, as these decide a clip;
    the others' maxima, at most the threshold, are read from the rounded logits.
    """

    def __init__(self, *, softmax_scale: float | None = None, config: Any, **_spec: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.observer: MaxLogitObserver | None = None
        self.clip_threshold = 0.0  # every head in float32

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_unused: Any
    ) -> Tensor:
        """Attend: query, key [s, b, heads, d], value [s, b, heads, v] to [s, b, heads * v].

        ``attention_mask`` is bool, broadcast to [b, heads, s, s], True where not to look.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        logits = torch.matmul(query * self.softmax_scale, key.transpose(-1, -2))
        logits = logits.masked_fill(attention_mask, -torch.inf)
        if self.observer is not None and self.training and torch.is_grad_enabled():
            self.observer(self._largest(query, key, logits, attention_mask))
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.softmax(logits, dim=-1, dtype=wide).to(value.dtype)
        context = torch.matmul(weights, value)
        return context.permute(2, 0, 1, 3).flatten(2)

    @torch.no_grad()
    def _largest(self, query: Tensor, key: Tensor, logits: Tensor, masked: Tensor) -> Tensor:
        """Each head's largest logit, float32 [heads]."""
        rounded = logits.amax(dim=(0, 2, 3)).float()
        if logits.dtype == torch.float32:
            return rounded
        seen = screened_max_logits(
            query, key, self.clip_threshold, scale=self.softmax_scale, mask=~masked
        )
        # No rounding lifts a head over the threshold that its bound keeps it under.
        settled = rounded.minimum(seen.bounds)
        return torch.where(seen.bounds <= self.clip_threshold, settled, seen.max_logits)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, built the way a layer spec builds it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_spec: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism each tensor-parallel rank sees a part of the sequence, and
        # megatron-core sums the gradients of the parameters that carry this mark.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (for mypy)

    def forward(self, x: Tensor) -> Tensor:
        """Norm of the last dimension; NVIDIA's apex does it where it is installed."""
        assert self.eps is not None
        return apex.rms_norm(x, self.weight, self.eps)


class LatentRMSNorm(RMSNorm):
    """The norm of MLA's latents, whose epsilon no setting of DeepSeek-V3 changes."""

    def __init__(self, config: Any, hidden_size: int, **_spec: Any) -> None:
        super().__init__(config, hidden_size, eps=1e-6)


class DuplicatedLinear(nn.Linear):
    """A linear layer that every tensor-parallel rank has whole, for its part of the sequence.

    It takes the place of MLA's ``linear_kv_down_proj``, whose output holds the rotary key that all
    heads share. Cut by ``ColumnParallelLinear``, that key's gradient would be each rank's own
    heads' alone: megatron-core 0.16 gathers the output without summing its gradient.
    """

    def __init__(self, cut: ColumnParallelLinear) -> None:
        super().__init__(cut.input_size, cut.output_size, bias=False, dtype=cut.weight.dtype)
        # As for norms, its gradient is summed over the parts of the sequence.
        setattr(self.weight, "sequence_parallel", True)  # noqa: B010 (for mypy)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """megatron-core's layers return a bias beside their output."""
        return super().forward(x), None


def transformer_config(
    config: LanguageConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    dtype: torch.dtype,
) -> MLATransformerConfig:
    """megatron-core's settings for our language model."""
    sparse = config.num_layers - config.dense_layers
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
        moe_layer_freq=[0] * config.dense_layers + [1] * sparse,
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
        # Two stages are each other's next and previous: messages sent in one batch could be
        # taken one for the other.
        batch_p2p_comm=parallel.interleave == 1,
        overlap_p2p_comm=parallel.interleave > 1,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Losses are sums over tokens, divided once by the count of the whole global batch: the
        # result does not depend on how sequences are dealt to ranks and micro-batches.
        calculate_per_token_loss=True,
        # Weights are drawn by pretrain.model.initialize, the same in every parallel layout.
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _pipeline_layout(config: LanguageConfig, parallel: ParallelConfig) -> list[list[str]] | None:
    """Contents of each run of layers, if they are not all of one length."""
    layers = parallel.layers(config.num_layers)
    if len(set(layers)) == 1:
        return None
    runs = [["decoder"] * count for count in layers]
    return [["embedding", *runs[0]], *runs[1:-1], [*runs[-1], "loss"]]


def _rope_settings(config: RopeScalingConfig) -> dict[str, Any]:
    """With YaRN, megatron-core's MLA passes on a softmax scale that has m(mscale_all_dim) squared
    in it, and turns queries and keys with a table that has m(mscale) / m(mscale_all_dim) in it: a
    head's largest logit is seen with both."""
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
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(config.modules),
        }
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
    """Build this rank's part of the model; megatron-core's parallel state must be set up.

    Args:
        recompute: which activations are not kept; None keeps all.
        dtype: of the parameters.

    Returns:
        The runs of layers that this rank has: one, or several with an interleaved pipeline.
    """
    settings = transformer_config(config, parallel, recompute or RecomputeConfig(), dtype)
    chunks = []
    for chunk in range(parallel.interleave):
        virtual = {"vp_stage": chunk} if parallel.interleave > 1 else {}
        spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, **virtual)
        spec.layer_norm = RMSNorm
        for layer in spec.layer_specs:
            layer.submodules.input_layernorm = RMSNorm
            layer.submodules.pre_mlp_layernorm = RMSNorm
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = CoreAttention
            attention.q_layernorm = LatentRMSNorm
            attention.kv_layernorm = LatentRMSNorm
        model = GPTModel(
            config=settings,
            transformer_layer_spec=spec,
            vocab_size=vocab_size,
            max_sequence_length=seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **virtual),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **virtual),
            position_embedding_type="none",
            share_embeddings_and_output_weights=False,
            # Image features take their places first; multimodal.forward scatters after that.
            scatter_embedding_sequence_parallel=False,
            **virtual,
        )
        if parallel.tensor > 1:
            for layer in model.decoder.layers:
                attention = layer.self_attention
                attention.linear_kv_down_proj = DuplicatedLinear(attention.linear_kv_down_proj)
        chunks.append(model)
    return chunks


def tensor_shards(chunk: GPTModel) -> dict[str, TensorShard]:
    """How tensor parallelism cut this rank's parameters, by their names in ``chunk``."""
    found = {}
    for name, module in chunk.named_modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        group = module.tp_group
        if group.size() > 1:
            stacked = 2 if name.endswith("linear_fc1") else 1
            found[f"{name}.weight"] = TensorShard(dim, group.rank(), group.size(), stacked)
    return found
