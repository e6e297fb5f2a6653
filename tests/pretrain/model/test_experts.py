"""Grouped experts compute what megatron-core's sequence of MLPs computes, and share their weights.

In float64 the products are loops, in float32 and bfloat16 ``grouped_mm``. Integers, whose products
and sums are exact in every order, compare the two to the bit.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.errors import PretrainError
from pretrain.model import experts
from pretrain.model.experts import GroupedExperts, stacked

HIDDEN, FFN = 8, 16
DTYPES = [torch.float32, torch.bfloat16]
_ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
GROUPS = SimpleNamespace(ep=_ALONE, expt_tp=_ALONE, expt_dp=_ALONE)
COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def settings_of(count: int, **changes: Any) -> TransformerConfig:
    options = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 1,
        "num_moe_experts": count,
        "moe_ffn_hidden_size": FFN,
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**options | changes)


def grouped_experts(count: int, dtype: torch.dtype) -> GroupedExperts:
    """Experts with random weights."""
    module = GroupedExperts(count, settings_of(count), pg_collection=GROUPS)
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def sequence(
    module: GroupedExperts, x: Tensor, tokens_per_expert: Tensor, probabilities: Tensor
) -> tuple[Tensor, None]:
    """The outputs of the same experts one after the other, as megatron-core's MLP defines them."""
    counts = tokens_per_expert.tolist()
    outputs = []
    for expert, rows, weights in zip(
        module.local_experts, x.split(counts), probabilities.split(counts), strict=True
    ):
        gate, up = nn.functional.linear(rows, expert.linear_fc1.weight).chunk(2, -1)
        activated = (nn.functional.silu(gate) * up * weights.unsqueeze(-1)).to(x.dtype)
        outputs.append(nn.functional.linear(activated, expert.linear_fc2.weight))
    return torch.cat(outputs), None


def results(
    module: GroupedExperts,
    counts: list[int],
    router: torch.dtype,
    forward: Callable[..., tuple[Tensor, None]] = GroupedExperts.__call__,
) -> list[Tensor]:
    """Output and gradients of a random input, and the gradients of all weights.

    Args:
        router: dtype of the probabilities.
    """
    dtype = next(module.parameters()).dtype
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype).requires_grad_()
    probabilities = torch.rand(sum(counts), generator=generator).to(router).requires_grad_()
    output, bias = forward(module, x, torch.tensor(counts), probabilities)
    assert bias is None
    gradient = torch.randn(output.shape, generator=generator).to(dtype)
    inputs = (x, probabilities, *module.parameters())
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


@given(counts=COUNTS)
def test_experts_in_float64_equal_the_sequence(counts: list[int]) -> None:
    """Including experts without tokens, and no token at all."""
    module = grouped_experts(len(counts), torch.float64)
    found = results(module, counts, torch.float64)
    expected = results(module, counts, torch.float64, sequence)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@given(counts=COUNTS)
def test_grouped_products_follow_the_sequence(dtype: torch.dtype, counts: list[int]) -> None:
    """With the router's probabilities in float32, as in training."""
    module = grouped_experts(len(counts), dtype)
    found = results(module, counts, torch.float32)
    expected = results(module, counts, torch.float32, sequence)
    rounding = 8 * torch.finfo(dtype).eps
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == reference.dtype
        torch.testing.assert_close(value, reference, rtol=rounding, atol=4 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@given(counts=COUNTS, seed=st.integers(0, 100))
def test_grouped_products_equal_loops(dtype: torch.dtype, counts: list[int], seed: int) -> None:
    """To the bit: small integers have exact products and sums."""
    torch.manual_seed(seed)
    rows = sum(counts)
    x, y = (torch.randint(-2, 3, (rows, width)).to(dtype) for width in (HIDDEN, FFN))
    weights = torch.randint(-2, 3, (len(counts), FFN, HIDDEN)).to(dtype)
    groups = experts._Groups(torch.tensor(counts), x.device)

    def products() -> list[Tensor]:
        return [
            experts._product(x, weights.mT, groups),
            experts._product(y, weights, groups),
            experts._outer_product(y, x, groups),
        ]

    assert experts._can_group(x, y)
    grouped = products()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "_grouped_mm", None)
        assert not experts._can_group(x, y)
        for value, reference in zip(grouped, products(), strict=True):
            assert torch.equal(value, reference)


