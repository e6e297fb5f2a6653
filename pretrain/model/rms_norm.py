"""RMSNorm: by the fastest of apex, torch, and a derivative written out for CPUs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.runtime import apex


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in at least float32.

    On a CPU, torch derives its RMSNorm operation by operation, which takes three times as long as
    the formula.
    """
    if x.device.type != "cpu":
        return apex.rms_norm(x, weight, eps)
    output: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        output: Tensor = (wide * scale).mul_(weight).to(x.dtype)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normalized = x * scale
        of_weight = gradient * normalized
        mean = (of_weight * weight).mean(-1, keepdim=True)
        of_x = (gradient * weight).sub_(normalized.mul_(mean)).mul_(scale)
        return of_x.to(x.dtype), of_weight.flatten(0, -2).sum(0).to(weight.dtype), None
