"""Hugging Face transformers: QK-Clip for its models, in two lines.

>>> clip = qk_clip(model, threshold=100.0)  # doctest: +SKIP
>>> clip.attach(optimizer)  # doctest: +SKIP

``attention_layouts`` finds the heads by the structure of the attention modules, ``watch`` reads
queries and keys where the library's registry of attention functions hands them to the kernel:
eager, sdpa, flex_attention or flash attention alike. The first forward pass in training tries each
layout out, so that a model whose attention does more than its structure shows is refused, not
clipped wrongly.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from muonclip.adapters import base_layer
from muonclip.attachment import Handle
from muonclip.attention_layouts import AttentionLayout
from muonclip.integrations.watched_modules import Watched, WatchedModules
from muonclip.qk_clip import QKClip, split_factor
from muonclip.row_scaling import ScalingPlan, Share, read_sides

# Names that transformers' models give to the same thing, all of them attributes of the attention.
_QUERY_KEY = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("q_lin", "k_lin"))
_FUSED = ("qkv_proj", "qkv", "Wqkv", "c_attn")  # rows: all queries, all keys, all values
_FUSED_BY_HEAD = ("query_key_value",)  # rows: for each head its query, key and value
_NORMS = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("q_layer_norm", "k_layer_norm"),
    ("query_layernorm", "key_layernorm"),
)
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads")


def qk_clip(
    model: nn.Module,
    threshold: float = 100.0,
    *,
    exclude: str | Sequence[str] = (),
    exact: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
) -> QKClip:
    """QK-Clip for a transformers model: its layouts found, its attention watched.

    What is left to do is ``clip.attach(optimizer)``, or ``clip.step()`` after each optimizer step.
    Call it before or after the model is wrapped, sharded (DDP, FSDP2) or compiled.
    ``clip.remove()`` undoes everything. A new clip of the same model replaces an earlier one.

    Args:
        model: a model of transformers >= 5.
        threshold: τ: no head's largest logit stays above it.
        exclude: patterns of layer names to leave out, as in ``attention_layouts``.
        exact: as in ``QKClip``.
        process_group: as in ``QKClip``.

    Raises:
        ImportError: without transformers.
        ValueError: as ``attention_layouts``, and if it finds no attention.
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


