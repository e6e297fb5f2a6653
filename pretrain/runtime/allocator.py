"""Reuse of main memory by glibc's allocator."""

import ctypes
import os

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest threshold that glibc accepts on 64 bits.
_LARGEST_MMAP_THRESHOLD = 2**25
# A user's settings of the same thresholds.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")


def keep_freed_memory() -> bool:
    """Have this process keep freed blocks of up to 32 MiB for later allocations.

    By default, glibc returns free memory at the end of its heap to the system as soon as it exceeds
    twice the largest block so far. The heap of a training step grows and shrinks by more than that
    for each micro-batch, and faults its pages in again each time: 20,000 faults a step, 5% of its
    processor time, in ``benchmarks run dep --quick``. The memory that is kept is at most the peak
    of the heap.

    Returns:
        Whether the allocator accepts it. Allocators other than glibc's are not changed, nor one
        whose thresholds the environment sets.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in _VARIABLES) or any(n in tunables for n in _TUNABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    accepted = mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), mallopt(_TRIM_THRESHOLD, -1)
    return all(accepted)
