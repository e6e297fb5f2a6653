"""Experts as grouped matrix products, in place of megatron-core's SequentialMLP.

A layer's experts stay separate modules with separate parameters, so that the optimizer, checkpoints
and the data-parallel wrapper see one matrix per expert. Their values are consecutive in memory: the
weights of all local experts are one operand [experts, out, in] of ``grouped_mm``, without a copy.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.errors import PretrainError
from pretrain.model.flex import to_device

# torch 2.10 added it. It requires rows of a multiple of 16 bytes, on CUDA also aligned to 16 bytes.
_grouped_mm: Any = getattr(nn.functional, "grouped_mm", None)
_GROUPED_DTYPES = (torch.bfloat16, torch.float32)
_ROW_BYTES = 16

# Settings of megatron-core that change the experts' function, and the values that are implemented.
_REQUIRED = {
    "gated_linear_unit": True,
    "activation_func": nn.functional.silu,
    "add_bias_linear": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "fp8": None,
    "fp4": None,
}


class GroupedExperts(SequentialMLP):
    """The experts of a layer on this rank: gated MLPs (SwiGLU), without biases.

    Under expert tensor parallelism each rank has columns of the first product and rows of the
    second one; the token dispatcher gathers tokens and sums outputs.

    Raises:
        PretrainError: the configuration changes the experts' function, e.g. by biases or fp8.
    """

    def __init__(self, num_local_experts: int, config: Any, **options: Any) -> None:
        for name, value in _REQUIRED.items():
            if (actual := getattr(config, name, value)) != value:
                raise PretrainError(
                    f"megatron.{name}={actual} is not implemented by kernels=torch, which trains "
                    f"experts with {name}={value}"
                )
        layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(num_local_experts, config, submodules=layers, **options)
        self.weights()

    def forward(
        self, hidden_states: Tensor, tokens_per_expert: Tensor, probabilities: Tensor
    ) -> tuple[Tensor, None]:
        """Return the experts' outputs, multiplied by their probabilities, and no bias.

        Args:
            hidden_states: [tokens, hidden], sorted by local expert.
            tokens_per_expert: [experts], integers that add up to ``tokens``; also zeros.
            probabilities: [tokens], the router's weight of each row.
        """
        fc1, fc2 = self.weights()
        groups = _Groups(tokens_per_expert, hidden_states.device)
        parameters = [*self._parameters_of("linear_fc1"), *self._parameters_of("linear_fc2")]
        output: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
            hidden_states, probabilities, groups, fc1, fc2, *parameters
        )
        return output, None

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of the two linear layers of all experts, detached [experts, out, in]."""
        return (
            stacked(self._parameters_of("linear_fc1")),
            stacked(self._parameters_of("linear_fc2")),
        )

    def _parameters_of(self, linear: str) -> list[nn.Parameter]:
        return [getattr(expert, linear).weight for expert in self.local_experts]


