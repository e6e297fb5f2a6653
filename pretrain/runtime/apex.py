"""Optional use of NVIDIA's apex: a fused RMSNorm, and multi-tensor operations.

Without it, torch's functions compute the same. Its speed has not been measured in this project.
"""

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Apex(NamedTuple):
    """The functions of apex that are used.

    Attributes:
        rms_norm: (input, weight, normalized_shape, eps) -> output.
        apply: applies one of the compiled operations to lists of tensors.
        l2_norm, scale: compiled operations.
    """

    rms_norm: Callable[..., Tensor]
    apply: Callable[..., Any]
    l2_norm: Any
    scale: Any


@functools.cache
def find() -> Apex | None:
    """Import apex and its compiled extensions; None if any of them is missing.

    A package of that name is not enough: ``pip install apex`` installs an unrelated program, and
    apex can be built without its extensions.
    """
    try:
        import_module("fused_layer_norm_cuda")
        compiled = import_module("amp_C")
        return Apex(
            import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine,
            import_module("apex.multi_tensor_apply").multi_tensor_applier,
            compiled.multi_tensor_l2norm,
            compiled.multi_tensor_scale,
        )
    except (ImportError, AttributeError):
        return None


def _for(tensor: Tensor) -> Apex | None:
    return find() if tensor.is_cuda else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    apex = _for(x)
    if apex is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return apex.rms_norm(x, weight, weight.shape, eps)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all entries of one or more tensors on one device."""
    apex = _for(tensors[0])
    if apex is None:
        return nn.utils.get_total_norm(tensors)
    overflow = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
    norm, _ = apex.apply(apex.l2_norm, overflow, [list(tensors)], False)
    return norm.squeeze()  # type: ignore[no-any-return]


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors on one device by a 0-d tensor, in place."""
    apex = _for(factor)
    if apex is None or not tensors:
        torch._foreach_mul_(list(tensors), factor)
        return
    overflow = torch.zeros(1, dtype=torch.int, device=factor.device)
    apex.apply(apex.scale, overflow, [list(tensors), list(tensors)], factor.item())
