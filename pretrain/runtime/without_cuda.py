"""Patches of torch and megatron-core for training on a CPU over gloo.

This file lists everything that is replaced in other libraries because there is no GPU, with the
reason. Importing it changes nothing: :func:`enable` applies the patches before a model is built,
and :func:`disable` reverts them. Both do nothing if CUDA is available.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.runtime.patches import Patches

USE_CUDA = torch.cuda.is_available()


class _Stream:
    """A CUDA stream whose methods do nothing.

    It must be a class: other libraries use ``torch.cuda.Stream`` in ``isinstance`` and in
    annotations such as ``torch.cuda.Stream | None``. It is not a subclass of the one it replaces,
    of which torch's builds for CUDA cannot create an instance without a GPU.
    """

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __repr__(self) -> str:
        return "<a stream on a CPU>"

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> Any:
        return self

    def synchronize(self) -> None: ...


_STREAM = _Stream()


@contextlib.contextmanager
def _stream_context(_stream: object) -> Iterator[None]:
    yield


class _TorchOnCpu:
    """The torch module with ``zeros(device="cuda")`` on the CPU, for schedules.py."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **kwargs)


def _splits_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _chunks_of_this_rank(table: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """See :class:`pretrain.model.context_parallel.SequenceShare`."""
    chunks = table.chunk(2 * group.size(), dim)
    return torch.cat([chunks[group.rank()], chunks[-1 - group.rank()]], dim)


def _largest_logits(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, logits.amax(-1)


_patches = Patches()


def enable() -> None:
    """Make megatron-core usable on a CPU; to be called before a model is built.

    Further calls have no effect until :func:`disable`.
    """
    if USE_CUDA or _patches.applied:
        return
    from megatron.core.models.common.embeddings import (
        rotary_pos_embedding,
        yarn_rotary_pos_embedding,
    )
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import cross_entropy
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import token_dispatcher

    replace = _patches.replace
    # megatron-core decorates small functions with torch.compile. On a CPU this requires a C++
    # compiler, and compiling takes longer than it saves.
    _patches.enter(torch.compiler.set_stance("force_eager"))
    # The device of buffers, and streams that order copies between host and device.
    replace(torch.cuda, "current_device", lambda: torch.device("cpu"))
    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "current_stream", lambda *_args: _STREAM)
    replace(torch.cuda, "stream", _stream_context)
    replace(torch.cuda, "synchronize", lambda *_args: None)
    replace(torch.cuda, "get_rng_state", lambda *_args: torch.get_rng_state())
    replace(torch.cuda, "set_rng_state", lambda state, *_args: torch.set_rng_state(state))
    # Tensor-parallel layers fork CUDA's random states.
    replace(
        tensor_parallel_random,
        "_get_cuda_rng_state",
        lambda *_args, **_kwargs: torch.get_rng_state(),
    )
    replace(
        tensor_parallel_random,
        "_set_cuda_rng_state",
        lambda state, *_args, **_kwargs: torch.set_rng_state(state),
    )
    # Selects rows by indices in pinned memory.
    for module in (rotary_pos_embedding, yarn_rotary_pos_embedding):
        replace(module, "get_pos_emb_on_this_cp_rank", _chunks_of_this_rank)
    # Counts tokens in a tensor created with device="cuda".
    replace(schedules, "torch", _TorchOnCpu())
    # Finds the indices of the largest logits, too, which is 8 times as slow on a CPU. Rounds
    # float64 to float32.
    replace(
        cross_entropy.VocabParallelCrossEntropy,
        "calculate_logits_max",
        staticmethod(_largest_logits),
    )
    # Converts the split sizes of the all-to-all only if they are on a GPU.
    replace(token_dispatcher, "maybe_move_tensor_to_cpu", _splits_on_cpu)


def disable() -> None:
    """Revert the patches of :func:`enable`, if any."""
    _patches.undo()
