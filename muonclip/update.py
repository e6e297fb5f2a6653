"""Arithmetic of one update, on lists of tensors, in place."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

WeightDecayMode = Literal["decoupled", "cautious", "independent", "l2"]
AdamWDecayMode = Literal["decoupled", "cautious"]
# A number, or a 0-d tensor on the parameters' device, which never waits for the host.
Scalar = float | Tensor


def is_free_to_read(device: torch.device) -> bool:
    """Whether the host can read a tensor without waiting for the work of the tensor's device."""
    return device.type == "cpu"


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no values, as in a step that only estimates memory."""
    return isinstance(tensor, FakeTensor)


def may_be_nonzero(lr: Scalar | None) -> bool:
    """Whether a learning rate may be nonzero; one on an accelerator is not read."""
    return (isinstance(lr, Tensor) and not is_free_to_read(lr.device)) or bool(lr)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype. Asking for its dtype takes less time than ``Tensor.to``."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def update_momentum(
    buffers: Sequence[Tensor], gradients: Sequence[Tensor], momentum: float
) -> None:
    """buffer <- momentum * buffer + (1 - momentum) * gradient, in the buffers' dtype."""
    gradients = [cast(g, b.dtype) for g, b in zip(gradients, buffers, strict=True)]
    torch._foreach_lerp_(list(buffers), gradients, 1 - momentum)


def look_ahead_(
    targets: Sequence[Tensor],
    buffers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum: float,
    nesterov: bool,
) -> None:
    """Write the updates to orthogonalize into ``targets``.

    They are the buffers or, with Nesterov, momentum * buffer + (1 - momentum) * gradient.
    """
    targets, buffers = list(targets), list(buffers)
    if not nesterov:
        torch._foreach_copy_(targets, buffers)
    elif all(t.dtype == b.dtype for t, b in zip(targets, buffers, strict=True)):
        torch._foreach_copy_(targets, list(gradients))
        torch._foreach_lerp_(targets, buffers, momentum)
    else:
        # Gradient and momentum largely cancel: round to the targets' dtype only afterwards.
        wide = [
            g.to(torch.promote_types(b.dtype, torch.float32))
            for g, b in zip(gradients, buffers, strict=True)
        ]
        buffers = [b.to(w.dtype) for b, w in zip(buffers, wide, strict=True)]
        torch._foreach_copy_(targets, list(torch._foreach_lerp(wide, buffers, momentum)))


def decay_and_apply(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: Scalar,
    weight_decay: float,
    mode: WeightDecayMode,
    unit: float = 1.0,
) -> None:
    """W <- W - lr * (unit * update + weight decay), in place.

    ``"decoupled"``: lr·λ·W (Loshchilov and Hutter, arXiv 1711.05101). ``"cautious"``: the same
    of ``cautiously_decayed`` weights. ``"independent"``: λ·W, whatever the learning rate, unless
    that is 0. ``"l2"``: nothing here, because λ·W is in the gradient.
    """
    if isinstance(lr, Tensor):  # in 16 bits, 1 - lr * weight_decay would round to 1
        lr = lr.to(torch.promote_types(lr.dtype, torch.float32))
    params = list(params)
    updates = [
        u if u.dtype == p.dtype or _adds_as_it_is(u, p, lr) else u.to(p.dtype)
        for u, p in zip(updates, params, strict=True)
    ]
    if weight_decay and mode == "cautious":
        decayed = [cautiously_decayed(p, u) for p, u in zip(params, updates, strict=True)]
        _add_scaled(params, decayed, -lr * weight_decay)
    elif weight_decay and mode in ("decoupled", "independent"):
        # A step with learning rate zero must change nothing: it is skipped, or taken by
        # torch.distributed.checkpoint to create the state of a new optimizer.
        factor = 1 - weight_decay * (lr if mode == "decoupled" else lr != 0)
        torch._foreach_mul_(params, factor)
    _add_scaled(params, updates, -lr * unit)


def cautiously_decayed(param: Tensor, update: Tensor) -> Tensor:
    """The weights, with zero where update and weight have opposite signs.

    Chen et al. (arXiv 2510.12402): the mask is u·w >= 0, so that a weight whose update is zero
    decays.
    """
    # Signs, because the product of two small numbers would underflow.
    return torch.where(update.sign() * param.sign() >= 0, param, 0)


def _adds_as_it_is(update: Tensor, param: Tensor, lr: Scalar) -> bool:
    """Whether ``param.add_(update, alpha=-lr)`` is the same without a conversion of the update.

    On a CPU the conversion is up to four times slower than the sum, because it is in fresh memory.
    """
    is_narrower = update.dtype.itemsize < param.dtype.itemsize
    return is_narrower and is_free_to_read(param.device) and not isinstance(lr, Tensor)


def _add_scaled(params: list[Tensor], tensors: list[Tensor], scale: Scalar) -> None:
    if isinstance(scale, Tensor):  # alpha must be a number
        tensors = list(torch._foreach_mul(tensors, scale))
        torch._foreach_add_(params, tensors)
    else:
        torch._foreach_add_(params, tensors, alpha=scale)
