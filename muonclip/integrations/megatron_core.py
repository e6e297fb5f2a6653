"""megatron-core's GPTModel: its attention layouts, and the matrices fused in its parameters.

Modules are recognised by class name and attributes; megatron-core itself is never imported.
"""

from typing import Any

from torch import Tensor, nn

from muonclip.attention_layouts import AttentionLayout


def attention_layouts(model: nn.Module) -> dict[str, AttentionLayout]:
    """The layouts of a model's self-attention layers, for ``QKClip``.

    Under tensor parallelism these are the layouts of the rank's own heads.

    Args:
        model: a GPTModel or any module around one; layers without self-attention are passed over.

    Returns:
        Module name, e.g. ``"decoder.layers.0.self_attention"`` -> layout.

    Raises:
        ValueError: for an attention whose logits do not follow from its weights' scale (a norm on
            query or key) or whose rows are not whole heads (fewer key groups than tensor-parallel
            ranks).
    """
    layouts = {}
    for name, module in model.named_modules():
        if _is_a(module, "MLASelfAttention"):
            layouts[name] = _mla(module)
        elif _is_a(module, "SelfAttention"):
            layouts[name] = _gqa(name, module)
    return layouts


def row_splits(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters that hold several matrices of the model one below the other, for ``param_groups``.

    These are gate and up in ``linear_fc1`` of gated MLPs (experts too), and in MLA's
    ``linear_kv_down_proj`` the latent and the shared rotary key.

    Args:
        model: a GPTModel or any module around one.

    Returns:
        Parameter name -> rows of each matrix.

    Raises:
        ValueError: for a parameter whose matrices cannot be told apart here: experts in
            ``GroupedMLP`` (stored transposed and side by side), or a ``linear_kv_down_proj``
            sharded by tensor parallelism.
    """
    splits: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if _is_a(module, "GroupedMLP"):
            raise ValueError(
                f"{name}: GroupedMLP stores its experts side by side; use SequentialMLP "
                "(moe_grouped_gemm=False) or TEGroupedMLP"
            )
        config = getattr(module, "config", None)
        fc1 = getattr(module, "linear_fc1", None)
        if isinstance(fc1, nn.Module) and getattr(config, "gated_linear_unit", False):
            for weight_name, weight in _weights(fc1):
                half = weight.size(0) // 2
                splits[_join(name, "linear_fc1", weight_name)] = (half, half)
        if config is not None and _is_a(module, "MLASelfAttention"):
            rows = (config.kv_lora_rank, config.qk_pos_emb_head_dim)
            for weight_name, weight in _weights(module.linear_kv_down_proj):
                full_name = _join(name, "linear_kv_down_proj", weight_name)
                if weight.size(0) != sum(rows):
                    raise ValueError(
                        f"{full_name} has {weight.size(0)} of {sum(rows)} rows: it is sharded by "
                        "tensor parallelism, and its matrices must be gathered first"
                    )
                splits[full_name] = rows
    return splits


def _mla(module: Any) -> AttentionLayout:
    config = module.config
    return AttentionLayout.mla(
        module.linear_q_proj if config.q_lora_rank is None else module.linear_q_up_proj,
        module.linear_kv_up_proj,
        num_heads=module.num_attention_heads_per_partition,
        nope_dim=config.qk_head_dim,
        rope_dim=config.qk_pos_emb_head_dim,
        v_dim=config.v_head_dim,
    )


def _gqa(name: str, module: Any) -> AttentionLayout:
    for norm in ("q_layernorm", "k_layernorm"):
        layer = getattr(module, norm, None)
        if layer is not None and not _is_a(layer, "IdentityOp"):
            raise ValueError(
                f"{name} has a {norm}: it undoes any scale of the weights before it, so QK-Clip "
                "cannot act there (and the norm already bounds the logits); leave the layer out"
            )
    if module.config.num_query_groups < module.world_size:
        raise ValueError(
            f"{name} has {module.config.num_query_groups} key groups on {module.world_size} "
            "tensor-parallel ranks, so that heads are cut; use at most one rank per key group"
        )
    return AttentionLayout.fused_by_group(
        module.linear_qkv,
        num_heads=module.num_attention_heads_per_partition,
        num_kv_groups=module.num_query_groups_per_partition,
        output_gate=getattr(module.config, "attention_output_gate", False),
    )


def _weights(linear: nn.Module) -> list[tuple[str, Tensor]]:
    """The matrices of a linear layer: ``weight``, or of a grouped one ``weight0``, ``weight1``…"""
    named = linear.named_parameters(recurse=False)
    return [(name, p) for name, p in named if name.startswith("weight") and p.ndim == 2]


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _is_a(module: nn.Module, class_name: str) -> bool:
    return any(cls.__name__ == class_name for cls in type(module).__mro__)
