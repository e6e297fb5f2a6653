"""Max logits of 16-bit attention are those of its queries and keys, not of rounded products."""

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
TOLERANCE = 1e-3  # rounding of logits near 100 in float32; in bfloat16 it is 0.5


def observe(query: Tensor, key: Tensor, masked: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Max logits that the observer receives, and the exact ones in float64."""
    attention = CoreAttention(config=SimpleNamespace(kv_channels=WIDTH)).train()
    attention.clip_threshold = threshold
    observed: list[Tensor] = []
    attention.observer = observed.append
    attention(query, key, key, masked)
    q, k = (x.detach().double().permute(1, 2, 0, 3) for x in (query, key))
    logits = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(masked, -math.inf)
    (max_logits,) = observed
    assert max_logits.dtype == torch.float32 and not max_logits.requires_grad
    return max_logits.double(), logits.amax((0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=25, deadline=None)
@given(target=st.floats(95.0, 110.0), seed=st.integers(0, 2**16))
def test_rounded_logits_do_not_decide_a_clip(dtype: torch.dtype, target: float, seed: int) -> None:
    """In bfloat16, whose values near 100 are 0.5 apart, a max logit of 100.2 would be 100."""
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
