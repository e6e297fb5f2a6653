"""What this machine and torch's settings allow a Triton kernel to do.

``torch.compile`` takes the answers for constants: it cannot trace the questions.
"""

import functools
import importlib.util

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_triton() -> bool:
    """Whether Triton is installed and there is an NVIDIA GPU it is fast on: Ampere or newer."""
    return _has_triton()


@functools.cache
def _has_triton() -> bool:
    return (
        importlib.util.find_spec("triton") is not None
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def allows_tf32() -> bool:
    """Whether torch may round float32 factors to tf32 in CUDA products."""
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"
