"""What megatron-core 0.16 needs beyond its own options to train on a CPU over gloo.

Everything that is replaced in torch or megatron-core stands in this file, with its reason.
Import it before megatron; :func:`enable` does nothing where CUDA is available.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

USE_CUDA = torch.cuda.is_available()

if not USE_CUDA:
    # megatron-core decorates small functions with torch.compile when it is imported. On a CPU
    # that needs a C++ compiler on the user's machine and costs more start-up than it gives back.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


class _Stream:
    """A CUDA stream that has nothing to wait for."""

    def wait_stream(self, _other: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...

    def record_event(self, _event: object = None) -> "_Stream":
        return self

    def synchronize(self) -> None: ...


_STREAM = _Stream()


@contextlib.contextmanager
def _stream_context(_stream: object) -> Iterator[None]:
    yield


class _TorchOnCpu:
    """torch, as schedules.py sees it: ``zeros(device="cuda")`` are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **kwargs)


def _splits_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_enabled = False


def enable() -> None:
    """Make megatron-core usable on this machine's CPU; call once, before building a model."""
    global _enabled
    if USE_CUDA or _enabled:
        return
    _enabled = True

    cuda: Any = torch.cuda
    # Asked for as the device of buffers, and to order copies that do not happen here.
    cuda.current_device = lambda: torch.device("cpu")
    cuda.Stream = lambda *_args, **_kwargs: _STREAM
    cuda.current_stream = lambda *_args: _STREAM
    cuda.stream = _stream_context
    cuda.synchronize = lambda *_args: None

    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Counts tokens in a tensor made with device="cuda".
    schedules.torch = _TorchOnCpu()
    # The tracker of random states that tensor-parallel layers fork from keeps CUDA's states.
    tensor_parallel_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: (
        torch.set_rng_state(state)
    )
    cuda.get_rng_state = lambda *_args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_args: torch.set_rng_state(state)
    # Without Transformer Engine its import succeeds with None for every name, so this is True.
    multi_latent_attention.HAVE_TE = False
    # Never bound where Transformer Engine is missing, and read all the same.
    moe_utils.te_general_gemm = None
    # Converts the split sizes of the all-to-all only if they are on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_on_cpu
