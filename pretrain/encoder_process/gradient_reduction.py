"""Sum of the tower's gradients over ranks, while the last backward pass is running."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Elements of a bucket, whose gradients are summed together: 64 MiB in float32.
_BUCKET = 2**24


class GradientReduction:
    """Sums of gradients over ranks, in place and in buckets, as soon as a bucket is complete.

    Buckets contain parameters in reverse order, which is nearly that of a backward pass. All ranks
    sum them in the same order, those without a backward pass in :meth:`finish`.

    Args:
        tower: its parameters that need gradients are reduced.
        group: None: all ranks.
    """

    def __init__(self, tower: nn.Module, group: dist.ProcessGroup | None) -> None:
        self._group, self._alone = group, dist.get_world_size(group) == 1
        self._buckets: list[list[nn.Parameter]] = []
        size = _BUCKET
        for parameter in reversed([p for p in tower.parameters() if p.requires_grad]):
            if size >= _BUCKET:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel()
        self._hooks: list[RemovableHandle] = []
        self._incomplete: list[set[nn.Parameter]] = []
        # The sum of each bucket that has begun; None: this rank is alone.
        self._pending: list[tuple[Tensor, dist.Work] | None] = []

    def start(self) -> None:
        """Sum each bucket once all of its gradients are complete, in the next backward pass."""
        self._incomplete = [set(bucket) for bucket in self._buckets]
        for number, bucket in enumerate(self._buckets):
            parameter: Any  # torch does not annotate its method
            for parameter in bucket:
                hook = parameter.register_post_accumulate_grad_hook(
                    lambda parameter, number=number: self._complete(number, parameter)
                )
                self._hooks.append(hook)

    def finish(self) -> None:
        """Sum the remaining buckets and wait for all; no gradient counts as zero."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        while len(self._pending) < len(self._buckets):
            self._reduce_next()
        for bucket, pending in zip(self._buckets, self._pending, strict=True):
            if pending is None:
                continue
            flat, work = pending
            work.wait()
            summed = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, total in zip(bucket, summed, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(total.view_as(parameter))
        self._pending.clear()

    def _complete(self, number: int, parameter: Tensor) -> None:
        self._incomplete[number].discard(parameter)
        while len(self._pending) < len(self._buckets) and not self._incomplete[len(self._pending)]:
            self._reduce_next()

    def _reduce_next(self) -> None:
        """Begin to sum the next bucket."""
        gradients = []
        for parameter in self._buckets[len(self._pending)]:
            if parameter.grad is None:
                # torch before 2.10 has no other dtype of gradients.
                dtype = getattr(parameter, "grad_dtype", parameter.dtype)
                parameter.grad = torch.zeros_like(parameter, dtype=dtype)
            gradients.append(parameter.grad.flatten())
        if self._alone:
            self._pending.append(None)
            return
        flat = torch.cat(gradients)
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        self._pending.append((flat, work))
