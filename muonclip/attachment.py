"""Hooks that connect a QK-Clip with an optimizer, and handles that undo such connections."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from muonclip.qk_clip import QKClip


class Handle:
    """Undoes what returned it: a ``watch`` or an ``attach``.

    Args:
        undo: functions to call, the last one first.
    """

    def __init__(self, undo: Iterable[Callable[[], object]]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Undo it. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    @property
    def is_active(self) -> bool:
        """Whether ``remove`` would still undo something."""
        return bool(self._undo)


class Attachment(Handle):
    """Runs a clip after every step of an optimizer.

    Steps that changed nothing because a gradient was not finite are told from the others by
    ``MuonClip.skipped_steps`` and by ``found_inf``, which ``torch.amp.GradScaler`` sets on fused
    optimizers. With other optimizers GradScaler leaves out the call of ``step``, and calls of
    ``zero_grad`` show which gradients were discarded unused.
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
        # In the optimizer, so that both end together. It is not copied with the optimizer.
        optimizer.__dict__.setdefault(_ATTRIBUTE, []).append(self)
        restore = _call_before_zero_grad(optimizer, clip._discard_graded)
        super().__init__([partial(_forget, optimizer, self), restore, *(h.remove for h in hooks)])

    def _before_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self.clip._checked_plan()  # raises before the step has changed anything
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
    """Whether a learning rate is not zero, as far as the host knows.

    ``torch.distributed.checkpoint`` makes a step at a learning rate of zero to create the state.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    known = [r for r in rates if not isinstance(r, Tensor) or r.device.type == "cpu"]
    return len(known) < len(rates) or any(known)


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
            "clip.step() after each step of it instead"
        )
    return optimizer


def _forget(optimizer: Optimizer, attachment: Attachment) -> None:
    attachments = optimizer.__dict__.get(_ATTRIBUTE, [])
    if attachment in attachments:
        attachments.remove(attachment)
    if not attachments:
        optimizer.__dict__.pop(_ATTRIBUTE, None)


def _share_weights(one: "QKClip", other: "QKClip") -> bool:
    def weights(clip: "QKClip") -> set[int]:
        layouts = clip.layouts.values()
        return {id(part.weight) for x in layouts for part in (x.query, x.key)}

    return not weights(one).isdisjoint(weights(other))


def _call_before_zero_grad(
    optimizer: Optimizer, function: Callable[[], None]
) -> Callable[[], object]:
    """Let ``optimizer.zero_grad`` call a function first; returns what undoes that."""
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
