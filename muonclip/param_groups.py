"""Assignment of parameters to Muon and AdamW, with the reason for each."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from muonclip.labels import WRAPPERS
from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.orthogonalize import default_ns_dtype

if TYPE_CHECKING:
    from muonclip.distributed.sharding import Sharding

Algorithm = Literal["muon", "adamw"]

_HEADS = {"head", "output_layer", "embed_out", "unembed", "unembedding", "classifier", "score",
          "qa_outputs"}  # fmt: skip
_ATTENTION_HEADS = {"q_head", "k_head", "v_head"}
# Heads of several layers, such as RoBERTa's `classifier`, and their last layers.
_HEADS_OF_LAYERS = {"classifier", "classification_head", "lm_head"}
_LAST_OF_HEAD = {"out_proj", "decoder"}
# Components of names that wrappers add, PEFT's among them.
_WRAPPERS = {*WRAPPERS, "original_module", "base_layer"}
# Components that PEFT adds to a name; the name of the adapter follows.
_LORA = {"lora_A", "lora_B"}
# The factor of LoRA that projects the input to its rank, by the names of several libraries.
_LORA_DOWN = {"lora_A", "lora_a", "lora_down"}
_BY_ADAPTER = {*_LORA, "modules_to_save", "lora_embedding_A", "lora_embedding_B",
               "trainable_tokens_delta"}  # fmt: skip
# Words in the names of parameters that no input is multiplied with.
_NO_MATRIX = {
    word: reason
    for reason, words in {
        "bias": ("bias", "biases"),
        "gain": ("scale", "scales", "gain", "gamma", "alpha", "beta", "lambda", "temperature"),
        "learned token": (
            "token", "tokens", "query", "queries", "latent", "latents", "probe", "prompt",
            "prompts", "mask", "pointer", "sinks", "codebook", "codevectors",
        ),
        "embedding": ("pos", "position", "positional"),
        "constant of a recurrence": ("log", "time", "decay"),
    }.items()
    for word in words
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Assignment:
    """The algorithm and layout of one parameter.

    Attributes:
        name: its first name in the model.
        parameter: the parameter itself.
        algorithm: ``"muon"``, ``"adamw"``, or None if it is frozen.
        reason: for the algorithm, in a few words.
        layout: of the matrices that it stores; None for one matrix or a plain stack.
    """

    name: str
    parameter: Tensor
    algorithm: Algorithm | None
    reason: str
    layout: MatrixLayout | None = None


def choose_algorithm(
    parameter: Tensor, name: str | None = None, module: nn.Module | None = None
) -> tuple[Algorithm, str]:
    """The algorithm for one parameter, and the reason.

    Args:
        parameter: any shape.
        name: its dotted name in the model; default: only shape and module count.
        module: the module that owns it, if known.

    Returns:
        ``("adamw", reason)`` for vectors (single rows and columns too), empty matrices, convolution
        kernels, embeddings, learned tokens, norms, output heads, routers and LoRA's A; ``("muon",
        reason)`` for other matrices [n, m] and stacks of matrices [E, n, m]. LoRA's B is one of
        them: its orthogonal columns use the whole rank (arXiv 2508.17901), while the extreme aspect
        ratio of A makes orthogonalized updates noisy (OneTrainer#1314).
    """
    if parameter.ndim < 2:
        return "adamw", "vector or scalar"
    reason = None if module is None else _reason_in_module(module, name)
    if reason is None and name is not None:
        reason = _reason_in_name(name, parameter)
    if reason is None and parameter.ndim > 3:
        reason = f"{parameter.ndim} dimensions"
    if reason is None and min(parameter.shape) == 0:
        reason = "no elements"
    if reason is None and min(parameter.shape[-2:]) == 1:
        reason = "single row or column"
    if reason is not None:
        return "adamw", reason
    return "muon", "matrix" if parameter.ndim == 2 else "stack of matrices"


def part_of_matrix(parameter: Tensor) -> str | None:
    """Why a parameter is only a part of a matrix; None for a whole one and for a DTensor.

    The shape of such a part says nothing about the matrix: as a vector it would go to AdamW.
    """
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        return (
            "is a flat part of what was a matrix (FullyShardedDataParallel), which Muon needs "
            "whole: shard with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_shape"):
        return (
            "is partitioned by DeepSpeed ZeRO-3, but Muon needs whole matrices: shard with "
            "torch.distributed.fsdp.fully_shard (FSDP2), or set DeepSpeed's zero_optimization "
            "stage to 0"
        )
    if getattr(parameter, "is_gtp_weight_remat", False):
        return (
            "is a shard of megatron-core's generalized tensor parallelism (GTP), but Muon needs "
            "whole matrices: turn GTP weight sharding off"
        )
    return None


def _reason_in_module(module: nn.Module, name: str | None) -> str | None:
    """Why a matrix of this module goes to AdamW; None if it does not."""
    own_name = (name or "").rpartition(".")[2]
    if isinstance(module, _ConvNd):
        return "convolution kernel"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, ParametrizationList) or any(
        isinstance(hook, (WeightNorm, SpectralNorm))
        and own_name in (f"{hook.name}_g", f"{hook.name}_v", f"{hook.name}_orig")
        for hook in module._forward_pre_hooks.values()
    ):  # a direction, whose length is free
        return "parametrization"
    kind = type(module).__name__.lower()
    # Transformer Engine's LayerNormLinear and LayerNormMLP contain matrices.
    if "norm" in kind and "linear" not in kind and "mlp" not in kind:
        return "norm"
    if "router" in kind:
        return "router"
    return None


def _reason_in_name(name: str, parameter: Tensor) -> str | None:
    """Why a matrix of this name goes to AdamW; None if it does not."""
    parts = name.split(".")
    path = [part for part in _unwrapped(parts) if not part.isdigit()] or [name]
    if "parametrizations" in path:
        return "parametrization"
    if not _LORA_DOWN.isdisjoint(parts):
        return "LoRA's A"
    nearest = path[-2:]  # the owning module and the parameter: further up says too little
    words = [_words(part) for part in nearest]
    if any(part.startswith("patch_embed") for part in path) or any(
        part == "patcher" or {"patch", "projection"} <= found or {"patch", "conv"} <= found
        for part, found in zip(nearest, words, strict=True)
    ):
        return "patch embedding"
    for word in sorted(words[-1]):
        if word in _NO_MATRIX:
            return _NO_MATRIX[word]
    if path[-1] in ("A", "D"):
        return "constant of a recurrence"
    if any("embed" in part or part in ("wte", "wpe") for part in nearest) or any(
        "emb" in found or {"rel", "pos"} <= found for found in words
    ):
        return "embedding"
    if any("norm" in part for part in nearest):
        return "norm"
    if any("router" in part or part == "shared_expert_gate" for part in path):
        return "router"
    # `gate` is also a name in gated units; only a router has fewer rows than columns. The factors
    # of an adapter have the shape of neither.
    if (
        ("gate" in nearest or "wg" in nearest)
        and _LORA.isdisjoint(parts)
        and parameter.shape[-2] < parameter.shape[-1]
    ):
        return "router"
    if path == ["output", "weight"] or any(
        part in _HEADS or (part.endswith("_head") and part not in _ATTENTION_HEADS)
        for part in nearest
    ):
        return "output head"
    if len(path) > 2 and path[-3] in _HEADS_OF_LAYERS and path[-2] in _LAST_OF_HEAD:
        return "output head"
    # A convolution known by name only: [out, in, width] is not a stack of matrices.
    if parameter.ndim > 2 and any("conv" in part for part in nearest):
        return "convolution kernel"
    # A tensor broadcast over a batch; but a rank may have a single expert.
    if parameter.ndim == 3 and parameter.size(0) == 1 and not any("expert" in p for p in path):
        return "learned token"
    return None


def _unwrapped(parts: Sequence[str]) -> list[str]:
    """The components of a name, without those that wrappers and adapters add."""
    parts = parts[2:] if parts[:2] == ["base_model", "model"] else parts
    kept: list[str] = []
    before = ""
    for part in parts:
        if before not in _BY_ADAPTER and part not in (*_WRAPPERS, *_LORA, "modules_to_save"):
            kept.append(part)
        before = part
    return kept


def _words(part: str) -> set[str]:
    return set(re.split(r"[_\d]+", part.lower()))


def assign_parameters(
    model: nn.Module,
    *,
    adamw: Sequence[str] = (),
    muon: Sequence[str] = (),
    layouts: Mapping[str, MatrixLayout] | None = None,
    shardings: "Mapping[Tensor, Sharding] | None" = None,
) -> list[Assignment]:
    """Assign each parameter of a model to Muon or AdamW, in the model's order, tied ones once.

    A parameter with several names (tied weights) goes to AdamW if it would under any of them.

    Args:
        model: any module.
        adamw: ``fnmatch`` patterns of names that go to AdamW in any case.
        muon: the same for Muon: matrices, stacks of matrices, and kernels of convolutions, which
            have one matrix [out, in * ...] for each group of channels.
        layouts: pattern of names -> layout of the matrices in such a parameter (gate and up fused,
            heads, transposed storage); the first match counts. ``muonclip.integrations`` finds
            those of known models; torch's own modules (``nn.MultiheadAttention``, ``nn.LSTM``,
            ``nn.GRU``) need none.
        shardings: of plain tensors that are shards, as for ``MuonClip``; the whole shapes count.

    Raises:
        ValueError: if a pattern matches nothing, a parameter matches both ``adamw`` and ``muon``,
            ``muon`` matches a parameter without matrices, a layout does not fit, or a parameter is
            a flat part of a matrix (FSDP1, DeepSpeed ZeRO-3).
    """
    layouts = dict(layouts or {})
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(path, recurse=False):
            owners.setdefault(parameter, []).append((name, module))

    for pattern, layout in layouts.items():
        if not isinstance(layout, MatrixLayout):
            raise TypeError(f"layouts: {pattern!r} needs a MatrixLayout, got {layout!r}")
    heads, adapters = _output_embeddings(model), _adapters_for_adamw(model)

    every_name = {name for names in owners.values() for name, _ in names}
    matches = {}
    for option, patterns in (("adamw", adamw), ("muon", muon), ("layouts", layouts)):
        if isinstance(patterns, str):
            raise TypeError(f"{option} must be a list of patterns, got the string {patterns!r}")
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{option} must contain patterns of names, got {pattern!r}")
            if pattern not in every_name and not any(fnmatchcase(n, pattern) for n in every_name):
                raise ValueError(f"{option}: the pattern {pattern!r} matches no parameter")
        matches[option] = _first_match(patterns)

    assignments = []
    for parameter, names in owners.items():
        name = names[0][0]
        if parameter.requires_grad:
            _check_whole(name, names[0][1], parameter)
        forced_adamw, forced_muon = matches["adamw"](names), matches["muon"](names)
        algorithm: Algorithm | None
        if forced_adamw and forced_muon:
            raise ValueError(
                f"{name} matches adamw={forced_adamw!r} and muon={forced_muon!r}: keep one"
            )
        if not parameter.requires_grad:
            algorithm, reason = None, "frozen"
        elif forced_adamw:
            algorithm, reason = "adamw", f"matches {forced_adamw!r}"
        elif forced_muon:
            algorithm, reason = "muon", f"matches {forced_muon!r}"
        else:
            whole = whole_parameter(parameter, shardings)
            choices = [choose_algorithm(whole, *owner) for owner in names]
            if any(module in heads for _, module in names):
                choices.append(("adamw", "output head"))
            if parameter in adapters:
                choices.append(("adamw", adapters[parameter]))
            algorithm, reason = min(choices, key=lambda choice: choice[0] == "muon")
        found: MatrixLayout | None = None
        if algorithm == "muon":
            declared = matches["layouts"](names)
            found = layouts[declared] if declared else _native_layout(*names[0], parameter)
            try:
                (found or WHOLE).check(whole_parameter(parameter, shardings).shape)
            except ValueError as error:
                raise ValueError(f"{name} ({reason}): {error}") from None
        assignments.append(Assignment(name, parameter, algorithm, reason, found))
    return assignments


def _check_whole(name: str, module: nn.Module, parameter: Tensor) -> None:
    """Raise for a trained parameter that is only a part of a matrix."""
    reason = part_of_matrix(parameter)
    is_weight = isinstance(module, nn.Linear) and name.rpartition(".")[2] == "weight"
    if reason is None and is_weight and parameter.ndim != 2:
        reason = (
            "is the weight of an nn.Linear, but not a matrix: it has been flattened. Muon "
            "needs whole matrices: shard with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if reason is not None:
        raise ValueError(f"{name} of shape {tuple(parameter.shape)} {reason}")


def _output_embeddings(model: nn.Module) -> set[nn.Module]:
    """The output heads of a transformers model, whatever their names."""
    found: set[nn.Module] = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get) and isinstance(head := get(), nn.Module):
            found.update(head.modules())  # an adapter may have wrapped it
    return found


def _adapters_for_adamw(model: nn.Module) -> dict[Tensor, str]:
    """The parameters of PEFT's adapters that are not one factor of an update, with the reason.

    Some are vectors or rotations that are stored as matrices (OFT, VB-LoRA). LoRA of a stack of
    experts (``target_parameters``) has the columns of all experts alternately in one B.
    """
    found: dict[Tensor, str] = {}
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())
        # AdaLoRA's factors are of a singular value decomposition, with the values in lora_E.
        kept = {"modules_to_save"} if "lora_E" in names else {*_LORA, "modules_to_save"}
        for name in names:
            adapter = getattr(module, name, None)
            if isinstance(adapter, nn.Module) and name not in kept:
                found |= dict.fromkeys(adapter.parameters(), "adapter other than LoRA")
        experts, factors = getattr(module, "num_experts", 1), getattr(module, "lora_B", None)
        if "lora_B" in kept.intersection(names) and experts > 1 and isinstance(factors, nn.Module):
            found |= dict.fromkeys(factors.parameters(), "LoRA's B of several experts")
    return found


def _native_layout(name: str, module: nn.Module, parameter: Tensor) -> MatrixLayout | None:
    """Layout of a parameter of one of torch's modules; None if it stores one matrix.

    Convolutions have a matrix for each group of channels, recurrent layers for each gate, and
    ``nn.MultiheadAttention`` for query, key and value.
    """
    if isinstance(module, _ConvTransposeNd):
        raise ValueError(f"{name} is a transposed convolution, stored [in, out, ...]: use AdamW")
    if isinstance(module, _ConvNd):
        if module.groups == 1:
            return MatrixLayout(flatten=True)
        rows = module.out_channels // module.groups
        return MatrixLayout((rows,), module.groups, separate=True, flatten=True)
    leaf = name.rpartition(".")[2]
    parts = 1
    if isinstance(module, nn.MultiheadAttention) and leaf == "in_proj_weight":
        parts = 3
    elif leaf.startswith(("weight_ih", "weight_hh")):
        if isinstance(module, (nn.LSTM, nn.LSTMCell)):
            parts = 4
        elif isinstance(module, (nn.GRU, nn.GRUCell)):
            parts = 3
    return MatrixLayout((parameter.size(0) // parts,) * parts) if parts > 1 else None


def whole_parameter(parameter: Tensor, shardings: "Mapping[Tensor, Sharding] | None") -> Tensor:
    """A tensor of the shape of the whole parameter."""
    if shardings is None or parameter not in shardings:
        return parameter
    return torch.empty(shardings[parameter].shape, device="meta")


def _first_match(
    patterns: Iterable[str],
) -> Callable[[list[tuple[str, nn.Module]]], str | None]:
    """A function that finds the first pattern that matches any of a parameter's names.

    Integrations list every parameter by its full name: only patterns with wildcards are tried.
    """
    order = {pattern: index for index, pattern in enumerate(patterns)}
    wild = [pattern for pattern in order if not set("*?[").isdisjoint(pattern)]

    def match(names: list[tuple[str, nn.Module]]) -> str | None:
        found = [name for name, _ in names if name in order]
        found += [p for p in wild if any(fnmatchcase(name, p) for name, _ in names)]
        return min(found, key=order.__getitem__, default=None)

    return match


def param_groups(
    model: nn.Module,
    *,
    adamw: Sequence[str] = (),
    muon: Sequence[str] = (),
    layouts: Mapping[str, MatrixLayout] | None = None,
    shardings: "Mapping[Tensor, Sharding] | None" = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for ``MuonClip``: one per algorithm and layout, with names.

    Frozen parameters are left out. ``print(describe_assignment(assign_parameters(model)))`` shows
    the same assignment.

    Args:
        model: as for ``assign_parameters``, with its errors, like the next four.
        adamw: patterns of parameters for AdamW.
        muon: patterns of parameters for Muon.
        layouts: pattern of parameter names -> layout.
        shardings: sharding of each parameter that is a shard of a larger one.
        options: put into every group, e.g. ``weight_decay=0.1``.

    Returns:
        Groups with ``params`` as (name, parameter) pairs, ``algorithm`` and ``layout``.
    """
    return group_assignments(
        assign_parameters(model, adamw=adamw, muon=muon, layouts=layouts, shardings=shardings),
        **options,
    )


