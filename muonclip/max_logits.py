"""The largest attention logit of each head, and an upper bound that is nearly free."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from muonclip.kernels.max_logits import max_logits_triton, supports
from muonclip.kernels.support import full_float32_products

Mask: TypeAlias = Tensor | BlockMask

# Logits computed at a time: on a CPU what stays in a core's cache, elsewhere a quarter gigabyte.
_LOGITS_AT_A_TIME = {"cpu": 2**18}
_LOGITS_AT_A_TIME_ELSEWHERE = 2**26


class ScreenedMaxLogits(NamedTuple):
    """Result of ``screened_max_logits``; float32 (float64 for float64 input), [heads].

    Attributes:
        max_logits: the largest logits; -inf for heads that were not computed.
        bounds: upper bounds on the logits.
        unbiased_max_logits: the largest logits without their additive bias, weighted by what the
            bias leaves of the threshold: the maximum over entries of (S - b) / (1 - b/τ), where S
            is the logit, b < τ its bias and τ the threshold. A head's q·k must be multiplied by
            τ over this maximum for all these entries to be at most τ. Equal to ``max_logits``
            where there is no bias; -inf for heads that were not computed.
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
    """The largest input of each head's softmax, computed exactly and in blocks of queries.

    Arguments are as in ``torch.nn.functional.scaled_dot_product_attention``, after any rotary
    embedding and before any soft cap. Products are computed in at least float32, whatever torch
    allows for matrix products (autocast, TF32). A CPU skips keys that no query of a block attends
    to (causal, sliding window, padding). A GPU without a mask runs a Triton kernel that does not
    store the logits.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads (GQA).
        scale: factor on the products; default: 1/√d.
        mask: broadcastable to [..., heads, queries, keys]: boolean, true where a query attends, or
            floating, added to the logits, where -inf and anything below half the dtype's least
            number mask. Or flex_attention's ``BlockMask``.
        bias: floating, broadcastable to the logits and added to them, such as a position bias or
            ALiBi; the same as a floating mask, for use together with any mask.
        causal: a query attends to keys up to its own index.
        block_size: queries per block.

    Returns:
        float32 (or float64 for float64 input), [heads], without gradient; -inf for a head that
        attends to nothing, such as in an empty batch or sequence.

    Raises:
        ValueError: if the shapes disagree or ``block_size`` is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    _check_shapes(query, key, mask, bias)
    if bias is None and isinstance(mask, Tensor | None) and supports(query, key, mask):
        scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        return max_logits_triton(query, key, scale=scale, causal=causal)
    return _max_logits(query, key, scale, mask, bias, causal, block_size=block_size)[0]


@torch.no_grad()
def max_logits_bound(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """An upper bound on ``max_logits``: the largest ‖q‖ times the largest ‖k‖ times the scale.

    By the Cauchy-Schwarz inequality, for each sequence of the batch. A bound at or below the
    threshold proves that a head needs no clipping without computing a logit, whatever attention
    kernel ran. The largest value of a floating mask and of a bias is added; masks that only remove
    logits are not read.

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
    for added in (mask, bias):
        if isinstance(added, Tensor) and added.is_floating_point():
            largest = largest + _added(_largest_of_heads(added), dtype)
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
    """``max_logits`` of only those heads whose ``max_logits_bound`` is above the threshold.

    On a GPU without ``mask`` and ``bias`` a Triton kernel compares bounds and threshold on the
    device. Otherwise the host reads which heads are over the threshold: it waits for the GPU, which
    costs far less than computing the logits of all heads. During CUDA graph capture, where nothing
    can be read, the logits of all heads are computed.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads.
        threshold: τ.
        scale: factor on the products; default: 1/√d.
        mask: as in ``max_logits``.
        bias: as in ``max_logits``.
        causal: a query attends to keys up to its own index.
        exact: compute the logits of every head, whatever its bound.

    Raises:
        ValueError: if the shapes disagree.
    """
    bounds = max_logits_bound(query, key, scale=scale, mask=mask, bias=bias)
    settled_at = -math.inf if exact else threshold
    if bias is None and isinstance(mask, Tensor | None) and supports(query, key, mask):
        scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        largest = max_logits_triton(
            query, key, scale=scale, causal=causal, bound=bounds, threshold=settled_at
        )
        return ScreenedMaxLogits(largest, bounds, largest)
    none = torch.full_like(bounds, -math.inf)
    heads = None
    if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        heads = (~(bounds <= settled_at)).nonzero().flatten()  # a bound that is NaN settles nothing
        if heads.numel() == 0:
            return ScreenedMaxLogits(none, bounds, none)
    some = heads if heads is not None and heads.numel() < bounds.numel() else None
    maxima = _max_logits(query, key, scale, mask, bias, causal, heads=some, threshold=threshold)
    if some is None:
        largest, unbiased = (none.where(bounds <= settled_at, x) for x in maxima)
    else:
        largest, unbiased = (none.index_copy(0, some, x) for x in maxima)
    return ScreenedMaxLogits(largest, bounds, unbiased)