def test_rows_that_are_not_aligned_are_multiplied_in_a_loop() -> None:
    """grouped_mm refuses rows whose size is not a multiple of 16 bytes."""
    groups = experts._Groups(torch.tensor([2, 1]), torch.device("cpu"))
    x, weights = torch.randn(3, 6), torch.randn(2, 6, 10)
    product = experts._product(x, weights, groups)
    torch.testing.assert_close(product, torch.cat([x[:2] @ weights[0], x[2:] @ weights[1]]))
    outer = experts._outer_product(product, x, groups)
    torch.testing.assert_close(outer[1], product[2:].t() @ x[2:])


def test_gradients_are_those_of_the_function() -> None:
    grouped = grouped_experts(3, torch.float64)
    x = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True)
    probabilities = torch.rand(4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 0, 1])

    def outputs(x: Tensor, probabilities: Tensor, *_weights: Tensor) -> Tensor:
        return grouped(x, counts, probabilities)[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(outputs, (x, probabilities, *grouped.parameters()))


def test_weights_are_views_of_one_tensor_per_matrix() -> None:
    grouped = grouped_experts(3, torch.float32)
    for linear, weights in zip(("linear_fc1", "linear_fc2"), grouped.weights(), strict=True):
        for expert, values in zip(grouped.local_experts, weights, strict=True):
            assert getattr(expert, linear).weight.data_ptr() == values.data_ptr()
    names = [name for name, _ in grouped.named_parameters()]
    assert names[:2] == ["local_experts.0.linear_fc1.weight", "local_experts.0.linear_fc2.weight"]


def test_only_weights_that_are_not_consecutive_are_moved() -> None:
    parameters = [nn.Parameter(torch.full((2, 4), float(number))) for number in range(3)]
    weights = stacked(parameters)
    address = weights.data_ptr()
    assert stacked(parameters).data_ptr() == address
    with torch.no_grad():
        parameters[1].add_(10.0)
    assert weights[1].eq(11.0).all() and stacked(parameters).data_ptr() == address

    # Each of these leaves a tensor that does not contain the weights, or not all of them.
    for number in range(3):
        parameters[number].data = torch.full((2, 4), 20.0 + number)
        assert [int(matrix[0, 0]) for matrix in stacked(parameters)][number] == 20 + number
        with torch.no_grad():
            parameters[number].add_(1.0)
        assert stacked(parameters)[number].eq(21.0 + number).all()
    parameters[0].data, parameters[1].data = parameters[1].data, parameters[0].data
    assert [int(matrix[0, 0]) for matrix in stacked(parameters)] == [22, 21, 23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_something_assigned_are_used(dtype: torch.dtype) -> None:
    """A conversion, a load that assigns, or an assignment to ``data`` between two steps."""
    grouped = grouped_experts(3, torch.float32)
    results(grouped, [2, 0, 3], torch.float32)
    grouped.to(dtype)
    for parameter in grouped.parameters():
        parameter.data = parameter.data * 2
    found = results(grouped, [2, 0, 3], dtype)
    for value, reference in zip(found, results(grouped, [2, 0, 3], dtype, sequence), strict=True):
        torch.testing.assert_close(value, reference)


def test_weights_that_are_moved_in_inference_can_be_trained() -> None:
    """As after sampling from a model in bfloat16, whose conversion has separated the weights."""
    grouped = grouped_experts(2, torch.bfloat16)
    x, counts = torch.randn(2, HIDDEN, dtype=torch.bfloat16), torch.tensor([1, 1])
    with torch.inference_mode():
        grouped(x, counts, torch.ones(2))
    assert not any(parameter.is_inference() for parameter in grouped.parameters())
    grouped(x, counts, torch.ones(2))[0].sum().backward()


def test_second_derivatives_are_an_error() -> None:
    """They would lack those by the weights."""
    grouped = grouped_experts(2, torch.float64)
    x = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
    output, _ = grouped(x, torch.tensor([1, 1]), torch.ones(2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_update_between_forward_and_backward_is_an_error() -> None:
    grouped = grouped_experts(2, torch.float32)
    x = torch.randn(2, HIDDEN, requires_grad=True)
    output, _ = grouped(x, torch.tensor([1, 1]), torch.ones(2))
    with torch.no_grad():
        for parameter in grouped.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    "changes",
    [{"gated_linear_unit": False}, {"activation_func_clamp_value": 7.0}],
    ids=["no gate", "clamp"],
)
def test_settings_that_are_not_implemented_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PretrainError, match=f"megatron.{next(iter(changes))}="):
        GroupedExperts(2, settings_of(2, **changes), pg_collection=GROUPS)
