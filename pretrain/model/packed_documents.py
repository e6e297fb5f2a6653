"""The documents of a micro-batch, and the blocks of logits that attention within them needs."""

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pretrain.model import flex
from pretrain.model.context_parallel import WHOLE_SEQUENCE, SequenceShare
from pretrain.model.flex import to_device

# Queries in a block.
BLOCK = 64
# Query-key pairs that cost as much as the kernel launches of one more block.
_PAIRS_PER_LAUNCH = 2**12
# Query-key pairs up to which sequences whose keys begin at different positions share a block: it
# has a limit for each pair, so that without a bound memory would be quadratic in their length.
_PAIRS_PER_LIMIT = 2**14


class Block(NamedTuple):
    """Queries of one or more sequences, and all keys to which any of them attends.

    Attributes:
        sequences: of the batch.
        queries: rows of the query tensor.
        keys: rows of the key tensor.
        limit: [sequences or 1, 1, 1, queries, n], -inf where a query does not attend to one of the
            last n keys, else inf. All queries attend to the keys before these. The minimum with it
            masks logits; on a CPU, ``masked_fill_`` is 15 times as slow.
    """

    sequences: slice
    queries: slice
    keys: slice
    limit: Tensor


class PackedDocuments(PackedSeqParams):  # type: ignore[misc]
    """Documents of a micro-batch; a token attends to itself and the earlier ones of its document.

    Created once for each micro-batch. megatron-core passes it to the attention of every layer as
    ``packed_seq_params``; its ``qkv_format`` is "sbhd": activations remain [s, b, ...].

    Args:
        lengths: tokens of each document of each sequence. All sequences have the same length s.
        device: of queries and keys.
        chunks: first and last position, exclusive, of the queries, in the order of the query
            tensor; keys are those of the whole sequences. Default: the whole sequences.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        device: torch.device,
        chunks: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        length = sum(lengths[0])
        super().__init__(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length)
        self.lengths = [list(sequence) for sequence in lengths]
        self.device = device
        self.chunks = list(chunks or [(0, length)])
        self._blocks: dict[torch.dtype, list[Block]] = {}

    @classmethod
    def of(
        cls, documents: Tensor, device: torch.device, share: SequenceShare = WHOLE_SEQUENCE
    ) -> "PackedDocuments":
        """From the number of each token's document, [b, s] on the CPU.

        Args:
            share: the tokens whose queries this rank has.
        """
        lengths = [torch.unique_consecutive(row, return_counts=True)[1] for row in documents]
        return cls([row.tolist() for row in lengths], device, share.chunks(documents.shape[1]))

    @functools.cached_property
    def thd(self) -> PackedSeqParams:
        """The same documents for activations [b * s, 1, ...], the sequences one after another.

        megatron-core's format for Transformer Engine: it counts positions within documents. The
        maximum length is that of a sequence, because kernels are compiled for each maximum.
        """
        ends = [0, *accumulate(length for row in self.lengths for length in row)]
        cumulative = to_device(torch.tensor(ends, dtype=torch.int32), self.device)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cumulative,
            cu_seqlens_kv=cumulative,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_kv=self.max_seqlen_kv,
        )

    @functools.cached_property
    def first_keys(self) -> Tensor:
        """[b, s] int64 on the CPU: position of the first token of each token's document."""
        return torch.stack(
            [
                torch.tensor([0, *accumulate(row)][:-1]).repeat_interleave(torch.tensor(row))
                for row in self.lengths
            ]
        )

    @functools.cached_property
    def positions(self) -> Tensor:
        """[queries] int64 on the CPU: position of each query in its sequence."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.chunks])

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """Mask for flex_attention.

        Built from pairs of blocks of 128 rows, on the CPU: their number is that of all pairs of
        tokens over 16,384.
        """
        length = self.first_keys.shape[1]
        blocks = torch.arange(0, length, flex.BLOCK)
        rows = len(self.positions)
        padded = torch.arange(-(-rows // flex.BLOCK) * flex.BLOCK).clamp(max=rows - 1)
        positions = self.positions[padded].view(-1, flex.BLOCK)
        first_keys = self.first_keys[:, positions]  # [b, query blocks, 128]
        attended = (blocks <= positions.amax(-1)[:, None]) & (
            blocks + flex.BLOCK > first_keys.amin(-1)[..., None]
        )
        full = (blocks + flex.BLOCK - 1 <= positions.amin(-1)[:, None]) & (
            blocks >= first_keys.amax(-1)[..., None]
        )
        full[:, rows // flex.BLOCK :] = False  # an incomplete last block
        first_key, position = (
            to_device(x.to(torch.int32), self.device)
            for x in (self.first_keys[:, self.positions].contiguous(), self.positions)
        )

        def allowed(sequence: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= position[query]) & (key >= first_key[sequence, query])

        lengths = rows, length
        return flex.block_mask(attended & ~full, full, allowed, lengths, self.device)

    def blocks(self, dtype: torch.dtype) -> list[Block]:
        """Blocks that cover all queries, for logits of this dtype; made once."""
        if dtype not in self._blocks:
            blocks = self._blocks[dtype] = []
            row = 0
            for start, stop in self.chunks:
                for first in range(start, stop, BLOCK):
                    last = min(first + BLOCK, stop)
                    queries = slice(row, row + last - first)
                    blocks += self._blocks_at(first, last, queries, dtype)
                    row = queries.stop
        return self._blocks[dtype]

    def _blocks_at(self, first: int, last: int, queries: slice, dtype: torch.dtype) -> list[Block]:
        """Blocks of the queries at positions ``first`` to ``last``."""
        first_keys = self.first_keys[:, first:last]
        blocks = []
        for begin, end in _similar(first_keys[:, 0].tolist(), last, last - first):
            starts = first_keys[begin:end]
            key = int(starts.min())
            if bool((starts == key).all()):  # one document: only later keys are masked
                limit = _causal_limit(last - first, dtype, self.device)
            else:
                keys = torch.arange(key, last)
                later = keys > torch.arange(first, last)[:, None]
                masked = later | (keys < starts[..., None])
                limit = to_device(_as_limit(masked[:, None, None], dtype), self.device)
            blocks.append(Block(slice(begin, end), queries, slice(key, last), limit))
        return blocks


def keys_per_query(length: int) -> float:
    """Logits of a head computed per query of a document of this length: whole blocks of queries."""
    ends = [min(first + BLOCK, length) for first in range(0, length, BLOCK)]
    starts = [0, *ends[:-1]]
    pairs = sum((end - start) * end for start, end in zip(starts, ends, strict=True))
    return pairs / length


def _similar(first_keys: Sequence[int], last: int, queries: int) -> list[tuple[int, int]]:
    """Ranges of consecutive sequences whose keys begin at similar positions and end at ``last``.

    A sequence joins a range if the additional logits cost less than another block, and if it needs
    no large mask.
    """
    begin, key = 0, first_keys[0]
    ranges = []
    for sequence, first_key in enumerate(first_keys):
        joint = min(key, first_key)
        more = (sequence - begin) * (key - joint) + first_key - joint
        differ = first_key != key and (last - joint) * queries > _PAIRS_PER_LIMIT
        if differ or more * queries > _PAIRS_PER_LAUNCH:
            ranges.append((begin, sequence))
            begin, joint = sequence, first_key
        key = joint
    return [*ranges, (begin, len(first_keys))]


@functools.cache
def _causal_limit(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, 1, size, size], -inf above the diagonal, else inf."""
    later = torch.ones(1, 1, 1, size, size, dtype=torch.bool).triu(1)
    return to_device(_as_limit(later, dtype), device)


def _as_limit(masked: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(masked, -math.inf, math.inf).to(dtype)
