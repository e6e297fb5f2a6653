"""The largest attention logit of each head, and a cheap upper bound on it."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from muonclip.kernels.max_logits import max_logits_triton, supports
from muonclip.kernels.support import full_float32_products

Mask: TypeAlias = Tensor | BlockMask

# Logits computed at a time: on a CPU those that fit a core's cache, elsewhere a quarter gigabyte.
_LOGITS_AT_A_TIME = {"cpu": 2**18}
_LOGITS_AT_A_TIME_ELSEWHERE = 2**26


class ScreenedMaxLogits(NamedTuple):
    """Result of ``screened_max_logits``; float32 (float64 for float64 input), [heads].

    Attributes:
        max_logits: the largest logits; -inf for heads that were not computed.
        bounds: upper bounds on the logits.
        unbiased_max_logits: the maximum of (S - b) / (1 - b/τ) over entries with b < τ, where S is
            the logit, b its additive bias and τ the threshold. Multiplying a head's q·k by τ over
            this maximum brings all these entries to τ or below. Equal to ``max_logits`` without a
            bias; -inf for heads that were not computed.
    """

    max_logits: Tensor
    bounds: Tensor
    unbiased_max_logits: Tensor


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    block_size: int = 64,
) -> Tensor:
    """The largest input of each head's softmax, computed exactly in blocks of queries.

    Arguments are as in ``torch.nn.functional.scaled_dot_product_attention``, after any rotary
    embedding and before any soft cap. Products are computed in at least float32, independent of
    torch's settings for matrix products (autocast, TF32). On a CPU, keys to which no query of a
    block attends are skipped (causal, sliding window, padding). On a GPU, without a mask, a Triton
    kernel runs that does not store the logits.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads (GQA).
        scale: factor on the products; default: 1/√d.
        mask: broadcastable to [..., heads, queries, keys]: boolean, true where a query attends, or
            floating, added to the logits; -inf and values below half the dtype's minimum mask an
            entry. Or flex_attention's ``BlockMask``.
        bias: floating, broadcastable to the logits and added to them, such as a position bias or
            ALiBi; like a floating mask, but can be combined with any mask.
        causal: a query attends to keys up to its own index.
        block_size: queries per block.

    Returns:
        float32 (or float64 for float64 input), [heads], without gradient; -inf for a head without
        logits, for example in an empty batch or sequence.

    Raises:
        ValueError: if the shapes disagree or ``block_size`` is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    _check_shapes(query, key, mask, bias)
    if bias is None and isinstance(mask, Tensor | None) and supports(query, key, mask):
        scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        return max_logits_triton(query, key, scale=scale, causal=causal)
    return _blocked_max_logits(query, key, scale, mask, bias, causal, block_size=block_size)[0]


