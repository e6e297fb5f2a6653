"""Largest logits in bfloat16 are those of its queries and keys, not of their rounded products."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.model.language import CoreAttention

LENGTH, BATCH, HEADS, WIDTH = 7, 2, 4, 24
THRESHOLD = 100.0
TOLERANCE = 1e-3  # float32's rounding of sums of products of some 500; bfloat16's is 0.5


def observe(query: Tensor, key: Tensor, masked: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The logits that the observer gets, and the largest logits in float64."""
    attention = CoreAttention(config=SimpleNamespace(kv_channels=WIDTH)).train()
    attention.clip_threshold = threshold
    seen: list[Tensor] = []
    attention.observer = seen.append
    attention(query, key, key, masked)
    q, k = (x.detach().double().permute(1, 2, 0, 3) for x in (query, key))
    logits = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(masked, -math.inf)
    (largest,) = seen
    assert largest.dtype == torch.float32 and not largest.requires_grad
    return largest.double(), logits.amax((0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=25, deadline=None)
@given(target=st.floats(95.0, 110.0), seed=st.integers(0, 2**16))
def test_no_rounding_of_logits_decides_a_clip(dtype: torch.dtype, target: float, seed: int) -> None:
    """bfloat16's neighbours of 100 are 99.5 and 100.5: a head at 100.2 would pass for 100."""
    torch.manual_seed(seed)
    query = torch.randn(LENGTH, BATCH, HEADS, WIDTH)
    key = torch.randn(LENGTH, BATCH, HEADS, WIDTH)
    masked = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.3
    # Heads from far below the threshold to near it.
    largest = (query.permute(1, 2, 0, 3) @ key.permute(1, 2, 3, 0) / math.sqrt(WIDTH)).amax(
        (0, 2, 3)
    )
    aims = torch.tensor([target, target - 5, target / 2, 1.0])
    query = (query * (aims / largest)[:, None]).to(dtype).requires_grad_()
    key = key.to(dtype)
    observed, expected = observe(query, key, masked, THRESHOLD)
    clear = (expected - THRESHOLD).abs() > TOLERANCE
    assert torch.equal((observed > THRESHOLD)[clear], (expected > THRESHOLD)[clear])
    over = expected > THRESHOLD
    assert torch.allclose(observed[over], expected[over], rtol=0, atol=TOLERANCE)
    rounding = 4 * torch.finfo(dtype).eps
    assert torch.allclose(observed, expected, rtol=rounding, atol=100 * rounding)
    exact, _ = observe(query, key, masked, threshold=0.0)
    assert torch.allclose(exact, expected, rtol=0, atol=TOLERANCE)
