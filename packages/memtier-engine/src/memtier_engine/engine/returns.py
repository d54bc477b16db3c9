"""What the kernel counted of faults while pages came back: was memory wanted back, or freed and filled anew?

A page that we paged out and that is in RAM at the next scan was swapped in, or its process freed it (MADV_DONTNEED,
munmap(2), execve(2)) and touched the address anew, which is nothing to us. Only faults tell the two apart.
"""

from __future__ import annotations

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import read_stat_fields
from memtier_engine.model import ProcessId
from memtier_engine.pages.spaceledger import SwapInsSeen
from memtier_engine.trackers.bpf.feed import SwapIns, SwapInWatch

_MAJFLT = 12 - 3
"""Field of /proc/PID/stat, counted from the third one: major faults of all threads, those that ended among them.

The counter of swap-ins sees what a program touches itself; a buffer given to read(2) is touched by the kernel in its
name (tracepoint page_fault_kernel), which only this has. Source: proc_pid_stat(5); mm/memory.c, mm_account_fault().
"""


class ReturnsWatch:
    """One per engine."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._major: dict[ProcessId, int] = {}

    def read(self, watch: SwapInWatch, each: dict[ProcessId, SwapIns]) -> dict[ProcessId, SwapInsSeen]:
        """To be asked after each scan: what was seen of the processes of which all of it is known.

        Costs one small file per process that memory went out of.
        """
        found: dict[ProcessId, SwapInsSeen] = {}
        major: dict[ProcessId, int] = {}
        for process in watch.covered:
            try:
                major[process] = int(read_stat_fields(self._host, process.pid)[_MAJFLT])
            except (KernelCallError, ValueError, IndexError):
                continue
            before = self._major.get(process)
            if before is not None:
                counted = each.get(process, SwapIns())
                found[process] = SwapInsSeen(counted.regions, max(0, major[process] - before - counted.waited))
        self._major = major
        return found
