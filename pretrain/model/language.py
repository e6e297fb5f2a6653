"""The language model: megatron-core's GPTModel in the shapes of published models.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) or grouped-query attention, and dense
MLPs or mixtures of experts. The layer spec replaces the core attention, which observes max logits,
and the norms.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

from pretrain.config import LanguageConfig, ParallelConfig, RecomputeConfig
from pretrain.model.attention import CoreAttention
from pretrain.model.cross_entropy import cross_entropy
from pretrain.model.experts import GroupedExperts
from pretrain.model.kernels import Kernels
from pretrain.model.latent_attention import LatentAttention
from pretrain.model.megatron_config import LATENT_EPSILON, transformer_config
from pretrain.model.pass_through import explained
from pretrain.model.rms_norm import rms_norm


class LanguageModel(GPTModel):  # type: ignore[misc]
    """GPTModel that computes logits only for the labels that count.

    The labels of image placeholders, padding and prompts have no weight. The output layer and the
    loss, which take much of a small model's time and of a large model's memory, leave them out.
    """

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Logits [b, s, vocabulary] without ``labels``; else losses [b, s].

        Args:
            hidden_states: [s, b, h].
            labels: int64 [b, s].
            loss_mask: int64 [n], the indices of the labels that count in [b, s], flattened; the
                losses of the others are 0. Default: all count.
        """
        if labels is None or loss_mask is None or not self.post_process:
            output: Tensor = super()._postprocess(
                hidden_states=hidden_states, labels=labels, loss_mask=None, **options
            )
            return output
        size, length = labels.shape
        rows = loss_mask % length * size + loss_mask // length
        losses = super()._postprocess(
            hidden_states=hidden_states.flatten(0, 1).index_select(0, rows).unsqueeze(1),
            labels=labels.flatten().index_select(0, loss_mask).unsqueeze(0),
            loss_mask=None,
            **options,
        )
        every: Tensor = losses.new_zeros(labels.numel()).index_copy(0, loss_mask, losses[0])
        return every.view_as(labels)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The losses [b, s] of labels [b, s]; the logits [s, b, vocabulary] are overwritten."""
        if self.config.cross_entropy_loss_fusion:
            fused: Tensor = super().compute_language_model_loss(labels, logits)
            return fused
        losses = cross_entropy(logits.flatten(0, 1), labels.t().flatten(), self.pg_collection.tp)
        return losses.view(labels.shape[::-1]).t().contiguous()


class RMSNorm(nn.RMSNorm):
    """RMSNorm with the constructor that layer specs require."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_spec: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # With sequence parallelism, megatron-core sums the gradients of parameters with this
        # attribute over the tensor-parallel ranks, each of which has a part of the sequence.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (for mypy)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LatentRMSNorm(RMSNorm):
    """RMSNorm of MLA's latents, with DeepSeek-V3's fixed epsilon."""

    def __init__(self, config: Any, hidden_size: int, **_spec: Any) -> None:
        super().__init__(config, hidden_size, eps=LATENT_EPSILON)


def build_language_model(
    config: LanguageConfig,
    vocab_size: int,
    seq_length: int,
    parallel: ParallelConfig,
    recompute: RecomputeConfig | None = None,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels = "torch",
    megatron: Mapping[str, Any] = MappingProxyType({}),
) -> list[LanguageModel]:
    """Build this rank's model chunks; megatron-core's parallel state must be initialized.

    Args:
        recompute: activations to recompute. Default: none.
        dtype: of the parameters.
        kernels: see :mod:`pretrain.model.kernels`.
        megatron: options of megatron-core's configuration.

    Raises:
        PretrainError: these kernels are not available, or an option cannot be passed on.

    Returns:
        One model chunk, or several with an interleaved pipeline.
    """
    recompute = recompute or RecomputeConfig()
    settings = transformer_config(config, parallel, recompute, dtype, kernels, megatron)
    if kernels == "torch":
        layer_spec = _layer_spec
    else:  # the import needs Transformer Engine
        from pretrain.model.transformer_engine import layer_spec
    chunks = []
    for chunk in range(parallel.interleave):
        virtual = {"vp_stage": chunk} if parallel.interleave > 1 else {}
        with explained("megatron"):
            model = LanguageModel(
                config=settings,
                transformer_layer_spec=layer_spec(settings, virtual),
                vocab_size=vocab_size,
                max_sequence_length=seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **virtual),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **virtual),
                # MLA has its own rotary embedding.
                position_embedding_type="rope" if config.attention == "gqa" else "none",
                rotary_base=config.rope_base,
                share_embeddings_and_output_weights=config.tie_embeddings,
                # multimodal.forward scatters the embeddings after it has inserted image features.
                scatter_embedding_sequence_parallel=False,
                **virtual,
            )
        chunks.append(model)
    return chunks


def _layer_spec(settings: TransformerConfig, virtual: dict[str, int]) -> Any:
    """megatron-core's layer spec of a model chunk, with our core attention and norms."""
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False, **virtual)
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CoreAttention
        if isinstance(settings, MLATransformerConfig):
            layer.submodules.self_attention.module = LatentAttention
            attention.q_layernorm = attention.kv_layernorm = LatentRMSNorm
        elif settings.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        mlp = layer.submodules.mlp
        # A partial since megatron-core 0.17.
        mlp_submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        if isinstance(mlp_submodules, MoESubmodules):
            mlp_submodules.experts = GroupedExperts
    return spec
