"""The largest attention logit of each head: exactly, and a bound that costs next to nothing."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from muonclip.kernels.max_logits import max_logits_triton, supports

Mask: TypeAlias = Tensor | BlockMask

# Logits computed at a time: on a CPU what stays in a core's cache, elsewhere a quarter gigabyte.
_LOGITS_AT_A_TIME = {"cpu": 2**18}
_LOGITS_AT_A_TIME_ELSEWHERE = 2**26


class ScreenedMaxLogits(NamedTuple):
    """What ``screened_max_logits`` found; float32 (float64 for float64 input), [heads].

    Attributes:
        max_logits: the largest logits; -inf for heads whose bound settles them.
        bounds: what no logit exceeds.
    """

    max_logits: Tensor
    bounds: Tensor


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
    block_size: int = 64,
) -> Tensor:
    """The largest input of each head's softmax, exactly and in blocks of queries.

    Arguments are as in ``torch.nn.functional.scaled_dot_product_attention``, after any rotary
    embedding. Products are computed in at least float32. On a CPU keys that a block of queries
    does not attend to (causal, sliding window, padding) cost nothing. On a GPU without a mask a
    Triton kernel keeps the logits out of memory.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads (GQA).
        scale: factor on the products; default: 1/√d.
        mask: broadcastable to [..., heads, queries, keys]: boolean, true where a query attends, or
            floating, added to the logits, where -inf and the dtype's least number mask. Or
            flex_attention's ``BlockMask``.
        causal: a query attends to keys up to its own index.
        block_size: queries per block.

    Returns:
        float32 (or float64 for float64 input), [heads], without gradient; -inf for a head that
        attends to nothing.

    Raises:
        ValueError: if the shapes disagree or ``block_size`` is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    _check_shapes(query, key, mask)
    if isinstance(mask, Tensor | None) and supports(query, key, mask):
        scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        return max_logits_triton(query, key, scale=scale, causal=causal)
    return _max_logits(query, key, scale, mask, causal, block_size)


