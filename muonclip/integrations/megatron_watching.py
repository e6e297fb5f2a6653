"""QK-Clip for megatron-core: queries and keys are read where a layer calls its core attention.

>>> clip = QKClip(megatron_core.attention_layouts(model))  # doctest: +SKIP
>>> handle = watch(model, clip)  # doctest: +SKIP
>>> clip.attach(optimizer)  # doctest: +SKIP

The core is ``DotProductAttention``, or ``TEDotProductAttention`` with the same arguments. With
another core, or with packed sequences, pass the maxima of its kernel to ``QKClip.observe``.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from muonclip.hooks import Handle
from muonclip.integrations.watched_modules import WatchedModules, select_layers, with_pre_hook
from muonclip.qk_clip import QKClip

_REMEDY = "pass the maxima of its kernel to QKClip.observe, or leave the layer out with exclude"


def watch(model: nn.Module, clip: QKClip, *, layers: Iterable[str] | None = None) -> Handle:
    """Let ``clip`` observe the queries and keys of every forward pass in training.

    Under tensor parallelism they are those of the local heads. Recomputed forward passes are
    observed once. If another clip watches one of the layers, that clip ends, and its next step
    warns.

    Args:
        model: the model whose submodules the clip's layers name.
        clip: observes the logits.
        layers: layers of the clip to watch; default: all.

    Returns:
        A handle whose ``remove()`` ends the watching. It also ends with the model.

    Raises:
        ValueError: as ``core_attention``, and if a layer is not in the model or not in the clip. In
            the forward pass: for packed sequences.
    """
    modules = select_layers(model, clip, layers)
    return _watched.watch({n: core_attention(n, module) for n, module in modules.items()}, clip)


def core_attention(name: str, module: nn.Module) -> nn.Module:
    """The module in an attention layer that multiplies queries and keys; ``name`` is for errors.

    Raises:
        ValueError: if there is none, its scale is not known, or context parallelism gives each rank
            a part of the keys.
    """
    core = module._modules.get("core_attention")
    if core is None or not isinstance(getattr(core, "softmax_scale", None), float):
        raise ValueError(f"{name} has no core attention with a softmax_scale: {_REMEDY}")
    if getattr(getattr(module, "config", None), "context_parallel_size", 1) > 1:
        raise ValueError(
            f"{name}: with context parallelism, each rank has only a part of the keys: {_REMEDY}"
        )
    return core


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _observe(core: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
    """Observe the logits that the core will compute from these arguments."""
    if kwargs is None or (observer := _watched.observer(core)) is None:
        return
    name, clip = observer
    given = inspect.signature(core.forward).bind(*args, **kwargs).arguments
    query, key = given["query"], given["key"]
    if given.get("packed_seq_params") is not None or query.dim() != 4:
        raise ValueError(
            f"layer {name!r} attends within packed sequences: {_REMEDY} "
            "(qk_clip_exclude of for_model)"
        )
    clip._track_backward(query, key)
    mask, causal = _mask(core, given, query.size(0), key.size(0))
    softmax = getattr(core, "scale_mask_softmax", None)
    # With apply_query_key_layer_scaling, the softmax multiplies by the layer's number again.
    factor = getattr(softmax, "scale", None) or 1.0
    # [length, batch, heads, d]
    query, key = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3)
    scale = core.softmax_scale * factor
    clip.observe_attention(
        name, query, key, scale=scale, mask=mask, causal=causal,
        bias=given.get("attention_bias"),
    )  # fmt: skip


_watched = WatchedModules(with_pre_hook(_observe))


def _mask(core: Any, given: dict[str, Any], queries: int, keys: int) -> tuple[Tensor | None, bool]:
    """A mask that is true where a query attends, or None; and whether attention is causal."""
    mask, device = given.get("attention_mask"), given["query"].device
    allowed = None if mask is None else ~mask.bool()  # megatron-core's is true where masked
    softmax = getattr(core, "scale_mask_softmax", None)
    if softmax is not None:  # DotProductAttention: a window, or else a mask, replaces the others
        if softmax.window_size is not None:
            return _window(softmax.window_size, queries, keys, device), False
        return allowed, allowed is None and softmax.attn_mask_type.name == "causal" and queries > 1
    kind = given.get("attn_mask_type") or core.attn_mask_type  # of megatron-core, or a string
    window = getattr(core, "window_size", None)
    if window is not None and max(window) >= 0:
        near = _window(window, queries, keys, device)
        allowed = near if allowed is None else allowed & near
    return allowed, "causal" in str(getattr(kind, "name", kind))


def _window(size: Sequence[int], queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys]: true for up to (left, right) keys from each query; -1: without limit."""
    left, right = (keys if side < 0 else side for side in size)
    distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance <= left) & (distance >= -right)
