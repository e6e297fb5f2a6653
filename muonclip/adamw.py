"""AdamW's step by torch's kernels, for tensors of any strides."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from muonclip.update import AdamWDecayMode, Scalar


class AdamWParam(NamedTuple):
    """A non-empty parameter in a step: local tensors of one shape on one device.

    Attributes:
        param: the tensor to update.
        gradient: not changed.
        average, square: first and second moment.
        step: 0-d float32.
    """

    param: Tensor
    gradient: Tensor
    average: Tensor
    square: Tensor
    step: Tensor


def adamw_step(
    rows: Sequence[AdamWParam],
    *,
    lr: Scalar,
    beta1: float,
    beta2: float,
    weight_decay: float,
    mode: AdamWDecayMode = "decoupled",
    eps: float,
    maximize: bool,
    found_inf: Tensor | None,
) -> None:
    """Update parameters, moments and steps in place, unless ``found_inf`` is 1.

    Weight decay is subtracted before the update: λ·lr·W, or with ``mode="cautious"`` the same
    where update and weight do not have opposite signs (Chen et al., arXiv 2510.12402). The sign of
    an update is that of the new first moment.

    torch's fused kernels require dense tensors of equal strides: the one for CPUs ignores strides,
    the one for CUDA raises unless all are the same. Tensors that differ in strides or dtype from
    their parameter, or have gaps, are therefore copied before and after.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[AdamWParam, AdamWParam]]]
    groups = defaultdict(list)
    for row in rows:
        dense = _dense(row)
        groups[dense.param.device, dense.param.dtype].append((row, dense))
    for (device, _), pairs in groups.items():
        fused = device.type in _get_fused_kernels_supported_devices()
        skip = None if fused else found_inf
        if skip is not None:  # only fused kernels support found_inf
            pairs = [(row, AdamWParam(*map(torch.clone, dense))) for row, dense in pairs]
        if mode == "cautious" and weight_decay:
            # In a step that is skipped, ``param`` is a copy unless kernels are fused.
            rate = lr if found_inf is None else lr * (1 - found_inf)
            for _, row in pairs:
                _decay_cautiously(row, rate * weight_decay, beta1, maximize)
        params, gradients, averages, squares, steps = map(
            list, zip(*(dense for _, dense in pairs), strict=True)
        )
        adamw(
            params,
            gradients,
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay if mode == "decoupled" else 0.0,
            eps=eps,
            maximize=maximize,
            fused=fused,
            foreach=not fused,
            found_inf=found_inf if fused else None,
        )
        for row, dense in pairs:
            if dense is row:
                continue
            for name in ("param", "average", "square", "step"):
                old, new = getattr(row, name), getattr(dense, name)
                if new is not old:
                    old.copy_(new if skip is None else torch.where(skip == 0, new.to(old), old))


def _decay_cautiously(row: AdamWParam, rate: Scalar, beta1: float, maximize: bool) -> None:
    """Subtract ``rate`` times the weights whose update does not have the opposite sign."""
    gradient = row.gradient.to(row.average.dtype)
    update = torch.lerp(row.average, -gradient if maximize else gradient, 1 - beta1)
    # Signs, because the product of two small numbers would underflow.
    decayed = torch.where(update.sign() * row.param.sign() >= 0, row.param, 0)
    row.param.sub_(decayed * rate)


def _dense(row: AdamWParam) -> AdamWParam:
    """The row with dense tensors of the same strides and dtype, copied where needed."""
    param = row.param
    dtype = torch.promote_types(param.dtype, row.average.dtype)
    strides = param.stride() if param.is_contiguous() or _is_dense(param) else None
    tensors = row[:4]
    if all(tensor.dtype == dtype and tensor.stride() == strides for tensor in tensors):
        return row

    def fit(tensor: Tensor) -> Tensor:
        if tensor.dtype == dtype and tensor.stride() == strides:
            return tensor
        if strides is None:
            return torch.empty(param.shape, dtype=dtype, device=param.device).copy_(tensor)
        copy = torch.empty_strided(param.shape, strides, dtype=dtype, device=param.device)
        return copy.copy_(tensor)

    param, gradient, average, square = map(fit, tensors)
    return AdamWParam(param, gradient, average, square, row.step)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill memory without gaps or overlaps, in any order."""
    length = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != length:
                return False
            length *= size
    return True