def attention_layouts(
    model: nn.Module, *, exclude: str | Sequence[str] = ()
) -> dict[str, AttentionLayout]:
    """The layouts of a model's attention layers, for ``QKClip``.

    Known are separate projections (Llama, Mistral, Qwen2, T5, BERT, ViT…), with or without biases
    and shared key heads; fused ones (Phi-3, GPT-2, GPT-NeoX, vision towers); MLA (DeepSeek-V2 and
    V3); and a norm after the projection with a gain for each head (Olmo 2), which is scaled in
    place of the projection. Layers without softmax attention (Mamba, linear attention, MLPs) are
    passed over.

    Args:
        model: any module that contains attention layers of transformers.
        exclude: pattern or patterns (``fnmatch``) of names of layers to leave out, such as
            ``"*.vision_tower.*"``.

    Returns:
        Module name, e.g. ``"model.layers.0.self_attn"`` -> layout.

    Raises:
        ValueError: for an attention that is not known, or whose queries and keys are normalised
            with one gain for all heads (Qwen3, Gemma 3): the norm bounds their logits already.
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return {
        name: _layout(name, module)
        for name, module in model.named_modules()
        if _uses_registry(module) and not any(fnmatch(name, pattern) for pattern in patterns)
    }


def watch(model: nn.Module, clip: QKClip, *, layers: Iterable[str] | None = None) -> Handle:
    """Show ``clip`` the queries and keys of every forward pass in training.

    They are read where attention modules hand them to the attention function that the model is set
    to, rotary embedding and all, by way of ``AttentionInterface.get_interface``, which is replaced
    while anything is watched; functions, masks and results stay as they are. Masks, padding,
    packed sequences and sliding windows count as the kernel counts them. Position biases are in
    the logits but are not scaled, see ``QKClip.observe_attention``. A softcap is left out: the
    logits that count are those that follow the weights, before the cap. Forward passes that
    activation checkpointing repeats are seen once. Under ``torch.compile`` the graph breaks at
    each attention.

    In its first forward pass each layer is tried out: with its rows scaled as a clip would, do its
    logits, and nothing else, follow?

    The model may be compiled before or after. Since compiled code does not run what is added later,
    this call clears the caches of torch's compiler (``torch.compiler.reset``). A layer that another
    clip watches is watched by this one from now on; the other clip is removed. Copies of the model
    are not watched.

    Args:
        model: the model whose submodules the clip's layers name.
        clip: takes the logits in.
        layers: which of the clip's layers to watch; default: all.

    Returns:
        A handle whose ``remove()`` ends the watching. It ends by itself with the model.

    Raises:
        ImportError: without transformers >= 5.
        ValueError: if a layer is not in the model or not known to the clip. In the forward pass:
            if a layer's logits do not follow its layout, its position bias is made of the queries,
            or the attention function's name is not known.
    """
    names = list(clip.layouts) if layers is None else list(layers)
    modules = dict(model.named_modules())
    for name in names:
        if name not in clip.layouts:
            raise ValueError(f"layers: the clip has no layer {name!r}")
        if name not in modules:
            raise ValueError(
                f"the clip's layer {name!r} is not in {type(model).__name__}: give the model that "
                "attention_layouts was given, or choose with layers"
            )
    _watched.make_room([modules[name] for name in names], clip)
    _read_through_registry()
    return _watched.begin({modules[name]: _Layer(name, modules[name]) for name in names}, clip)


# ---------------------------------------------------------------------- layouts


def _uses_registry(module: nn.Module) -> bool:
    """Whether its forward asks the registry of attention functions for one."""
    for cls in type(module).__mro__:
        forward = inspect.unwrap(cls.__dict__.get("forward", _uses_registry))
        if "get_interface" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return True
    return False


def _layout(name: str, module: Any) -> AttentionLayout:
    if isinstance(getattr(module, "kv_b_proj", None), nn.Module):
        return _mla(module)
    for query_name, key_name in _QUERY_KEY:
        query, key = getattr(module, query_name, None), getattr(module, key_name, None)
        if isinstance(query, nn.Module) and isinstance(key, nn.Module):
            return _separate(name, module, query_name, key_name)
    fused = {n: m for n in _FUSED + _FUSED_BY_HEAD if (m := getattr(module, n, None)) is not None}
    if len(fused) == 1:
        (projection_name,) = fused
        return _fused(name, module, projection_name, by_head=projection_name in _FUSED_BY_HEAD)
    raise ValueError(
        f"{name}: the attention of {type(module).__name__} is not known "
        f"({', '.join(child for child, _ in module.named_children())}); declare it with "
        "AttentionLayout, or leave it out with exclude"
    )


def _mla(module: Any) -> AttentionLayout:
    query = "q_proj" if getattr(module, "q_b_proj", None) is None else "q_b_proj"
    nope, rope, v = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    return AttentionLayout.mla(
        _child(module, query),
        _child(module, "kv_b_proj"),
        num_heads=_rows(getattr(module, query)) // (nope + rope),
        nope_dim=nope,
        rope_dim=rope,
        v_dim=v,
    )


def _child(module: nn.Module, name: str) -> Callable[[], nn.Module]:
    """A child module, read at every step: PEFT replaces it."""
    return partial(getattr, module, name)


def _separate(name: str, module: Any, query_name: str, key_name: str) -> AttentionLayout:
    query, key = getattr(module, query_name), getattr(module, key_name)
    dim = _rows_dim(query)
    rows, key_rows = _rows(query), _rows(key)
    head_dim = _head_dim(module) or rows // _num_heads(name, module)
    if rows % head_dim or key_rows % head_dim:
        raise ValueError(
            f"{name}: projections of {rows} and {key_rows} rows hold no whole heads of {head_dim}: "
            "declare it with AttentionLayout, or leave it out with exclude"
        )
    heads, groups = rows // head_dim, key_rows // head_dim
    norms = _norms(module)
    if norms is None:
        query, key = _child(module, query_name), _child(module, key_name)
        return AttentionLayout.separate(query, key, num_heads=heads, num_kv_groups=groups, dim=dim)
    _check_gains(name, module, norms, heads, groups, head_dim)
    return AttentionLayout.separate(*norms, num_heads=heads, num_kv_groups=groups)


def _fused(name: str, module: Any, child: str, *, by_head: bool) -> AttentionLayout:
    projection = getattr(module, child)
    heads, rows = _num_heads(name, module), _rows(projection)
    head_dim = _head_dim(module) or rows // (3 * heads)
    groups = (rows // head_dim - heads) // 2
    if groups < 1 or (heads + 2 * groups) * head_dim != rows or (by_head and groups != heads):
        raise ValueError(
            f"{name}: a projection of {rows} rows is not that of {heads} heads of {head_dim}: "
            "declare it with AttentionLayout, or leave it out with exclude"
        )
    norms = _norms(module)
    if norms is not None:
        _check_gains(name, module, norms, heads, groups, head_dim)
        return AttentionLayout.separate(*norms, num_heads=heads, num_kv_groups=groups)
    if by_head:
        return AttentionLayout.fused_by_group(_child(module, child), num_heads=heads)
    return AttentionLayout.fused(
        _child(module, child), num_heads=heads, num_kv_groups=groups, dim=_rows_dim(projection)
    )


def _rows_dim(projection: nn.Module) -> int:
    """1 for GPT-2's Conv1D, whose weight is [in, out]."""
    return int(type(base_layer(projection)).__name__ == "Conv1D")


