"""Polynomials of symmetric matrices and their products, in memory that a CPU uses again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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

    spare: Tensor
    gram: Tensor | None = None
    polynomial: Tensor | None = None
    total: Tensor | None = None
    square: Tensor | None = None


def apply(function: Callable[[Tensor, Workspace], Tensor], x: Tensor) -> Tensor:
    """Apply a function that overwrites its argument to each matrix of [b, n, m].

    On a CPU, in place, on as many matrices at a time as a core's cache holds, and in the same
    memory for all: fresh memory and a cold cache cost a fifth of the time of small ones.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return function(x, Workspace(torch.empty_like(x)))
    matrix_bytes = max(1, x.size(1) * x.size(2) * x.itemsize)
    count = min(len(x), max(1, _CACHE_BYTES // matrix_bytes))
    spare = torch.empty_like(x[:count])
    squares = x.new_empty(4, count, x.size(1), x.size(1))
    for start in range(0, len(x), max(1, count)):
        matrices = x[start : start + count]
        size = len(matrices)
        result = function(matrices, Workspace(spare[:size], *squares[:, :size]))
        if result is not matrices:
            matrices.copy_(result)
    return x


class Polynomial(NamedTuple):
    """The symmetric matrix ``constant`` * identity + ``matrix``, [b, n, n]."""

    constant: float
    matrix: Tensor


def polynomial(r: Tensor, a: float, b: float, c: float, out: Tensor | None) -> Polynomial:
    """a + b r + c r², for symmetric ``r``.

    In 16 bits, adding the identity would round once more, which doubles the error of the whole: it
    is left to the products, which have it in their sums. So it is for small matrices, for which
    the addition takes longer. Otherwise it is in ``matrix``, and saves the products a pass over
    what they multiply.
    """
    if c == 0:
        matrix = torch.mul(r, b, out=out)
    else:
        matrix = unchecked_product(r, r, c=r, alpha=c, beta=b, out=out)
    if r.dtype in (torch.bfloat16, torch.float16) or r.size(1) <= SMALL_SIDE:
        return Polynomial(a, matrix)
    matrix.diagonal(dim1=-2, dim2=-1).add_(a)
    return Polynomial(0.0, matrix)


def as_matrix(p: Polynomial, out: Tensor | None) -> Tensor:
    """A copy of the polynomial as one matrix."""
    matrix = p.matrix.clone() if out is None else out.copy_(p.matrix)
    if p.constant:
        matrix.diagonal(dim1=-2, dim2=-1).add_(p.constant)
    return matrix


def product(s: Tensor, p: Polynomial, out: Tensor | None) -> Tensor:
    """s p, for a matrix ``s`` that commutes with ``p``: symmetric."""
    if p.constant:
        return unchecked_product(s, p.matrix, c=s, beta=p.constant, out=out)
    return unchecked_product(s, p.matrix, out=out)


def multiply_(p: Polynomial, x: Tensor, factor: float, out: Tensor) -> Tensor:
    """factor * p x, written into ``out``; ``p`` is overwritten."""
    if p.constant:
        return torch.baddbmm(x, p.matrix, x, beta=factor * p.constant, alpha=factor, out=out)
    if factor != 1:
        p.matrix.mul_(factor)
    return torch.bmm(p.matrix, x, out=out)
