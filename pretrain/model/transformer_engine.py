"""megatron-core's layers with Transformer Engine's kernels.

Importing this module needs Transformer Engine. The modules and parameters have other names than
those of ``kernels: torch``: norms are part of the linear layer after them, and all experts of a
layer are one module. :mod:`pretrain.model.names` gives them the same names.
"""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

from pretrain.model.attention import MaxLogitObserver
from pretrain.model.megatron_config import LATENT_EPSILON


class CoreAttention(TEDotProductAttention):  # type: ignore[misc]
    """Transformer Engine's attention, which reports every head's max logit.

    Transformer Engine computes max logits in float32 and rounds them to the dtype of its output: in
    bfloat16, with a relative error of at most 2^-9.

    Attributes:
        observer: as in :class:`pretrain.model.attention.CoreAttention`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.observer: MaxLogitObserver | None = None

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Attend causally within documents, given in the format "thd"."""
        # megatron-core keeps the largest logits of all forward passes: here, of this one.
        self.current_max_attn_logits: Tensor | None = None
        context: Tensor = super().forward(*arguments, **options)
        max_logits = self.current_max_attn_logits
        if self.observer is not None and self.training and torch.is_grad_enabled():
            assert max_logits is not None
            wide = torch.promote_types(max_logits.dtype, torch.float32)
            self.observer(max_logits.detach().to(wide))
        self.current_max_attn_logits = None
        return context


class LatentLayers:
    """Part of an MLA class: the epsilon of its norms, and its projections as separate weights."""

    config: MLATransformerConfig

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            if hasattr(self, name):  # contains the norm of its input
                getattr(self, name).eps = LATENT_EPSILON
        if hasattr(self, "linear_qkv_down_proj"):
            split_weight(self.linear_qkv_down_proj, {"q": self.config.q_lora_rank})

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The layers of the spec. megatron-core 0.19 would add a norm before ``linear_q_proj``."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in (*names, "q_layernorm", "kv_layernorm")}


def split_weight(linear: Any, rows: dict[str, int]) -> None:
    """Split a layer's fused weight into parameters, as its option ``parameters_split`` would.

    Transformer Engine joins them again, without a copy while they are consecutive in memory.

    Args:
        linear: a linear layer of Transformer Engine, not split over ranks.
        rows: number of rows of the first parameter by its name; the second is "kv".
    """
    ((first, count),) = rows.items()
    weight = linear.weight
    sizes = {first: count, "kv": weight.shape[0] - count}
    del linear.weight
    for name, part in zip(sizes, weight.detach().split([*sizes.values()]), strict=True):
        parameter = nn.Parameter(part)
        vars(parameter).update(vars(weight))
        nn.Module.register_parameter(linear, f"{name}_weight", parameter)
    linear.weight_names = [f"{name}_weight" for name in sizes]
    linear.parameter_split_sizes = [*sizes.values()]


def layer_spec(settings: TransformerConfig, virtual: dict[str, int]) -> Any:
    """megatron-core's layer spec of a model chunk, with an attention that reports max logits."""
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=True, **virtual)
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention
        attention.submodules.core_attention = CoreAttention
        if isinstance(settings, MLATransformerConfig) and not issubclass(
            attention.module, LatentLayers
        ):
            # Named like its base class, by which muonclip knows it.
            name = attention.module.__name__
            attention.module = type(name, (LatentLayers, attention.module), {})
    return spec
