"""The mask that each of transformers' attention functions makes of its arguments."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonclip.max_logits import Mask


class LogitInputs(NamedTuple):
    """Everything that determines the logits: the arguments of ``QKClip.observe_attention``."""

    query: Tensor
    key: Tensor
    scale: float | None
    mask: Mask | None
    bias: Tensor | None
    causal: bool


@torch.no_grad()
def logit_inputs(
    module: nn.Module,
    implementation: str | None,
    query: Tensor,
    key: Tensor,
    mask: Any,
    options: dict[str, Any],
) -> LogitInputs:
    """Translate the arguments of the attention function that is registered as ``implementation``.

    Raises:
        ValueError: for an unknown implementation, or arguments whose meaning is not known.
    """
    scale = options.get("scaling")
    if isinstance(scale, Tensor):  # a learned temperature, for all heads or for each
        if scale.ndim > 0 and scale.size(-1) != 1:
            raise ValueError("a scale that depends on the key is not supported")
        query, scale = query.to(torch.promote_types(query.dtype, torch.float32)) * scale, 1.0
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    bias = options.get("position_bias")
    if implementation is not None and "flash" in implementation:
        query, key, mask = _flash_mask(query, key, mask, causal, options)
        causal, bias = False, None  # flash attention kernels take no bias
    elif implementation in ("eager", "flex_attention", None):
        causal = False  # already in the mask
    elif implementation == "sdpa":
        causal = mask is None and query.size(-2) > 1 and bool(causal)
    else:
        raise ValueError(
            f"attn_implementation {implementation!r} is not known, so neither is the meaning of "
            "its mask: use eager, sdpa, flex_attention or flash_attention_2, or call "
            "QKClip.observe_attention yourself"
        )
    mask, bias = (x[..., : key.size(-2)] if isinstance(x, Tensor) else x for x in (mask, bias))
    if len(query) == 1:  # learned queries, shared by the whole batch
        query = query.expand(len(key), *query.shape[1:])
    return LogitInputs(query, key, scale, mask, bias, causal)


def _flash_mask(
    query: Tensor, key: Tensor, padding: Tensor | None, causal: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and the boolean mask that is equivalent to flash attention's arguments."""
    if options.get("indices") is not None or options.get("block_table") is not None:
        raise ValueError("flash attention with indices or a block_table is not supported")
    window = options.get("sliding_window")
    if window is not None and key.size(-2) <= window:
        window = None  # transformers does not pass it on
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    packed: list[Any] = [options.get(name) for name in names]
    positions = options.get("position_ids")
    if padding is not None:
        key = key[..., : padding.size(-1), :]  # a static cache has slots that are not used yet
        query_rows, key_rows = _padded(padding.bool(), query.size(-2))
    elif all(x is not None for x in packed):
        # All sequences of the batch, concatenated.
        query, key = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (query, key))
        query_rows, key_rows = _packed(query, packed[0]), _packed(key, packed[1])
    elif (
        len(query) == 1
        and positions is not None
        and positions.size(-1) == query.size(-2) == key.size(-2)
    ):
        # A sequence begins wherever the first position occurs.
        flat = positions.reshape(-1, query.size(-2))[0]
        starts = (flat == flat.min()).nonzero().flatten()
        query_rows = key_rows = _packed(query, F.pad(starts, (0, 1), value=len(flat)))
    else:
        query_rows, key_rows = (
            _packed(x, torch.tensor([0, x.size(-2)], device=x.device)) for x in (query, key)
        )
    mask = query_rows.present[:, :, None] & key_rows.present[:, None]
    mask = mask & (query_rows.sequence[:, :, None] == key_rows.sequence[:, None])
    # The last query of a sequence is aligned with its last key.
    distance = key_rows.from_end[:, None] - query_rows.from_end[:, :, None]
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        mask = mask & (distance.abs() < window)
    return query, key, mask[:, None]


class _SequenceRows(NamedTuple):
    """Rows of queries or keys as flash attention sees them; [batch or 1, rows].

    Attributes:
        present: whether a row is passed to the kernel.
        sequence: index of the row's sequence.
        from_end: number of present rows of that sequence after this row.
    """

    present: Tensor
    sequence: Tensor
    from_end: Tensor


def _padded(present: Tensor, queries: int) -> tuple[_SequenceRows, _SequenceRows]:
    """Rows of queries and keys under a padding mask [batch, keys]; the queries come last."""
    # A single query after earlier keys counts as a token whatever the mask says.
    tokens = torch.ones_like(present[:, -1:]) if queries == 1 else present[:, -queries:]
    if queries == present.size(-1):
        tokens = present
    query_rows, key_rows = (
        _SequenceRows(x, torch.zeros_like(x, dtype=torch.int64), x.sum(-1, True) - x.cumsum(-1))
        for x in (tokens, present)
    )
    return query_rows, key_rows


def _packed(x: Tensor, boundaries: Tensor) -> _SequenceRows:
    """Rows of x, [1, heads, rows, d], as sequences between boundaries."""
    rows = torch.arange(x.size(-2), device=x.device)
    sequence = torch.bucketize(rows, boundaries[1:], right=True)
    inside = (rows >= boundaries[0]) & (rows < boundaries[-1])
    ends = boundaries[1:][sequence.clamp(max=len(boundaries) - 2)]
    return _SequenceRows(inside[None], sequence[None], (ends - 1 - rows)[None])
