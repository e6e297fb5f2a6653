"""AdamW's step for parameters, or for parts of them, by torch's kernels."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from muonclip.offload import copy_back, fetch
from muonclip.precision import Result, refresh_master, write_back
from muonclip.remainders import join
from muonclip.update import AdamWDecayMode, Scalar, cautiously_decayed


class AdamWPart(NamedTuple):
    """A parameter of AdamW in a step: its local tensor, or a range of elements of that tensor.

    Attributes:
        local: the weights.
        to_update: the tensor to update: this part of the master copy, or ``local``.
        gradient: not changed.
        average, square: first and second moment.
        step: 0-d float32, the number of steps.
        seed: of the parameter, for stochastic rounding.
        start: the first element, in the local tensor.
        remainder: of a master copy that is stored as ``local`` and a remainder.
        compute: where the step computes with tensors that may be elsewhere (see ``offload``); None:
            all are on one device.
    """

    local: Tensor
    to_update: Tensor
    gradient: Tensor
    average: Tensor
    square: Tensor
    step: Tensor
    seed: tuple[int, ...]
    start: int = 0
    remainder: Tensor | None = None
    compute: torch.device | None = None


def update_parts(
    parts: Sequence[AdamWPart], group: Mapping[str, Any], found_inf: Tensor | None
) -> None:
    """Update parameters and their state where the step computes, and round the results.

    Args:
        parts: on any devices.
        group: their options.
        found_inf: 1 if nothing must change; None if the step changes something.
    """
    rows, results, fetched = [], [], []
    for part in parts:
        device = part.compute or part.local.device
        local, average, square = (fetch(x, device) for x in (part.local, part.average, part.square))
        to_update = local
        if part.to_update is not part.local:
            to_update = fetch(part.to_update, device)
            if part.compute is not None:
                refresh_master(to_update, local)
            fetched.append((part.to_update, to_update))
        elif part.remainder is not None:
            to_update = join(local, part.remainder)
        elif group["stochastic_rounding"] and local.dtype == torch.bfloat16:
            to_update = local.float()
        rows.append(AdamWRow(to_update, fetch(part.gradient, device), average, square, part.step))
        results.append(Result(to_update, part.local, part.remainder, (*part.seed, part.start)))
        fetched += [(part.average, average), (part.square, square)]
    adamw_step(
        rows,
        lr=group["lr"],
        beta1=group["momentum"],
        beta2=group["adamw_beta2"],
        weight_decay=group["weight_decay"],
        mode=group["adamw_weight_decay_mode"],
        eps=group["adamw_eps"],
        maximize=group["maximize"],
        found_inf=found_inf,
    )
    write_back(results, stochastic=group["stochastic_rounding"])
    for given, copied in fetched:
        copy_back(given, copied)


class AdamWRow(NamedTuple):
    """The non-empty tensors of a part, of one shape and on one device.

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
    rows: Sequence[AdamWRow],
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

    Weight decay is subtracted before the update: λ·lr·W, or with ``mode="cautious"`` the same of
    ``cautiously_decayed`` weights. The sign of an update is that of the new first moment.

    torch's fused kernels require dense tensors of equal strides: the one for CPUs ignores strides,
    the one for CUDA raises unless all are the same. Tensors that differ in strides or dtype from
    their parameter, or have gaps, are therefore copied before and after.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[AdamWRow, AdamWRow]]]
    groups = defaultdict(list)
    for row in rows:
        dense = _dense(row)
        groups[dense.param.device, dense.param.dtype].append((row, dense))
    for (device, _), pairs in groups.items():
        fused = device.type in _get_fused_kernels_supported_devices()
        skip = None if fused else found_inf
        if skip is not None:  # only fused kernels support found_inf
            pairs = [(row, AdamWRow(*map(torch.clone, dense))) for row, dense in pairs]
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


def _decay_cautiously(row: AdamWRow, rate: Scalar, beta1: float, maximize: bool) -> None:
    """Subtract ``rate`` times the weights whose update does not have the opposite sign."""
    gradient = row.gradient.to(row.average.dtype)
    update = torch.lerp(row.average, -gradient if maximize else gradient, 1 - beta1)
    row.param.sub_(cautiously_decayed(row.param, update) * rate)


def _dense(row: AdamWRow) -> AdamWRow:
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
    return AdamWRow(param, gradient, average, square, row.step)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill memory without gaps or overlaps, in any order."""
    length = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != length:
                return False
            length *= size
    return True
