"""Reuse of main memory by glibc's allocator."""

import ctypes

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest threshold that glibc accepts on 64 bits.
_LARGEST_MMAP_THRESHOLD = 2**25


def keep_freed_memory() -> bool:
    """Have this process keep freed blocks of up to 32 MiB for later allocations.

    By default, glibc returns free memory at the end of its heap to the system as soon as it exceeds
    twice the largest block so far. The heap of a training step grows and shrinks by more than that
    for each micro-batch, and faults its pages in again each time: 20,000 faults a step, 5% of its
    processor time, in ``benchmarks run dep --quick``. The memory that is kept is at most the peak
    of the heap.

    Returns:
        Whether the allocator accepts it. Others than glibc's are not changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    accepted = mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), mallopt(_TRIM_THRESHOLD, -1)
    return all(accepted)
