"""Page faults of processes per 2 MiB region, counted in the kernel: refaults for any engine, whatever its tracker.

A swap-in is a fault at a page table entry that holds a swap slot. Major ones, which waited for the device, come with
their duration. The entries are read by the page-table walk of `access.bpf.c`.
"""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memtier_engine.closing import Closing
from memtier_engine.errors import KernelCallError, MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.model import U64, ProcessId
from memtier_engine.trackers.bpf import attach, paging
from memtier_engine.trackers.bpf.loaders import Loaded, load
from memtier_engine.trackers.bpf.program import SharedWalker
from memtier_engine.trackers.bpf.rights import explained

TRACEPOINT = "page_fault_user"
_KEY_WORDS = 2
_COUNT_WORDS = 7
_SIZES = {"watched": 1 << 15, "faults": 1 << 16, "pending": 1 << 13}
_NS_PER_S = 1e9
_NONE = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True)
class FaultTable:
    """Faults of one process since the last reading, one row [n] per 2 MiB region that had any."""

    regions: U64  # address of the first byte, ascending
    faults: U64
    reads: U64 | None  # None: reads and writes cannot be told apart here
    writes: U64 | None
    not_present: U64  # of `faults`: no page was mapped (the others: copy on write, access rights)
    swap_ins: U64  # of `not_present`: the page was in swap, or in the swap cache
    major: U64  # of `swap_ins`: had to wait for the swap device
    major_s: NDArray[np.float64]
    """Seconds that the `major` ones took in all."""

    @staticmethod
    def empty() -> FaultTable:
        """No fault."""
        return FaultTable(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE, np.zeros(0))


@dataclass(slots=True)
class FaultTotals:
    """Sums over everything read so far."""

    faults: int = 0
    swap_ins: int = 0
    major: int = 0
    major_s: float = 0.0
    lost: int = field(default=0)
    """Faults that found the map full: read more often."""


class FaultCounter(Closing):
    """Counts from `watch` on; gone with `close`, or with this process."""

    def __init__(self, host: Host, *, loader: str = "auto", tracepoint: str | None = TRACEPOINT) -> None:
        """Load and attach.

        Args:
            tracepoint: where faults are counted. None, or one that this kernel lacks: the software event page-faults,
                which does not tell reads from writes.
        Raises:
            TrackerUnavailable: it does not work here, and why.
        """
        self._fds: list[int] = []
        self._watched: frozenset[ProcessId] = frozenset()
        self._loaded: Loaded | None = None
        self.totals = FaultTotals()
        self._areas: list[mmap.mmap] = []
        attach.need_initial_pid_namespace(host)
        shared = SharedWalker(host, loader)  # verifies what the walk in the fault's program relies on
        try:
            walker = shared.walker
            self._loaded = load(host, ("on_fault", "on_perf_fault", "on_major_fault"), loader, _SIZES)
            settings = self._mapped("settings")
            settings[0, :3] = walker.base, walker.mask, walker.top_shift
            self._lost = self._mapped("lost")
            self.reads_and_writes = self._attach(host, tracepoint)
        except MemtierError as failure:
            self.close()
            raise explained(host, failure) from None
        finally:
            shared.close()

    def _mapped(self, name: str) -> U64:
        assert self._loaded is not None
        area = mmap.mmap(self._loaded.map_fd(name), mmap.PAGESIZE, mmap.MAP_SHARED)
        self._areas.append(area)
        return np.frombuffer(area, np.uint64).reshape(1, -1)

    def _attach(self, host: Host, tracepoint: str | None) -> bool:
        assert self._loaded is not None
        cpus = attach.online_cpus(host)
        self._fds += attach.attach_perf_event(
            self._loaded.program_fd("on_major_fault"),
            attach.PERF_TYPE_SOFTWARE,
            attach.PERF_COUNT_SW_PAGE_FAULTS_MAJ,
            cpus,
        )
        if tracepoint is not None:
            try:
                self._fds.append(attach.attach_raw_tracepoint(tracepoint, self._loaded.program_fd("on_fault")))
                return True
            except KernelCallError as failure:
                if failure.errno != errno.ENOENT:
                    raise
        self._fds += attach.attach_perf_event(
            self._loaded.program_fd("on_perf_fault"),
            attach.PERF_TYPE_SOFTWARE,
            attach.PERF_COUNT_SW_PAGE_FAULTS,
            cpus,
        )
        return False

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """The whole set to count from now on; call again when it changes. Beyond 32 768 processes some are left out."""
        assert self._loaded is not None
        self._watched = attach.follow(self._loaded.map_fd("watched"), self._watched, processes)

    def read(self) -> dict[ProcessId, FaultTable]:
        """What happened since the last reading, by process; those without faults are left out."""
        assert self._loaded is not None
        keys, counts = attach.take_all(self._loaded.map_fd("faults"), _KEY_WORDS, _COUNT_WORDS)
        self.totals.lost = int(self._lost[0, 0])
        sums = counts.sum(axis=0)
        self.totals.faults += int(sums[2])
        self.totals.swap_ins += int(sums[4])
        self.totals.major += int(sums[5])
        self.totals.major_s += float(sums[6]) / _NS_PER_S
        rows = attach.rows_by_process(keys, self._watched)
        return {process: self._table(keys[at, 0], counts[at]) for process, at in rows.items()}

    def _table(self, numbers: U64, counts: U64) -> FaultTable:
        known = self.reads_and_writes
        return FaultTable(
            regions=numbers * np.uint64(paging.BLOCK_BYTES),
            faults=counts[:, 2],
            reads=counts[:, 0] if known else None,
            writes=counts[:, 1] if known else None,
            not_present=counts[:, 3],
            swap_ins=counts[:, 4],
            major=counts[:, 5],
            major_s=counts[:, 6] / _NS_PER_S,
        )

    def close(self) -> None:
        """Detach and unload. Safe to call twice."""
        attach.close_all(self._fds)
        self._lost = np.zeros((1, 1), np.uint64)
        for area in self._areas:
            try:
                area.close()
            except BufferError:  # an error's traceback still refers to a view; it goes with that
                pass
        self._areas.clear()
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None
