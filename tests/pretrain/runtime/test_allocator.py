"""Memory that a step frees serves the next one without page faults."""

import platform
import subprocess
import sys

import pytest

# 64 blocks of 1 MiB are freed and allocated again: without the setting, glibc returns them to the
# system meanwhile, and touching them costs a fault for each page.
_PROGRAM = """
import resource, sys
from pretrain.runtime.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * 2**20 for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults() * resource.getpagesize() / 2**26)
"""


def _share_of_faults(argument: str) -> float:
    """Pages that were faulted in again, of those allocated."""
    command = [sys.executable, "-c", _PROGRAM, argument]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_freed_memory_is_kept() -> None:
    assert _share_of_faults("default") > 0.5
    assert _share_of_faults("keep") < 0.1
