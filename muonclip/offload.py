"""Tensors of a step on another device than it is computed on, streamed there in batches.

While a batch is computed on, the next one is on its way, on another stream. Results are copied
back in the order of the computation; ``finish`` waits for them, so that the host may read them when
the step has returned.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Devices:
    """The devices of an optimizer's state and of its computations.

    Attributes:
        state: of the state; None: the parameter's.
        compute: of a step; None: the parameter's.
    """

    state: torch.device | None = None
    compute: torch.device | None = None

    @classmethod
    def of(cls, state: Any, compute: Any) -> "Devices":
        """The devices of the options ``state_device`` and ``compute_device``.

        Raises:
            ValueError: for a device that is missing, or that state cannot be streamed from.
        """
        if state is not None and str(state) != "cpu":
            raise ValueError(
                f"state_device must be 'cpu', or None for the parameter's device, got {state!r:.80}"
            )
        return cls(_device("state_device", state), _device("compute_device", compute))

    @property
    def are_given(self) -> bool:
        return self.state is not None or self.compute is not None

    def of_step(self, local: Tensor) -> torch.device:
        """The device of a step's computations with a parameter."""
        return self.compute or local.device

    def of_state(self, local: Tensor) -> torch.device:
        """The device of a parameter's state."""
        return self.state or local.device

    def differ_from(self, device: torch.device) -> bool:
        """Whether state or computations of a parameter on this device are elsewhere."""
        return self.state not in (None, device) or self.compute not in (None, device)

    def pin(self, tensor: Tensor) -> Tensor:
        """State in pinned memory, from which CUDA copies without waiting.

        DTensors stay as they are, because their local tensors cannot be replaced.
        """
        is_plain = type(tensor) is Tensor and tensor.device.type == "cpu"
        if self.are_given and is_plain and torch.cuda.is_available():
            return tensor.pin_memory()
        return tensor

    def new_zeros(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of state, zero everywhere, in the shape and placements of a parameter."""
        if self.state is None:
            return torch.zeros_like(param.detach(), dtype=dtype)
        return self.pin(torch.zeros_like(param.detach(), dtype=dtype, device=self.state))

    def finish(self, tensors: Iterable[Tensor]) -> None:
        """Wait for everything that a step has copied to the host.

        Args:
            tensors: local tensors of the parameters.
        """
        if self.are_given:
            for device in {self.of_step(tensor) for tensor in tensors}:
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()


def _device(option: str, value: Any) -> torch.device | None:
    if value is None:
        return None
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"{option} must be a device such as 'cuda', got {value!r:.80}") from None
    if device.type == "cpu":
        return device
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if current is not None else 0
    if current is None or current.type != device.type or (device.index or 0) >= count:
        has = f"{count} of type {current.type}" if current is not None else "no accelerator"
        raise ValueError(
            f"{option}={value!r} is missing: torch finds {has}. Choose a device that "
            f"torch.accelerator has, or leave {option} out"
        )
    if device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def fetch(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device: a copy, or the tensor itself if it is there."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=True)


def copy_back(target: Tensor, source: Tensor) -> None:
    """Copy a tensor that ``fetch`` returned to where it came from."""
    if source is not target:
        target.copy_(source, non_blocking=True)


def streamed(
    batches: Iterable[_T], start: Callable[[_T], tuple[_T, list[Tensor]]], device: torch.device
) -> Iterator[tuple[_T, _T]]:
    """Batches and their copies on a device; while one is used, the next is copied.

    Args:
        batches: to copy.
        start: starts to copy a batch; returns the copy, and its tensors that are new.
        device: to copy to.
    """
    side: Any = None
    if device.type == "cuda":
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(batch: _T) -> tuple[_T, _T, list[Tensor], Any]:
        with torch.cuda.stream(side) if side is not None else nullcontext():
            copied, tensors = start(batch)
        return batch, copied, tensors, None if side is None else side.record_event()

    def await_(batch: _T, copied: _T, tensors: list[Tensor], event: Any) -> tuple[_T, _T]:
        if event is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(event)
            for tensor in tensors:  # allocated on the other stream, used on this one
                tensor.record_stream(stream)
        return batch, copied

    earlier: tuple[_T, _T, list[Tensor], Any] | None = None
    for batch in batches:
        later = begin(batch)
        if earlier is not None:
            yield await_(*earlier)
        earlier = later
    if earlier is not None:
        yield await_(*earlier)
