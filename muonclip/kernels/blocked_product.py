"""Symmetric products on a CPU: blocks of rows up to the diagonal, each mirrored above it."""

from functools import cached_property

import torch
from torch import Tensor

from muonclip.kernels.support import cpu_threads

# Rows of a block. Two blocks need 3/4 of the work, four 5/8, eight 9/16, but small products are
# less efficient, the more so if several threads share one. Measured with MKL and oneDNN on EPYC,
# with one thread and with two.
_LEAST_ROWS, _MOST_ROWS, _BLOCKS = 64, 128, 8
_LEAST_SIDE = 160  # of a matrix
_LEAST_ELEMENTS = 384**2  # of a matrix in 16 bits

# Rows of a power of two of bytes apart compete for the same lines of a cache: a copy between rows
# and columns of such a matrix is up to five times slower.
_CACHE_LINE, _AVOIDED_STRIDE = 64, 1024


def block_rows(n: int, dtype: torch.dtype) -> int:
    """Rows of a block of a symmetric [n, n]."""
    threads = cpu_threads()
    if threads > 1 or dtype.itemsize <= 2:  # larger products, to be efficient
        return _MOST_ROWS * threads
    return min(max(_LEAST_ROWS, -(-n // _BLOCKS)), _MOST_ROWS)


def pays_by_blocks(n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether a symmetric product of [n, k] takes less time by blocks than as a whole."""
    is_large = dtype.itemsize > 2 or n * k >= _LEAST_ELEMENTS
    return is_large and n >= max(_LEAST_SIDE, 2 * block_rows(n, dtype))


class Matrices:
    """Matrices [b, n, k], and views of their blocks of rows.

    To create the views takes as long as a small product. They are created when first used, and
    serve all products of the matrices.

    Args:
        tensor: [b, n, k]. Views are used on a CPU only.
        is_symmetric: whether every matrix is symmetric, up to rounding. Products then use its
            columns in place of its transposed rows, with which MKL is up to 28% slower. (oneDNN,
            which multiplies 16-bit matrices, is equally fast with both.) It is also more exact:
            polynomials of a matrix that rounding has made slightly asymmetric commute with each
            other, but not with their transposes. Those would make the error of the Gram form up to
            six times as large.
        rounded_to: 16-bit dtype in which the CPU multiplies slowly. The matrices are float32 with
            values of that dtype, to which products of them are rounded.
    """

    def __init__(
        self, tensor: Tensor, *, is_symmetric: bool = False, rounded_to: torch.dtype | None = None
    ) -> None:
        self.tensor = tensor
        self.is_symmetric = is_symmetric
        self.rounded_to = rounded_to

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.rounded_to or self.tensor.dtype

    def symmetric(self, tensor: Tensor) -> "Matrices":
        """Symmetric results of these matrices, [b, n, n], whose values have the same dtype."""
        return Matrices(tensor, is_symmetric=True, rounded_to=self.rounded_to)

    def round_(self) -> "Matrices":
        """Round float32 results to the dtype of the values."""
        if self.rounded_to is not None:
            self.tensor.copy_(self.tensor.to(self.rounded_to))
        return self

    @cached_property
    def rows(self) -> list[Tensor]:
        """The blocks of rows of each matrix, [rows, k]."""
        return [matrix[start:stop] for matrix, start, stop in self._blocks]

    @cached_property
    def columns(self) -> list[Tensor]:
        """For each block, the rows up to its last one as columns, [k, stop]."""
        if self.is_symmetric:
            return [matrix[:, :stop] for matrix, _, stop in self._blocks]
        return [matrix[:stop].mT for matrix, _, stop in self._blocks]

    @cached_property
    def lower(self) -> list[Tensor]:
        """For each block of square matrices, its part up to the diagonal, [rows, stop]."""
        return [matrix[start:stop, :stop] for matrix, start, stop in self._blocks]

    @cached_property
    def mirrored(self) -> list[tuple[Tensor, Tensor] | None]:
        """For each block of square matrices, the columns above it, and what they must equal."""
        return [
            (matrix[:start, start:stop], matrix[start:stop, :start].mT) if start else None
            for matrix, start, stop in self._blocks
        ]

    @cached_property
    def _blocks(self) -> list[tuple[Tensor, int, int]]:
        """Each block of each matrix: the matrix, the block's first row, and the row behind it."""
        n = self.tensor.size(1)
        rows = block_rows(n, self.tensor.dtype)
        return [
            (matrix, start, min(start + rows, n))
            for matrix in self.tensor.unbind()
            for start in range(0, n, rows)
        ]


def new_squares(like: Matrices, count: int) -> list[Matrices]:
    """Memory for symmetric products of ``like``, [b, n, k]: ``count`` times [b, n, n]."""
    batch, n, _ = like.tensor.shape
    itemsize = like.tensor.itemsize
    padding = 0 if n * itemsize % _AVOIDED_STRIDE else _CACHE_LINE // itemsize
    squares = like.tensor.new_empty(count, batch, n, n + padding)
    return [like.symmetric(square) for square in squares[..., :n]]


def blocked_product(
    a: Matrices, b: Matrices, c: Matrices | None, alpha: float, beta: float, out: Matrices
) -> None:
    """Write beta * c + alpha * a @ b.mT, which must be symmetric, into ``out``.

    One matrix at a time: of a part of a batch, torch copies 16-bit factors, slower than it
    multiplies them.
    """
    # Written in place: nothing is copied.
    summands, beta = (out.lower, 0.0) if c is None else (c.lower, beta)
    for block, summand, rows, columns, mirrored in zip(
        out.lower, summands, a.rows, b.columns, out.mirrored, strict=True
    ):
        torch.addmm(summand, rows, columns, beta=beta, alpha=alpha, out=block)
        if mirrored is not None:
            above, values = mirrored
            above.copy_(values)
