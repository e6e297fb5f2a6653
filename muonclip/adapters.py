"""The tensors that determine the rows of a layer's output, including PEFT's adapters.

PEFT's modules are recognized by their attributes; PEFT is not imported.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RowTensor(NamedTuple):
    """A tensor with one entry, or one slice, per output row of a layer."""

    tensor: Tensor
    dim: int | None = None  # of the rows; None: as in the layout of the layer's weight
    is_bias: bool = False  # the layer's bias


class Effective(NamedTuple):
    """The tensors that scale the rows of a layer's output.

    Attributes:
        tensors: scaling a row in all of these scales that row of the output.
        adapter: the adapter that contributes to the output, e.g. ``"LoRA"``; empty if none does.
        others: other tensors through which the output is trained.
        obstacle: the reason why scaling ``tensors`` does not scale the output; empty if it does.
        in_module: whether the tensors come from a module; otherwise the caller passed them.
    """

    tensors: list[RowTensor]
    adapter: str = ""
    others: tuple[Tensor, ...] = ()
    obstacle: str = ""
    in_module: bool = True

    def is_frozen(self, tensor: Tensor) -> bool:
        """Whether a tensor is not trained.

        In a module, only parameters (and views of them) are trained. A tensor that the caller
        passed counts as trained unless it is a parameter without ``requires_grad``.
        """
        base = root(tensor)
        return (self.in_module or isinstance(base, nn.Parameter)) and not base.requires_grad


def active_module(module: nn.Module) -> nn.Module:
    """The module that PEFT's ``modules_to_save`` wrapper runs; any other module itself."""
    run = _run_by_wrapper(module)
    return module if run is None else active_module(run[1])


def active_adapters(module: nn.Module) -> tuple[str, ...]:
    """The names of PEFT's adapters that presently determine a layer's output.

    They distinguish forward passes that run other parameters of the layer. The parameters
    themselves do not, because FSDP2 replaces them for the forward pass.
    """
    run = _run_by_wrapper(module)
    if run is not None:
        name, inner = run
        return (name, *active_adapters(inner))
    layer = module._modules.get("base_layer")
    return () if layer is None else (*_active_in_tuner(module), *active_adapters(layer))


