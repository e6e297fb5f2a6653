"""The arithmetic of one update, on lists of tensors: pure apart from what it writes in place."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

WeightDecayMode = Literal["decoupled", "cautious", "independent", "l2"]
# A number, or a 0-d tensor on the parameters' device: with the latter nothing waits for the host.
Scalar = float | Tensor


def update_momentum(
    buffers: Sequence[Tensor], gradients: Sequence[Tensor], momentum: Scalar
) -> None:
    """buffer <- momentum * buffer + (1 - momentum) * gradient, in the buffers' dtype."""
    alike = [g.to(b.dtype) for g, b in zip(gradients, buffers, strict=True)]
    torch._foreach_lerp_(list(buffers), alike, 1 - momentum)  # type: ignore[arg-type]


def look_ahead_(
    targets: Sequence[Tensor],
    buffers: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum: float,
    nesterov: bool,
) -> None:
    """Write into ``targets`` what is orthogonalized: the buffers, or with Nesterov's look-ahead
    momentum * buffer + (1 - momentum) * gradient."""
    targets, buffers = list(targets), list(buffers)
    if not nesterov:
        torch._foreach_copy_(targets, buffers)
    elif all(t.dtype == b.dtype for t, b in zip(targets, buffers, strict=True)):
        torch._foreach_copy_(targets, list(gradients))
        torch._foreach_lerp_(targets, buffers, momentum)
    else:
        # Gradient and momentum largely cancel: they are rounded to the targets after that.
        wide = [
            g.to(torch.promote_types(b.dtype, torch.float32))
            for g, b in zip(gradients, buffers, strict=True)
        ]
        alike = [b.to(w.dtype) for b, w in zip(buffers, wide, strict=True)]
        torch._foreach_copy_(targets, list(torch._foreach_lerp(wide, alike, momentum)))


def decay_and_apply(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: Scalar,
    weight_decay: float,
    mode: WeightDecayMode,
) -> None:
    """W <- W - lr * (update + weight decay), in place.

    ``"decoupled"``: lr·λ·W (Loshchilov and Hutter, arXiv 1711.05101). ``"cautious"``: the same
    where update and weight do not have opposite signs, elsewhere nothing (Chen et al., arXiv
    2510.12402: the mask is u·w >= 0, so that a weight whose update is zero decays).
    ``"independent"``: λ·W, whatever the learning rate, unless that is 0. ``"l2"``: nothing here;
    λ·W is in the gradient.
    """
    if isinstance(lr, Tensor):  # in 16 bits, 1 - lr * weight_decay would round to 1
        lr = lr.to(torch.promote_types(lr.dtype, torch.float32))
    params = list(params)
    updates = [u.to(p.dtype) for u, p in zip(updates, params, strict=True)]
    if weight_decay and mode == "cautious":
        # By signs: the product of two small numbers would vanish.
        decayed = [
            torch.where(u.sign() * p.sign() >= 0, p, 0)
            for u, p in zip(updates, params, strict=True)
        ]
        _add_scaled(params, decayed, -lr * weight_decay)
    elif weight_decay and mode in ("decoupled", "independent"):
        # A step with learning rate zero must change nothing: it is one that is skipped, or how
        # torch.distributed.checkpoint makes a fresh optimizer's state.
        factor = 1 - weight_decay * (lr if mode == "decoupled" else lr != 0)
        torch._foreach_mul_(params, factor)
    _add_scaled(params, updates, -lr)


def _add_scaled(params: list[Tensor], tensors: list[Tensor], scale: Scalar) -> None:
    if isinstance(scale, Tensor):  # alpha must be a number
        tensors = list(torch._foreach_mul(tensors, scale))
        torch._foreach_add_(params, tensors)
    else:
        torch._foreach_add_(params, tensors, alpha=scale)


def write_back(
    results: Sequence[tuple[Tensor, Tensor, tuple[int, ...]]], *, stochastic: bool
) -> None:
    """Round results into their parameters, unless a result is its parameter.

    Args:
        results: (result, parameter, seed) each.
        stochastic: round bfloat16 parameters at random, by the seed, in place of to nearest.
    """
    sources, targets = [], []
    for result, param, seed in results:
        if stochastic and param.dtype == torch.bfloat16:
            round_stochastically(result, param, seed)
        elif result is not param:
            sources.append(result)
            targets.append(param)
    if targets:
        torch._foreach_copy_(targets, sources)


def adopt_changed(master: Tensor, param: Tensor) -> None:
    """Copy into a master copy the entries of its 16-bit parameter that are not its rounded ones.

    A step leaves the rounded master in the parameter. Where the parameter holds anything else,
    it was written to since then (a loaded state dict, an average of weights swapped in), and the
    parameter counts; entries that still match keep the master's full precision.
    """
    rounded = master.to(param.dtype).view(torch.int16)  # bits: NaN does not equal itself
    bits = param.view(torch.int16)
    # Only on a CPU may the result be read without waiting, and there it saves the rest.
    on_cpu = param.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (on_cpu and torch.equal(rounded, bits)):
        torch.where(rounded == bits, master, param.to(master.dtype), out=master)


def round_stochastically(source: Tensor, target: Tensor, seed: tuple[int, ...]) -> None:
    """Write float32 ``source`` into bfloat16 ``target``, rounded up or down at random.

    The nearer neighbour is the likelier, in proportion: the expectation is ``source``, so that
    updates smaller than half a unit in the last place are not lost on average. The random bits
    are a function of the seed and the shape.
    """
    generator = torch.Generator(source.device).manual_seed(hash(seed) % 2**63)
    # Contiguous whatever the source: numbers are drawn in the order of memory.
    noise = torch.empty(source.shape, dtype=torch.int32, device=source.device)
    noise.random_(0, 2**16, generator=generator)
    bits = source.view(torch.int32).add(noise).bitwise_and_(-(2**16))
    # Infinities and NaN have no neighbours: noise would turn one into the other.
    target.copy_(torch.where(source.isfinite(), bits.view(torch.float32), source))


def local(tensor: Tensor) -> Tensor:
    """A DTensor's part on this rank, sharing its storage; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
