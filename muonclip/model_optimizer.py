"""``for_model``: parameter groups, layouts, optimizer and QK-Clip of a model in one call."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip.adapters import root
from muonclip.attention_layouts import AttentionLayout, NormalizedAttentionError
from muonclip.hooks import Handle
from muonclip.matrix_layouts import MatrixLayout
from muonclip.model_report import ModelReport, describe_settings, group_names
from muonclip.optimizer import MuonClip
from muonclip.param_groups import assign_parameters, describe_assignment, group_assignments
from muonclip.qk_clip import QKClip, check_threshold
from muonclip.row_scaling import FROZEN, ScalingPlan
from muonclip.warning import warn

if TYPE_CHECKING:
    from muonclip.distributed.sharding import Sharding

_TRANSFORMERS = ("transformers.modeling_utils", "PreTrainedModel")
_MEGATRON = ("megatron.core.transformer.module", "MegatronModule")
_NORMALIZED = "its queries and keys are normalized, which bounds the logits{} and undoes any clip"
_HIGH_BOUND = (
    "the norms of queries and keys bound the logits of {} only by {:.3g}, above qk_clip_threshold, "
    "and QK-Clip cannot scale their heads. To accept it, name them in qk_clip_exclude, or set "
    "qk_clip_threshold to the bound or None"
)
_NO_ATTENTION = (
    "QK-Clip found no attention layer in {}: give the AttentionLayout of each as "
    "attention_layouts and let the layers call optimizer.qk_clip.observe_attention, or set "
    "qk_clip_threshold=None"
)
_UNKNOWN = "its attention is not known, so that its logits are not observed"
_ROUNDED = (
    "trained parameters are in {}, which rounds small updates away: set master_weights=True{}, or "
    "master_weights=False to accept it"
)
_UNKNOWN_ATTENTION = (
    "QK-Clip cannot limit the logits of {}: {}. Give the AttentionLayout of each as "
    "attention_layouts and let the layers call optimizer.qk_clip.observe_attention. To "
    "accept it, name them in qk_clip_exclude, or set qk_clip_threshold=None"
)
_SHARED = (
    "its query or key weights are shared with other layers, whose logits a clip would scale too "
    "(name all but one of them in qk_clip_exclude to clip that one)"
)
_EXCLUDED = "it matches qk_clip_exclude"
_NOT_CLIPPED = "QK-Clip cannot limit the logits of {}: {}. Set qk_clip_threshold=None to accept it"


def for_model(
    model: nn.Module,
    lr: float | Tensor = 2e-4,
    *,
    qk_clip_threshold: float | None = 100.0,
    qk_clip_exclude: str | Sequence[str] = (),
    attention_layouts: Mapping[str, AttentionLayout] | None = None,
    adamw: Sequence[str] = (),
    muon: Sequence[str] = (),
    layouts: Mapping[str, MatrixLayout] | None = None,
    per_head: bool = False,
    decay_vectors: bool = True,
    shardings: "Mapping[Tensor, Sharding] | None" = None,
    report: Callable[[str], object] | None = print,
    **options: Any,
) -> MuonClip:
    """A ``MuonClip`` for a whole model, whose ``step`` also limits attention logits (QK-Clip).

    >>> optimizer = muonclip.for_model(model, lr=2e-4, qk_clip_threshold=100.0)  # doctest: +SKIP

    Models of transformers (language, vision, both), megatron-core, PEFT and torch are recognized,
    alone and as parts of a larger model: their fused matrices and their attention layers are found
    by structure. With megatron-core it is a collective call, after its parallel state is
    initialized; give each parameter its ``main_grad`` as ``grad`` before each step.
    Attention whose queries and keys are normalized (Qwen3, Gemma 3) has bounded logits and is not
    clipped; the report has the bound. Construct the optimizer after adapters are added (PEFT) and
    parameters are sharded (FSDP2); DDP and ``torch.compile`` may wrap the model before or after.

    Args:
        model: its trainable parameters are optimized; frozen and quantized ones are left alone.
            If it is a ``DistributedDataParallel``, compiled or not, the ranks share the
            orthogonalization.
        lr: learning rate, as for ``MuonClip``.
        qk_clip_threshold: τ: no head's largest logit stays above it; None: no QK-Clip.
        qk_clip_exclude: pattern or patterns (``fnmatch``) of attention layers that are not clipped.
        attention_layouts: layer -> layout of attention modules that are not recognized. They call
            ``optimizer.qk_clip.observe_attention(layer, query, key, ...)`` in training.
        adamw: patterns of parameter names that go to AdamW in any case.
        muon: patterns of parameter names that go to Muon in any case.
        layouts: pattern of parameter names -> layout; goes before those that are found.
        per_head: orthogonalize the query, key and value rows of each head separately.
        decay_vectors: False: weight decay leaves out biases, gains and other vectors. They are
            decayed by default, as in Kimi K2.
        shardings: as for ``MuonClip``; default: those of megatron-core's models.
        report: called with the report as text, on the first rank; None: not called.
        options: of ``MuonClip``, e.g. ``weight_decay=0.1``.

    Returns:
        The optimizer. ``optimizer.report`` says which algorithm updates each parameter and why, and
        which heads are clipped; ``optimizer.qk_clip`` is the clip, or None if it would have no
        effect.

    Warns:
        UserWarning: if trained attention cannot be clipped or is not known, norms do not bound its
            logits by the threshold, or parameters of 16 bits would lose small updates; it names the
            remedy.

    Raises:
        TypeError, ValueError: for anything but a module, a model without trainable parameters, a
            pattern that matches nothing, options of a clip that is turned off, and as
            ``assign_parameters``, ``matrix_layouts`` and ``MuonClip``.
    """
    _check_arguments(model, report, options)
    _check_clip(qk_clip_threshold, qk_clip_exclude, attention_layouts)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: unfreeze some, or add an adapter"
        )
    original = getattr(model, "_orig_mod", model)  # before torch.compile
    if isinstance(original, nn.parallel.DistributedDataParallel):
        options.setdefault("process_group", original.process_group)
    parallel = _megatron_ranks(model)
    if shardings is None and parallel is not None:
        shardings = parallel.shardings
    assignments = assign_parameters(
        model,
        adamw=adamw,
        muon=muon,
        layouts=_matrix_layouts(model, layouts or {}, per_head),
        shardings=shardings,
    )
    attention = _Attention(model, attention_layouts or {})
    clip = None
    if qk_clip_threshold is not None:
        attention.find(qk_clip_exclude, qk_clip_threshold)
        group = options.get("process_group") if parallel is None else parallel.same_heads
        clip = attention.make_clip(qk_clip_threshold, group)
    groups = group_assignments(assignments, decay_vectors=decay_vectors)
    optimizer = MuonClip(groups, lr, shardings=shardings, qk_clip=clip, **options)
    messages = [*attention.warnings, *_rounding(model, options)]
    optimizer.report = ModelReport(
        type(model).__name__,
        describe_assignment(assignments, ns_dtype=options.get("ns_dtype"), by_layer=False),
        {item.name: (item.algorithm, item.reason) for item in assignments},
        describe_settings(optimizer),
        qk_clip_threshold,
        {name: layout.num_heads for name, layout in attention.layouts.items()},
        attention.not_clipped,
        messages,
    )
    for message in messages:
        warn(message)
    if report is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        report(str(optimizer.report))
    return optimizer


def _check_arguments(model: object, report: object, options: Mapping[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"for_model needs a torch.nn.Module, got {type(model).__name__}: give it the model "
            "(several as nn.ModuleList), or give parameters to MuonClip"
        )
    if report is not None and not callable(report):
        raise TypeError(
            f"report must be a function that is called with the text, or None, got {report!r}"
        )
    for option in ("params", "qk_clip"):
        if option in options:
            raise TypeError(
                f"for_model makes {option} itself: leave it out, or use MuonClip(params, "
                "qk_clip=clip)"
            )


def _check_clip(threshold: object, exclude: object, layouts: object) -> None:
    if not isinstance(exclude, str) and not (
        isinstance(exclude, Sequence) and all(isinstance(pattern, str) for pattern in exclude)
    ):
        raise TypeError(f"qk_clip_exclude must be a pattern or a list of patterns, got {exclude!r}")
    if layouts is not None and not isinstance(layouts, Mapping):
        raise TypeError(f"attention_layouts must map names to AttentionLayout, got {layouts!r:.80}")
    if threshold is not None:
        check_threshold(threshold, "qk_clip_threshold")
        return
    for option, value in (("qk_clip_exclude", exclude), ("attention_layouts", layouts)):
        if value:
            raise ValueError(f"{option} has no effect with qk_clip_threshold=None: leave it out")


def _rounding(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
    """A warning if parameters of 16 bits are updated without a remedy."""
    if not {"master_weights", "stochastic_rounding"}.isdisjoint(options):
        return []
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float16 in dtypes:
        return [_ROUNDED.format("float16", "")]
    if torch.bfloat16 in dtypes:
        return [_ROUNDED.format("bfloat16", " or stochastic_rounding=True")]
    return []


class _Library(NamedTuple):
    """The attention layers of a library."""

    modules: Callable[[nn.Module], dict[str, nn.Module]]
    layout: Callable[[str, nn.Module], AttentionLayout]
    watch: Callable[..., Handle]


def _libraries() -> list[_Library]:
    # They import torch's compiler, which takes seconds.
    from muonclip.integrations import (
        megatron_core,
        megatron_watching,
        torch_attention,
        transformers,
    )

    def megatron_modules(model: nn.Module) -> dict[str, nn.Module]:
        return {
            _join(path, name): module
            for path, part in _parts_of(model, _MEGATRON)
            for name, module in megatron_core.attention_modules(part).items()
        }

    def megatron_layout(name: str, module: nn.Module) -> AttentionLayout:
        layout = megatron_core.attention_layout(name, module)
        megatron_watching.core_attention(name, module)
        return layout

    return [
        _Library(library.attention_modules, library.attention_layout, library.watch)
        for library in (transformers, torch_attention)
    ] + [_Library(megatron_modules, megatron_layout, megatron_watching.watch)]


class _MegatronRanks(NamedTuple):
    """The ranks of megatron-core's parallel state that share a model."""

    shardings: "dict[Tensor, Sharding]"
    same_heads: "dist.ProcessGroup"


