"""The machine of a run: how fast it multiplies, how much memory is used, which versions."""

import contextlib
import importlib.metadata
import platform
import resource
import sys
import time

import torch


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOP/s of a large square matrix product here, the best of a few; under a second."""
    on_gpu = device.type == "cuda"
    # A CPU without instructions for 16 bits takes seconds for what it does in float32 at once.
    size = 8192 if on_gpu else 256 if dtype.itemsize < 4 else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):  # the first finds the library unready, and is never the best
        if on_gpu:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.mm(a, a)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has used so far: on its GPU, or else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's results depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "muonclip", "numpy", "tokenizers"):
        # Run from a source tree, a package need not be installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    """The GPU's name, or the CPU architecture's; not the host's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads a process"
