"""How benchmarks measure and how they print."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def best_s(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the fastest of `rounds`: the least disturbed one."""
    times = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times)


def ratio_line(name: str, value: str, ratio: float, limit: float, *, at_least: bool = False) -> bool:
    """Print `name: value, ratio R (limit L)`; True if the limit holds."""
    holds = ratio >= limit if at_least else ratio <= limit
    sign = ">=" if at_least else "<="
    print(
        f"{name}: {value}, ratio {ratio:.3g} (limit {sign} {limit:g}){'' if holds else '  NOT HELD'}",
        flush=True,
    )
    return holds


_HOLDER = """
import mmap, sys
size = int(sys.argv[1])
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if sys.argv[2] == "4k" and hasattr(mmap, "MADV_NOHUGEPAGE"):
    area.madvise(mmap.MADV_NOHUGEPAGE)
block = bytes(range(1, 251)) * 4294967
for at in range(0, size, 1 << 20):
    area[at:at + (1 << 20)] = block[at % 1000 : at % 1000 + (1 << 20)]
import ctypes
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(size_bytes: int, pages: str = "4k", *, program: str = _HOLDER) -> Iterator[tuple[int, int]]:
    """(pid, address) of a process that holds `size_bytes` of touched private memory.

    `program`: Python that fills it, prints the address and waits for the end of its input.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(size_bytes), pages],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.pid, int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()
