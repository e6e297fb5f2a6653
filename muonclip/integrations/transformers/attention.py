"""Attention layouts of transformers' models, derived from the structure of their modules."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from muonclip.attention_layouts import AttentionLayout, HeadRows, NormalizedAttentionError
from muonclip.integrations.transformers import structure

_REMEDY = "declare it with AttentionLayout, or leave it out with exclude"


def attention_layouts(
    model: nn.Module, *, exclude: str | Sequence[str] = ()
) -> dict[str, AttentionLayout]:
    """The layouts of a model's attention layers, for ``QKClip``.

    Supported structures: separate projections (Llama, Mistral, Qwen2, T5, BERT, ViT…), with or
    without biases and GQA; fused projections (Phi-3, GPT-2, GPT-NeoX, vision towers); MLA
    (DeepSeek-V2 and V3); and a norm after the projection with one gain per head (Olmo 2), whose
    gain is scaled instead of the projection. Layers without softmax attention (Mamba, linear
    attention, MLPs) are skipped.

    Args:
        model: any module that contains attention layers of transformers.
        exclude: pattern or patterns (``fnmatch``) of layer names to leave out, such as
            ``"*.vision_tower.*"``.

    Returns:
        Module name, e.g. ``"model.layers.0.self_attn"`` -> layout.

    Raises:
        ValueError: for an attention of unknown structure, and for queries and keys that are
            normalized with one gain for all heads (Qwen3, Gemma 3): the norm already bounds their
            logits.
    """
    return {
        name: attention_layout(name, module)
        for name, module in attention_modules(model).items()
        if not structure.is_excluded(name, exclude)
    }


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that call transformers' registry of attention functions, by name."""
    return {name: module for name, module in model.named_modules() if _uses_registry(module)}


