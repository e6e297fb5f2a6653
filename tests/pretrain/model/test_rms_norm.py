"""RMSNorm's formula for CPUs: values and derivatives equal torch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.model.rms_norm import rms_norm


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    eps=st.sampled_from([1e-6, 1e-5]),
    seed=st.integers(0, 99),
)
def test_equals_torchs(shape: tuple[int, ...], scale: float, eps: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, gradient = (
        torch.randn(size, dtype=torch.float64, generator=generator)
        for size in (shape, shape[-1:], shape)
    )
    inputs = [(x * scale).requires_grad_(), weight.requires_grad_()]
    expected = F.rms_norm(inputs[0], shape[-1:], inputs[1], eps)
    actual = rms_norm(inputs[0], inputs[1], eps)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for ours, torchs in zip(
        torch.autograd.grad(actual, inputs, gradient),
        torch.autograd.grad(expected, inputs, gradient),
        strict=True,
    ):
        largest = float(torchs.abs().max())
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12 * (1 + largest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(size, generator=generator).to(dtype).requires_grad_()
        for size in ((4, 3, 64), (64,), (4, 3, 64))
    )
    output = rms_norm(x, weight, 1e-5)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    reference = F.rms_norm(exact[0], (64,), exact[1], 1e-5)
    pairs = [
        (output, reference),
        *zip(
            torch.autograd.grad(output, (x, weight), gradient),
            torch.autograd.grad(reference, exact, gradient.double()),
            strict=True,
        ),
    ]
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=4 * tolerance)
