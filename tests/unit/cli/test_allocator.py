"""Memory that a daemon does not need any more goes back to the system."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

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


_START_OVER = """
import ctypes, mmap, sys
import numpy as np
from memtier_cli import allocator

def file_kib():
    return int(open("/proc/self/status").read().partition("RssFile:")[2].split()[0])

# A private mapping of a file that was written to, and may now only be read.
with open(sys.argv[1], "r+b") as file:
    changed = mmap.mmap(file.fileno(), 4 * mmap.PAGESIZE, mmap.MAP_PRIVATE)
changed[:5] = b"ours!"
address = ctypes.addressof(ctypes.c_char.from_buffer(changed))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4 * mmap.PAGESIZE), 1) == 0
before = file_kib()
allocator.unmap_idle_code()
print(file_kib() / before, changed[:5].decode(), int(np.arange(10).sum()))
"""


def test_code_that_the_start_used_goes_and_what_was_written_stays(tmp_path: Path) -> None:
    """More than a quarter of what is mapped, numpy works on, and a changed page keeps its change."""
    file = tmp_path / "file"
    file.write_bytes(bytes(4 * mmap.PAGESIZE))
    done = subprocess.run([sys.executable, "-c", _START_OVER, file], capture_output=True, text=True, check=True)
    left, changed, total = done.stdout.split()
    assert float(left) < 0.75
    assert (changed, total) == ("ours!", "45")
