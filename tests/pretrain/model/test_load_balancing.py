"""The load-balancing loss is that of the DeepSeek-V3 report, for each sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.model.load_balancing import _AddGradient, sequence_losses


def definition(logits: Tensor, top_k: int, softmax: bool) -> Tensor:
    """Equations 17 to 20, token by token."""
    losses = []
    length, sequences, experts = logits.shape
    for sequence in range(sequences):
        frequency, probability = torch.zeros(experts), torch.zeros(experts, dtype=torch.float64)
        for token in range(length):
            row = logits[token, sequence]
            scores = row.softmax(0) if softmax else row.sigmoid() / row.sigmoid().sum()
            frequency[scores.topk(top_k).indices] += experts / (top_k * length)
            probability = probability + scores / length
        losses.append((frequency * probability).sum())
    return torch.stack(losses)


@given(
    length=st.integers(1, 5), sequences=st.integers(1, 3), experts=st.integers(1, 6),
    data=st.data(), softmax=st.booleans(),
)  # fmt: skip
def test_it_is_the_definition(
    length: int, sequences: int, experts: int, data: st.DataObject, softmax: bool
) -> None:
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = (length, sequences, experts)
    logits = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    losses = sequence_losses(logits, top_k, softmax=softmax)
    expected = definition(logits, top_k, softmax)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("softmax", [True, False])
def test_balanced_experts_have_a_loss_of_one(softmax: bool) -> None:
    logits = 5 * torch.eye(4, dtype=torch.float64).unsqueeze(1)  # each token another expert
    loss = sequence_losses(logits, 1, softmax=softmax)
    torch.testing.assert_close(loss, torch.ones(1, dtype=torch.float64))


def test_the_gradient_of_the_loss_is_added_in_the_backward_pass() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    same = _AddGradient.apply(x * 1, (x**2).sum(), torch.tensor(0.5, dtype=torch.float64))
    assert torch.equal(same, x)
    (3 * same).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 3 + 0.5 * 2 * x.detach())