@torch.no_grad()
def stacked(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return a view of parameters of one shape as one tensor, whose values they share.

    Parameters that are not consecutive in memory, because they are new or something assigned to
    their ``data``, are moved: their ``data`` become views of a new tensor.
    """
    first = parameters[0]
    if not _consecutive(parameters):
        with torch.inference_mode(False), torch.no_grad():  # which could not be trained any more
            values = torch.stack([parameter.detach() for parameter in parameters])
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data = value
    # As a view of the first one, it detects changes of this between forward and backward passes.
    return first.detach().as_strided(
        (len(parameters), *first.shape), (first.numel(), *first.stride()), first.storage_offset()
    )


def _consecutive(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether parameters are contiguous, and one after the other in the same storage."""
    first = parameters[0]
    storage, size = first.untyped_storage().data_ptr(), first.numel() * first.element_size()
    return all(p.is_contiguous() and p.dtype == first.dtype for p in parameters) and all(
        after.data_ptr() - before.data_ptr() == size
        and after.untyped_storage().data_ptr() == storage
        for before, after in pairwise(parameters)
    )


class _Groups:
    """The rows of each expert.

    megatron-core's dispatchers leave the counts on the host or on the device. Grouped products need
    them on the device, and loops on the host: only loops on a device synchronize.
    """

    def __init__(self, counts: Tensor, device: torch.device) -> None:
        self._counts = counts
        ends = counts.cumsum(0, dtype=torch.int32)
        if ends.device != device:
            ends = to_device(ends, device)
        self.ends = ends

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split rows by expert."""
        return x.split_with_sizes(self._counts.tolist())


def _can_group(*operands: Tensor) -> bool:
    return (
        _grouped_mm is not None
        and operands[0].dtype in _GROUPED_DTYPES
        and all(x.size(-1) * x.element_size() % _ROW_BYTES == 0 for x in operands)
    )


def _product(x: Tensor, weights: Tensor, groups: _Groups) -> Tensor:
    """Multiply the rows x [tokens, n] of each expert by its matrix of weights [experts, n, m]."""
    if _can_group(x, weights):
        product: Tensor = _grouped_mm(x, weights, offs=groups.ends)
        return product
    pieces = zip(groups.rows(x), weights, strict=True)
    return torch.cat([rows @ matrix for rows, matrix in pieces])


def _outer_product(x: Tensor, y: Tensor, groups: _Groups) -> Tensor:
    """Sum the outer products of rows x [tokens, n] and y [tokens, m]: [experts, n, m]."""
    if _can_group(x, y):
        # With a transposed x, the numbers of rows need not be multiples of anything.
        products: Tensor = _grouped_mm(x.t(), y, offs=groups.ends)
        return products
    pieces = zip(groups.rows(x), groups.rows(y), strict=True)
    return torch.stack([left.t() @ right for left, right in pieces])


class _Experts(torch.autograd.Function):
    """Gated MLPs of all experts, weighted by probabilities.

    Saves the inputs and the outputs of the first product; the activation is computed again. The
    operations are those of megatron-core's MLP, in the same order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probabilities: Tensor,
        groups: _Groups,
        fc1: Tensor,
        fc2: Tensor,
        *_parameters: nn.Parameter,
    ) -> Tensor:
        """``_parameters``: the values of fc1, then of fc2, which get the gradients."""
        hidden = _product(x, fc1.mT, groups)
        ctx.save_for_backward(x, probabilities, hidden, fc1, fc2)
        ctx.groups = groups
        _, _, weighted = _activation(hidden, probabilities)
        return _product(weighted, fc2.mT, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, probabilities, hidden, fc1, fc2 = ctx.saved_tensors
        groups = ctx.groups
        grad = grad.contiguous()
        activated, silu, weighted = _activation(hidden, probabilities)
        gate, up = hidden.chunk(2, -1)

        grad_weighted = _product(grad, fc2, groups).to(probabilities.dtype)
        grad_fc2 = _outer_product(grad, weighted, groups)
        grad_probabilities = (grad_weighted * activated).sum(-1)
        grad_activated = (grad_weighted * probabilities.unsqueeze(-1)).to(hidden.dtype)
        grad_gate = torch.ops.aten.silu_backward(grad_activated * up, gate)
        grad_hidden = torch.cat([grad_gate, grad_activated * silu], -1)
        grad_x = _product(grad_hidden, fc1, groups)
        grad_fc1 = _outer_product(grad_hidden, x, groups)
        return grad_x, grad_probabilities, None, None, None, *grad_fc1, *grad_fc2


def _activation(hidden: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SwiGLU of [tokens, 2 * ffn], gate then up; silu(gate); and SwiGLU times probabilities."""
    gate, up = hidden.chunk(2, -1)
    silu = nn.functional.silu(gate)
    activated = silu * up
    return activated, silu, (activated * probabilities.unsqueeze(-1)).to(hidden.dtype)
