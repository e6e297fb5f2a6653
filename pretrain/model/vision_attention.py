"""Attention within each item of a pack of items of any lengths, never over the whole pack."""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# flex_attention's tiles: rows of queries, and of keys.
BLOCK = 128


class Pack:
    """Where the items of a pack lie, one behind the other; made once for all layers.

    Args:
        lengths: rows of each item. Equal ones should be neighbours: they are attended as a batch.
        device: where queries and keys will be.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.device = device
        # (items, length of each) of neighbours of one length.
        self.runs = [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @functools.cached_property
    def offsets(self) -> Tensor:
        """int32 [items + 1]: every item's first row, and the end."""
        offsets = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return offsets.to(self.device)

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """flex_attention's mask: each item by itself."""
        return block_mask(self.lengths, self.device)

    @functools.cached_property
    def buckets(self) -> list[Tensor]:
        """int64 [items, rows] of items whose lengths are within a factor of two: their rows, and
        the last row again and again where an item has fewer than the longest."""
        firsts = torch.tensor([0, *accumulate(self.lengths)])[:-1]
        buckets = []
        by_size = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        for _, group in groupby(by_size, key=lambda item: self.lengths[item].bit_length()):
            items = torch.tensor(list(group))
            lengths = torch.tensor(self.lengths)[items, None]
            rows = torch.arange(int(lengths.max())).minimum(lengths - 1)
            buckets.append((firsts[items, None] + rows).to(self.device))
        return buckets


Kernel = Literal["runs", "varlen", "flex"]


def choose_kernel(query: Tensor) -> Kernel:
    """The one rule for who attends.

    - ``varlen``, torch's packed flash attention: 16 bits on an NVIDIA GPU (Ampere or newer), heads
      of a multiple of 8 up to 256 wide, torch 2.10 or newer.
    - ``flex``, compiled flex_attention that skips other items' tiles: what is left of 16 bits and
      float32 on such a GPU, heads at least 16 wide.
    - ``runs``, scaled_dot_product_attention for each length of items: everything else, a CPU first
      of all.
    """
    width = query.shape[-1]
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) < (8, 0):
        return "runs"
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and width % 8 == 0 and width <= 256 and _has_varlen():
        return "varlen"
    return "flex" if (half or query.dtype == torch.float32) and width >= 16 else "runs"


def attend(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack, kernel: Kernel | None = None
) -> Tensor:
    """Softmax attention of each item's rows to all rows of the item; scale 1/√d.

    Args:
        query, key, value: [P, heads, d], the pack's rows.
        kernel: which; default: :func:`choose_kernel`.

    Returns:
        [P, heads, d].
    """
    attended: dict[Kernel, Callable[[Tensor, Tensor, Tensor, Pack], Tensor]] = {
        "runs": _attend_runs,
        "varlen": _attend_varlen,
        "flex": _attend_flex,
    }
    return attended[kernel or choose_kernel(query)](query, key, value, pack)


def batches(query: Tensor, key: Tensor, pack: Pack) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys as plain batches [items, heads, rows, d], for who looks at the logits.

    On a CPU a batch is the items of one length. Elsewhere few launches matter more: a batch is all
    items of about one length, filled up with copies of their own rows, which add logits but none
    that is not there already: the largest is the same.
    """
    if query.device.type == "cpu":
        yield from zip(_by_run(query, pack), _by_run(key, pack), strict=True)
    else:
        for rows in pack.buckets:
            yield query[rows].transpose(1, 2), key[rows].transpose(1, 2)


def block_mask(lengths: Sequence[int], device: torch.device) -> BlockMask:
    """flex_attention's mask of items of these lengths, made of tiles: no [P, P] on the way."""
    ends = torch.tensor(list(accumulate(lengths)))
    firsts = ends - torch.tensor(lengths)
    rows = int(ends[-1])
    tiles = torch.arange(-(-rows // BLOCK))
    # The items of each tile's first and last row.
    head = torch.searchsorted(ends, tiles * BLOCK, right=True)
    tail = torch.searchsorted(ends, (tiles * BLOCK + BLOCK - 1).clamp(max=rows - 1), right=True)
    first_seen = firsts[head] // BLOCK
    last_seen = (ends[tail] - 1) // BLOCK
    seen = (tiles >= first_seen[:, None]) & (tiles <= last_seen[:, None])
    # A tile of one item need not look at its mask. One that the pack's end cuts must.
    whole = (head == tail) & ((tiles + 1) * BLOCK <= rows)
    full = whole[:, None] & whole & (head[:, None] == head)

    items = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    items = items.to(device)

    def same_item(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return items[q] == items[k]

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full, device),
        *_listed(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_item,
        seq_lengths=(rows, rows),
    )


def _listed(tiles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are wanted, and which: theirs come first."""
    wanted = tiles.to(torch.int32)
    which = wanted.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return (
        wanted.sum(-1, dtype=torch.int32)[None, None].to(device),
        which[None, None].contiguous().to(device),
    )


def _by_run(x: Tensor, pack: Pack) -> Iterator[Tensor]:
    """Views [items, heads, length, d] of the rows [P, heads, d] of items of one length."""
    parts = torch.split(x, [items * length for items, length in pack.runs])
    for (items, length), part in zip(pack.runs, parts, strict=True):
        yield torch.unflatten(part, 0, (items, length)).transpose(1, 2)


def _attend_runs(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    outputs = [
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        for q, k, v in zip(*(_by_run(x, pack) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(pack.lengths)
    attended = varlen_attn(query, key, value, pack.offsets, pack.offsets, longest, longest)
    return cast(Tensor, attended)


def _attend_flex(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    flex = _compiled_flex() if query.is_cuda else cast(Callable[..., Tensor], flex_attention)
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    return flex(*heads_first, block_mask=pack.block_mask)[0].transpose(0, 1)


@functools.cache
def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Packs differ in every step: one program for all lengths.
    return torch.compile(flex_attention, dynamic=True)
