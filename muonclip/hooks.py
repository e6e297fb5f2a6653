"""Hooks of optimizers, handles that undo them, and code that torch traces or leaves alone."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

# Like torch.compiler.disable, without importing torch._dynamo, which takes seconds, until the first
# call. In a trace, attributes of an optimizer that are set to tensors are lost.
untraced = torch._compile._disable_dynamo


def is_recording() -> bool:
    """Whether a model is exported: by ``torch.export`` or ``torch.jit.trace``."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


class Handle:
    """Undoes the ``watch`` or ``attach`` that returned it.

    Args:
        undo: functions to call, in reverse order.
    """

    def __init__(self, undo: Iterable[Callable[[], object]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Undo everything. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    @property
    def is_active(self) -> bool:
        """Whether ``remove`` would still undo something."""
        return bool(self._undo)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers of Accelerate and Lightning."""
    if isinstance(optimizer, Optimizer) or type(optimizer).__name__.startswith("Lightning"):
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, Optimizer):
            return unwrap_optimizer(inner)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}: call "
            "clip.step() after each of its steps instead"
        )
    return optimizer


def call_before_zero_grad(
    optimizer: Optimizer, function: Callable[[], None]
) -> Callable[[], object]:
    """Let ``optimizer.zero_grad`` call a function first, and return a function that undoes it."""
    original, was_replaced = optimizer.zero_grad, "zero_grad" in optimizer.__dict__
    calls = [function]

    @wraps(original)
    def zero_grad(*args: Any, **kwargs: Any) -> None:
        for call in calls:
            call()
        original(*args, **kwargs)

    def restore() -> None:
        calls.clear()
        if optimizer.__dict__.get("zero_grad") is zero_grad:
            del optimizer.zero_grad
            if was_replaced:
                optimizer.zero_grad = original  # type: ignore[method-assign]

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
    return restore