def _run_by_wrapper(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The adapter and the module that a ``modules_to_save`` wrapper runs, "" for the original.

    None for any other module.
    """
    original = module._modules.get("original_module")
    copies = module._modules.get("modules_to_save")
    if original is None or not isinstance(copies, nn.ModuleDict):
        return None
    wrapper: Any = module
    names = [] if wrapper.disable_adapters else [n for n in wrapper.active_adapters if n in copies]
    return (names[0], copies[names[0]]) if names else ("", original)


def _active_in_tuner(tuner: Any) -> list[str]:
    """The active adapters of one of PEFT's layers that adapt it."""
    if getattr(tuner, "disable_adapters", False):
        return []
    names = tuple(getattr(tuner, "adapter_layer_names", ()))
    return [
        adapter
        for adapter in getattr(tuner, "active_adapters", ())
        if any(adapter in (getattr(tuner, name, None) or ()) for name in names)
    ]


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside all of PEFT's adapters and wrappers."""
    module = active_module(module)
    inner = module._modules.get("base_layer")
    return module if inner is None else base_layer(inner)


def inner_layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers inside all of PEFT's adapters and wrappers: the original one and its copies.

    Args:
        module: a layer, or a wrapper of one.
        name: of the module; the layers' names continue it.
    """
    children = module._modules
    copies = children.get("modules_to_save")
    if isinstance(copies, nn.ModuleDict) and "original_module" in children:
        wrapped = {f"modules_to_save.{key}": copy for key, copy in copies.items()}
        wrapped["original_module"] = module.get_submodule("original_module")
    elif (inner := children.get("base_layer")) is not None:
        wrapped = {"base_layer": inner}
    else:
        yield name, module
        return
    for key, layer in wrapped.items():
        yield from inner_layers(layer, f"{name}.{key}")


def effective(module: nn.Module) -> Effective:
    """The tensors that presently determine the rows of a layer's output.

    Exact for a plain layer (weight, bias), DoRA without dropout (magnitude, bias), IA3 (its
    vector), and LoRA over a trained weight (weight, bias, B). LoRA over a frozen weight cannot be
    scaled: gamma (W + sBA) equals W + sB'A for some B' only if A spans the rows of W.
    """
    module = active_module(module)
    if module._modules.get("base_layer") is None:
        return _plain(module)
    tuner: Any = module
    base = effective(tuner.base_layer)
    if getattr(tuner, "disable_adapters", False):
        return base
    if getattr(tuner, "merged", False):
        return base._replace(obstacle="an adapter is merged into its weight: unmerge it")
    names = tuple(getattr(tuner, "adapter_layer_names", ()))
    active = _active_in_tuner(tuner)
    if not active:
        return base
    others = tuple(
        parameter
        for name, parameter in tuner.named_parameters()
        if not name.startswith("base_layer.") and not set(name.split(".")).isdisjoint(active)
    )
    if "ia3_l" in names and not tuner.is_feedforward:
        # The output is multiplied by all active vectors: any trained one can take the factor.
        vectors = [tuner.ia3_l[adapter] for adapter in active]
        vector = next((v for v in vectors if v.requires_grad), None)
        return base if vector is None else Effective([RowTensor(vector, 0)], "IA3")
    # AdaLoRA's factors are parameters without a module.
    if "lora_A" in names and isinstance(getattr(tuner, "lora_B", None), nn.ModuleDict):
        variants = [getattr(tuner, "lora_variant", {}).get(adapter) for adapter in active]
        if not any(variants) and all(adapter in tuner.lora_B for adapter in active):
            ups = [tuner.lora_B[adapter] for adapter in active]
            tensors = [RowTensor(up.weight, 0) for up in ups]
            tensors += [RowTensor(up.bias, 0) for up in ups if up.bias is not None]
            return Effective([*base.tensors, *tensors], "LoRA", others, base.obstacle)
        if [type(v).__name__ for v in variants] == ["DoraLinearVariant"] and not base.adapter:
            magnitude = tuner.lora_magnitude_vector[active[0]].weight
            biases = [t for t in base.tensors if t.is_bias]
            obstacle = base.obstacle
            if getattr(tuner.lora_dropout[active[0]], "p", 0):
                # PEFT computes W x + (m / n - 1) W d(x) + m / n · s B A d(x) with dropout d.
                obstacle = "DoRA's output follows its magnitudes only with lora_dropout=0"
            return Effective([RowTensor(magnitude, 0), *biases], "DoRA", others, obstacle)
    kind = type(tuner).__module__.split(".")[-2:][0] + " adapter"
    return Effective(base.tensors, kind, others, f"the rows of its {kind} cannot be scaled exactly")


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a layer. In Megatron's without a bias it is empty or None."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{type(module).__name__} has no weight: give a linear layer, a weight, "
            "or (weight, bias)"
        )
    return weight, bias if isinstance(bias, Tensor) and bias.numel() else None


def layer_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight, before a quantization packed it."""
    weight = weight_and_bias(module)[0]
    rows, columns = (getattr(module, name, None) for name in ("out_features", "in_features"))
    # 4-bit weights of bitsandbytes are a column of integers, or of another type for FSDP.
    is_packed = not weight.is_floating_point() or (1 in weight.shape and not weight.requires_grad)
    if is_packed and isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    return tuple(weight.shape)


def _plain(module: nn.Module) -> Effective:
    with torch.enable_grad():  # distinguishes computed weights from parameters
        weight, bias = weight_and_bias(module)
    plain = of_tensors(weight, bias)._replace(in_module=True)
    # Other implementations of LoRA keep their matrices in the layer or in its children.
    others = tuple(p for p in module.parameters() if p.ndim > 1 and p is not weight)
    if not plain.obstacle and any(p.requires_grad for p in others):
        return Effective(
            plain.tensors, "adapter", others, "it also trains matrices other than its weight"
        )
    return plain


def of_tensors(weight: Tensor, bias: Tensor | None) -> Effective:
    """A weight and its bias."""
    tensors = [RowTensor(weight)]
    if bias is not None and bias.numel():
        tensors.append(RowTensor(bias, 0, is_bias=True))
    obstacle = ""
    if any(root(row.tensor).grad_fn is not None for row in tensors):
        obstacle = "its weight is computed from other parameters (weight norm, parametrization)"
    return Effective(tensors, obstacle=obstacle, in_module=False)


def root(tensor: Tensor) -> Tensor:
    """The base of a view; any other tensor itself."""
    return tensor if tensor._base is None else tensor._base
