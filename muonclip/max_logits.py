"""The largest attention logit of each head: exactly, and a bound that costs next to nothing."""

import math

import torch
from torch import Tensor


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    block_size: int = 1024,
) -> Tensor:
    """The largest input of each head's softmax, exactly and in blocks of queries.

    Arguments are as in ``torch.nn.functional.scaled_dot_product_attention``, after any rotary
    embedding. Products are computed in at least float32. Takes memory for
    batch x heads x block_size x keys logits.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads (GQA).
        scale: factor on the products; default: 1/√d.
        mask: broadcastable to [..., heads, queries, keys]: boolean, true where a query attends, or
            floating, added to the logits.
        causal: a query attends to keys up to its own index.
        block_size: queries per block.

    Returns:
        float32 (or float64 for float64 input), [heads], without gradient; -inf for a head that
        attends to nothing.

    Raises:
        ValueError: if the shapes disagree or ``block_size`` is below 1.
    """
    groups = _check_shapes(query, key)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    heads, queries, dim = query.shape[-3:]
    keys = key.size(-2)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype).unsqueeze(-3)  # [..., groups, 1, keys, d]
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], queries, keys)
    columns = torch.arange(keys, device=query.device)

    largest = torch.full((heads,), -math.inf, dtype=dtype, device=query.device)
    for start in range(0, queries, block_size):
        rows = slice(start, min(start + block_size, queries))
        block = query[..., rows, :].to(dtype)
        block = block.reshape(*query.shape[:-3], groups, -1, *block.shape[-2:])
        logits = (block @ key.mT).flatten(-4, -3) * scale  # [..., heads, block, keys]
        if mask is not None:
            part = mask[..., rows, :]
            if part.dtype == torch.bool:
                logits = logits.masked_fill(~part, -math.inf)
            else:
                logits = logits + part
        if causal:
            later = columns > torch.arange(rows.start, rows.stop, device=query.device)[:, None]
            logits = logits.masked_fill(later, -math.inf)
        if logits.numel():
            largest = torch.maximum(largest, logits.amax((-2, -1)).reshape(-1, heads).amax(0))
    return largest


@torch.no_grad()
def max_logits_bound(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """An upper bound on ``max_logits``: the largest ‖q‖ times the largest ‖k‖ times the scale.

    Under the threshold it proves that a head needs no clipping, whatever attention kernel ran,
    without computing a logit. It holds for any mask that only removes logits. Cauchy-Schwarz, per
    sequence of the batch.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d]; groups divides heads.
        scale: factor on the products; default: 1/√d.

    Returns:
        float32 (or float64 for float64 input), [heads], without gradient.

    Raises:
        ValueError: if the shapes disagree.
    """
    groups = _check_shapes(query, key)
    heads = query.size(-3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_norm = torch.linalg.vector_norm(query, dim=-1, dtype=dtype).amax(-1)
    key_norm = torch.linalg.vector_norm(key, dim=-1, dtype=dtype).amax(-1)
    bound = query_norm * key_norm.repeat_interleave(heads // groups, -1) * abs(scale)
    largest: Tensor = bound.reshape(-1, heads).amax(0)
    return largest


def _check_shapes(query: Tensor, key: Tensor) -> int:
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
    return groups
