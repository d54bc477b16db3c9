"""A process with known hot and cold memory: `python -m ...demo_scene.workload HOT_MIB COLD_MIB LAYOUT`.

Half of each kind lies in a mapping of its own. The other half is interleaved: LAYOUT `mappings` alternates small
mappings, with a gap between them; `pages` alternates runs of a few pages within one mapping. One JSON line says
where its memory is and how long a round of touching takes; then it touches each hot page until it is killed.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time

import numpy as np
from numpy.typing import NDArray

MIB = 1 << 20
PAGE = mmap.PAGESIZE
STRIPS = 16
HOT_RUN_PAGES = 4
TOUCH_INTERVAL_S = 0.05


class Area:
    """A private anonymous mapping with an inaccessible page at its end, which keeps it apart from the next."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = mmap.mmap(-1, size_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        end = ctypes.c_void_p(self.address + size_bytes)
        if libc.mprotect(end, ctypes.c_size_t(PAGE), ctypes.c_int(0)) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.view: NDArray[np.uint8] = np.frombuffer(self.memory, np.uint8, size_bytes)
        # Half random, half zero in every page: compresses about as well as the memory of real programs.
        noise = np.frombuffer(os.urandom(PAGE // 2), np.uint8)
        pages = self.view.reshape(-1, PAGE)
        pages[:, : PAGE // 2] = noise
        pages[:, :8] = np.arange(len(pages), dtype=np.uint64).view(np.uint8).reshape(-1, 8)

    def range(self, first: int, last: int) -> tuple[int, int]:
        """Addresses of the bytes from `first` to `last`."""
        return self.address + first, self.address + last


def lay_out(
    hot_mib: int, cold_mib: int, layout: str
) -> tuple[list[NDArray[np.uint8]], list[tuple[int, int]], list[tuple[int, int]], list[Area]]:
    """(hot views, hot ranges, cold ranges, areas)."""
    hot, cold = Area(hot_mib * MIB // 2), Area(cold_mib * MIB // 2)
    areas = [hot, cold]
    views = [hot.view]
    hot_ranges, cold_ranges = [hot.range(0, len(hot.view))], [cold.range(0, len(cold.view))]
    if layout == "mappings":
        for _ in range(STRIPS):
            warm, chill = Area(hot_mib * MIB // 2 // STRIPS), Area(cold_mib * MIB // 2 // STRIPS)
            areas += [warm, chill]
            views.append(warm.view)
            hot_ranges.append(warm.range(0, len(warm.view)))
            cold_ranges.append(chill.range(0, len(chill.view)))
    else:
        mixed = Area((hot_mib + cold_mib) * MIB // 2)
        areas.append(mixed)
        run = HOT_RUN_PAGES * PAGE
        period = run * (hot_mib + cold_mib) // hot_mib
        for first in range(0, len(mixed.view), period):
            views.append(mixed.view[first : first + run])
            hot_ranges.append(mixed.range(first, first + run))
            cold_ranges.append(mixed.range(first + run, min(first + period, len(mixed.view))))
    return views, hot_ranges, cold_ranges, areas


def main() -> None:
    """Run until killed."""
    views, hot, cold, _areas = lay_out(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    parent = os.getppid()
    round_s = float("inf")
    for _ in range(3):
        began_s = time.monotonic()
        touch(views)
        round_s = min(round_s, time.monotonic() - began_s + TOUCH_INTERVAL_S)
    print(json.dumps({"hot": hot, "cold": cold, "round_s": round_s}), flush=True)
    while os.getppid() == parent:  # an orphan ends itself
        touch(views)
        time.sleep(TOUCH_INTERVAL_S)


def touch(views: list[NDArray[np.uint8]]) -> None:
    """Write to every hot page."""
    for view in views:
        view[16::PAGE] += 1


if __name__ == "__main__":
    main()