def _max_logits(
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
    """Largest logits and, given a threshold, largest unbiased ones; of all heads or those listed.

    Without a threshold, or without anything floating added, both are the largest logits.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    device = query.device
    count = query.size(-3) if heads is None else len(heads)
    if query.numel() == 0 or key.numel() == 0:
        none = torch.full((count,), -math.inf, dtype=dtype, device=device)
        return none, none
    lead, (queries, dim), keys = query.shape[:-3], query.shape[-2:], key.size(-2)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    query, key = query.reshape(-1, *query.shape[-3:]), key.reshape(-1, *key.shape[-3:])
    if heads is not None:  # one key group for each of them
        query, key = query[:, heads], key[:, heads // (query.size(1) // key.size(1))]
    key = key.to(dtype).contiguous()
    batch, groups, per_group = *key.shape[:2], query.size(1) // key.size(1)
    read_mask = _mask_reader(mask, bias, lead, queries, keys, heads, dtype)

    largest = torch.full((batch, groups, per_group), -math.inf, dtype=dtype, device=device)
    floating = bias is not None or (isinstance(mask, Tensor) and mask.is_floating_point())
    unbiased = largest.clone() if floating and threshold is not None else largest
    buffer = torch.empty(0, dtype=dtype, device=device)  # reused: fresh memory costs a CPU dearly
    weighted_buffer = buffer
    for start in range(0, queries, block_size):
        stop = min(start + block_size, queries)
        first, last = 0, min(stop, keys) if causal else keys
        part = read_mask(start, stop)
        if part is not None and device.type == "cpu":  # elsewhere reading it would wait
            part = _as_boolean(part)
            first, last = _span(part[..., :last])
        if first == last:
            continue
        if part is not None:
            # [batch or 1, groups or 1, heads of a group or 1, queries or 1, keys].
            part = part[..., first:last]
            part = part.view(part.size(0), groups if part.size(1) > 1 else 1, -1, *part.shape[2:])
        weights = excluded = None
        if threshold is not None and part is not None and part.dtype != torch.bool:
            weights, excluded = _weights(part, threshold)
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
            with full_float32_products(device):
                torch.bmm(block, keys_of_block, out=logits)
            logits = logits.view(b.stop - b.start, -1, *shape)
            weighted = logits  # the same tensor: masked below
            if weights is not None:
                if weighted_buffer.numel() < size:
                    weighted_buffer = torch.empty(size, dtype=dtype, device=device)
                weighted = weighted_buffer[:size].view(logits.shape)
                torch.mul(logits, _piece(weights, b, g), out=weighted)
                if excluded is not None:  # may be anything, NaN included
                    weighted.masked_fill_(_piece(excluded, b, g), -math.inf)
            if part is not None:
                _apply_mask(logits, _piece(part, b, g))
            _raise_to_largest(largest[b, g], logits, cap, edge - first)
            if unbiased is not largest:
                _raise_to_largest(unbiased[b, g], weighted, cap, edge - first)
    maxima = largest.flatten(1).amax(0)
    return maxima, maxima if unbiased is largest else unbiased.flatten(1).amax(0)


def _piece(part: Tensor, batch: slice, groups: slice) -> Tensor:
    """Some batch items and groups of a tensor that broadcasts over both."""
    part = part[batch] if part.size(0) > 1 else part
    return part[:, groups] if part.size(1) > 1 else part


def _raise_to_largest(maxima: Tensor, logits: Tensor, cap: Tensor | None, edge: int) -> None:
    """Take the last two dimensions' largest into ``maxima``; ``cap`` limits columns from ``edge``.

    Changes ``logits``.
    """
    if cap is not None:
        at_edge = logits[..., edge:]
        torch.minimum(at_edge, cap, out=at_edge)
    torch.maximum(maxima, logits.flatten(-2).amax(-1), out=maxima)


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
    """A function of the first and last query that gives their part of mask and bias.

    The part is [batch or 1, heads or 1, queries or 1, keys], boolean, or of ``dtype`` with -inf
    where masked; ``heads`` chooses among its heads.
    """
    sources = [_rows_of(x, lead, queries, keys) for x in (mask, bias) if x is not None]

    def read(start: int, stop: int) -> Tensor | None:
        joined: Tensor | None = None
        for rows in sources:
            part = rows(start, stop)
            if heads is not None and part.size(1) > 1:
                part = part[:, heads]
            if part.dtype != torch.bool:
                part = _added(part, dtype)
            if joined is None:
                joined = part
            elif joined.dtype == torch.bool:
                joined = torch.where(joined, part, -math.inf)
            else:
                joined = joined + part
        return joined

    return read


def _rows_of(mask: Mask, lead: torch.Size, queries: int, keys: int) -> Callable[[int, int], Tensor]:
    """A function of the first and last query that gives their rows of a mask or bias."""
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
    # As flex_attention calls it: on scalars.
    for in_dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        allowed = torch.vmap(allowed, in_dims=in_dims, out_dims=0)
    allowed = torch.vmap(allowed, in_dims=(0, None, None, None))
    element = allowed(
        torch.arange(batch, device=device), torch.arange(heads, device=device), queries, columns
    )
    # The kernel asks the function in partial blocks only: it attends to all of a full block, and to
    # nothing of a block that is not listed.
    block_rows, block_columns = mask.BLOCK_SIZE
    rows, blocks = queries // block_rows, columns // block_columns
    partly = _listed(mask.kv_num_blocks, mask.kv_indices)[:, :, rows][..., blocks]
    attended: Tensor = element & partly
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        fully = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        attended = attended | fully[:, :, rows][..., blocks]
    return attended


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Which blocks of keys each row of blocks lists, boolean [..., rows, blocks].

    Args:
        counts: [..., rows], how many of a row's indices count.
        indices: [..., rows, blocks].
    """
    blocks = indices.size(-1)
    counted = torch.arange(blocks, device=indices.device) < counts[..., None]
    # Other indices go to a column that is dropped.
    targets = indices.where(counted, blocks).long()
    listed = counted.new_zeros(*indices.shape[:-1], blocks + 1)
    return listed.scatter(-1, targets, True)[..., :blocks]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating mask or bias in another dtype, with -inf where it masks.

    Masks use the least number of their dtype. Half of that leaves room for a bias added to it, and
    for masks made in bfloat16, whose least number is not float32's.
    """
    masked = mask <= torch.finfo(mask.dtype).min / 2
    return mask.to(dtype).masked_fill(masked, -math.inf)


def _largest_of_heads(added: Tensor) -> Tensor:
    """The largest value for each head, [heads or 1], of what broadcasts to [..., heads, q, k]."""
    full = added.view(*[1] * (3 - added.ndim), *added.shape)
    return full.amax((-2, -1)).flatten(0, -2).amax(0) if full.ndim > 3 else full.amax((-2, -1))


def _as_boolean(part: Tensor) -> Tensor:
    """A floating mask of nothing but 0 and -inf as a boolean one, anything else as it is."""
    if part.dtype == torch.bool:
        return part
    zero = part == 0
    return zero if (zero | (part == -math.inf)).all() else part


def _span(part: Tensor) -> tuple[int, int]:
    """The range of keys that any query of a mask's part attends to."""
    attended = part if part.dtype == torch.bool else part != -math.inf
    columns = attended.flatten(0, -2).any(0).nonzero()
    return (int(columns[0]), int(columns[-1]) + 1) if columns.numel() else (0, 0)


def _apply_mask(logits: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -math.inf)
    else:
        logits.add_(mask).masked_fill_(mask == -math.inf, -math.inf)


def _weights(bias: Tensor, threshold: float) -> tuple[Tensor, Tensor | None]:
    """1 / (1 - b/τ) of every bias b < τ, and which entries are masked or have another bias.

    Scaling q·k by τ over its largest product with these weights brings all q·k + b with b < τ to τ
    or below. No factor on q·k could do that where b is at least τ. On a CPU the second is None if
    it is empty.
    """
    excluded = ~((bias < threshold) & (bias > -math.inf))
    # A bias just under the threshold must not divide by 0.
    left = ((threshold - bias) / threshold).clamp_(min=torch.finfo(bias.dtype).eps)
    if bias.device.type == "cpu" and not excluded.any():
        return left.reciprocal_(), None
    return left.reciprocal_(), excluded


def _check_shapes(query: Tensor, key: Tensor, mask: Mask | None, bias: Tensor | None) -> int:
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
    fits = mask.ndim <= len(logits) and all(
        n in (1, wanted) for n, wanted in zip(reversed(mask.shape), reversed(logits), strict=False)
    )
    if mask.ndim == 0 or not fits:
        raise ValueError(f"{name} {tuple(mask.shape)} must broadcast to the logits, {logits}")
