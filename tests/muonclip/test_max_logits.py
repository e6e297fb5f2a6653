"""Max logits against the full product, and the bound above them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muonclip import max_logits, max_logits_bound


def reference(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    heads = query.shape[-3]
    key = key.repeat_interleave(heads // key.shape[-3], -3)
    logits = torch.einsum("...hqd,...hkd->...hqk", query.double(), key.double()) * scale
    if allowed is not None:
        logits = logits.where(allowed, -math.inf)
    return logits.reshape(-1, *logits.shape[-3:]).amax((0, 2, 3))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries_per_group=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    block=st.integers(1, 10),
    causal=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_exact_and_bounded(
    batch: int,
    groups: int,
    queries_per_group: int,
    queries: int,
    keys: int,
    block: int,
    causal: bool,
    seed: int,
) -> None:
    """Any block size, grouping and length; causal as in scaled_dot_product_attention."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, groups * queries_per_group, queries, 4, generator=generator)
    key = torch.randn(batch, groups, keys, 4, generator=generator)
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    result = max_logits(query, key, scale=0.7, causal=causal, block_size=block)
    assert torch.allclose(result.double(), reference(query, key, 0.7, allowed), atol=1e-5)
    assert (max_logits_bound(query, key, scale=0.7) >= result - 1e-5).all()


def test_bound_is_reached_by_parallel_vectors() -> None:
    query, key = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 1, 4)
    query[..., 0], key[..., 0] = 3, 5
    assert max_logits_bound(query, key).tolist() == pytest.approx([7.5, 7.5])  # 15/√4
    assert max_logits(query, key).tolist() == pytest.approx([7.5, 7.5])


def test_masks() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8)
    allowed = torch.rand(2, 1, 5, 6) > 0.5
    expected = reference(query, key, 8**-0.5, allowed)
    assert torch.allclose(max_logits(query, key, mask=allowed, block_size=2).double(), expected)
    additive = torch.zeros(2, 1, 5, 6).masked_fill(~allowed, -math.inf)
    assert torch.allclose(max_logits(query, key, mask=additive, block_size=2).double(), expected)
    padding = torch.tensor([True] * 3 + [False] * 3)
    expected = reference(query, key[..., :3, :], 8**-0.5)
    assert torch.allclose(max_logits(query, key, mask=padding).double(), expected)


def test_a_head_that_attends_to_nothing() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    result = max_logits(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), mask=nothing)
    assert result.tolist() == [-math.inf] * 2


def test_no_gradient_and_no_rounding_in_low_precision() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(1, 2, 5, 64, dtype=torch.bfloat16)
    result = max_logits(query, key)
    assert not result.requires_grad
    assert result.dtype == torch.float32
    assert torch.allclose(result.double(), reference(query, key, 0.125), rtol=1e-5)


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        ((3, 5, 4), (2, 5, 4), "3 query heads cannot be shared by 2"),
        ((2, 5, 4), (2, 5, 3), "agree in d"),
        ((2, 2, 5, 4), (1, 2, 5, 4), "leading dimensions"),
        ((5, 4), (5, 4), "as many dimensions"),
    ],
)
def test_errors(query: tuple[int, ...], key: tuple[int, ...], message: str) -> None:
    for function in (max_logits, max_logits_bound):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(query), torch.zeros(key))
    with pytest.raises(ValueError, match="block_size"):
        max_logits(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), block_size=0)
