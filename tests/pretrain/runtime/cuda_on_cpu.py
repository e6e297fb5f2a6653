"""A CUDA machine for tests on a CPU: everything placed on ``cuda`` is placed on the CPU."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from pretrain.runtime import background, without_cuda


class _CudaIsCpu(TorchFunctionMode):
    """Replaces CUDA devices in the arguments of torch's functions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs = {key: _on_cpu(value, key == "device") for key, value in (kwargs or {}).items()}
        moves = func is torch.Tensor.to
        return func(*[_on_cpu(value, moves and n == 1) for n, value in enumerate(args)], **kwargs)


def _on_cpu(value: Any, is_device: bool) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    # Numbers are CUDA devices.
    return "cpu" if is_device and (isinstance(value, int) or value == "cuda") else value


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Make pretrain believe that there are two GPUs.

    Streams, random states and synchronization are those of ``without_cuda``, which pretrain then
    does not apply; NCCL is gloo. Everything else is what pretrain runs on a GPU.
    """
    init_process_group, start_thread = dist.init_process_group, background.start

    def start(action: Callable[[], Any], name: str) -> Future[Any]:
        def call() -> Any:
            with _CudaIsCpu():  # a mode belongs to a thread
                return action()

        return start_thread(call, name)

    def over_gloo(backend: str, **options: Any) -> None:
        assert backend == "nccl"
        init_process_group("gloo", **options)

    without_cuda.enable()
    replaced: list[tuple[Any, str, Any]] = [
        (without_cuda, "USE_CUDA", True),
        (without_cuda, "disable", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 2),
        (torch.cuda, "set_device", lambda _device: None),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_name", lambda *_device: "a GPU"),
        (torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=2**33)),
        # Too old for flex_attention, which torch's builds for CUDA would otherwise compile.
        (torch.cuda, "get_device_capability", lambda *_device: (7, 0)),
        (torch.cuda, "max_memory_allocated", lambda *_device: 2**30),
        (dist, "init_process_group", over_gloo),
        (background, "start", start),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_CudaIsCpu())
        yield
    without_cuda.disable()
