"""Which matrices of the model a parameter stores: fused, per head, transposed, convolution."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """How the matrices of a model lie in one parameter.

    Muon's maths is that of the model's matrices; frameworks fuse and rearrange them in storage.
    Read as [outputs, inputs] (after ``view`` or ``flatten``, then ``transposed``), the parameter's
    rows are ``repeats`` copies of one pattern of blocks, ``blocks`` rows each. The rows that a
    block has in all repeats are one matrix, or with ``separate`` one matrix a repeat. A parameter
    [E, outputs, inputs] is a stack: all this holds for each of its E slices.

    Examples: gate and up fused, ``MatrixLayout((f, f))``; the same in alternate rows,
    ``MatrixLayout((1, 1), repeats=f)``; each of 8 heads on its own,
    ``MatrixLayout.per_head(rows, 8)``; Megatron's QKV, for each group its queries, key and value,
    ``MatrixLayout((q * d, d, d), repeats=groups)``; an einsum's weight [inputs, heads, d],
    ``MatrixLayout(view=(inputs, heads * d), transposed=True)``.

    Attributes:
        blocks: rows of each block in one repeat; None: all rows.
        repeats: how often the pattern recurs.
        separate: the repeats of a block are matrices of their own.
        transposed: stored as [inputs, outputs].
        flatten: a convolution kernel [out, in, ...], read as [out, in * ...].
        view: the shape as which the elements, in their order, are read; None: the parameter's.

    Raises:
        ValueError: for counts below 1, or more than one of ``flatten`` and ``transposed`` or
            ``view``.
    """

    blocks: tuple[int, ...] | None = None
    repeats: int = 1
    separate: bool = False
    transposed: bool = False
    flatten: bool = False
    view: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(self, "blocks", _counts("blocks", self.blocks))
        if type(self.repeats) is not int or self.repeats < 1:
            raise ValueError(f"repeats must be a positive integer, got {self.repeats!r}")
        if self.repeats > 1 and self.blocks is None:
            raise ValueError("repeats needs blocks: the rows of each block in one repeat")
        if self.view is not None:
            object.__setattr__(self, "view", _counts("view", self.view))
            if len(self.view) not in (2, 3):
                raise ValueError(f"view must be a shape [n, m] or [E, n, m], got {self.view}")
        if self.flatten and (self.transposed or self.view is not None):
            raise ValueError("flatten excludes transposed and view")

    @classmethod
    def per_head(cls, rows: int, heads: int, *, transposed: bool = False) -> "MatrixLayout":
        """Each head's rows are a matrix of their own.

        Args:
            rows: the parameter's outputs.
            heads: divides them.
            transposed: stored as [inputs, outputs].

        Raises:
            ValueError: if ``heads`` does not divide ``rows``.
        """
        if heads < 1 or rows % heads:
            raise ValueError(f"{rows} rows cannot be shared by {heads} heads")
        return cls((rows // heads,), heads, separate=True, transposed=transposed)

    def check(self, shape: Sequence[int]) -> None:
        """Raise unless a parameter of this shape can hold these matrices.

        Raises:
            ValueError: naming what does not fit.
        """
        if self.view is not None:
            if prod(self.view) != prod(shape):
                raise ValueError(f"shape {tuple(shape)} cannot be read as {self.view}")
            shape = self.view
        if self.flatten:
            if len(shape) < 3:
                raise ValueError(f"flatten is for kernels [out, in, ...], got {tuple(shape)}")
        elif len(shape) not in (2, 3):
            raise ValueError(f"shape {tuple(shape)} is no matrix [n, m] or stack [E, n, m]")
        rows = shape[0] if self.flatten else shape[-1 if self.transposed else -2]
        if self.blocks is not None and self.repeats * sum(self.blocks) != rows:
            raise ValueError(
                f"{self.repeats} x {self.blocks} add up to {self.repeats * sum(self.blocks)} rows, "
                f"not {rows}"
            )

    def slices(self, shape: Sequence[int]) -> int:
        """How many slices of the parameter's first dimension stand for themselves.

        Args:
            shape: the parameter's.

        Returns:
            E for a stack [E, n, m]; 1 where only the parameter as a whole holds whole matrices.
        """
        return shape[0] if len(shape) == 3 and not self.flatten and self.view is None else 1

    def split(self, parameter: Tensor) -> list[Tensor]:
        """The matrices in a tensor laid out like the parameter.

        Args:
            parameter: [n, m], [E, n, m], or what ``flatten`` or ``view`` are for; of a stack also
                a part of its slices.

        Returns:
            One [b, n, m] for each block, views where strides allow.
        """
        x = parameter.flatten(1) if self.flatten else parameter
        if self.view is not None:
            x = x.reshape(self.view)
        if self.transposed:
            x = x.mT
        x = x.reshape(-1, *x.shape[-2:])
        if self.blocks is None:
            return [x]
        parts = x.reshape(x.size(0), self.repeats, -1, x.size(-1)).split_with_sizes(self.blocks, -2)
        return [part.flatten(0, 1) if self.separate else part.flatten(1, 2) for part in parts]

    def join(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`split`.

        Args:
            matrices: as ``split`` returned.
            shape: the parameter's.

        Returns:
            A tensor of that shape.
        """
        if self.blocks is None:
            (x,) = matrices
        else:
            repeats = self.repeats
            # [E * repeats, block, m] or [E, repeats * block, m] to [E, repeats, block, m]
            parts = [
                part.reshape(-1, repeats, rows, part.size(-1))
                for part, rows in zip(matrices, self.blocks, strict=True)
            ]
            x = (parts[0] if len(parts) == 1 else torch.cat(parts, -2)).flatten(1, 2)
        if self.transposed:
            x = x.mT
        return x.reshape(tuple(shape))

    def __str__(self) -> str:
        words = []
        if self.blocks is not None:
            words.append("rows " + " + ".join(map(str, self.blocks)))
            if self.repeats > 1:
                words.append(f"{self.repeats} times, {'separate' if self.separate else 'merged'}")
        words += [word for word in ("transposed", "flatten") if getattr(self, word)]
        if self.view is not None:
            words.append(f"read as {'x'.join(map(str, self.view))}")
        return ", ".join(words) or "one matrix"


def _counts(what: str, value: Sequence[int]) -> tuple[int, ...]:
    if (
        not isinstance(value, Sequence)
        or not value
        or any(type(number) is not int or number < 1 for number in value)
    ):
        raise ValueError(f"{what} must be a tuple of positive integers, got {value!r}")
    return tuple(value)


WHOLE = MatrixLayout()

# A layout may be pickled on its own, and torch.load's safe mode may read it back.
torch.serialization.add_safe_globals([MatrixLayout])
