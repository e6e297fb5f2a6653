"""The matrices that a parameter stores: fused, per head, transposed, convolution kernels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """The matrices of the model that one parameter stores.

    Muon orthogonalizes the model's matrices, which frameworks fuse and rearrange in storage. Read
    as [outputs, inputs] (after ``view`` or ``flatten``, then ``transposed``), the parameter's rows
    repeat a pattern of blocks ``repeats`` times; ``blocks`` are the rows of each block. The rows of
    a block in all repeats form one matrix, or with ``separate`` one matrix per repeat. A parameter
    [E, outputs, inputs] is a stack of E slices with this layout.

    Examples: gate and up fused, ``MatrixLayout((f, f))``; the same in alternate rows,
    ``MatrixLayout((1, 1), repeats=f)``; each of 8 heads separately,
    ``MatrixLayout.per_head(rows, 8)``; Megatron's QKV, per group its queries, key and value,
    ``MatrixLayout((q * d, d, d), repeats=groups)``; an einsum's weight [inputs, heads, d],
    ``MatrixLayout(view=(inputs, heads * d), transposed=True)``.

    Attributes:
        blocks: rows of each block in one repeat; None: all rows.
        repeats: number of times the pattern repeats.
        separate: the repeats of a block are separate matrices.
        transposed: stored as [inputs, outputs].
        flatten: a convolution kernel [out, in, ...], read as [out, in * ...].
        view: shape to view the parameter as; None: its shape.

    Raises:
        ValueError: for counts below 1, or ``flatten`` together with ``transposed`` or ``view``.
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
            raise ValueError("repeats requires blocks: the rows of each block in one repeat")
        if self.view is not None:
            object.__setattr__(self, "view", _counts("view", self.view))
            if len(self.view) not in (2, 3):
                raise ValueError(f"view must be a shape [n, m] or [E, n, m], got {self.view}")
        if self.flatten and (self.transposed or self.view is not None):
            raise ValueError("flatten cannot be combined with transposed or view")

    @classmethod
    def per_head(cls, rows: int, heads: int, *, transposed: bool = False) -> "MatrixLayout":
        """A separate matrix for the rows of each head.

        Args:
            rows: the parameter's outputs.
            heads: number of heads; divides ``rows``.
            transposed: stored as [inputs, outputs].

        Raises:
            ValueError: if ``heads`` does not divide ``rows``.
        """
        if heads < 1 or rows % heads:
            raise ValueError(f"{rows} rows cannot be split into {heads} heads")
        return cls((rows // heads,), heads, separate=True, transposed=transposed)

    @classmethod
    def parse(cls, text: str) -> "MatrixLayout":
        """The layout that ``str`` describes by this text."""
        blocks = re.search(r"rows (\d+(?: \+ \d+)*)", text)
        repeats = re.search(r"(\d+) times, (\w+)", text)
        view = re.search(r"read as (\d+(?:x\d+)*)", text)
        return cls(
            tuple(map(int, blocks[1].split(" + "))) if blocks else None,
            int(repeats[1]) if repeats else 1,
            separate=repeats is not None and repeats[2] == "separate",
            transposed="transposed" in text,
            flatten="flatten" in text,
            view=tuple(map(int, view[1].split("x"))) if view else None,
        )

    def differs_in_order(self, other: "MatrixLayout") -> bool:
        """Whether another layout stores the same matrices with their rows in another order.

        As Megatron's gate and up at another number of tensor-parallel ranks, each of which has its
        rows of gate, then its rows of up.
        """
        return (
            self.repeats != other.repeats
            and self._merged is not None
            and self._merged == other._merged
        )

    @property
    def _merged(self) -> "MatrixLayout | None":
        """This layout with the rows of each matrix in one piece; None unless blocks are merged over
        repeats, and there are several."""
        if self.blocks is None or len(self.blocks) == 1 or (self.separate and self.repeats > 1):
            return None
        blocks = tuple(self.repeats * rows for rows in self.blocks)
        return replace(self, blocks=blocks, repeats=1, separate=False)

    def check(self, shape: Sequence[int]) -> None:
        """Check that a parameter of this shape can store these matrices.

        Raises:
            ValueError: if it cannot.
        """
        if self.view is not None:
            if prod(self.view) != prod(shape):
                raise ValueError(f"shape {tuple(shape)} cannot be read as {self.view}")
            shape = self.view
        if self.flatten:
            if len(shape) < 3:
                raise ValueError(f"flatten is for kernels [out, in, ...], got {tuple(shape)}")
        elif len(shape) not in (2, 3):
            raise ValueError(
                f"shape {tuple(shape)} is neither a matrix [n, m] nor a stack [E, n, m]"
            )
        rows = shape[0] if self.flatten else shape[-1 if self.transposed else -2]
        if self.blocks is not None and self.repeats * sum(self.blocks) != rows:
            raise ValueError(
                f"{self.repeats} x {self.blocks} add up to {self.repeats * sum(self.blocks)} rows, "
                f"not {rows}"
            )

    def slices(self, shape: Sequence[int]) -> int:
        """Number of slices along the first dimension of a parameter that contain whole matrices.

        Returns:
            E for a stack [E, n, m]; 1 if only the parameter as a whole contains whole matrices.
        """
        return shape[0] if len(shape) == 3 and not self.flatten and self.view is None else 1

    def matrix_shapes(self, shape: Sequence[int]) -> list[tuple[int, int, int]]:
        """[b, n, m] of each block of a parameter, as ``split`` returns them.

        Args:
            shape: of the whole parameter.
        """
        if self.flatten:
            shape = (shape[0], prod(shape[1:]))
        *stack, rows, columns = shape if self.view is None else self.view
        if self.transposed:
            rows, columns = columns, rows
        count = prod(stack)
        if self.blocks is None:
            return [(count, rows, columns)]
        if self.separate:
            return [(count * self.repeats, block, columns) for block in self.blocks]
        return [(count, block * self.repeats, columns) for block in self.blocks]

    def input_dims(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The dimensions of a parameter along which it has the inputs of a neuron (matrix row).

        Args:
            shape: of the whole parameter.

        Raises:
            ValueError: if ``view`` joins inputs and outputs in one dimension.
        """
        if self.flatten:
            return tuple(range(1, len(shape)))
        if self.view is None:
            return (len(shape) - (2 if self.transposed else 1),)
        ends = list(accumulate(shape, mul, initial=1))
        stack = prod(self.view[:-2])
        rows = stack * self.view[-2]
        if stack not in ends or rows not in ends:
            raise ValueError(
                f"in shape {tuple(shape)}, read as {self.view}, no dimensions are those of the rows"
            )
        if self.transposed:
            return tuple(range(ends.index(stack), ends.index(rows)))
        return tuple(range(ends.index(rows), len(shape)))

    def has_input_dims(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape has dimensions of inputs.

        It has none if ``view`` joins them with outputs, or adds the one of a matrix [n, 1].
        """
        try:
            return bool(self.input_dims(shape))
        except ValueError:
            return False

    @property
    def of_neurons(self) -> "MatrixLayout":
        """The layout of a tensor with one element along ``input_dims``: [n, 1] for a matrix."""
        if self.view is None:
            return self
        *rest, rows, columns = self.view
        return replace(self, view=(*rest, 1, columns) if self.transposed else (*rest, rows, 1))

    def split(self, parameter: Tensor) -> list[Tensor]:
        """The matrices in a tensor with the parameter's layout.

        Args:
            parameter: [n, m], [E, n, m], or a shape that ``flatten`` or ``view`` applies to; of a
                stack also a part of its slices.

        Returns:
            One [b, n, m] for each block; views if strides allow.
        """
        x = parameter.flatten(1) if self.flatten else parameter
        if self.view is not None:
            x = x.reshape(self.view)
        if self.transposed:
            x = x.mT
        x = x.unsqueeze(0) if x.ndim == 2 else x.reshape(-1, *x.shape[-2:])
        if self.blocks is None:
            return [x]
        x = x.reshape(x.size(0), self.repeats, -1, x.size(-1))
        blocks = x.split_with_sizes(self.blocks, -2)
        return [block.flatten(0, 1) if self.separate else block.flatten(1, 2) for block in blocks]

    def join(self, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The inverse of ``split``.

        Args:
            matrices: as returned by ``split``.
            shape: the parameter's.
        """
        if self.blocks is None:
            (x,) = matrices
        else:
            repeats = self.repeats
            # [E * repeats, block, m] or [E, repeats * block, m] to [E, repeats, block, m]
            blocks = [
                matrix.reshape(-1, repeats, rows, matrix.size(-1))
                for matrix, rows in zip(matrices, self.blocks, strict=True)
            ]
            x = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)).flatten(1, 2)
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


def _counts(name: str, value: Sequence[int]) -> tuple[int, ...]:
    if (
        not isinstance(value, Sequence)
        or not value
        or any(type(number) is not int or number < 1 for number in value)
    ):
        raise ValueError(f"{name} must be a tuple of positive integers, got {value!r}")
    return tuple(value)


WHOLE = MatrixLayout()

# A layout may be pickled on its own, and torch.load's safe mode may read it back.
torch.serialization.add_safe_globals([MatrixLayout])