def unobserved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that train queries and keys and whose attention is not observed.

    They have projections to queries and keys by their names, but neither call transformers'
    registry of attention functions, nor contain or belong to a module that does, or an
    ``nn.MultiheadAttention``. Linear attention is left out: its logits have no softmax.
    """
    observed = {
        name
        for name, module in model.named_modules()
        if _uses_registry(module) or isinstance(module, nn.MultiheadAttention)
    }
    around = {name[:end] for name in observed for end in _ends(name)}
    return {
        name: module
        for name, module in model.named_modules()
        if _trains_queries_and_keys(module)
        and name not in around
        and not any(name[:end] in observed for end in _ends(name))
    }


def _ends(name: str) -> list[int]:
    """The ends of the names, within this dotted name, of the module and those around it."""
    return [0, *(i for i, letter in enumerate(name) if letter == "."), len(name)]


def _trains_queries_and_keys(module: nn.Module) -> bool:
    """Whether a module has linear layers for queries and keys by name, at least one trained."""
    if any(word in type(module).__name__ for word in structure.WITHOUT_SOFTMAX):
        return False
    separate = [names[:2] for names in structure.SEPARATE]
    fused = [(name,) for name in structure.FUSED + structure.FUSED_BY_GROUP]
    for names in [*separate, *fused]:
        layers = [module._modules.get(name) for name in names]  # getattr would look into wrappers
        if all(layers) and any(p.requires_grad for x in layers if x for p in x.parameters()):
            return True
    return False


def _uses_registry(module: nn.Module) -> bool:
    """Whether the module's forward gets its function from transformers' attention registry."""
    for cls in type(module).__mro__:
        forward = inspect.unwrap(cls.__dict__.get("forward", _uses_registry))
        if "get_interface" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return True
    return False


def attention_layout(name: str, module: nn.Module) -> AttentionLayout:
    """The layout of one attention module; ``name`` is for errors.

    Raises:
        NormalizedAttentionError, ValueError: as ``attention_layouts``.
    """
    dims = structure.mla_dims(module)
    if dims is not None and _has(module, "kv_b_proj"):
        return _mla(module, dims)
    for query, key, _ in structure.SEPARATE:
        if _has(module, query, key):
            return _separate(name, module, query, key)
    fused = [child for child in structure.FUSED + structure.FUSED_BY_GROUP if _has(module, child)]
    if len(fused) == 1:
        return _fused(name, module, fused[0])
    raise ValueError(
        f"{name}: the attention of {type(module).__name__} is not known "
        f"({', '.join(child for child, _ in module.named_children())}); {_REMEDY}"
    )


def _has(module: nn.Module, *children: str) -> bool:
    return all(isinstance(getattr(module, child, None), nn.Module) for child in children)


def _projection(module: nn.Module, child: str) -> Callable[[], nn.Module]:
    """A child module, read at every step because PEFT may replace it."""
    return partial(getattr, module, child)


def _mla(module: nn.Module, dims: structure.MLADims) -> AttentionLayout:
    query = "q_b_proj" if _has(module, "q_b_proj") else "q_proj"
    return AttentionLayout.mla(
        _projection(module, query),
        _projection(module, "kv_b_proj"),
        num_heads=structure.linear_shape(getattr(module, query))[0] // (dims.nope + dims.rope),
        nope_dim=dims.nope,
        rope_dim=dims.rope,
        v_dim=dims.value,
    )


def _separate(name: str, module: Any, query: str, key: str) -> AttentionLayout:
    query_layer, key_layer = getattr(module, query), getattr(module, key)
    rows, key_rows = structure.linear_shape(query_layer)[0], structure.linear_shape(key_layer)[0]
    head_dim = structure.head_dim(module) or rows // _num_heads(name, module)
    if rows % head_dim or key_rows % head_dim:
        raise ValueError(
            f"{name}: projections of {rows} and {key_rows} rows cannot be split into heads of "
            f"{head_dim}: {_REMEDY}"
        )
    heads, groups = rows // head_dim, key_rows // head_dim
    gains = _gains_per_head(name, module, heads, groups, head_dim)
    projections = gains or (_projection(module, query), _projection(module, key))
    dim = 0 if gains else int(structure.is_transposed(query_layer))
    return AttentionLayout.separate(*projections, num_heads=heads, num_kv_groups=groups, dim=dim)


def _fused(name: str, module: Any, child: str) -> AttentionLayout:
    layer = getattr(module, child)
    # GPTBigCode without multi-query attention has another order than with it.
    by_group = child in structure.FUSED_BY_GROUP or getattr(module, "multi_query", None) is False
    heads, rows = _num_heads(name, module), structure.linear_shape(layer)[0]
    head_dim = structure.head_dim(module) or rows // (3 * heads)
    groups = (rows // head_dim - heads) // 2
    if groups < 1 or (heads + 2 * groups) * head_dim != rows or (by_group and groups != heads):
        raise ValueError(
            f"{name}: a projection of {rows} rows cannot be split into {heads} query heads of "
            f"{head_dim} and their keys and values: {_REMEDY}"
        )
    gains = _gains_per_head(name, module, heads, groups, head_dim)
    if gains is not None:
        return AttentionLayout.separate(*gains, num_heads=heads, num_kv_groups=groups)
    projection = _projection(module, child)
    if type(module).__name__ == "CodeGenAttention":
        # Four parts, each with its queries, values and keys.
        parts = torch.arange(rows, device="cpu").view(4, 3, -1, head_dim)
        query_rows, _, key_rows = (x.flatten(0, 1) for x in parts.unbind(1))
        return AttentionLayout(HeadRows(projection, query_rows), HeadRows(projection, key_rows))
    if by_group:
        return AttentionLayout.fused_by_group(projection, num_heads=heads)
    return AttentionLayout.fused(
        projection, num_heads=heads, num_kv_groups=groups, dim=int(structure.is_transposed(layer))
    )


def _num_heads(name: str, module: nn.Module) -> int:
    heads = structure.num_heads(module)
    if heads is None:
        raise ValueError(
            f"{name}: neither {type(module).__name__} nor its config states the number of heads: "
            f"{_REMEDY}"
        )
    return heads


def _gains_per_head(
    name: str, module: Any, heads: int, groups: int, head_dim: int
) -> tuple[nn.Module, nn.Module] | None:
    """The norms of projected queries and keys, if any.

    Raises:
        ValueError: unless each query head and each key group has its own gain.
    """
    if _has(module, structure.NORM_OF_BOTH):  # of Llama 4, without gains
        raise _normalized(name)
    names = next((names for names in structure.NORMS if _has(module, *names)), None)
    if names is None or isinstance(getattr(module, names[0]), nn.Identity):
        return None
    norms: tuple[nn.Module, nn.Module] = getattr(module, names[0]), getattr(module, names[1])
    gains = [getattr(norm, "weight", None) for norm in norms]
    sizes = [gain.numel() if isinstance(gain, Tensor) else 0 for gain in gains]
    if sizes == [heads * head_dim, groups * head_dim]:
        return norms
    longest_query, longest_key = (_longest(norm, head_dim) for norm in norms)
    scale = getattr(module, "scaling", head_dim**-0.5)
    raise _normalized(name, scale * longest_query * longest_key)


def _normalized(name: str, bound: float = math.nan) -> NormalizedAttentionError:
    here = "" if math.isnan(bound) else f", here to {bound:.3g}, with the present gains"
    return NormalizedAttentionError(
        f"{name} normalizes queries and keys after their projection: QK-Clip cannot scale a single "
        f"head there and does not need to, because the norm bounds the logits{here}. Leave such "
        f'layers out: exclude="{name}", or a pattern of their names',
        bound,
    )


@torch.no_grad()
def _longest(norm: nn.Module, head_dim: int) -> float:
    """An upper bound on the length of a vector after a norm; NaN if it is not known.

    Before the gain, the vector is at most √d long. The norm itself computes gain and bias, because
    some norms add one to their weight.
    """
    if isinstance(norms := getattr(norm, "norms", None), nn.ModuleList):  # of each head (StableLM)
        return max((_longest(child, head_dim) for child in norms), default=math.nan)
    weight: Any = getattr(norm, "weight", None)
    if type(weight) is not nn.Parameter or weight.numel() != head_dim or weight.is_meta:
        return math.nan
    unit = torch.ones(head_dim, dtype=weight.dtype, device=weight.device)  # mean 0 and RMS 1
    unit[1::2] = -1
    positive, negative = norm(unit), norm(-unit)
    gain, bias = (positive - negative) / 2, (positive + negative) / 2
    return float(head_dim**0.5 * gain.abs().max() + bias.norm())
