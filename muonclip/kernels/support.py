"""Features of this machine and of torch's settings: Triton, TF32, 16-bit products on a CPU."""

import functools
import importlib.util
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

# bfloat16 must be worth its rounding. Known processors are far from this: 2 and more.
_LEAST_SPEEDUP = 1.25
# A product of a size at which instructions take the time, for each thread, and its repetitions.
_TIMED_SIDE, _TIMED_ROUNDS = 256, 8


def _constant(question: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let ``torch.compile`` treat the result as a constant, because it cannot trace the function.

    This is ``torch.compiler.assume_constant_result`` without importing torch._dynamo, which takes
    seconds.
    """
    question._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return question


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
def prefers_bfloat16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 faster than in float32.

    With AMX it does. With AVX512-BF16 of AMD or the instructions of ARM it depends on the processor
    (Zen 4 is twice as fast) and is measured, once in a process, in tens of ms.
    """
    return _prefers_bfloat16()


@functools.cache
def _prefers_bfloat16() -> bool:
    return _multiplies_fast(torch.bfloat16) and (
        _has_instructions("_is_amx_tile_supported") or _bfloat16_speedup() >= _LEAST_SPEEDUP
    )


@_constant
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether the CPU has fast instructions for products of matrices in bfloat16 or float16.

    Without them it is up to 1.7 (AVX512-BF16 of Intel) or 36 times (AVX2) as fast to multiply in
    float32 and to round the result. Not measured, so that results have the same bits in every run.
    """
    return _multiplies_fast(dtype)


@functools.cache
def _multiplies_fast(dtype: torch.dtype) -> bool:
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    if not (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        # False too where ONEDNN_MAX_CPU_ISA excludes the instructions. True on other processors,
        # where oneDNN converts to float32 in each product.
        and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    ):
        return False
    if dtype == torch.float16:  # AVX512-FP16 takes as long as float32
        return _has_instructions("_is_amx_fp16_supported")
    if _has_instructions("_is_amx_tile_supported"):
        return True
    # AVX512-BF16 takes twice as long as float32 on an Intel Xeon whose AMX is hidden.
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    return is_arm or (_has_instructions("_is_avx512_bf16_supported") and not _is_intel())


def _is_intel() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    return "GenuineIntel" in text


def _has_instructions(question: str) -> bool:
    """Ask a function of ``torch.cpu``, which not all versions have."""
    return bool(getattr(torch.cpu, question, lambda: False)())


def _bfloat16_speedup() -> float:
    """The time of a matrix product in float32 divided by that in bfloat16, on this CPU.

    In a separate thread, which has the default modes of torch: no autocast, no fake tensors.
    """
    speedup: list[float] = []
    thread = threading.Thread(target=lambda: speedup.append(_time_products()))
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending, and starts no thread
        return _time_products()
    thread.join()
    return speedup[0]


def _time_products() -> float:
    # Ones, because random numbers would change the random state.
    rows = _TIMED_SIDE * cpu_threads()
    float32 = torch.ones(rows, _TIMED_SIDE, dtype=torch.float32, device="cpu")
    factors = [float32, float32.bfloat16()]
    # Each the shortest of several: other load makes some of them longer.
    shortest = [math.inf, math.inf]
    for _ in range(_TIMED_ROUNDS):
        for kind, factor in enumerate(factors):
            start = time.perf_counter()
            factor @ factor[:_TIMED_SIDE]
            shortest[kind] = min(shortest[kind], time.perf_counter() - start)
    return shortest[0] / shortest[1]


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
        # That of torch.backends, if it is the same: torch does not tell whether it was set here.
        backend.matmul.fp32_precision = "none"
        if backend.matmul.fp32_precision != precision:
            backend.matmul.fp32_precision = precision