@torch.no_grad()
def max_logits_bound(
    query: Tensor, key: Tensor, *, scale: float | None = None, mask: Mask | None = None
) -> Tensor:
    """An upper bound on ``max_logits``: the largest ‖q‖ times the largest ‖k‖ times the scale.

    Under the threshold it proves that a head needs no clipping, whatever attention kernel ran,
    without computing a logit. Cauchy-Schwarz, per sequence of the batch. A floating mask can raise
    logits: give it, and its largest value is added; one that only removes them is not looked at.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads.
        scale: factor on the products; default: 1/√d.
        mask: as in ``max_logits``.

    Returns:
        float32 (or float64 for float64 input), [heads], without gradient.

    Raises:
        ValueError: if the shapes disagree.
    """
    groups = _check_shapes(query, key, mask)
    heads = query.size(-3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_norm = torch.linalg.vector_norm(query, dim=-1, dtype=dtype).amax(-1)
    key_norm = torch.linalg.vector_norm(key, dim=-1, dtype=dtype).amax(-1)
    bound = query_norm.unflatten(-1, (groups, -1)) * key_norm.unsqueeze(-1) * abs(scale)
    largest: Tensor = bound.reshape(-1, heads).amax(0)
    if isinstance(mask, Tensor) and mask.is_floating_point():
        raised = mask.amax((-2, -1)) if mask.ndim > 1 else mask.amax()
        largest = largest + (raised.flatten(0, -2).amax(0) if raised.ndim > 1 else raised)
    return largest


@torch.no_grad()
def screened_max_logits(
    query: Tensor,
    key: Tensor,
    threshold: float,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
) -> ScreenedMaxLogits:
    """``max_logits`` of only those heads whose ``max_logits_bound`` is above the threshold.

    On a GPU without a mask (causality is none) a Triton kernel decides that on the device. Where
    it cannot serve, the host reads which heads are over: it waits for the GPU, which costs far
    less than logits of all heads. While a CUDA graph is captured, and nothing can be read, they
    are computed.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads.
        threshold: τ; -inf for the exact logits of every head.
        scale: factor on the products; default: 1/√d.
        mask: as in ``max_logits``.
        causal: a query attends to keys up to its own index.

    Raises:
        ValueError: if the shapes disagree.
    """
    bounds = max_logits_bound(query, key, scale=scale, mask=mask)
    if isinstance(mask, Tensor | None) and supports(query, key, mask):
        scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        exact = max_logits_triton(
            query, key, scale=scale, causal=causal, bound=bounds, threshold=threshold
        )
        return ScreenedMaxLogits(exact, bounds)
    none = torch.full_like(bounds, -math.inf)
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        exact = _max_logits(query, key, scale, mask, causal)
        return ScreenedMaxLogits(none.where(bounds <= threshold, exact), bounds)
    heads = (~(bounds <= threshold)).nonzero().flatten()  # a bound that is NaN settles nothing
    if heads.numel() == 0:
        return ScreenedMaxLogits(none, bounds)
    some = heads if heads.numel() < bounds.numel() else None
    exact = _max_logits(query, key, scale, mask, causal, heads=some)
    return ScreenedMaxLogits(none.index_copy(0, heads, exact), bounds)


def _max_logits(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    mask: Mask | None,
    causal: bool,
    block_size: int = 64,
    heads: Tensor | None = None,
) -> Tensor:
    """``max_logits``, of all heads or of those listed."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    device = query.device
    lead, (queries, dim), keys = query.shape[:-3], query.shape[-2:], key.size(-2)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    query, key = query.reshape(-1, *query.shape[-3:]), key.reshape(-1, *key.shape[-3:])
    if heads is not None:  # each of them a group of its own
        query, key = query[:, heads], key[:, heads // (query.size(1) // key.size(1))]
    key = key.to(dtype).contiguous()
    batch, groups, per_group = *key.shape[:2], query.size(1) // key.size(1)
    read_mask = _mask_reader(mask, lead, queries, keys, heads)

    largest = torch.full((batch, groups, per_group), -math.inf, dtype=dtype, device=device)
    if batch == 0 or queries == 0:
        return torch.full((groups * per_group,), -math.inf, dtype=dtype, device=device)
    buffer = torch.empty(0, dtype=dtype, device=device)  # reused: fresh memory costs a CPU dearly
    for start in range(0, queries, block_size):
        stop = min(start + block_size, queries)
        first, last = 0, min(stop, keys) if causal else keys
        part = read_mask(start, stop)
        if part is not None and device.type == "cpu":  # elsewhere reading it would wait
            first, last = _span(part[..., :last])
        if first == last:
            continue
        if part is not None:
            # [batch or 1, groups or 1, heads of a group or 1, queries or 1, keys].
            part = part[..., first:last]
            part = part.view(part.size(0), groups if part.size(1) > 1 else 1, -1, *part.shape[2:])
        # Causality masks in part only the keys from the block's first query on.
        edge = max(first, start) if causal else last
        cap = None
        if edge < last:
            columns = torch.arange(edge, last, device=device)
            later = columns > torch.arange(start, stop, device=device)[:, None]
            cap = torch.where(later, -math.inf, math.inf).to(dtype)

        shape = (per_group, stop - start, last - first)
        for b, g in _chunks(batch, groups, math.prod(shape), device):
            block = query[b, g.start * per_group : g.stop * per_group, start:stop]
            block = (block.to(dtype) * scale).reshape(-1, per_group * (stop - start), dim)
            keys_of_block = key[b, g, first:last].flatten(0, 1).mT
            size = len(block) * math.prod(shape)
            if buffer.numel() < size:
                buffer = torch.empty(size, dtype=dtype, device=device)
            logits = buffer[:size].view(*block.shape[:2], last - first)
            torch.bmm(block, keys_of_block, out=logits)
            logits = logits.view(b.stop - b.start, -1, *shape)
            if part is not None:
                by_batch = part[b] if part.size(0) > 1 else part
                _apply_mask(logits, by_batch[:, g] if part.size(1) > 1 else by_batch)
            if cap is not None:
                at_edge = logits[..., edge - first :]
                torch.minimum(at_edge, cap, out=at_edge)
            seen = largest[b, g]
            torch.maximum(seen, logits.flatten(-2).amax(-1), out=seen)
    result: Tensor = largest.flatten(1).amax(0)
    return result


def _chunks(
    batch: int, groups: int, logits_per_group: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Cut batch and groups so that a piece has a bounded number of logits."""
    at_a_time = _LOGITS_AT_A_TIME.get(device.type, _LOGITS_AT_A_TIME_ELSEWHERE)
    pairs = max(1, at_a_time // logits_per_group)
    group_step = min(pairs, groups)
    batch_step = max(1, pairs // groups)
    for b in range(0, batch, batch_step):
        for g in range(0, groups, group_step):
            yield slice(b, min(b + batch_step, batch)), slice(g, min(g + group_step, groups))


def _mask_reader(
    mask: Mask | None, lead: torch.Size, queries: int, keys: int, heads: Tensor | None
) -> Callable[[int, int], Tensor | None]:
    """A function of the first and last query that gives their part of the mask.

    The part is [batch or 1, heads or 1, queries or 1, keys]; ``heads`` chooses among its heads.
    """
    if mask is None:
        return lambda start, stop: None

    if isinstance(mask, Tensor):
        full = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
        if full.ndim > 4:
            full = full.expand(*lead, *full.shape[-3:]).flatten(0, -4)
        full = full.expand(*full.shape[:-1], keys)

        def rows(start: int, stop: int) -> Tensor:
            return full[..., start:stop, :] if full.size(-2) > 1 else full
    else:
        block_mask = mask

        def rows(start: int, stop: int) -> Tensor:
            return _block_mask_rows(block_mask, start, stop, keys)

    def read(start: int, stop: int) -> Tensor:
        part = rows(start, stop)
        return part if heads is None or part.size(1) == 1 else part[:, heads]

    return read


def _block_mask_rows(mask: BlockMask, start: int, stop: int, keys: int) -> Tensor:
    """Rows of a flex_attention mask, boolean [batch or 1, heads or 1, queries, keys]."""
    device = mask.kv_num_blocks.device
    batch, heads = mask.kv_num_blocks.shape[:2]
    queries = torch.arange(start, stop, device=device)
    columns = torch.arange(keys, device=device)
    allowed = mask.mask_mod
    # As flex_attention calls it: on scalars.
    for in_dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        allowed = torch.vmap(allowed, in_dims=in_dims, out_dims=0)
    allowed = torch.vmap(allowed, in_dims=(0, None, None, None))
    element = allowed(
        torch.arange(batch, device=device), torch.arange(heads, device=device), queries, columns
    )
    # Blocks that are not listed are skipped, whatever the function says.
    block_rows, block_columns = mask.BLOCK_SIZE
    blocks = mask.to_dense()[:, :, queries // block_rows][..., columns // block_columns]
    return element & blocks.bool()


def _span(part: Tensor) -> tuple[int, int]:
    """The range of keys that any query of a mask's part attends to."""
    attended = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min
    columns = attended.flatten(0, -2).any(0).nonzero()
    return (int(columns[0]), int(columns[-1]) + 1) if columns.numel() else (0, 0)


def _apply_mask(logits: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -math.inf)
    else:
        logits.add_(mask).masked_fill_(mask <= torch.finfo(mask.dtype).min, -math.inf)


def _check_shapes(query: Tensor, key: Tensor, mask: Mask | None) -> int:
    """The number of key groups."""
    if query.ndim < 3 or key.ndim != query.ndim:
        raise ValueError(
            "query and key must be [..., heads, length, d] with as many dimensions, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    heads, groups = query.size(-3), key.size(-3)
    if query.size(-1) != key.size(-1) or query.shape[:-3] != key.shape[:-3]:
        raise ValueError(
            "query and key must agree in d and in the leading dimensions, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} query heads cannot be shared by {groups} key groups")
    if isinstance(mask, Tensor):
        _check_mask(mask, (*query.shape[:-1], key.size(-2)))
    return groups


def _check_mask(mask: Tensor, logits: tuple[int, ...]) -> None:
    fits = mask.ndim <= len(logits) and all(
        n in (1, wanted) for n, wanted in zip(reversed(mask.shape), reversed(logits), strict=False)
    )
    if mask.ndim == 0 or not fits:
        raise ValueError(f"mask {tuple(mask.shape)} must broadcast to the logits, {logits}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask must be boolean or floating, got {mask.dtype}")