@torch.no_grad()
def max_logits_bound(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """An upper bound on ``max_logits``: max‖q‖ · max‖k‖ · scale, by the Cauchy-Schwarz inequality.

    Computed for each sequence of the batch. A bound at or below the threshold proves, without
    computing a logit, that a head needs no clipping. The largest value of a floating mask and of a
    bias is added; masks that only remove logits are ignored.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads.
        scale: factor on the products; default: 1/√d.
        mask: as in ``max_logits``.
        bias: as in ``max_logits``.

    Returns:
        float32 (or float64 for float64 input), [heads], without gradient; -inf for an empty batch
        or sequence.

    Raises:
        ValueError: if the shapes disagree.
    """
    groups = _check_shapes(query, key, mask, bias)
    heads = query.size(-3)
    dtype = torch.promote_types(query.dtype, torch.float32)
    if query.numel() == 0 or key.numel() == 0:
        return torch.full((heads,), -math.inf, dtype=dtype, device=query.device)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    query_norm = torch.linalg.vector_norm(query, dim=-1, dtype=dtype).amax(-1)
    key_norm = torch.linalg.vector_norm(key, dim=-1, dtype=dtype).amax(-1)
    bound = query_norm.unflatten(-1, (groups, -1)) * key_norm.unsqueeze(-1) * abs(scale)
    largest: Tensor = bound.reshape(-1, heads).amax(0)
    for addend in (mask, bias):
        if isinstance(addend, Tensor) and addend.is_floating_point():
            largest = largest + _additive(_largest_per_head(addend), dtype)
    return largest


@torch.no_grad()
def screened_max_logits(
    query: Tensor,
    key: Tensor,
    threshold: float,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    exact: bool = False,
) -> ScreenedMaxLogits:
    """``max_logits`` of the heads whose ``max_logits_bound`` is above the threshold.

    On a GPU without ``mask`` and ``bias``, a Triton kernel compares bounds and threshold on the
    device. Otherwise the host reads which heads are above the threshold; waiting for the GPU costs
    far less than computing the logits of all heads. During CUDA graph capture, when nothing can be
    read, the logits of all heads are computed.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads.
        threshold: τ.
        scale: factor on the products; default: 1/√d.
        mask: as in ``max_logits``.
        bias: as in ``max_logits``.
        causal: a query attends to keys up to its own index.
        exact: compute the logits of every head, independent of its bound.

    Raises:
        ValueError: if the shapes disagree.
    """
    bounds = max_logits_bound(query, key, scale=scale, mask=mask, bias=bias)
    computed_above = -math.inf if exact else threshold
    if bias is None and isinstance(mask, Tensor | None) and supports(query, key, mask):
        scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        largest = max_logits_triton(
            query, key, scale=scale, causal=causal, bound=bounds, threshold=computed_above
        )
        return ScreenedMaxLogits(largest, bounds, largest)
    none = torch.full_like(bounds, -math.inf)
    heads = None
    if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        heads = (~(bounds <= computed_above)).nonzero().flatten()  # includes bounds that are NaN
        if heads.numel() == 0:
            return ScreenedMaxLogits(none, bounds, none)
        if heads.numel() == bounds.numel():
            heads = None
    maxima = _blocked_max_logits(
        query, key, scale, mask, bias, causal, heads=heads, threshold=threshold
    )
    if heads is None:
        largest, unbiased = (none.where(bounds <= computed_above, x) for x in maxima)
    else:
        largest, unbiased = (none.index_copy(0, heads, x) for x in maxima)
    return ScreenedMaxLogits(largest, bounds, unbiased)


# ---------------------------------------------------------------------- blocks of logits


def _blocked_max_logits(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    mask: Mask | None,
    bias: Tensor | None,
    causal: bool,
    *,
    block_size: int = 64,
    heads: Tensor | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest logits and, given a threshold, the largest unbiased logits.

    Without a threshold, or without a floating mask or bias, both are the largest logits.

    Args:
        heads: indices of the heads to compute; None: all.
    """
    dtype, device = torch.promote_types(query.dtype, torch.float32), query.device
    if query.numel() == 0 or key.numel() == 0:
        num_heads = query.size(-3) if heads is None else len(heads)
        none = torch.full((num_heads,), -math.inf, dtype=dtype, device=device)
        return none, none
    lead, (queries, dim), keys = query.shape[:-3], query.shape[-2:], key.size(-2)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    query, key = query.reshape(-1, *query.shape[-3:]), key.reshape(-1, *key.shape[-3:])
    if heads is not None:  # one key group per head
        query, key = query[:, heads], key[:, heads // (query.size(1) // key.size(1))]
    key = key.to(dtype).contiguous()
    batch, groups, per_group = *key.shape[:2], query.size(1) // key.size(1)
    read_mask = _mask_reader(mask, bias, lead, queries, keys, heads, dtype)

    largest = torch.full((batch, groups, per_group), -math.inf, dtype=dtype, device=device)
    floating = bias is not None or (isinstance(mask, Tensor) and mask.is_floating_point())
    unbiased = largest.clone() if floating and threshold is not None else largest
    logits_buffer, weighted_buffer = Buffer(dtype, device), Buffer(dtype, device)
    for start in range(0, queries, block_size):
        stop = min(start + block_size, queries)
        block = _make_block(
            read_mask(start, stop), start, stop, keys, groups, causal, threshold, like=largest
        )
        if block is None:
            continue
        width = block.last_key - block.first_key
        shape = (per_group, stop - start, width)
        for b, g in _chunks(batch, groups, math.prod(shape), device):
            q = query[b, g.start * per_group : g.stop * per_group, start:stop]
            q = (q.to(dtype) * scale).reshape(-1, per_group * (stop - start), dim)
            k = key[b, g, block.first_key : block.last_key].flatten(0, 1).mT
            logits = logits_buffer.view(*q.shape[:2], width)
            with full_float32_products(device):
                torch.bmm(q, k, out=logits)
            logits = logits.view(b.stop - b.start, -1, *shape)
            weighted = logits  # the same tensor: masked below
            if block.weights is not None:
                weighted = weighted_buffer.view(*logits.shape)
                torch.mul(logits, _select(block.weights, b, g), out=weighted)
                if block.excluded is not None:  # the products may be NaN
                    weighted.masked_fill_(_select(block.excluded, b, g), -math.inf)
            if block.mask is not None:
                addend = _select(block.mask, b, g)
                if addend.dtype != torch.bool:
                    logits.add_(addend)
                    addend = addend != -math.inf
                logits.masked_fill_(~addend, -math.inf)
            _update_maxima(largest[b, g], logits, block)
            if unbiased is not largest:
                _update_maxima(unbiased[b, g], weighted, block)
    maxima = largest.flatten(1).amax(0)
    return maxima, maxima if unbiased is largest else unbiased.flatten(1).amax(0)


class _Block(NamedTuple):
    """A block of queries and the range of keys that they attend to.

    ``mask`` is [batch or 1, groups or 1, heads per group or 1, queries or 1, keys]; ``weights`` and
    ``excluded`` are its ``_bias_weights``. ``limit``, [queries, keys from ``edge`` on], is -inf
    where causality removes a logit, else inf; None if the block has no such logit.
    """

    first_key: int
    last_key: int
    mask: Tensor | None
    weights: Tensor | None
    excluded: Tensor | None
    limit: Tensor | None
    edge: int


def _make_block(
    mask: Tensor | None,
    start: int,
    stop: int,
    keys: int,
    groups: int,
    causal: bool,
    threshold: float | None,
    like: Tensor,
) -> _Block | None:
    """The block of queries from ``start`` to ``stop``; None if it attends to no key.

    ``like`` has the dtype and device of the logits.
    """
    first, last = 0, min(stop, keys) if causal else keys
    if mask is not None and mask.device.type == "cpu":  # on a GPU, reading the mask would wait
        mask = _as_boolean(mask)
        first, last = _key_range(mask[..., :last])
    if first == last:
        return None
    weights = excluded = limit = None
    if mask is not None:
        mask = mask[..., first:last]
        mask = mask.view(mask.size(0), groups if mask.size(1) > 1 else 1, -1, *mask.shape[2:])
        if threshold is not None and mask.dtype != torch.bool:
            weights, excluded = _bias_weights(mask, threshold)
    # A causal mask applies only to keys from the first query of the block on.
    edge = max(first, start) if causal else last
    if edge < last:
        columns = torch.arange(edge, last, device=like.device)
        is_later = columns > torch.arange(start, stop, device=like.device)[:, None]
        limit = torch.where(is_later, -math.inf, math.inf).to(like.dtype)
    return _Block(first, last, mask, weights, excluded, limit, edge - first)


class Buffer:
    """Memory that is reused, because allocating is expensive on a CPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def view(self, *shape: int) -> Tensor:
        """An uninitialized tensor, valid until the next call."""
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)


def _select(mask: Tensor, batch: slice, groups: slice) -> Tensor:
    """A chunk of batch items and groups of a mask that broadcasts over both."""
    mask = mask[batch] if mask.size(0) > 1 else mask
    return mask[:, groups] if mask.size(1) > 1 else mask


def _update_maxima(maxima: Tensor, logits: Tensor, block: _Block) -> None:
    """Take the maximum of ``maxima`` and the last two dimensions of ``logits``, in place.

    Changes ``logits``.
    """
    if block.limit is not None:
        at_edge = logits[..., block.edge :]
        torch.minimum(at_edge, block.limit, out=at_edge)
    torch.maximum(maxima, logits.flatten(-2).amax(-1), out=maxima)


def _chunks(
    batch: int, groups: int, logits_per_group: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Split batch and groups into chunks with a bounded number of logits."""
    at_a_time = _LOGITS_AT_A_TIME.get(device.type, _LOGITS_AT_A_TIME_ELSEWHERE)
    pairs = max(1, at_a_time // logits_per_group)
    group_step = min(pairs, groups)
    batch_step = max(1, pairs // groups)
    for b in range(0, batch, batch_step):
        for g in range(0, groups, group_step):
            yield slice(b, min(b + batch_step, batch)), slice(g, min(g + group_step, groups))


# ---------------------------------------------------------------------- masks and biases


def _mask_reader(
    mask: Mask | None,
    bias: Tensor | None,
    lead: torch.Size,
    queries: int,
    keys: int,
    heads: Tensor | None,
    dtype: torch.dtype,
) -> Callable[[int, int], Tensor | None]:
    """A function from the first and last query of a block to its rows of mask + bias.

    The rows are [batch or 1, heads or 1, queries or 1, keys], boolean, or of ``dtype`` with -inf
    for masked entries. ``heads`` selects heads.
    """
    readers = [_row_reader(x, lead, queries, keys) for x in (mask, bias) if x is not None]

    def read(start: int, stop: int) -> Tensor | None:
        total: Tensor | None = None
        for read_rows in readers:
            rows = read_rows(start, stop)
            if heads is not None and rows.size(1) > 1:
                rows = rows[:, heads]
            if rows.dtype != torch.bool:
                rows = _additive(rows, dtype)
            if total is None:
                total = rows
            elif total.dtype == torch.bool:
                total = torch.where(total, rows, -math.inf)
            else:
                total = total + rows
        return total

    return read


def _row_reader(
    mask: Mask, lead: torch.Size, queries: int, keys: int
) -> Callable[[int, int], Tensor]:
    """A function from the first and last query of a block to its rows of a mask or bias."""
    if not isinstance(mask, Tensor):
        return lambda start, stop: _block_mask_rows(mask, start, stop, keys)
    ndim = max(4, len(lead) + 3)
    full = mask.view(*[1] * (ndim - mask.ndim), *mask.shape)
    if full.ndim > 4:
        full = full.expand(*lead, *full.shape[-3:]).flatten(0, -4)
    full = full.expand(*full.shape[:-1], keys)
    return lambda start, stop: full[..., start:stop, :] if full.size(-2) > 1 else full


def _block_mask_rows(mask: BlockMask, start: int, stop: int, keys: int) -> Tensor:
    """Rows of a flex_attention mask, boolean [batch or 1, heads or 1, queries, keys]."""
    device = mask.kv_num_blocks.device
    batch, heads = mask.kv_num_blocks.shape[:2]
    queries = torch.arange(start, stop, device=device)
    columns = torch.arange(keys, device=device)
    allowed = mask.mask_mod
    # flex_attention calls the function on scalars.
    for in_dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        allowed = torch.vmap(allowed, in_dims=in_dims, out_dims=0)
    allowed = torch.vmap(allowed, in_dims=(0, None, None, None))
    element = allowed(
        torch.arange(batch, device=device), torch.arange(heads, device=device), queries, columns
    )
    # The kernel evaluates the function in partial blocks only. Full blocks are attended to as a
    # whole, and blocks that are not listed not at all.
    block_rows, block_columns = mask.BLOCK_SIZE
    rows, blocks = queries // block_rows, columns // block_columns
    partial = _listed_blocks(mask.kv_num_blocks, mask.kv_indices)[:, :, rows][..., blocks]
    attended: Tensor = element & partial
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _listed_blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
        attended = attended | full[:, :, rows][..., blocks]
    return attended


def _listed_blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """Whether each row of blocks lists each block of keys, boolean [..., rows, blocks].

    Args:
        counts: [..., rows], number of valid indices of each row.
        indices: [..., rows, blocks].
    """
    blocks = indices.size(-1)
    is_valid = torch.arange(blocks, device=indices.device) < counts[..., None]
    # Invalid indices go to an extra column, which is removed.
    targets = indices.where(is_valid, blocks).long()
    listed = is_valid.new_zeros(*indices.shape[:-1], blocks + 1)
    return listed.scatter(-1, targets, True)[..., :blocks]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating mask or bias in another dtype, with -inf for masked entries.

    Masks use the minimum of their dtype. Half of it allows for a bias added to it, and for masks
    made in bfloat16, whose minimum differs from float32's.
    """
    is_masked = mask <= torch.finfo(mask.dtype).min / 2
    return mask.to(dtype).masked_fill(is_masked, -math.inf)


def _largest_per_head(bias: Tensor) -> Tensor:
    """The largest value for each head, [heads or 1], of a bias that broadcasts to the logits."""
    full = bias.view(*[1] * (3 - bias.ndim), *bias.shape)
    return full.amax((-2, -1)).flatten(0, -2).amax(0) if full.ndim > 3 else full.amax((-2, -1))


def _as_boolean(mask: Tensor) -> Tensor:
    """A floating mask that contains only 0 and -inf as a boolean mask; any other mask itself."""
    if mask.dtype == torch.bool:
        return mask
    is_zero = mask == 0
    return is_zero if (is_zero | (mask == -math.inf)).all() else mask


def _key_range(mask: Tensor) -> tuple[int, int]:
    """The range of keys that any query attends to."""
    attended = mask if mask.dtype == torch.bool else mask != -math.inf
    columns = attended.flatten(0, -2).any(0).nonzero()
    return (int(columns[0]), int(columns[-1]) + 1) if columns.numel() else (0, 0)


def _bias_weights(bias: Tensor, threshold: float) -> tuple[Tensor, Tensor | None]:
    """1 / (1 - b/τ) for each bias b < τ, and which entries are masked or have b >= τ.

    Scaling q·k by τ over its largest product with these weights brings all q·k + b with b < τ to τ
    or below. No factor on q·k can do that for b >= τ. On a CPU the second result is None if there
    are no such entries.
    """
    excluded = ~((bias < threshold) & (bias > -math.inf))
    # A bias just below the threshold must not cause a division by 0.
    share_left = ((threshold - bias) / threshold).clamp_(min=torch.finfo(bias.dtype).eps)
    if bias.device.type == "cpu" and not excluded.any():
        return share_left.reciprocal_(), None
    return share_left.reciprocal_(), excluded


def _check_shapes(query: Tensor, key: Tensor, mask: Mask | None, bias: Tensor | None) -> int:
    """Check the arguments and return the number of key groups."""
    if query.is_nested or key.is_nested:
        raise ValueError(
            "query and key must not be nested tensors: pass query.to_padded_tensor(0.0) and "
            "key.to_padded_tensor(0.0), as logits of 0 do not count"
        )
    if query.ndim < 3 or key.ndim != query.ndim:
        raise ValueError(
            "query and key must have the same number of dimensions, [..., heads, length, d], "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    heads, groups = query.size(-3), key.size(-3)
    if query.size(-1) != key.size(-1) or query.shape[:-3] != key.shape[:-3]:
        raise ValueError(
            "query and key must agree in d and in the leading dimensions, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if heads != groups and (groups == 0 or heads % groups):
        raise ValueError(f"{heads} query heads cannot be shared by {groups} key groups")
    logits = (*query.shape[:-1], key.size(-2))
    if isinstance(mask, Tensor):
        _check_broadcasts("mask", mask, logits)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"mask must be boolean or floating, got {mask.dtype}")
    if bias is not None:
        _check_broadcasts("bias", bias, logits)
        if not bias.is_floating_point():
            raise ValueError(f"bias must be floating, got {bias.dtype}")
    return groups


def _check_broadcasts(name: str, mask: Tensor, logits: tuple[int, ...]) -> None:
    sizes = zip(reversed(mask.shape), reversed(logits), strict=False)
    if not 0 < mask.ndim <= len(logits) or any(n not in (1, size) for n, size in sizes):
        raise ValueError(f"{name} {tuple(mask.shape)} must broadcast to the logits, {logits}")
