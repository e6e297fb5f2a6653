"""The weights of the whole model, and how tensor parallelism splits them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TensorShard(NamedTuple):
    """One rank's shard of a tensor that tensor parallelism splits.

    Attributes:
        dim: the dimension that is split.
        rank, size: the shard's number and the number of shards.
        stacked: number of matrices stacked along ``dim``, each of which is split by itself: 2 for
            the fused gate and up projections.
    """

    dim: int
    rank: int
    size: int
    stacked: int = 1

    def local(self, whole: Tensor) -> Tensor:
        """Return this rank's shard of the whole tensor."""
        matrices = whole.chunk(self.stacked, self.dim)
        return torch.cat([m.chunk(self.size, self.dim)[self.rank] for m in matrices], self.dim)

    def whole_shape(self, local_shape: Sequence[int]) -> list[int]:
        """Return the shape of the whole tensor, given that of a shard."""
        shape = list(local_shape)
        shape[self.dim] *= self.size
        return shape

    def blocks(self, local: Tensor) -> list[tuple[list[int], Tensor]]:
        """Return (offsets in the whole tensor, view of the shard), one for each stacked matrix."""
        found = []
        for number, view in enumerate(local.chunk(self.stacked, self.dim)):
            offsets = [0] * local.ndim
            offsets[self.dim] = (number * self.size + self.rank) * view.shape[self.dim]
            found.append((offsets, view))
        return found
