"""Memory that a step frees serves the next one without page faults; settings of users stay."""

import os
import platform
import subprocess
import sys

import pytest

# 64 blocks of 1 MiB are freed and allocated again: without the setting, glibc returns them to the
# system meanwhile, and touching them costs a fault for each page.
_PROGRAM = """
import resource, sys
from pretrain.runtime.allocator import keep_freed_memory

if sys.argv[1] != "default":
    assert keep_freed_memory() == (sys.argv[1] == "keep")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x") * 2**20 for _ in range(64)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults() * resource.getpagesize() / 2**26)
"""


_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=131072",
}

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")


def _share_of_faults(argument: str, **settings: str) -> float:
    """Pages that were faulted in again, of those allocated."""
    command = [sys.executable, "-c", _PROGRAM, argument]
    others = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=others | settings)
    return float(run.stdout)


@glibc
def test_freed_memory_is_kept() -> None:
    assert _share_of_faults("default") > 0.5
    assert _share_of_faults("keep") < 0.1


@glibc
@pytest.mark.parametrize("name", _SETTINGS)
def test_thresholds_of_the_environment_stay(name: str) -> None:
    assert _share_of_faults("leave", **{name: _SETTINGS[name]}) > 0.5
