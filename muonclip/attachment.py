"""Hooks that run a QK-Clip after an optimizer's steps, and handles that undo them."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from muonclip.qk_clip import QKClip


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


class Attachment(Handle):
    """Runs a clip after every step of an optimizer.

    Steps that were skipped because a gradient was not finite are recognized by
    ``MuonClip.skipped_steps`` and by ``found_inf``, which ``torch.amp.GradScaler`` sets on fused
    optimizers. For other optimizers GradScaler does not call ``step``, and calls of ``zero_grad``
    show which gradients were discarded.
    """

    def __init__(self, clip: "QKClip", optimizer: Any) -> None:
        optimizer = _unwrapped(optimizer)
        self.clip = clip
        self._skipped_before: int | Tensor | None = None
        for other in tuple(getattr(optimizer, _ATTRIBUTE, ())):
            if _share_weights(other.clip, clip):
                other.clip._deactivate(
                    "a newer QKClip of these weights was attached to the optimizer"
                )
        hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Stored in the optimizer, so that both end together. Not copied with the optimizer.
        optimizer.__dict__.setdefault(_ATTRIBUTE, []).append(self)
        restore = _call_before_zero_grad(optimizer, clip._discard_graded)
        super().__init__([partial(_forget, optimizer, self), restore, *(h.remove for h in hooks)])

    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self.clip._checked_plan()  # raises errors before the step changes anything
        self._skipped_before = getattr(optimizer, "skipped_steps", None)

    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        applied: bool | Tensor = True
        if self._skipped_before is not None:
            applied = getattr(optimizer, "skipped_steps", 0) == self._skipped_before
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            applied = applied & (found_inf == 0)
        self.clip._step(applied, optimizer)


def tensors_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors that an optimizer updates."""
    for group in optimizer.param_groups:
        yield from group["params"]


def has_rate(optimizer: Optimizer) -> bool:
    """Whether any learning rate may be nonzero; those on an accelerator are not read.

    ``torch.distributed.checkpoint`` runs a step with a learning rate of zero to create the state.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    return any((isinstance(r, Tensor) and r.device.type != "cpu") or r for r in rates)


_ATTRIBUTE = "_qk_clip_attachments"


def _unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers of Accelerate and Lightning."""
    if isinstance(optimizer, Optimizer) or type(optimizer).__name__.startswith("Lightning"):
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, Optimizer):
            return _unwrapped(inner)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach needs a torch.optim.Optimizer, got {type(optimizer).__name__}: call "
            "clip.step() after each of its steps instead"
        )
    return optimizer


def _forget(optimizer: Optimizer, attachment: Attachment) -> None:
    attachments = optimizer.__dict__.get(_ATTRIBUTE, [])
    if attachment in attachments:
        attachments.remove(attachment)
    if not attachments:
        optimizer.__dict__.pop(_ATTRIBUTE, None)


def _share_weights(first: "QKClip", second: "QKClip") -> bool:
    def weights(clip: "QKClip") -> set[int]:
        return {
            id(x.weight) for layout in clip.layouts.values() for x in (layout.query, layout.key)
        }

    return not weights(first).isdisjoint(weights(second))


def _call_before_zero_grad(
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
