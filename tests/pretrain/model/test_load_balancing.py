"""The load-balancing loss is that of the DeepSeek-V3 report, for each sequence."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.model import load_balancing
from pretrain.model.load_balancing import _AddGradient, sequence_losses


def definition(logits: Tensor, top_k: int, softmax: bool) -> Tensor:
    """Equations 17 to 20, token by token."""
    losses = []
    length, sequences, experts = logits.shape
    for sequence in range(sequences):
        frequency, probability = torch.zeros(2, experts, dtype=torch.float64)
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
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@given(
    length=st.integers(1, 6), sequences=st.integers(1, 6), ranks=st.sampled_from([1, 2, 3]),
    softmax=st.booleans(),
)  # fmt: skip
def test_packed_sequences_have_the_losses_of_separate_ones(
    length: int, sequences: int, ranks: int, softmax: bool
) -> None:
    """On tensor-parallel ranks, which have parts of the packed sequences."""
    assume(length * sequences % ranks == 0)
    generator = torch.Generator().manual_seed(length)
    logits = torch.randn(length, sequences, 4, dtype=torch.float64, generator=generator)
    expected = sequence_losses(logits, 2, softmax=softmax)
    packed = logits.transpose(0, 1).reshape(-1, 1, 4)
    counted = []

    def losses(counts: Tensor | None) -> Tensor:
        """The sum over ranks; ``counts``: of all ranks."""

        def all_reduce(local: Tensor, group: object) -> None:
            counted.append(local.clone())
            if counts is not None:
                local.copy_(counts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load_balancing.dist, "all_reduce", all_reduce)
            parts = []
            for rank, part in enumerate(packed.chunk(ranks)):
                group: Any = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: ranks)
                options: Any = {"softmax": softmax, "packed_length": length}
                parts.append(sequence_losses(part, 2, group, **options))
            return torch.stack(parts).sum(0)

    found = losses(None)
    if ranks > 1:
        found = losses(torch.stack(counted).sum(0))
    torch.testing.assert_close(found, expected)


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
