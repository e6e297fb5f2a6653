"""Polynomials of symmetric matrices and their products, in memory that a CPU uses again."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from muonclip.kernels.blocked_product import Matrices, new_squares, pays_by_blocks
from muonclip.kernels.support import full_float32_products
from muonclip.kernels.symmetric_product import unchecked_product

# Up to this side, calls take longer than the arithmetic.
SMALL_SIDE = 32

# Bytes of the matrices processed at a time on a CPU; at least one matrix.
_CACHE_BYTES = 2**19


@dataclass
class Workspace:
    """Memory for intermediate results of a computation on [b, n, m].

    Attributes:
        spare: [b, n, m].
        gram, polynomial, total, square: [b, n, n], or None to allocate each result.
    """

    spare: Matrices
    gram: Matrices | None = None
    polynomial: Matrices | None = None
    total: Matrices | None = None
    square: Matrices | None = None


def has_no_blocks(x: Tensor) -> bool:
    """Whether a CPU multiplies [b, n, m] by their transposes, and the results, as a whole."""
    _, n, m = x.shape
    return _is_eager_on_cpu(x) and not any(pays_by_blocks(n, k, x.dtype) for k in (n, m))


def _is_eager_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def in_passes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of [b, n, m] to as many matrices at a time as a CPU core's cache holds.

    Returns:
        The results, which may overwrite ``x``.
    """
    if not _is_eager_on_cpu(x) or len(x) == 1 or x.nbytes <= _CACHE_BYTES:
        return function(x)
    for part in _passes(x, x.dtype):
        part.copy_(function(part))
    return x


def _passes(x: Tensor, compute: torch.dtype) -> Iterator[Tensor]:
    """Parts of [b, n, m] that a core's cache holds in a dtype; at least one matrix each."""
    count = max(1, _CACHE_BYTES // max(1, x.size(1) * x.size(2) * compute.itemsize))
    for start in range(0, len(x), count):
        yield x[start : start + count]


def apply(
    function: Callable[[Matrices, Workspace], Matrices], x: Tensor, *, compute: torch.dtype
) -> Tensor:
    """Apply a function that overwrites its argument to each matrix of [b, n, m].

    On a CPU, in place, on as many matrices at a time as a core's cache holds, and in the same
    memory for all, whose views of blocks are used again.

    Args:
        function: of matrices and memory for its intermediate results.
        x: [b, n, m].
        compute: dtype to compute in, with every result rounded to that of ``x``.
    """
    is_rounded = compute != x.dtype
    new_matrices = partial(Matrices, rounded_to=x.dtype if is_rounded else None)
    if torch.compiler.is_compiling():
        x = x.contiguous()  # torch.compile supports no other memory for results
    if not _is_eager_on_cpu(x):
        values = new_matrices(x.to(compute))
        spare = new_matrices(torch.empty_like(values.tensor))
        return function(values, Workspace(spare)).tensor.to(x.dtype)
    memory: Workspace | None = None
    for part in _passes(x, compute):
        values = new_matrices(part.to(compute))
        if memory is None or memory.spare.tensor.shape != part.shape:
            spare = new_matrices(torch.empty_like(values.tensor))
            memory = Workspace(spare, *new_squares(spare, 4))
        spare = memory.spare
        # Otherwise torch may round factors in float16 to bfloat16, if it is set to.
        with full_float32_products(x.device) if is_rounded else nullcontext():
            result = function(values, memory)
        if result.tensor is not part:
            part.copy_(result.tensor)
        memory.spare = spare
    return x


class Polynomial(NamedTuple):
    """The symmetric matrix ``constant`` * identity + ``matrix``, [b, n, n]."""

    constant: float
    matrix: Matrices


def polynomial(r: Matrices, a: float, b: float, c: float, out: Matrices | None) -> Polynomial:
    """a + b r + c r², for symmetric ``r``.

    In 16 bits, adding the identity would round once more, which doubles the error of the whole: it
    is left to the products, which have it in their sums. So it is for small matrices, for which
    the addition takes longer. Otherwise it is in ``matrix``, and saves the products a pass over
    what they multiply.
    """
    values = r.tensor
    if c:
        matrix = unchecked_product(r, r, c=r, alpha=c, beta=b, out=out)
    elif out is None:
        matrix = r.symmetric(values * b).round_()
    else:
        torch.mul(values, b, out=out.tensor)
        matrix = out.round_()
    if r.dtype in (torch.bfloat16, torch.float16) or values.size(1) <= SMALL_SIDE:
        return Polynomial(a, matrix)
    matrix.tensor.diagonal(dim1=-2, dim2=-1).add_(a)
    return Polynomial(0.0, matrix)


def as_matrix(p: Polynomial, out: Matrices | None) -> Matrices:
    """A copy of the polynomial as one matrix."""
    if out is None:
        matrix = p.matrix.symmetric(p.matrix.tensor.clone())
    else:
        out.tensor.copy_(p.matrix.tensor)
        matrix = out
    if p.constant:
        matrix.tensor.diagonal(dim1=-2, dim2=-1).add_(p.constant)
    return matrix.round_()


def product(s: Matrices, p: Polynomial, out: Matrices | None) -> Matrices:
    """s p, for a matrix ``s`` that commutes with ``p``: symmetric."""
    if p.constant:
        return unchecked_product(s, p.matrix, c=s, beta=p.constant, out=out)
    return unchecked_product(s, p.matrix, out=out)


def multiply_(p: Polynomial, x: Matrices, factor: float, out: Matrices) -> Matrices:
    """factor * p x, written into ``out``; ``p`` is overwritten."""
    matrix, values = p.matrix.tensor, x.tensor
    if p.constant:
        beta = factor * p.constant
        torch.baddbmm(values, matrix, values, beta=beta, alpha=factor, out=out.tensor)
    else:
        if factor != 1:
            matrix.mul_(factor)
            p.matrix.round_()
        torch.bmm(matrix, values, out=out.tensor)
    return out.round_()
