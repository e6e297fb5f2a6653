"""QK-Clip for transformers' models: queries and keys are read at the attention registry."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip.hooks import Handle, is_recording
from muonclip.integrations.transformers.attention import attention_layouts
from muonclip.integrations.transformers.masks import logit_inputs
from muonclip.integrations.transformers.trial import AttentionInputs, check_layout
from muonclip.integrations.watched_modules import (
    Watched,
    WatchedModules,
    add_pre_hook,
    select_layers,
)
from muonclip.qk_clip import QKClip, check_not_in_vmap


def qk_clip(
    model: nn.Module,
    threshold: float = 100.0,
    *,
    exclude: str | Sequence[str] = (),
    exact: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
) -> QKClip:
    """A QK-Clip with the layouts of a transformers model, which watches its attention.

    Then call ``clip.attach(optimizer)`` once, or ``clip.step()`` after each optimizer step. The
    model may be wrapped, sharded (DDP, FSDP2) or compiled before or after this call.
    ``clip.remove()`` undoes everything. A new clip of the same model replaces an earlier one.

    Args:
        model: a model of transformers >= 5.
        threshold: τ: no head's largest logit stays above it.
        exclude: patterns of layer names to leave out, as in ``attention_layouts``.
        exact: as in ``QKClip``.
        process_group: as in ``QKClip``.

    Raises:
        ImportError: without transformers.
        ValueError: as ``attention_layouts``, and if no attention is found.
    """
    layouts = attention_layouts(model, exclude=exclude)
    if not layouts:
        raise ValueError(
            f"{type(model).__name__} has no attention that goes through transformers' registry of "
            "attention functions, or exclude leaves none"
        )
    clip = QKClip(layouts, threshold=threshold, exact=exact, process_group=process_group)
    watch(model, clip)
    return clip


def watch(model: nn.Module, clip: QKClip, *, layers: Iterable[str] | None = None) -> Handle:
    """Let ``clip`` observe the queries and keys of every forward pass in training.

    They are read after any rotary embedding, where the attention module calls the attention
    function that the model is set to. For this ``AttentionInterface.get_interface`` is replaced
    while anything is watched; functions, masks and results stay the same. Masks, padding, packed
    sequences and sliding windows have the kernel's meaning. Position biases are part of the logits
    but are not scaled, see ``QKClip.observe_attention``. A soft cap is left out, because only
    the logits before the cap follow the weights. Forward passes that activation checkpointing
    repeats are observed once. Under ``torch.compile`` the graph breaks at each attention.

    The first forward pass tests each layout: with its rows scaled as by a clip, the logits must
    follow and nothing else may change.

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
        ImportError: without transformers >= 5.
        ValueError: if a layer is not in the model or not in the clip. In the forward pass: if a
            layer's logits do not follow its layout, its position bias depends on the queries, or
            the attention function is not known.
    """
    return _watched.watch(select_layers(model, clip, layers), clip)


class _Layer(Watched):
    """A watched attention module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        trial = add_pre_hook(module, _check_layout)
        self.end_trial = trial.remove
        self.in_trial = False
        super().__init__(name, [trial.remove])

    def attention_inputs(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> AttentionInputs:
        """Run a forward pass, without its cache, up to the attention function."""
        cache: Any = import_module("transformers.cache_utils").Cache
        self.in_trial = True
        try:
            module.forward(
                *(None if isinstance(arg, cache) else arg for arg in args),
                **{n: None if isinstance(arg, cache) else arg for n, arg in kwargs.items()},
            )
        except AttentionInputs as inputs:
            return inputs.with_traceback(None)  # frees the tensors of the forward pass
        finally:
            self.in_trial = False
        raise ValueError(
            f"layer {self.name!r} did not ask transformers' registry for its attention function "
            "and cannot be watched: choose another attn_implementation, or leave it out (exclude; "
            "qk_clip_exclude of for_model)"
        )


def _check_layout(module: nn.Module, args: Any, kwargs: dict[str, Any] | None = None) -> None:
    """Test the layout in the first forward pass in training."""
    if torch.compiler.is_compiling() or is_recording() or kwargs is None:
        return
    layer = _watched.get(module)
    clip = None if layer is None else layer.clip()
    if layer is None or clip is None or layer.in_trial or not module.training:
        return
    check_not_in_vmap(layer.name)
    run = partial(layer.attention_inputs, module, args, kwargs)
    if check_layout(layer.name, clip.layouts[layer.name], module, run):
        layer.end_trial()


# ---------------------------------------------------------------------- the registry


_PATCH = "_qk_clip_get_interface"


def _patch_registry() -> None:
    """Let the registry return attention functions that call ``_observe`` first."""
    try:
        interface: Any = import_module("transformers.modeling_utils").AttentionInterface
        original = interface.get_interface
    except (ImportError, AttributeError) as error:
        raise ImportError("this needs transformers >= 5: pip install 'transformers>=5'") from error
    if _PATCH in interface.__dict__:
        return

    def get_interface(self: Any, implementation: str | None, default: Any) -> Any:
        # Without a look at the table of modules: torch.compile would guard on its content, which
        # changes while it compiles if another model is garbage-collected.
        return partial(_observed, original(self, implementation, default), implementation)

    interface.get_interface = get_interface
    setattr(interface, _PATCH, (get_interface, original))


def _restore_registry() -> None:
    """Undo ``_patch_registry``, unless the method was replaced once more since."""
    interface: Any = import_module("transformers.modeling_utils").AttentionInterface
    replacement, original = interface.__dict__.get(_PATCH, (None, None))
    if replacement is not None and interface.__dict__.get("get_interface") is replacement:
        interface.get_interface = original
        delattr(interface, _PATCH)


_watched: WatchedModules[_Layer] = WatchedModules(_Layer, _patch_registry, _restore_registry)


def _observed(
    function: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> Any:
    """An attention function whose arguments are observed."""
    _observe(implementation, module, query, key, value, attention_mask, options)
    return function(module, query, key, value, attention_mask, **options)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _observe(
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> None:
    """Pass the arguments of an attention function to the module's clip, or out of a trial."""
    layer = _watched.get(module)
    if layer is not None and layer.in_trial:
        raise AttentionInputs(query, key, value, mask, options.get("position_bias"))
    clip = None if layer is None else layer.observer(module)
    if layer is None or clip is None:
        return
    clip._track_backward(query)
    inputs = logit_inputs(module, implementation, query, key, mask, options)
    clip.observe_attention(layer.name, **inputs._asdict())
