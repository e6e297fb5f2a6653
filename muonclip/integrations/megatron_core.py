"""megatron-core's GPTModel: its attention layouts, and the matrices fused in its parameters.

Modules are recognised by class name and attributes; megatron-core itself is never imported.
"""

from typing import Any

from torch import Tensor, nn

from muonclip.attention_layouts import AttentionLayout
from muonclip.matrix_layouts import MatrixLayout


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


def matrix_layouts(model: nn.Module, *, per_head: bool = False) -> dict[str, MatrixLayout]:
    """The matrices of the model that its parameters fuse, for ``param_groups``.

    These are gate and up in ``linear_fc1`` of gated MLPs (experts too); query, key and value in
    ``linear_qkv``; in MLA, the latent and the shared rotary key of ``linear_kv_down_proj``, and
    each head's key and value of ``linear_kv_up_proj``; the experts that ``GroupedMLP`` keeps side
    by side. Under tensor parallelism they describe the whole parameter, as ``shardings`` puts it
    together.

    Args:
        model: a GPTModel or any module around one.
        per_head: orthogonalize the query, key and value rows of each head on their own.

    Returns:
        Parameter name -> its layout.
    """
    layouts: dict[str, MatrixLayout] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is None:
            continue
        ranks = getattr(config, "tensor_model_parallel_size", 1)
        if _is_a(module, "GroupedMLP"):
            layouts |= _grouped(name, module, config)
        fc1 = getattr(module, "linear_fc1", None)
        if isinstance(fc1, nn.Module) and getattr(config, "gated_linear_unit", False):
            for weight_name, weight in _weights(fc1):
                half = weight.size(0) // 2
                # Each tensor-parallel rank has its rows of gate, then its rows of up.
                layouts[_join(name, "linear_fc1", weight_name)] = MatrixLayout(
                    (half, half), repeats=ranks if _is_cut(weight) else 1
                )
        if _is_a(module, "MLASelfAttention"):
            heads = config.num_attention_heads
            down = (config.kv_lora_rank, config.qk_pos_emb_head_dim)
            up = (config.qk_head_dim, config.v_head_dim)
            query = (config.qk_head_dim, config.qk_pos_emb_head_dim)
            query_name = "linear_q_proj" if config.q_lora_rank is None else "linear_q_up_proj"
            fused = {
                "linear_kv_down_proj": MatrixLayout(down),
                "linear_kv_up_proj": MatrixLayout(up, heads, separate=per_head),
            }
            if per_head:
                fused[query_name] = MatrixLayout(query, heads, separate=True)
        elif _is_a(module, "SelfAttention"):
            fused = {"linear_qkv": _qkv(config, per_head)}
        else:
            continue
        for linear, layout in fused.items():
            for weight_name, _ in _weights(getattr(module, linear)):
                layouts[_join(name, linear, weight_name)] = layout
    return layouts


def _qkv(config: Any, per_head: bool) -> MatrixLayout:
    """Megatron's order: for each key group its queries, (their gates,) its key, its value."""
    dim, groups = config.kv_channels, config.num_query_groups
    queries = config.num_attention_heads // groups
    parts = 2 if getattr(config, "attention_output_gate", False) else 1
    if per_head:
        return MatrixLayout((dim,) * (queries * parts + 2), groups, separate=True)
    return MatrixLayout((*(queries * dim,) * parts, dim, dim), groups)


def _grouped(name: str, module: Any, config: Any) -> dict[str, MatrixLayout]:
    """GroupedMLP: weight1 [hidden, experts * ffn] and weight2 [experts * ffn, hidden]."""
    experts = module.num_local_experts
    first = module.weight1.size(1) // experts
    second = module.weight2.size(0) // experts
    blocks = (first // 2, first // 2) if config.gated_linear_unit else (first,)
    return {
        _join(name, "weight1"): MatrixLayout(blocks, experts, separate=True, transposed=True),
        _join(name, "weight2"): MatrixLayout((second,), experts, separate=True),
    }


def _is_cut(weight: Tensor) -> bool:
    """Whether tensor parallelism left this rank a part of the rows."""
    return bool(getattr(weight, "tensor_model_parallel", False)) and (
        getattr(weight, "partition_dim", -1) == 0
    )


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
