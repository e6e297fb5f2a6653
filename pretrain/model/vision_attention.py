"""Attention within each item of a pack, never over the whole pack."""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from muonclip import max_logits
from pretrain.model import flex
from pretrain.model.flex import BLOCK, compiled_flex, flex_problem


class Pack:
    """Boundaries of the items of a pack, computed once for all layers.

    Args:
        lengths: rows of each item. Consecutive items of equal length are attended in one batch.
        device: of queries and keys.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.device = device
        # (number of items, their length) of consecutive items of equal length.
        self.groups = [(len(list(items)), length) for length, items in groupby(self.lengths)]

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [items + 1]: first row of each item, then the number of rows."""
        boundaries = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return boundaries.to(self.device)

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """Mask for flex_attention."""
        return block_mask(self.lengths, self.device)

    @functools.cached_property
    def buckets(self) -> list[Tensor]:
        """int64 [items, rows] of items of similar length, padded with copies of their last rows."""
        first_rows = torch.tensor([0, *accumulate(self.lengths)])[:-1]
        buckets = []
        by_length = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        for _, group in groupby(by_length, key=lambda item: self.lengths[item].bit_length()):
            items = torch.tensor(list(group))
            lengths = torch.tensor(self.lengths)[items, None]
            rows = torch.arange(int(lengths.max())).minimum(lengths - 1)
            buckets.append((first_rows[items, None] + rows).to(self.device))
        return buckets


Kernel = Literal["sdpa", "varlen", "flex"]

# Logits computed at a time on a CPU, which fit a core's cache, and the least number of queries.
_LOGITS_AT_A_TIME, _LEAST_ROWS = 2**18, 64


def choose_kernel(query: Tensor) -> Kernel:
    """Kernel for queries [P, heads, d].

    - ``varlen``, torch's packed flash attention: 16 bits on an NVIDIA GPU (Ampere or newer), d a
      multiple of 8 up to 256, torch 2.10 or newer.
    - ``flex``, compiled flex_attention, which skips the blocks of other items: the remaining 16-bit
      types and float32 on such a GPU, d at least 16.
    - ``sdpa``, scaled_dot_product_attention for each length of items: everything else, including
      all CPUs.
    """
    width = query.shape[-1]
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return "sdpa"
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and width % 8 == 0 and width <= 256 and _has_varlen():
        return "varlen"
    return "flex" if flex_problem(query.device, query.dtype, (width,)) is None else "sdpa"


def attend(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, kernel: Kernel | None = None
) -> Tensor:
    """Softmax attention of each item's rows to all rows of the item, with scale 1/√d.

    Args:
        query, key, value: [P, heads, d], the pack's rows.
        kernel: default: :func:`choose_kernel`.

    Returns:
        [P, heads, d].
    """
    kernels: dict[Kernel, Callable[[Tensor, Tensor, Tensor, Pack], Tensor]] = {
        "sdpa": _attend_sdpa,
        "varlen": _attend_varlen,
        "flex": _attend_flex,
    }
    return kernels[kernel or choose_kernel(query)](query, key, value, pack)


@torch.no_grad()
def largest_logits(query: Tensor, key: Tensor, pack: Pack) -> Tensor:
    """The largest logit of each head within the items of a pack, at least float32 [heads].

    On a GPU, where few launches matter most, all items of a bucket are computed at a time; shorter
    ones are padded with copies of their last row, which do not change the max logit.
    """
    if query.device.type != "cpu":
        batches = (
            (query[rows].transpose(1, 2), key[rows].transpose(1, 2)) for rows in pack.buckets
        )
        return torch.stack([max_logits(*batch) for batch in batches]).amax(0)
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    maxima = []
    for q, k in zip(_by_length(query, pack), _by_length(key, pack), strict=True):
        columns = k.transpose(-1, -2)
        rows = max(_LEAST_ROWS, _LOGITS_AT_A_TIME // (q.numel() // q.shape[-1]))
        maxima += [torch.matmul(part, columns).amax((0, 2, 3)) for part in torch.split(q, rows, 2)]
    return torch.stack(maxima).amax(0) / math.sqrt(query.shape[-1])


def block_mask(lengths: Sequence[int], device: torch.device) -> BlockMask:
    """Mask for flex_attention of items of these lengths, without a [P, P] tensor."""
    ends = torch.tensor(list(accumulate(lengths)))
    first_rows = ends - torch.tensor(lengths)
    rows = int(ends[-1])
    blocks = torch.arange(-(-rows // BLOCK))
    # Items of each block's first and last row, and the range of blocks that they attend to.
    first_item = torch.searchsorted(ends, blocks * BLOCK, right=True)
    last_row = (blocks * BLOCK + BLOCK - 1).clamp(max=rows - 1)
    last_item = torch.searchsorted(ends, last_row, right=True)
    first_block = first_rows[first_item] // BLOCK
    last_block = (ends[last_item] - 1) // BLOCK
    attended = (blocks >= first_block[:, None]) & (blocks <= last_block[:, None])
    # Blocks of a single item need no mask, except the pack's incomplete last block.
    single = (first_item == last_item) & ((blocks + 1) * BLOCK <= rows)
    full = single[:, None] & single & (first_item[:, None] == first_item)

    items = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    items = flex.to_device(items, device)

    def same_item(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return items[q] == items[k]

    partial = attended & ~full
    return flex.block_mask(partial[None], full[None], same_item, (rows, rows), device)


def _by_length(x: Tensor, pack: Pack) -> Iterator[Tensor]:
    """Views [items, heads, length, d] of rows [P, heads, d], one for each of ``pack.groups``."""
    groups = torch.split(x, [items * length for items, length in pack.groups])
    for (items, length), rows in zip(pack.groups, groups, strict=True):
        yield torch.unflatten(rows, 0, (items, length)).transpose(1, 2)


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    outputs = [
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        for q, k, v in zip(*(_by_length(x, pack) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(pack.lengths)
    output = varlen_attn(query, key, value, pack.cu_seqlens, pack.cu_seqlens, longest, longest)
    return cast(Tensor, output)


def _attend_flex(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    attention = compiled_flex() if query.is_cuda else cast(Callable[..., Tensor], flex_attention)
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    return attention(*heads_first, block_mask=pack.block_mask)[0].transpose(0, 1)


@functools.cache
def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None
