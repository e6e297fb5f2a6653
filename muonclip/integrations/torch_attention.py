"""torch's own attention: QK-Clip for ``nn.MultiheadAttention``, alone or in ``nn.Transformer``.

>>> from torch import nn
>>> model = nn.TransformerEncoderLayer(d_model=32, nhead=4, batch_first=True)
>>> clip = qk_clip(model, threshold=100.0)
>>> list(clip.layouts)
['self_attn']

and ``clip.attach(optimizer)``.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from muonclip.attention_layouts import AttentionLayout, HeadRows, WeightAndBias
from muonclip.hooks import Handle
from muonclip.integrations.watched_modules import WatchedModules, select_layers, with_pre_hook
from muonclip.qk_clip import QKClip

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


def qk_clip(
    model: nn.Module,
    threshold: float = 100.0,
    *,
    exact: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
) -> QKClip:
    """A QK-Clip with the layouts of a model's ``nn.MultiheadAttention``, which watches them.

    Then call ``clip.attach(optimizer)`` once, or ``clip.step()`` after each optimizer step.
    ``clip.remove()`` undoes everything. A new clip of the same model replaces an earlier one.

    Args:
        model: any module.
        threshold: τ: no head's largest logit stays above it.
        exact: as in ``QKClip``.
        process_group: as in ``QKClip``.

    Raises:
        ValueError: if there is no ``nn.MultiheadAttention``, and as ``attention_layouts``.
    """
    layouts = attention_layouts(model)
    if not layouts:
        raise ValueError(f"{type(model).__name__} contains no nn.MultiheadAttention")
    clip = QKClip(layouts, threshold=threshold, exact=exact, process_group=process_group)
    watch(model, clip)
    return clip


def attention_layouts(model: nn.Module) -> dict[str, AttentionLayout]:
    """The layouts of a model's ``nn.MultiheadAttention`` layers, for ``QKClip``.

    Args:
        model: any module; layers other than ``nn.MultiheadAttention`` are skipped.

    Returns:
        Module name, e.g. ``"layers.0.self_attn"`` -> layout.

    Raises:
        ValueError: for a layer with ``add_bias_kv``, whose keys do not all come from a projection,
            for a layer that PEFT trains, and for a subclass whose ``forward`` has other arguments.
    """
    return {
        name: attention_layout(name, module) for name, module in attention_modules(model).items()
    }


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The ``nn.MultiheadAttention`` layers of a model by name, and trained adapters around them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or _trains_adapter(module)
    }


def _trains_adapter(module: nn.Module) -> bool:
    """Whether a module is a trained adapter of PEFT around an ``nn.MultiheadAttention``."""
    is_adapter = isinstance(module._modules.get("base_layer"), nn.MultiheadAttention)
    return is_adapter and any(p.requires_grad for p in module.parameters())


def attention_layout(name: str, module: nn.Module) -> AttentionLayout:
    """The layout of one of the ``attention_modules``; ``name`` is for errors.

    Raises:
        ValueError: as ``attention_layouts``.
    """
    if not isinstance(module, nn.MultiheadAttention):
        raise ValueError(
            f"{name} trains an adapter of PEFT over an nn.MultiheadAttention: QK-Clip cannot "
            "scale its logits exactly"
        )
    _check_forward(name, module)
    if module.bias_k is not None:
        raise ValueError(
            f"{name}: add_bias_kv adds a key without a projection, which QK-Clip would not scale "
            "with the others: build the layer with add_bias_kv=False"
        )
    # Functions, because FSDP2 replaces the parameters.
    if module.in_proj_weight is not None:
        return AttentionLayout.fused(
            partial(_projection, module, "in_proj_weight"), num_heads=module.num_heads
        )
    rows = torch.arange(module.embed_dim, device="cpu").view(module.num_heads, -1)
    query = partial(_projection, module, "q_proj_weight")
    key = partial(_projection, module, "k_proj_weight")
    if module.in_proj_bias is None:
        return AttentionLayout(HeadRows(query, rows), HeadRows(key, rows))
    # One bias for query, key and value.
    return AttentionLayout(
        HeadRows(query, rows, bias_rows=rows),
        HeadRows(key, rows, bias_rows=rows + module.embed_dim),
    )


def _check_forward(name: str, module: nn.MultiheadAttention) -> None:
    """Check that a subclass has torch's arguments, or the first ones of them, or passes on all.

    Raises:
        ValueError: if it does not.
    """
    own = inspect.signature(type(module).forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [parameter.name for parameter in own if parameter.kind not in variadic]
    usual = list(_SIGNATURE.parameters)
    passes_on = len(names) < len(own)
    if names != usual[: len(names)] or ("value" not in names and not passes_on):
        raise ValueError(
            f"{name}: the forward of {type(module).__name__} has other arguments than that of "
            "nn.MultiheadAttention, so its queries and keys are not known: declare its "
            "AttentionLayout, and let it call QKClip.observe_attention"
        )


def watch(model: nn.Module, clip: QKClip, *, layers: Iterable[str] | None = None) -> Handle:
    """Let ``clip`` observe the queries and keys of every forward pass in training.

    A hook before the forward pass computes the projections a second time, without gradient: about
    5% of a transformer layer's work. Masks have the layer's meaning; a floating ``attn_mask`` may
    be a bias, which is not scaled, see ``QKClip.observe_attention``. Forward passes that activation
    checkpointing repeats are observed once. Layers with hooks do not use torch's fast path in
    evaluation.

    The model may be compiled before or after. This call clears the caches of torch's compiler
    (``torch.compiler.reset``), because compiled code does not run hooks that are added later. If
    another clip watches one of the layers, that clip ends, and its next step warns. Copies of the
    model are not watched.

    Args:
        model: the model whose submodules the clip's layers name.
        clip: observes the logits.
        layers: layers of the clip to watch; default: all.

    Returns:
        A handle whose ``remove()`` ends the watching. It also ends with the model.

    Raises:
        ValueError: if a layer is not in the clip, or is not an ``nn.MultiheadAttention`` of the
            model with torch's arguments.
    """
    modules = select_layers(model, clip, layers)
    for name, module in modules.items():
        if not isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"the clip's layer {name!r} is a {type(module).__name__}, not an "
                "nn.MultiheadAttention: choose with layers"
            )
        _check_forward(name, module)
    return _watched.watch(modules, clip)


def _projection(module: nn.MultiheadAttention, weight: str) -> WeightAndBias:
    return getattr(module, weight), module.in_proj_bias


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _observe(
    module: nn.MultiheadAttention, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> None:
    """Observe the logits that the forward pass will compute from these arguments."""
    if kwargs is None or (observer := _watched.observer(module)) is None:
        return
    name, clip = observer
    call = _SIGNATURE.bind(module, *args, **kwargs)
    call.apply_defaults()
    arguments = call.arguments
    query, key = arguments["query"], arguments["key"]
    clip._track_backward(query, key)
    attn_mask, padding = arguments["attn_mask"], arguments["key_padding_mask"]
    if query.dim() == 2:
        query, key = query[None], key[None]
        padding = None if padding is None else padding[None]
    elif not module.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)

    # The layer ignores attn_mask if it can use this hint.
    causal = bool(arguments["is_causal"] and padding is None and not arguments["need_weights"])
    mask = None if causal else _merged_mask(attn_mask, padding, module.num_heads)
    query, key = _project(module, query, key)
    if module.add_zero_attn:
        key = F.pad(key, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=0.0 if mask.is_floating_point() else True)
    clip.observe_attention(name, query, key, mask=mask, causal=causal)


_watched = WatchedModules(with_pre_hook(_observe))


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, [batch, heads, length, d]."""
    dim = module.embed_dim
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight[:dim], module.in_proj_weight[dim : 2 * dim]
    else:
        weights = module.q_proj_weight, module.k_proj_weight
    biases = (None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)[:2]
    projected_query, projected_key = (
        F.linear(x, weight, bias)
        .view(*x.shape[:2], module.num_heads, module.head_dim)
        .transpose(1, 2)
        for x, weight, bias in zip((query, key), weights, biases, strict=True)
    )
    return projected_query, projected_key


def _merged_mask(attn_mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Boolean, true where a query attends, or floating, broadcastable to the logits."""
    masks = []
    if attn_mask is not None:
        by_head = attn_mask.dim() == 3  # [batch * heads, queries, keys]
        shape = (len(attn_mask) // heads, heads, *attn_mask.shape[1:])
        masks.append(attn_mask.view(shape) if by_head else attn_mask)
    if padding is not None:
        masks.append(padding[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):  # true where it does not attend
        masked = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~masked
    floating = [
        torch.zeros_like(m, dtype=torch.float32).masked_fill_(m, -math.inf)
        if m.dtype == torch.bool
        else m
        for m in masks
    ]
    return floating[0] if len(floating) == 1 else floating[0] + floating[1]
