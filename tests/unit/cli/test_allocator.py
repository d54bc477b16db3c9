"""Memory that a daemon does not need any more goes back to the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
import numpy as np
from memtier_cli import allocator

def used_mib():
    return int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0]) / 1024

if sys.argv[1] == "settled":
    allocator.settle()
np.zeros(24 << 20, np.uint8).fill(1)  # a block this large, freed, raises glibc's threshold
before = used_mib()
large, small = [], []
for _ in range(100):
    large.append(np.ones(1 << 20, np.uint8))
    small.append(np.ones(64, np.uint8))  # after each large block, one that stays
large.clear()
if sys.argv[1] == "settled":
    allocator.release()
print(used_mib() - before)
"""


def grown_mib(how: str) -> float:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc: other C libraries do without")
def test_large_arrays_between_small_ones_are_given_back() -> None:
    """100 MiB in use, then none of it."""
    assert grown_mib("settled") < 3
