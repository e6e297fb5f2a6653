"""Matrix products known to be symmetric: compute one triangle and mirror it, for half the work."""

from typing import Any, Literal

import torch
from torch import Tensor

from muonclip.kernels.dense_product import dense
from muonclip.kernels.support import allows_tf32, has_triton

Backend = Literal["dense", "blocked", "triton"]

# Side length -> blocks of rows that pay from there on. Two blocks need 3/4 of the work, four 5/8,
# eight 9/16, but small products are less efficient. Measured with MKL, EPYC and Xeon; in 16 bits
# with oneDNN, EPYC.
_BLOCKS_FROM = {256: 2, 384: 4, 1024: 8}
_BLOCKS_FROM_IN_16_BITS = {512: 4, 1024: 8}

# Smaller matrices are multiplied as a whole everywhere.
_LEAST_SIDE = min(_BLOCKS_FROM)

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
    return unchecked_product(a, b, c, alpha, beta, out)


def unchecked_product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`symmetric_product` without a check of the arguments, which takes longer than a small
    product."""
    if out is not None and (a.device.type != "cpu" or torch.compiler.is_compiling()):
        out = None
    if a.size(1) < _LEAST_SIDE or choose_backend(a) == "dense":
        return dense(a, b, c, alpha, beta, out)
    if out is not None:  # calling a custom operator takes longer than a small product
        return blocked(a, b, c, alpha, beta, out)
    product: Tensor = _operator(a, b, c, alpha, beta)  # by device: blocked or triton
    return product


def choose_backend(a: Tensor) -> Backend:
    """The backend of ``symmetric_product`` for a first factor like this one.

    ``"blocked"`` on a CPU and ``"triton"`` on an NVIDIA GPU (Ampere or newer, with Triton
    installed) for matrices large enough, ``"dense"`` for all others. Triton is for tensor cores:
    bfloat16, float16, and float32 where torch allows tf32.
    """
    batch, n, _ = a.shape
    if a.numel() == 0:
        return "dense"
    if a.device.type == "cpu" and n >= min(_blocks_from(a.dtype)):
        return "blocked"
    if a.device.type == "cuda" and n >= _TRITON_FROM:
        rows = -(-n // _TRITON_TILE)
        enough = batch * rows * (rows + 1) // 2 >= _TRITON_TILES
        half = a.dtype in (torch.bfloat16, torch.float16)
        tensor_cores = half or (a.dtype == torch.float32 and allows_tf32())
        if enough and tensor_cores and has_triton():
            return "triton"
    return "dense"


def _blocks_from(dtype: torch.dtype) -> dict[int, int]:
    return _BLOCKS_FROM_IN_16_BITS if dtype.itemsize == 2 else _BLOCKS_FROM


def blocked(
    a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor | None = None
) -> Tensor:
    """The blocks of rows up to the diagonal, each mirrored into the columns above it."""
    n = a.size(1)
    if out is None:
        out = a.new_empty(a.size(0), n, n)
    counts = _blocks_from(a.dtype)
    blocks = max([2, *(count for least, count in counts.items() if n >= least)])
    size = -(-n // blocks)
    # One matrix at a time: of a part of a batch, torch copies 16-bit factors, slower than it
    # multiplies them.
    for i in range(a.size(0)):
        result = out[i]
        for start in range(0, n, size):
            stop = min(start + size, n)
            rows, columns = a[i, start:stop], b[i, :stop].mT
            block = result[start:stop, :stop]  # written in place: nothing is copied
            if c is None:
                torch.addmm(block, rows, columns, beta=0, alpha=alpha, out=block)
            else:
                summand = c[i, start:stop, :stop]
                torch.addmm(summand, rows, columns, beta=beta, alpha=alpha, out=block)
            if start:
                result[:start, start:stop] = block[:, :start].mT
    return out


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
