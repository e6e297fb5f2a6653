"""Context parallelism: which tokens of a sequence a rank has, and how it gathers the others."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class SequenceShare:
    """The share of every sequence that a context-parallel rank has.

    A sequence is cut into 2 * ``size`` chunks of equal length; rank r has chunks r and
    2 * ``size`` - 1 - r, in this order. With causal attention, tokens of early chunks attend to few
    keys and those of late chunks to many: together, all ranks have the same work (Llama 3 report,
    arXiv 2407.21783, section 3.3.2). The default is the whole sequence.

    Attributes:
        rank, size: rank within the context-parallel group, and its size.
    """

    rank: int = 0
    size: int = 1

    def chunks(self, length: int) -> list[tuple[int, int]]:
        """First and last position, exclusive, of each chunk in a sequence of ``length`` tokens."""
        if self.size == 1:
            return [(0, length)]
        chunk = length // (2 * self.size)
        return [(n * chunk, (n + 1) * chunk) for n in (self.rank, 2 * self.size - 1 - self.rank)]

    def take(self, whole: Tensor, dim: int) -> Tensor:
        """Select this rank's tokens; ``dim`` has all tokens of a sequence."""
        if self.size == 1:
            return whole
        chunks = self.chunks(whole.shape[dim])
        return torch.cat([whole.narrow(dim, start, end - start) for start, end in chunks], dim)

    def restore(self, gathered: Tensor) -> Tensor:
        """Put tokens, gathered from all ranks along the first dimension, in their order."""
        if self.size == 1:
            return gathered
        chunks = gathered.chunk(2 * self.size)
        # Rank r's chunks are at 2r and 2r + 1.
        first, second = chunks[::2], chunks[1::2]
        return torch.cat([*first, *reversed(second)])

    def ranks(self, length: int, device: torch.device | None = None) -> Tensor:
        """int64 [length], the rank that has each token of a sequence."""
        half = torch.arange(self.size, device=device)
        return torch.cat([half, half.flip(0)]).repeat_interleave(length // (2 * self.size))


WHOLE_SEQUENCE = SequenceShare()


def gather_sequence(local: Tensor, group: dist.ProcessGroup, share: SequenceShare) -> Tensor:
    """Gather all tokens [s, ...] of the sequences from each rank's part of them.

    The gradient of a token is the sum of those of all ranks (reduce-scatter).

    Args:
        local: this rank's part of its share, all parts of equal size.
        group: the context-parallel ranks, or, with sequence parallelism, the tensor- and
            context-parallel ranks.
    """
    if group.size() == 1:
        return local
    gathered: Tensor = gather_from_sequence_parallel_region(local, group=group)
    return share.restore(gathered)
