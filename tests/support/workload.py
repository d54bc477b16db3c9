"""A process with known hot and cold memory for tests on the real kernel."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id, read_stat_fields
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans

_PROGRAM = """
import json, mmap, os, struct, sys, time, ctypes
hot_mib, cold_mib, strips, write = map(int, sys.argv[1:5])
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
def area(mib):
    held = mmap.mmap(-1, (mib << 20) + 8192, flags=PRIVATE)  # the last pages stay a gap between mappings
    if sys.argv[5] == "4k":
        held.madvise(mmap.MADV_NOHUGEPAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    libc.mprotect(ctypes.c_void_p(address + (mib << 20)), ctypes.c_size_t(8192), 0)
    for at in range(0, mib << 20, 4096):
        held[at:at + 8] = at.to_bytes(8, "little")
    return held, address, mib << 20
libc = ctypes.CDLL(None)
hot, cold = [], []
for _ in range(strips):
    hot.append(area(hot_mib // strips))
    cold.append(area(cold_mib // strips))
notes = os.memfd_create("rounds")
os.ftruncate(notes, 4096)
rounds = mmap.mmap(notes, 4096)
user = int(sys.argv[6])
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else its files in /proc stay root's
struct.pack_into("dd", rounds, 0, time.monotonic(), 0.0)
where = {"hot": [a[1:] for a in hot], "cold": [a[1:] for a in cold], "rounds": f"/proc/{os.getpid()}/fd/{notes}"}
print(json.dumps(where), flush=True)
total = 0
began = time.monotonic()
longest = 0.0
while True:
    for held, _, size in hot:
        if write:
            for at in range(0, size, 4096):
                held[at] = total & 255
                total += 1
        else:
            total += sum(held[0:size:4096])
    # From the begin of the round before to the end of this one: no page was left alone for longer.
    longest = max(longest, time.monotonic() - began)
    began = time.monotonic()
    struct.pack_into("dd", rounds, 0, began, longest)
    time.sleep(0.02)
"""


@dataclass(frozen=True)
class Workload:
    """Where its memory is."""

    pid: int
    process: ProcessId
    hot: Spans
    cold: Spans
    popen: subprocess.Popen[str]
    major_faults: int
    """When it was ready."""
    rounds: BinaryIO
    """What it notes down: when its last round ended, and the longest time that it left a hot page alone."""

    def longest_pause_s(self) -> float:
        """For how long it left a hot page alone at most, or does so now."""
        ended_s, longest_s = struct.unpack("dd", os.pread(self.rounds.fileno(), 16, 0))
        return float(max(longest_s, time.monotonic() - ended_s))

    def hot_stayed(self, idle_s: float, *, came_back: float = 0.02) -> bool:
        """Whether at most 2 % of its hot memory is out or was, though what is idle for `idle_s` may go.

        On a machine with too much to do it may not run for so long: then its hot memory was idle, and rightly out.

        Args:
            came_back: the share that may have been read back from swap.
        """
        if self.longest_pause_s() > idle_s / 2:
            return True
        # The kernel's own count. 64: pages of the program's files that others had pushed out.
        faults = _major_faults(self.pid) - self.major_faults
        return self.swapped_share(self.hot) <= 0.02 and faults <= 64 + came_back * self.hot.total_bytes / PAGE_BYTES

    def swapped_share(self, spans: Spans) -> float:
        """Share of `spans` that is swapped out, by the process's own pagemap."""
        with Pagemap(Host(), self.pid) as pagemap:
            return pagemap.swapped_bytes(spans.starts, spans.ends) / spans.total_bytes


def _major_faults(pid: int) -> int:
    return int(read_stat_fields(Host(), pid)[12 - 3])


def _spans(areas: list[list[int]]) -> Spans:
    starts = np.array(sorted(address for address, _ in areas), np.uint64)
    sizes = np.array([size for _, size in sorted(areas)], np.uint64)
    assert not (starts % np.uint64(PAGE_BYTES)).any()
    return Spans(starts, starts + sizes)


@contextmanager
def workload(
    hot_mib: int, cold_mib: int, *, strips: int = 1, write: bool = False, pages: str = "4k", user: int = 0
) -> Iterator[Workload]:
    """A process that touches its hot memory every 20 ms; each strip is a mapping of its own.

    `user`: whose it becomes; 0 stays the caller's.
    """
    command = [
        sys.executable,
        "-c",
        _PROGRAM,
        str(hot_mib),
        str(cold_mib),
        str(strips),
        str(int(write)),
        pages,
        str(user),
    ]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    try:
        where = json.loads(popen.stdout.readline())
        process = process_id(Host(), popen.pid)
        with open(where["rounds"], "rb", buffering=0) as rounds:
            yield Workload(
                popen.pid, process, _spans(where["hot"]), _spans(where["cold"]), popen, _major_faults(popen.pid), rounds
            )
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()