def _megatron_ranks(model: nn.Module) -> _MegatronRanks | None:
    """Those of a model of megatron-core, if its parallel state is initialized."""
    if not any(_parts_of(model, _MEGATRON)):
        return None
    from muonclip.integrations import megatron_core

    if not megatron_core.is_initialized():
        return None
    return _MegatronRanks(megatron_core.shardings(model), megatron_core.replica_group())


class _Attention:
    """The attention layers of a model.

    Attributes:
        layouts: of the layers to clip.
        not_clipped: layer -> reason, for all others.
        warnings: about layers that should be clipped and cannot be.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, AttentionLayout]) -> None:
        self._model = model
        self.layouts = dict(given)
        self.not_clipped: dict[str, str] = {}
        self.warnings: list[str] = []
        self._watched: list[tuple[_Library, list[str]]] = []
        self._bounds: dict[str, float] = {}  # of the logits of normalized layers
        # Query and key tensors of each layer.
        self._tensors = {
            name: _tensors(layout)
            for name, layout in given.items()
            if isinstance(layout, AttentionLayout)  # others are refused by QKClip
        }

    def find(self, exclude: str | Sequence[str], threshold: float) -> None:
        """Sort the model's layers into those to clip and the others.

        Raises:
            ValueError: for a pattern of ``exclude`` that matches no layer.
        """
        from muonclip.integrations.transformers import structure

        patterns = [exclude] if isinstance(exclude, str) else list(exclude)
        modules = {library: library.modules(self._model) for library in _libraries()}
        names = [name for found in modules.values() for name in found]
        unknown = self._unknown()
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names + unknown):
                raise ValueError(
                    f"qk_clip_exclude: the pattern {pattern!r} matches no attention layer "
                    f"(layers: {', '.join(group_names(names + unknown)) or 'none'})"
                )

        is_excluded = partial(structure.is_excluded, exclude=patterns)
        obstacles: dict[str, str] = {}
        for library, found in modules.items():
            watched = []
            for name, module in found.items():
                if name in self.layouts:
                    continue
                if is_excluded(name):
                    self.not_clipped[name] = _EXCLUDED
                elif not any(p.requires_grad for p in module.parameters()):
                    self.not_clipped[name] = "it is frozen"
                elif self._add(library, name, module, obstacles):
                    watched.append(name)
            self._watched.append((library, watched))
        self._note_normalized(threshold)
        for name in self._sharing_layers():
            del self.layouts[name]
            obstacles[name] = _SHARED
        self.not_clipped |= obstacles
        for reason in dict.fromkeys(obstacles.values()):
            layers = [name for name in obstacles if obstacles[name] == reason]
            self.warnings.append(_NOT_CLIPPED.format(", ".join(group_names(layers)), reason))
        self.not_clipped |= {n: _EXCLUDED if is_excluded(n) else _UNKNOWN for n in unknown}
        if layers := [name for name in unknown if not is_excluded(name)]:
            self.warnings.append(
                _UNKNOWN_ATTENTION.format(", ".join(group_names(layers)), _UNKNOWN)
            )
        elif not (names or unknown or self.layouts):
            self.warnings.append(_NO_ATTENTION.format(type(self._model).__name__))

    def _note_normalized(self, threshold: float) -> None:
        """Record the layers whose norms bound the logits, and the largest bound if it is known."""
        largest = max((x for x in self._bounds.values() if not math.isnan(x)), default=math.nan)
        known = (
            "" if math.isnan(largest) else f" (to {largest:.3g} at most, with the present gains)"
        )
        self.not_clipped |= dict.fromkeys(self._bounds, _NORMALIZED.format(known))
        high = [name for name, bound in self._bounds.items() if bound > threshold]
        if high:
            self.warnings.append(_HIGH_BOUND.format(", ".join(group_names(high)), largest))

    def _sharing_layers(self) -> list[str]:
        """The found layers that share a weight with another layer, found or given."""
        counts = Counter(tensor for tensors in self._tensors.values() for tensor in tensors)
        found = {name for _, watched in self._watched for name in watched}
        return [
            name
            for name in self.layouts
            if name in found and any(counts[tensor] > 1 for tensor in self._tensors[name])
        ]

    def _unknown(self) -> list[str]:
        """Modules whose attention is not known and has no given layout."""
        from muonclip.integrations import transformers

        declared = set[Tensor]().union(*self._tensors.values())
        return [
            name
            for name, module in transformers.unobserved_modules(self._model).items()
            if declared.isdisjoint(module.parameters())
        ]

    def _add(
        self, library: _Library, name: str, module: nn.Module, obstacles: dict[str, str]
    ) -> bool:
        """Whether a layer is to be clipped; otherwise the reason is recorded."""
        try:
            layout = library.layout(name, module)
            plan = ScalingPlan({name: layout})
        except NormalizedAttentionError as error:
            self._bounds[name] = error.bound
            return False
        except ValueError as error:
            # Without its name, so that layers with the same obstacle are reported together.
            text = _without_name(str(error), name)
            obstacles[name] = text.replace("with exclude", "with qk_clip_exclude")
            return False
        if name not in plan.skipped:
            self.layouts[name] = layout
            self._tensors[name] = {root(x.tensor) for x in plan.tensors}
        elif plan.skipped[name] == FROZEN:
            self.not_clipped[name] = FROZEN
        else:  # a trained side lets the logits grow
            obstacles[name] = plan.skipped[name]
        return name in self.layouts

    def make_clip(
        self, threshold: float, process_group: "dist.ProcessGroup | None"
    ) -> QKClip | None:
        """A clip of the layers, which watches those of the libraries; None if there are none."""
        if not self.layouts:
            return None
        clip = QKClip(self.layouts, threshold=threshold, process_group=process_group)
        for library, names in self._watched:
            if layers := [name for name in names if name in self.layouts]:
                library.watch(self._model, clip, layers=layers)
        return clip


def _tensors(layout: AttentionLayout) -> set[Tensor]:
    """The tensors that determine queries and keys, trained or not."""
    rows = (row for side in (layout.query, layout.key) for row in side.effective().tensors)
    return {root(row.tensor) for row in rows}


def _matrix_layouts(
    model: nn.Module, given: Mapping[str, MatrixLayout], per_head: bool
) -> dict[str, MatrixLayout]:
    """The given layouts, then those of the models of known libraries within this one."""
    from muonclip.integrations import megatron_core, transformers

    layouts = dict(given)
    found: dict[str, MatrixLayout] = {}
    for path, part in _parts_of(model, _TRANSFORMERS):
        patterns = [pattern.removeprefix(_join(path, "")) for pattern in given]
        try:
            named = transformers.matrix_layouts(part, per_head=per_head, exclude=patterns)
        except transformers.UnknownMatricesError as error:
            raise ValueError(
                f"{_join(path, error.problem)}. Give its layout, e.g. layouts="
                f"{{{_join(path, error.name)!r}: MatrixLayout()}}, which leaves it whole"
            ) from None
        found |= {_join(path, name): layout for name, layout in named.items()}
    for path, part in _parts_of(model, _MEGATRON):
        named = megatron_core.matrix_layouts(part, per_head=per_head)
        found |= {_join(path, name): layout for name, layout in named.items()}
    if per_head and not found:
        is_known = any(any(_parts_of(model, base)) for base in (_TRANSFORMERS, _MEGATRON))
        reason = (
            "trains no queries, keys or values: leave it out"
            if is_known
            else "contains no model of transformers or megatron-core: give the layouts of its "
            "heads (MatrixLayout.per_head)"
        )
        raise ValueError(f"per_head=True has no effect, because {type(model).__name__} {reason}")
    for name, layout in found.items():
        layouts.setdefault(name, layout)
    return layouts


def _without_name(message: str, layer: str) -> str:
    """A message about a layer, without the name at its beginning."""
    for name in (f"layer {layer!r}", layer):
        if message.startswith(f"{name}: "):
            return message.removeprefix(f"{name}: ")
        if message.startswith(f"{name} "):
            return "it" + message.removeprefix(name)
    return message


def _parts_of(
    model: nn.Module, base_class: tuple[str, str], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a library's class, by name; not those inside another one.

    Args:
        base_class: module and name of the class, which need not be imported.
    """
    if any((cls.__module__, cls.__name__) == base_class for cls in type(model).__mro__):
        yield path, model
        return
    for name, child in model.named_children():
        yield from _parts_of(child, base_class, _join(path, name))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
