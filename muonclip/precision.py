"""Precision of parameters and state: dtypes, float32 master copies and stochastic rounding."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.remainders import split_
from muonclip.update import is_fake, is_free_to_read
from muonclip.variants import neuron_state

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def moment_dtype(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """The dtype of a parameter's momentum (Muon) or moments (AdamW)."""
    if group["algorithm"] == "muon" and group["momentum_dtype"] is not None:
        dtype: torch.dtype = group["momentum_dtype"]
        return dtype
    wide = needs_master(group, param) or rounds_stochastically(group, param)
    # Running averages of float16 gradients, a tenth of their size at first, would vanish.
    wide = wide or param.dtype == torch.float16
    return torch.float32 if wide else param.dtype


def neuron_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state with a number for each neuron, of a parameter of the given dtype."""
    return torch.promote_types(dtype, torch.float32)


def state_dtype(name: str, group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """The dtype of an entry of a parameter's state."""
    if name in ("step", "master"):
        return torch.float32
    return neuron_dtype(param.dtype) if name in neuron_state() else moment_dtype(group, param)


def needs_master(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether the optimizer updates a float32 master copy in place of the parameter."""
    return bool(group["master_weights"]) and param.dtype in _LOW_PRECISION


def keeps_remainder(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether the master copy is stored as the weight and a remainder of 16 bits."""
    return group["master_weights"] == "remainder" and param.dtype == torch.bfloat16


def rounds_stochastically(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether updates of the parameter are rounded at random."""
    return bool(group["stochastic_rounding"]) and param.dtype == torch.bfloat16


# The options of precision, each with its effect on a parameter.
PRECISION = MappingProxyType(
    {
        "momentum_dtype": moment_dtype,
        "master_weights": needs_master,
        "stochastic_rounding": rounds_stochastically,
    }
)
# Attribute of a parameter: its dtype when MuonClip attached a master copy to it.
_DTYPE_WITH_MASTER = "_main_param_for"


def get_master(param: Tensor) -> Tensor | None:
    """The master copy attached to a parameter by ``MuonClip`` or by a Megatron optimizer.

    None if the parameter has been converted since ``MuonClip`` attached one.
    """
    is_current = getattr(param, _DTYPE_WITH_MASTER, param.dtype) == param.dtype
    return getattr(param, "main_param", None) if is_current else None


def set_master(param: Tensor, state: dict[str, Any], master: Tensor | None) -> None:
    """Attach a master copy to a parameter and its optimizer state, or detach it (None).

    The attribute ``main_param``, as in Megatron, lets QK-Clip scale the master copy as well. A
    ``main_param`` set by another optimizer is not detached.
    """
    if master is not None:
        state["master"] = master
        setattr(param, "main_param", master)  # noqa: B010 (for mypy)
        setattr(param, _DTYPE_WITH_MASTER, param.dtype)
    elif "master" in state and getattr(param, "main_param", None) is state.pop("master"):
        drop_master(param)


def drop_master(param: Tensor) -> None:
    """Detach the master copy of an optimizer that does not train the parameter any longer."""
    if hasattr(param, _DTYPE_WITH_MASTER):  # unlike Megatron's
        vars(param).pop("main_param", None)
        delattr(param, _DTYPE_WITH_MASTER)


def refresh_master(master: Tensor, param: Tensor) -> None:
    """Copy into a master copy the entries of its 16-bit parameter that changed since the last step.

    A step leaves the rounded master in the parameter. An entry that differs was written to since
    then (``load_state_dict``, averaged weights swapped in) and replaces the master's; entries that
    still match keep the master's full precision.
    """
    rounded = master.to(param.dtype).view(torch.int16)  # bits: NaN does not equal itself
    bits = param.view(torch.int16)
    # On a CPU, reading the result costs nothing and usually saves the rest.
    is_read = is_free_to_read(param.device) and not is_fake(param)
    if torch.compiler.is_compiling() or not (is_read and torch.equal(rounded, bits)):
        torch.where(rounded == bits, master, param.to(master.dtype), out=master)


class Result(NamedTuple):
    """An updated tensor, to be rounded into its parameter.

    Attributes:
        updated: the new values; may be ``param`` itself.
        param: the parameter's local tensor.
        remainder: of the parameter, where that is stored.
        seed: for stochastic rounding.
    """

    updated: Tensor
    param: Tensor
    remainder: Tensor | None
    seed: tuple[int, ...]


def write_back(results: Sequence[Result], *, stochastic: bool) -> None:
    """Round updated tensors into their parameters.

    Args:
        results: nothing is copied where the updated tensor is the parameter.
        stochastic: round bfloat16 parameters at random by the seed, instead of to nearest.
    """
    sources, targets = [], []
    for updated, param, remainder, seed in results:
        if remainder is not None:
            split_(updated, param, remainder)
        elif stochastic and param.dtype == torch.bfloat16:
            round_stochastically(updated, param, seed)
        elif updated is not param:
            sources.append(updated)
            targets.append(param)
    if targets:
        torch._foreach_copy_(targets, sources)


def round_stochastically(source: Tensor, target: Tensor, seed: tuple[int, ...]) -> None:
    """Write float32 ``source`` into bfloat16 ``target``, rounded up or down at random.

    The probability of each neighbour is proportional to its closeness, so that the expectation is
    ``source`` and updates smaller than half a unit in the last place are not lost on average. The
    random bits depend on the seed and the shape only.
    """
    generator = torch.Generator(source.device).manual_seed(hash(seed) % 2**63)
    # Contiguous whatever the source: numbers are drawn in the order of memory.
    noise = torch.empty(source.shape, dtype=torch.int32, device=source.device)
    noise.random_(0, 2**16, generator=generator)
    bits = source.view(torch.int32).add(noise).bitwise_and_(-(2**16))
    # Infinities and NaN have no neighbours: noise would turn one into the other.
    target.copy_(torch.where(source.isfinite(), bits.view(torch.float32), source))
