"""Which matrices of the model a parameter stores: fused, per head, transposed, convolution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixLayout:
    """How the matrices of a model lie in one parameter.

    Muon's maths is that of the model's matrices; frameworks fuse and rearrange them in storage.
    Read as [outputs, inputs] (after ``transposed`` or ``flatten``), the parameter's rows are
    ``repeats`` copies of one pattern of blocks, ``blocks`` rows each. The rows that a block has in
    all repeats are one matrix, or with ``separate`` one matrix a repeat. A parameter
    [E, outputs, inputs] is a stack: all this holds for each of its E slices.

    Examples: gate and up fused, ``MatrixLayout((f, f))``; each of 8 heads on its own,
    ``MatrixLayout.per_head(rows, 8)``; Megatron's QKV, for each group its queries, key and value,
    ``MatrixLayout((q * d, d, d), repeats=groups)``.

    Attributes:
        blocks: rows of each block in one repeat; None: all rows.
        repeats: how often the pattern recurs.
        separate: the repeats of a block are matrices of their own.
        transposed: stored as [inputs, outputs].
        flatten: a convolution kernel [out, in, ...], read as [out, in * ...].

    Raises:
        ValueError: for counts below 1, or ``transposed`` together with ``flatten``.
    """

    blocks: tuple[int, ...] | None = None
    repeats: int = 1
    separate: bool = False
    transposed: bool = False
    flatten: bool = False

    def __post_init__(self) -> None:
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))
            if not self.blocks or any(type(n) is not int or n < 1 for n in self.blocks):
                raise ValueError(f"blocks must be positive row counts, got {self.blocks!r}")
        if type(self.repeats) is not int or self.repeats < 1:
            raise ValueError(f"repeats must be a positive integer, got {self.repeats!r}")
        if self.repeats > 1 and self.blocks is None:
            raise ValueError("repeats needs blocks: the rows of each block in one repeat")
        if self.transposed and self.flatten:
            raise ValueError("transposed and flatten exclude each other")

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
        dims = len(shape)
        if self.flatten:
            if dims < 3:
                raise ValueError(f"flatten is for kernels [out, in, ...], got {tuple(shape)}")
        elif dims not in (2, 3):
            raise ValueError(f"shape {tuple(shape)} is no matrix [n, m] or stack [E, n, m]")
        rows = shape[0] if self.flatten else shape[-1 if self.transposed else -2]
        if self.blocks is not None and self.repeats * sum(self.blocks) != rows:
            raise ValueError(
                f"{self.repeats} x {self.blocks} add up to {self.repeats * sum(self.blocks)} rows, "
                f"not {rows}"
            )

    def split(self, parameter: Tensor) -> list[Tensor]:
        """The matrices in a tensor laid out like the parameter.

        Args:
            parameter: [n, m], [E, n, m], or [out, in, ...] with ``flatten``.

        Returns:
            One [b, n, m] for each block, views where strides allow.
        """
        x = parameter.flatten(1) if self.flatten else parameter
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
            A tensor of that shape; a view where there is one block.
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
        return ", ".join(words) or "one matrix"


WHOLE = MatrixLayout()

# Groups carry layouts, and a state_dict carries groups: torch.load's safe mode may read them.
torch.serialization.add_safe_globals([MatrixLayout])
