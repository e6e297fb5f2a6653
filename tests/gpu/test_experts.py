"""Grouped experts on a GPU equal the same experts in float64, one after the other, on a CPU."""

import copy

import pytest
import torch

from tests.gpu.devices import DEVICES
from tests.pretrain.model.test_experts import grouped_experts

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@DEVICES
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("counts", [[5, 0, 300, 1], [0, 0, 7, 0], [64, 64, 64, 64]], ids=str)
def test_grouped_experts_equal_single_ones(
    device: str, dtype: torch.dtype, counts: list[int]
) -> None:
    reference = grouped_experts(len(counts), torch.float64)
    module = copy.deepcopy(reference).to(device, dtype)
    with torch.no_grad():
        for rounded, exact in zip(module.parameters(), reference.parameters(), strict=True):
            exact.copy_(rounded)
    hidden = reference.local_experts[0].linear_fc1.weight.shape[1]
    x = torch.randn(sum(counts), hidden).to(dtype)
    probabilities = torch.rand(sum(counts))
    outcomes = []
    for model in (module, reference):
        weight = next(model.parameters())
        inputs = x.detach().to(weight.device, weight.dtype, copy=True).requires_grad_()
        # Megatron-core's dispatcher leaves the counts on the host.
        output, _ = model(
            inputs,
            torch.tensor(counts),
            probabilities.to(weight.device, torch.promote_types(weight.dtype, torch.float32)),
        )
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        outcomes.append([output.detach(), inputs.grad, *gradients])
    for found, expected in zip(*outcomes, strict=True):
        error = (found.cpu().double() - expected).norm()
        assert error <= TOLERANCES[dtype] * expected.norm()