def _rows(projection: Any) -> int:
    weight: Any = base_layer(projection).weight
    return int(weight.size(_rows_dim(projection)))


def _head_dim(module: nn.Module) -> int | None:
    found = (getattr(module, name, None) for name in _HEAD_DIM)
    return next((value for value in found if isinstance(value, int)), None)


def _num_heads(name: str, module: nn.Module) -> int:
    """Query heads, by the module or its configuration."""
    for source in (module, getattr(module, "config", None)):
        for attribute in _NUM_HEADS:
            value = getattr(source, attribute, None)
            if isinstance(value, int):
                return value
    raise ValueError(
        f"{name}: {type(module).__name__} does not tell its number of heads: declare it with "
        "AttentionLayout, or leave it out with exclude"
    )


def _norms(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The norms of queries and keys after their projection."""
    for names in _NORMS:
        query, key = (getattr(module, name, None) for name in names)
        if isinstance(query, nn.Module) and isinstance(key, nn.Module):
            return None if isinstance(query, nn.Identity) else (query, key)
    return None


def _check_gains(
    name: str,
    module: Any,
    norms: tuple[nn.Module, nn.Module],
    heads: int,
    groups: int,
    head_dim: int,
) -> None:
    """Raise unless each head, and each key group, has a gain of its own."""
    gains = [getattr(norm, "weight", None) for norm in norms]
    sizes = [gain.numel() if isinstance(gain, Tensor) else 0 for gain in gains]
    if sizes == [heads * head_dim, groups * head_dim]:
        return
    bound = ""
    if sizes == [head_dim, head_dim] and all(type(gain) is nn.Parameter for gain in gains):
        # Norms leave a vector no longer than √d before the gain. What that is, the norm tells: some
        # add one to their weight.
        query_gain, key_gain = (_largest_gain(norm, head_dim) for norm in norms)
        largest = head_dim * getattr(module, "scaling", head_dim**-0.5) * query_gain * key_gain
        bound = f", here to {largest:.3g} (d · scale · largest gains)"
    raise ValueError(
        f"{name} normalises queries and keys after their projection, with one gain for all heads: "
        f"QK-Clip cannot act on a head there, and need not, since the norm bounds the logits{bound}"
        '. Leave such layers out: exclude="' + name + '", or a pattern of their names'
    )


@torch.no_grad()
def _largest_gain(norm: nn.Module, head_dim: int) -> float:
    weight: Any = norm.weight
    unit = torch.ones(head_dim, dtype=weight.dtype, device=weight.device)  # mean 0 and rms 1
    unit[1::2] = -1
    return float(norm(unit).abs().max()) if not weight.is_meta else math.nan


# ---------------------------------------------------------------------- watching


class _Queries(Exception):
    """Carries what a layer gave to its attention function out of its forward pass."""


class _Layer(Watched):
    """An attention module that is watched, as one layer of a clip."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.trial = module.register_forward_pre_hook(_try_out, with_kwargs=True)
        self.trying = False
        super().__init__(name, [self.trial.remove])

    def see(
        self,
        module: nn.Module,
        implementation: str | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> None:
        if self.trying:
            raise _Queries(query, key, value, (mask, options.get("position_bias")))
        clip = self.clip()
        # Recomputation of a checkpointed forward runs within the backward pass.
        if clip is None:
            return
        if torch._C._current_graph_task_id() != -1:
            clip._note_backward()
            return
        if not module.training:
            clip._pass_over(self.name, "eval mode")
            return
        clip._follow(query)
        observe = partial(clip.observe_attention, self.name)
        _observe(observe, module, implementation, query, key, mask, options)

    @torch.no_grad()
    def try_out(
        self, layout: AttentionLayout, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Scale the rows of the layout as a clip would: the logits must follow, head by head."""
        alone = {self.name: layout}
        share = ScalingPlan(alone, read_sides(alone)).shares[self.name]
        if share == "none":  # until it is trained
            return
        # Powers of four: their roots are powers of two, by which scaling rounds nothing.
        exponents = torch.arange(layout.num_heads, device="cpu").remainder(5)
        gamma = torch.ones(layout.num_heads, dtype=torch.float32, device="cpu").ldexp(
            -2 * exponents
        )
        scaled = _scaled(module, layout, gamma, share)
        if scaled is None:  # parameters that are not the module's own at the moment
            self.trial.remove()
            return
        before = self._attention_inputs(module, args, kwargs)
        if before[0].size(1) != layout.num_heads:
            return  # which observing it refuses
        if before[0].numel() == 0 or before[1].numel() == 0:
            return  # an empty batch or sequence tells nothing: try again in the next forward pass
        with _replaced(scaled):
            after = self._attention_inputs(module, args, kwargs)
        logits, now = _some_logits(before), _some_logits(after)
        wanted = logits * gamma.to(logits)[:, None, None]
        error = (now - wanted).abs().amax((-2, -1))
        follow = (error <= 0.01 * wanted.abs().amax((-2, -1))).all()
        if not follow or not torch.allclose(before[2], after[2], rtol=0.01):
            raise ValueError(
                f"layer {self.name!r}: when the rows of its layout are scaled, its logits do not "
                "follow, or its values change: queries or keys are normalised or changed between "
                "projection and attention, or the rows are not those of the heads. Declare its "
                "AttentionLayout, or leave it out with exclude"
            )
        if not all(map(_same_bias, before[3], after[3])):
            raise ValueError(
                f"layer {self.name!r}: when the rows of its layout are scaled, the bias that is "
                "added to its logits changes too, as with relative positions that queries are "
                "multiplied by: QK-Clip knows no exact factor there. Leave it out with exclude"
            )
        self.trial.remove()

    def _attention_inputs(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Any, Any]]:
        """Query, key, value and (mask, position bias) as they reach the attention function."""
        cache: Any = import_module("transformers.cache_utils").Cache
        self.trying = True
        try:
            module.forward(
                *(None if isinstance(arg, cache) else arg for arg in args),
                **{n: None if isinstance(arg, cache) else arg for n, arg in kwargs.items()},
            )
        except _Queries as found:
            query, key, value, added = found.args
            return query, key, value, added
        finally:
            self.trying = False
        raise ValueError(
            f"layer {self.name!r} did not ask transformers' registry for its attention function, "
            "so it cannot be watched: choose another attn_implementation, or leave it out with "
            "exclude"
        )


def _try_out(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    watched = _watched.get(module)
    clip = None if watched is None else watched.clip()
    if watched is not None and clip is not None and module.training and not watched.trying:
        watched.try_out(clip.layouts[watched.name], module, args, kwargs)


def _read_through_registry() -> None:
    """Let every attention function that a watched module asks for pass through ``_Layer.see``."""
    try:
        interface: Any = import_module("transformers.modeling_utils").AttentionInterface
        original = interface.get_interface
    except (ImportError, AttributeError) as error:
        raise ImportError("this needs transformers >= 5: pip install 'transformers>=5'") from error
    if _OURS in interface.__dict__:
        return

    def get_interface(self: Any, implementation: str | None, default: Any) -> Any:
        function = original(self, implementation, default)
        return partial(_attention, function, implementation) if _watched else function

    interface.get_interface = get_interface
    setattr(interface, _OURS, (get_interface, original))


def _leave_registry() -> None:
    """Put back the registry's own method, unless someone else replaced ours."""
    interface: Any = import_module("transformers.modeling_utils").AttentionInterface
    ours, original = interface.__dict__.get(_OURS, (None, None))
    if ours is not None and interface.__dict__.get("get_interface") is ours:
        interface.get_interface = original
        delattr(interface, _OURS)


_OURS = "_qk_clip_get_interface"
_watched: WatchedModules[_Layer] = WatchedModules(when_empty=_leave_registry)


def _attention(
    function: Callable[..., Any],
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **options: Any,
) -> Any:
    _see(implementation, module, query, key, value, attention_mask, options)
    return function(module, query, key, value, attention_mask, **options)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _see(
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> None:
    watched = _watched.get(module)
    if watched is not None:
        watched.see(module, implementation, query, key, value, mask, options)


@torch.no_grad()
def _observe(
    observe: Callable[..., None],
    module: nn.Module,
    implementation: str | None,
    query: Tensor,
    key: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> None:
    """Call ``observe`` with the mask that an attention function makes of its arguments."""
    scale = options.get("scaling")
    if isinstance(scale, Tensor):  # a learned temperature, of all heads or of each
        if scale.ndim > 0 and scale.size(-1) != 1:
            raise ValueError("a scale that depends on the key is not understood")
        query, scale = query.to(torch.promote_types(query.dtype, torch.float32)) * scale, 1.0
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    bias = options.get("position_bias")
    if implementation is not None and "flash" in implementation:
        query, key, mask = _flash_mask(query, key, mask, causal, options)
        causal, bias = False, None  # which the kernels do not take
    elif implementation in ("eager", "flex_attention", None):
        causal = False  # the mask says it all
    elif implementation == "sdpa":
        causal = mask is None and query.size(-2) > 1 and bool(causal)
    else:
        raise ValueError(
            f"attn_implementation {implementation!r} is not known, and with it what its mask "
            "means: use eager, sdpa, flex_attention or flash_attention_2, or call "
            "QKClip.observe_attention yourself"
        )
    mask, bias = (x[..., : key.size(-2)] if isinstance(x, Tensor) else x for x in (mask, bias))
    if len(query) == 1:  # learned queries, once for the whole batch
        query = query.expand(len(key), *query.shape[1:])
    observe(query, key, scale=scale, mask=mask, bias=bias, causal=causal)


def _flash_mask(
    query: Tensor, key: Tensor, padding: Tensor | None, causal: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and the boolean mask equal to the arguments of flash attention."""
    if options.get("indices") is not None or options.get("block_table") is not None:
        raise ValueError("flash attention with indices or a block_table is not understood")
    window = options.get("sliding_window")
    if window is not None and key.size(-2) <= window:
        window = None  # transformers does not pass it on
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    packed: list[Any] = [options.get(name) for name in names]
    positions = options.get("position_ids")
    if padding is not None:
        key = key[..., : padding.size(-1), :]  # a static cache has slots that are not in use yet
        query_rows, key_rows = _padded(padding.bool(), query.size(-2))
    elif all(x is not None for x in packed):
        # All sequences of the batch, one after the other.
        query, key = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (query, key))
        query_rows, key_rows = _packed(query, packed[0]), _packed(key, packed[1])
    elif (
        len(query) == 1
        and positions is not None
        and positions.size(-1) == query.size(-2) == key.size(-2)
    ):
        # A sequence begins wherever the first position does.
        flat = positions.reshape(-1, query.size(-2))[0]
        starts = (flat == flat.min()).nonzero().flatten()
        query_rows = key_rows = _packed(query, F.pad(starts, (0, 1), value=len(flat)))
    else:
        query_rows, key_rows = (
            _packed(x, torch.tensor([0, x.size(-2)], device=x.device)) for x in (query, key)
        )
    mask = query_rows.present[:, :, None] & key_rows.present[:, None]
    mask = mask & (query_rows.sequence[:, :, None] == key_rows.sequence[:, None])
    # The last query of a sequence meets its last key.
    distance = key_rows.from_end[:, None] - query_rows.from_end[:, :, None]
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        mask = mask & (distance.abs() < window)
    return query, key, mask[:, None]


class _SequenceRows(NamedTuple):
    """Rows of queries or keys as flash attention sees them; [batch or 1, rows].

    Attributes:
        present: whether a row is given to the kernel.
        sequence: number of the sequence that it belongs to.
        from_end: how many present rows of that sequence follow it.
    """

    present: Tensor
    sequence: Tensor
    from_end: Tensor


def _padded(present: Tensor, queries: int) -> tuple[_SequenceRows, _SequenceRows]:
    """Rows of queries and keys of a padding mask [batch, keys]; the queries come last."""
    # A single query after earlier keys is taken for a token whatever the mask says.
    tokens = torch.ones_like(present[:, -1:]) if queries == 1 else present[:, -queries:]
    if queries == present.size(-1):
        tokens = present
    query_rows, key_rows = (
        _SequenceRows(x, torch.zeros_like(x, dtype=torch.int64), x.sum(-1, True) - x.cumsum(-1))
        for x in (tokens, present)
    )
    return query_rows, key_rows


def _packed(x: Tensor, boundaries: Tensor) -> _SequenceRows:
    """Rows of x, [1, heads, rows, d], as sequences between boundaries."""
    rows = torch.arange(x.size(-2), device=x.device)
    sequence = torch.bucketize(rows, boundaries[1:], right=True)
    inside = (rows >= boundaries[0]) & (rows < boundaries[-1])
    ends = boundaries[1:][sequence.clamp(max=len(boundaries) - 2)]
    return _SequenceRows(inside[None], sequence[None], (ends - 1 - rows)[None])


# ---------------------------------------------------------------------- trying layouts out


def _scaled(
    module: nn.Module, layout: AttentionLayout, gamma: Tensor, share: Share
) -> list[tuple[nn.Module, str, nn.Parameter]] | None:
    """Scaled copies of a layout's parameters: owner, attribute and new value; None if not found."""
    copies: dict[int, tuple[nn.Module, str, Tensor]] = {
        id(parameter): (owner, name, parameter.detach().clone())
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
    }
    scaled = {}
    factors = split_factor(gamma, layout.num_kv_groups, share)
    parts = (layout.query, layout.key, layout.query_rope)
    for part, factor in zip(parts, factors, strict=True):
        if part is None or (factor == 1).all():
            continue
        for row in part.effective().tensors:
            tensor, (dim, rows, _) = row.tensor, part.rows_in(row)
            if id(tensor) not in copies or hasattr(tensor, "placements"):
                return None
            owner, name, copy = copies[id(tensor)]
            scale = torch.ones(copy.size(dim), dtype=factor.dtype, device="cpu")
            scale[rows.cpu()] = factor[:, None]
            copy.mul_(scale.to(copy).view([-1 if d == dim else 1 for d in range(copy.ndim)]))
            scaled[id(tensor)] = (owner, name, nn.Parameter(copy, requires_grad=False))
    return list(scaled.values())


@contextmanager
def _replaced(parameters: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """Let modules use other parameters for a while."""
    originals = [getattr(owner, name) for owner, name, _ in parameters]
    try:
        for owner, name, parameter in parameters:
            setattr(owner, name, parameter)
        yield
    finally:
        for (owner, name, _), original in zip(parameters, originals, strict=True):
            setattr(owner, name, original)


def _same_bias(before: Any, after: Any) -> bool:
    """Whether a mask or bias stayed as it was; anything but floating tensors does."""
    if not isinstance(before, Tensor) or not before.is_floating_point():
        return True
    same: bool = torch.allclose(before, after, rtol=0.01)
    return same


def _some_logits(inputs: Sequence[Any], tokens: int = 16) -> Tensor:
    """Products of a few queries and keys, [heads, queries, keys]."""
    query, key = (x[0, :, :tokens].float() for x in inputs[:2])
    logits: Tensor = query @ key.repeat_interleave(query.size(0) // key.size(0), 0).mT
    return logits
