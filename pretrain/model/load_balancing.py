"""The sequence-wise load-balancing loss of layers of experts.

Of a sequence of T tokens, with N experts of which every token has K, the loss is sum_i f_i P_i
(DeepSeek-V3, arXiv 2412.19437, equations 17 to 20): f_i is N / (K T) times the number of tokens
with expert i among their K best scores, and P_i the mean of the tokens' scores of expert i,
normalized over all experts. It is 1 if the experts are balanced. megatron-core has it, too, but
its scale depends on the micro-batch size and on tensor parallelism (0.16), or on the number of
labels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import Router
from torch import Tensor, nn


class LoadBalancing:
    """Adds the gradient of the loss to that of the routers, in every backward pass of training.

    Args:
        chunks: model chunks of this rank.
        coefficient: factor of the gradient.
        softmax: whether scores are a softmax of the router's logits; else normalized sigmoids.
        packed_length: tokens of each sequence, if activations are [b * s, 1, ...]; None if they are
            [s, b, ...].
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        coefficient: float,
        *,
        softmax: bool,
        packed_length: int | None = None,
    ) -> None:
        self._coefficient, self._softmax = coefficient, softmax
        self._packed_length = packed_length
        device = next(chunks[0].parameters()).device
        self._scale = torch.zeros((), dtype=torch.float64, device=device)
        self._total = self._scale.clone()
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, Router):
                    module.register_forward_hook(self._add)

    def _add(self, router: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
        # Recomputed layers run twice in training, first without gradients.
        if not (router.training and torch.is_grad_enabled()):
            return output
        weights, *others = output
        losses = sequence_losses(
            router.gating(inputs[0]),
            router.topk,
            router.tp_cp_group,
            softmax=self._softmax,
            packed_length=self._packed_length,
        )
        loss = losses.sum()
        self._total.add_(loss.detach())
        weights = _AddGradient.apply(weights, loss, self._coefficient * self._scale)  # type: ignore[no-untyped-call]
        return weights, *others

    def start_step(self, scale: Tensor) -> None:
        """Call before the forward pass of a step.

        Args:
            scale: further factor of the gradient of each sequence's loss, a scalar.
        """
        self._scale.copy_(scale)
        self._total.zero_()

    @property
    def total(self) -> Tensor:
        """This rank's part of the losses of the step, summed over sequences and layers."""
        return self._total


def sequence_losses(
    logits: Tensor,
    top_k: int,
    group: "dist.ProcessGroup | None" = None,
    *,
    softmax: bool,
    packed_length: int | None = None,
) -> Tensor:
    """This rank's part of the loss of each sequence, [b]; the parts of a group's ranks add up.

    Args:
        logits: [s, b, experts], of this rank's tokens of each sequence; with ``packed_length``
            [b * s, 1, experts], of its part of the sequences one after another.
        top_k: number of experts of a token.
        group: ranks with the other tokens, as many each. Default: there are none.
        softmax, packed_length: see :class:`LoadBalancing`.
    """
    tokens, _, experts = logits.shape
    if softmax:
        scores = logits.softmax(-1)
    else:
        scores = logits.sigmoid()
        scores = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top_k, -1).indices, 1.0)
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    if packed_length is None:
        length = tokens * ranks
        counts, sums = chosen.sum(0), scores.sum(0)
    else:
        length = packed_length
        device = logits.device
        sequence_of = torch.arange(rank * tokens, (rank + 1) * tokens, device=device) // length
        sequences = torch.arange(tokens * ranks // length, device=device)
        belongs = (sequences[:, None] == sequence_of).to(scores)  # [b, tokens]
        counts, sums = belongs @ chosen.squeeze(1), belongs @ scores.squeeze(1)
    if ranks > 1:
        dist.all_reduce(counts, group=group)
    frequencies = counts * (experts / (top_k * length))
    return (frequencies * sums / length).sum(-1)


class _AddGradient(torch.autograd.Function):
    """The identity of its first input, whose backward pass also starts that of a loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient.to(loss.dtype)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.gradient, None
