"""The loss of vocabulary-parallel logits: values, gradients, and labels that do not count."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.cross_entropy import cross_entropy

_ALONE: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_equals_torchs_cross_entropy(rows: int, columns: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * scale
    labels = torch.randint(columns, (rows,), generator=generator)
    weights = torch.randn(rows, dtype=torch.float64, generator=generator)
    expected, actual = (logits.clone().requires_grad_() for _ in range(2))

    reference = F.cross_entropy(expected, labels, reduction="none")
    (reference * weights).sum().backward()
    losses = cross_entropy(actual.clone(), labels, _ALONE)
    (losses * weights).sum().backward()

    torch.testing.assert_close(losses, reference, rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    labels = torch.tensor([0, 7, 49, 3])
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf.clone(), labels, _ALONE)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
