"""The largest attention logit of each head on a GPU, computed without storing the logits."""

import math

import torch
from torch import Tensor

from muonclip.kernels.support import has_triton

# A row of q or k must fit a tile of at least 16: 1024 elements of 16 bits, 512 of float32.
_MAX_ROW_BYTES = 2048


def supports(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether ``max_logits_triton`` accepts these: CUDA, no mask, at most 32 bits, d small enough.

    Args:
        query: [..., heads, queries, d].
        key: [..., groups, keys, d].
        mask: as in ``muonclip.max_logits``.
    """
    return (
        mask is None
        and query.device.type == key.device.type == "cuda"
        and query.dtype == key.dtype
        and query.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and query.size(-1) * query.element_size() <= _MAX_ROW_BYTES
        and query.numel() > 0
        and has_triton()
    )


@torch.no_grad()
def max_logits_triton(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    causal: bool,
    bound: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """The largest input of each head's softmax, for inputs that ``supports`` accepts.

    With ``bound``, only heads whose bound exceeds the threshold are computed. The device compares
    them: the host does not wait, and queries and keys of other heads are not read. A single
    operator under ``torch.compile``; works in CUDA graphs.

    Products are summed in float32; float32 factors are not rounded to TF32.

    Args:
        query: [..., heads, queries, d]; any strides.
        key: [..., groups, keys, d]; groups divides heads (GQA).
        scale: factor on the products.
        causal: query i attends to keys up to i.
        bound: [heads], upper bounds on the result, as returned by ``max_logits_bound``.
        threshold: heads whose bound is not above it are skipped.

    Returns:
        float32 [heads], without gradient; -inf for a head that was skipped or has no logits, NaN if
        a logit is NaN.

    Raises:
        ValueError: if shapes disagree, or only one of ``bound`` and ``threshold`` is given.
        ImportError: if Triton is not installed.
    """
    heads, groups = query.size(-3), key.size(-3)
    if (
        query.ndim != key.ndim
        or query.shape[:-3] != key.shape[:-3]
        or query.size(-1) != key.size(-1)
        or groups == 0
        or heads % groups
    ):
        raise ValueError(
            "query must be [..., heads, queries, d] and key [..., groups, keys, d] with groups "
            f"dividing heads, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if (bound is None) != (threshold is None):
        raise ValueError("bound and threshold together select the heads to skip: give both")
    if bound is not None and bound.shape != (heads,):
        raise ValueError(f"bound must be [heads] = [{heads}], got {tuple(bound.shape)}")
    largest: Tensor = _operator(query, key, scale, causal, bound, threshold)
    return largest


@torch.library.custom_op(
    "muonclip::max_logits",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor key, float scale, bool causal, Tensor? bound, float? threshold)"
        " -> Tensor"
    ),
)
def _operator(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    bound: Tensor | None,
    threshold: float | None,
) -> Tensor:
    if query.numel() == 0 or key.numel() == 0:  # an empty grid cannot be launched
        return query.new_full((query.size(-3),), -math.inf, dtype=torch.float32)
    try:
        from muonclip.kernels import max_logits_triton as implementation
    except ImportError as error:
        raise ImportError("max_logits_triton needs Triton: pip install triton") from error
    return implementation.max_logits(query, key, scale, causal, bound, threshold)


@_operator.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    bound: Tensor | None,
    threshold: float | None,
) -> Tensor:
    return query.new_empty(query.size(-3), dtype=torch.float32)
