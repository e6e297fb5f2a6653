"""Features of this machine and of torch's settings: Triton, TF32, bfloat16 on a CPU."""

import functools
import importlib.util
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


def _constant(question: Callable[[], _T]) -> Callable[[], _T]:
    """Let ``torch.compile`` treat the result as a constant, because it cannot trace the function.

    This is ``torch.compiler.assume_constant_result`` without importing torch._dynamo, which takes
    seconds.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


def untraced(function: _F) -> _F:
    """Let ``torch.compile`` call a function instead of tracing it.

    This is ``torch.compiler.disable`` without importing torch._dynamo, which takes seconds.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


@_constant
def has_triton() -> bool:
    """Whether Triton is installed and there is an NVIDIA GPU of Ampere or newer."""
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    return (
        importlib.util.find_spec("triton") is not None
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


@_constant
def allows_tf32() -> bool:
    """Whether torch may round float32 factors to tf32 in CUDA products."""
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


@_constant
def cpu_threads() -> int:
    """The threads of torch's operators on a CPU."""
    return torch.get_num_threads()


@_constant
def has_bfloat16_products() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 by own instructions, faster than in float32.

    These are AVX512-BF16, AMX or those of ARM, and torch uses them by oneDNN. A measurement is not
    necessary: products with them are at least twice as fast, and without them never faster.
    """
    return _has_bfloat16_products()


@functools.cache
def _has_bfloat16_products() -> bool:
    if not (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        # False too where ONEDNN_MAX_CPU_ISA excludes AVX-512.
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    # On others oneDNN also supports it where it converts to float32 in each product.
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


@contextmanager
def full_float32_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32, even if torch is set to round the factors.

    ``torch.set_float32_matmul_precision`` and its relatives allow TF32 on CUDA, and TF32 or
    bfloat16 on a CPU.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision: str = backend.matmul.fp32_precision
    if precision not in ("tf32", "bf16"):
        yield
        return
    backend.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = precision
