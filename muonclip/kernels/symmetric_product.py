"""Matrix products known to be symmetric: compute one triangle and mirror it, for half the work."""

from typing import Any, Literal

import torch
from torch import Tensor

from muonclip.kernels.blocked_product import Matrices, blocked_product, pays_by_blocks
from muonclip.kernels.dense_product import dense
from muonclip.kernels.support import allows_tf32, has_triton

Backend = Literal["dense", "blocked", "triton"]

# Half the tiles take half the time only if all tiles are more than one wave over the GPU's
# multiprocessors (108 on an A100, 132 on an H100): the least number. Reasoned, not measured.
_TRITON_FROM = 512
_TRITON_TILES = 128
_TRITON_TILE = 128


def symmetric_product(
    a: Tensor,
    b: Tensor,
    *,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """beta * c + alpha * a @ b.mT, which must be symmetric.

    For Gram matrices (b is a) and for products of polynomials of one symmetric matrix, which
    commute. If it pays (see ``choose_backend``), only the lower triangle is computed and then
    mirrored, by an operator that ``torch.compile`` does not look into. Differentiable.

    On CUDA the first call for a shape times the kernel and the whole product, and waits for the
    device; later calls do neither, and may be captured in a CUDA graph. If the first call is
    captured, or with ``torch.use_deterministic_algorithms``, nothing is timed and the kernel uses
    its default tiling.

    Args:
        a: [batch, n, k], floating; any strides.
        b: [batch, n, k], of the same dtype and device.
        c: [batch, n, n], symmetric, of the same dtype and device; not changed.
        alpha: factor on the product.
        beta: factor on ``c``; with 0, ``c`` is not read.
        out: [batch, n, n], memory for the result on a CPU, where fresh memory costs more than a
            small product. Must not overlap a factor or require gradients.

    Returns:
        [batch, n, n]; ``out``, or new.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, or ``beta`` is not 0 without ``c``.
    """
    _check(a, b, c, beta)
    left = Matrices(a)
    right = left if b is a else Matrices(b)
    summand, result = (None if x is None else Matrices(x) for x in (c, out))
    return unchecked_product(left, right, summand, alpha, beta, result).tensor


def unchecked_product(
    a: Matrices,
    b: Matrices,
    c: Matrices | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Matrices | None = None,
) -> Matrices:
    """:func:`symmetric_product` without a check of the arguments, which takes longer than a small
    product."""
    if out is not None and (a.tensor.device.type != "cpu" or torch.compiler.is_compiling()):
        out = None
    summand = None if c is None else c.tensor
    if choose_backend(a.tensor) == "dense":
        memory = None if out is None else out.tensor
        right = b.tensor.mT if b.is_symmetric else b.tensor
        product = dense(a.tensor, right, summand, alpha, beta, memory)
    elif out is None:  # calling a custom operator takes longer than a small product
        product = _operator(a.tensor, b.tensor, summand, alpha, beta)  # by device
    else:
        blocked_product(a, b, c, alpha, beta, out)
    return (a.symmetric(product) if out is None else out).round_()


def choose_backend(a: Tensor) -> Backend:
    """The backend of ``symmetric_product`` for a first factor like this one.

    ``"blocked"`` on a CPU and ``"triton"`` on an NVIDIA GPU (Ampere or newer, with Triton
    installed) for matrices large enough, ``"dense"`` for all others. Triton is for tensor cores:
    bfloat16, float16, and float32 where torch allows tf32.
    """
    batch, n, k = a.shape
    if a.numel() == 0:
        return "dense"
    if a.device.type == "cpu" and pays_by_blocks(n, k, a.dtype):
        return "blocked"
    if a.device.type == "cuda" and n >= _TRITON_FROM:
        rows = -(-n // _TRITON_TILE)
        enough = batch * rows * (rows + 1) // 2 >= _TRITON_TILES
        half = a.dtype in (torch.bfloat16, torch.float16)
        tensor_cores = half or (a.dtype == torch.float32 and allows_tf32())
        if enough and tensor_cores and has_triton():
            return "triton"
    return "dense"


def blocked(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """The blocks of rows up to the diagonal, each mirrored into the columns above it."""
    result = a.new_empty(a.size(0), a.size(1), a.size(1))
    summand = None if c is None else Matrices(c)
    blocked_product(Matrices(a), Matrices(b), summand, alpha, beta, Matrices(result))
    return result


def triton(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    """The tiles on or below the diagonal, each stored twice."""
    from muonclip.kernels.symmetric_product_triton import symmetric_product_triton

    return symmetric_product_triton(a, b, c, alpha, beta)


_operator = torch.library.custom_op(
    "muonclip::symmetric_product",
    blocked,
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor a, Tensor b, Tensor? c, float alpha, float beta) -> Tensor",
)
_operator.register_kernel("cuda", triton)


@_operator.register_fake
def _fake(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    return a.new_empty(a.size(0), a.size(1), a.size(1))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, _, ctx.alpha, ctx.beta = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    needs_a, needs_b, needs_c = ctx.needs_input_grad[:3]
    return (
        ctx.alpha * gradient @ b if needs_a else None,
        ctx.alpha * gradient.mT @ a if needs_b else None,
        ctx.beta * gradient if needs_c else None,
        None,
        None,
    )


_operator.register_autograd(_backward, setup_context=_save)


def _check(a: Tensor, b: Tensor, c: Tensor | None, beta: float) -> None:
    if a.ndim != 3 or a.shape != b.shape or not a.is_floating_point():
        raise ValueError(
            "a and b must be floating-point tensors [batch, n, k] of one shape, "
            f"got {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    square = (a.size(0), a.size(1), a.size(1))
    if c is None and beta != 0:
        raise ValueError(f"beta is {beta}, but c is missing: give c, or beta=0")
    if c is not None and c.shape != square:
        raise ValueError(f"c must be [batch, n, n] = {square}, got {tuple(c.shape)}")
    for name, other in (("b", b), ("c", c)):
        if other is not None and (other.dtype != a.dtype or other.device != a.device):
            raise ValueError(
                f"{name} must have a's dtype and device, {a.dtype} on {a.device}, "
                f"got {other.dtype} on {other.device}"
            )
