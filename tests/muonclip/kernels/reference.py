"""Float64 references of the kernels, and the rounding error that their arithmetic allows."""

import torch
from torch import Tensor


def symmetric_factors(
    generator: torch.Generator, shape: tuple[int, int, int], gram: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """float64 a and b with a symmetric product: a matrix twice, or two polynomials of one
    symmetric matrix. Column-major where transposed."""
    batch, n, _ = shape
    if gram:
        a = torch.randn(shape, generator=generator, dtype=torch.float64)
        b = a
    else:
        x = torch.randn(batch, n, n, generator=generator, dtype=torch.float64) / n**0.5
        x = x @ x.mT
        a, b = 0.5 * x - x @ x, x + 0.25 * x @ x @ x
    if transposed:
        a = a.mT.contiguous().mT
        b = a if gram else b
    return a, b


def check_symmetric_product(
    result: Tensor, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float
) -> None:
    """Sums in float32 (float64 for float64), rounded to the result's dtype."""
    assert result.dtype == a.dtype
    a, b = a.double(), b.double()
    product = alpha * a @ b.mT
    addend = torch.zeros_like(product) if c is None else beta * c.double()
    accumulator = torch.float64 if result.dtype == torch.float64 else torch.float32
    sums = (a.size(-1) + 4) * torch.finfo(accumulator).eps
    magnitude = abs(alpha) * a.abs() @ b.abs().mT + addend.abs()
    rounding = torch.finfo(result.dtype)
    stores = 2 * rounding.eps * (product.abs() + addend.abs()) + rounding.tiny
    error = (result.double() - (product + addend)).abs()
    # The other triangle's product differs by what rounding a and b did to their symmetry.
    lopsided = (product - product.mT).abs()
    assert (error <= sums * magnitude + stores + lopsided).all()