def group_assignments(
    assignments: Iterable[Assignment], *, decay_vectors: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """The groups of ``param_groups`` for parameters that are assigned already.

    Args:
        decay_vectors: False: vectors and numbers are in separate groups, with
            ``weight_decay=0.0``, as are biases and gains of more dimensions (of experts, of
            positions).
    """
    groups: dict[tuple[Algorithm, MatrixLayout | None, bool], dict[str, Any]] = {}
    for item in assignments:
        if item.algorithm is None:
            continue
        is_decayed = decay_vectors or not _adds_or_scales(item)
        key = (item.algorithm, item.layout, is_decayed)
        if key not in groups:
            groups[key] = {
                "params": [],
                "algorithm": item.algorithm,
                "layout": item.layout,
                **options,
                **({} if is_decayed else {"weight_decay": 0.0}),
            }
        groups[key]["params"].append((item.name, item.parameter))
    return list(groups.values())


def _adds_or_scales(item: Assignment) -> bool:
    """Whether a parameter is a bias, a gain or another vector, of one dimension or more."""
    if item.parameter.dim() < 2 or item.reason in ("bias", "gain", "norm"):
        return True
    # By name too: T5's biases of positions are an embedding, and a pattern may be the reason.
    owner_and_leaf = _unwrapped(item.name.split("."))[-2:]
    return item.algorithm == "adamw" and any(
        "bias" in _words(part) or "norm" in part for part in owner_and_leaf
    )


def describe_assignment(
    assignments: Iterable[Assignment],
    *,
    ns_dtype: torch.dtype | None = None,
    by_layer: bool = True,
) -> str:
    """A printable table of the assignment and its reasons, with totals in elements.

    Args:
        assignments: as returned by ``assign_parameters``.
        ns_dtype: as for ``MuonClip``. The line of Muon's total has it, or the default for the
            parameters' devices.
        by_layer: False: one row for the parameters whose names differ only in numbers; those that
            differ become ``*``.
    """
    rows = [("parameter", "shape", "algorithm", "reason")]
    names: dict[tuple[str, str, str, str], list[str]] = {}  # by their pattern and the other cells
    totals: dict[str, list[int]] = {}
    ns_dtypes: set[str] = set()
    for item in assignments:
        algorithm = item.algorithm or "frozen"
        reason = item.reason
        if item.layout is not None:
            reason += f", {item.layout}"
        pattern = item.name if by_layer else without_numbers(item.name)
        row = (pattern, "x".join(map(str, item.parameter.shape)), algorithm, reason)
        names.setdefault(row, []).append(item.name)
        total = totals.setdefault(algorithm, [0, 0])
        total[0] += 1
        total[1] += item.parameter.numel()
        if algorithm == "muon":
            shapes = (item.layout or WHOLE).matrix_shapes(item.parameter.shape)
            chosen = ns_dtype or default_ns_dtype(
                item.parameter.device, item.parameter.dtype, shapes
            )
            ns_dtypes.add(str(chosen).removeprefix("torch."))
    rows += [
        (common_name(same) + f" ({len(same)} times)" * (len(same) > 1), shape, algorithm, reason)
        for (_, shape, algorithm, reason), same in names.items()
    ]
    arithmetic = {"muon": f", Newton-Schulz in {' and '.join(sorted(ns_dtypes))}"}
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    lines += [
        f"{algorithm}: {tensors} tensors, {elements:,} parameters{arithmetic.get(algorithm, '')}"
        for algorithm, (tensors, elements) in totals.items()
    ]
    return "\n".join(lines)


def without_numbers(name: str) -> str:
    """A dotted name with ``*`` for each component that is a number, as of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def common_name(names: Sequence[str]) -> str:
    """Dotted names that differ only in numbers, as one: ``*`` for each component that differs."""
    components = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(same[0] if len(set(same)) == 1 else "*" for same in components)
