"""Properties of the machine: speed of matrix products, memory in use, software versions."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable

import torch


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large square matrix product, the best of six; under a second."""
    on_gpu = device.type == "cuda"
    # A CPU without 16-bit instructions needs seconds for large products.
    size = 8192 if on_gpu else 256 if dtype.itemsize < 4 else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first one includes the initialization of the library
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def cores_per_process() -> int:
    """Cores of this machine for each process of the launcher, at least 1.

    An equal share, or the cores that the process is bound to if they are fewer.
    """
    share = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if hasattr(os, "sched_getaffinity"):  # Linux
        return min(share, len(os.sched_getaffinity(0)))
    return share


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on its GPU, or else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def versions(
    packages: Iterable[str] = ("torch", "megatron-core", "muonclip", "numpy", "tokenizers"),
) -> dict[str, str]:
    """Versions of Python and of the installed ones of the packages."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def processor() -> str:
    """Name of the GPU, or the CPU architecture and its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process"
