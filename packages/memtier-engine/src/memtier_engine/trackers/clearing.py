"""Ways to clear accessed bits, behind one interface: of the pages asked for and no others, no lock held for long.

`Cold` is the one to have: process_madvise(MADV_COLD) on what was touched, at most 1 MiB of small pages a call. The
kernel holds the mmap lock for reading meanwhile, some 40 us: page faults do not wait for it (they take the lock of one
mapping, Linux 6.4), mmap(2) and munmap(2) wait that long. It flushes the TLBs of what it clears, so a CPU that goes on
using a page sets the bit again. Source: mm/madvise.c, madvise_cold_or_pageout_pte_range().

What it passes over keeps its bit, and so counts as in use:
- pages that other processes map too, and locked ones. They cannot be paged out or moved either.
- pages that wait in a CPU's batch to join an LRU list, up to 31 per CPU, for ever on a CPU that rests. Those too cannot
  go out; `drain_batches` has the kernel put them on their list, and then they can.

It also puts what it clears on the inactive list, which is its price under memory pressure: docs/bpf.md has it measured.

`ClearRefs` is for who may not use that one, and for small processes that share most of their memory: writing to
/proc/PID/clear_refs takes the mmap lock for writing and walks all memory of the process, tracked or not: 11 to 35 ms
per GiB in which every page fault and every mmap(2) waits.
Source: fs/proc/task_mmu.c, clear_refs_write().
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from loguru import logger

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_COLD, UIO_MAXIOV
from memtier_engine.closing import Closing
from memtier_engine.errors import AccessDenied, KernelCallError, ProcessGone
from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, soft_dirty
from memtier_engine.hostfs.probe_base import TrialPages
from memtier_engine.hostfs.proc import CLEAR_REFS_REFERENCED, CLEAR_REFS_SOFT_DIRTY, clear_refs
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64, Bools, ProcessId, Spans
from memtier_engine.trackers.common import overlaps

GAP_PAGES = 16
"""Touched pages with fewer untouched ones between them are cleared as one range: looking at 16 pages costs the kernel
as much as another range does (it looks up the mapping, drains a batch, flushes the TLBs for each)."""
CALL_PAGES = 256
"""1 MiB. Larger calls cost as much CPU and held up mmap(2) for longer: 1, 4, 16, 64 MiB made 2-4, 1-12, 1-9, 7-15 ms
at worst."""
CALL_BYTES = CALL_PAGES << PAGE_SHIFT
CALL_COST = 512
RANGE_COST = 8
"""Of a range besides its pages, in pages."""
HUGE_COST = 64
"""Of a range that is one huge page: one entry, but a TLB flush of its own."""
SMALL_BYTES = 64 << 20
"""clear_refs walks that much in 1 to 2 ms. Everything the process maps counts, not only what is tracked."""
SHARED_PART = 16
"""More than one page in so many: less is not worth a walk through all."""
UNDISTURBED_S = 0.001
_ONE_PAGE = Path(__file__).with_name("__init__.py")
"""A file on a disk that is not empty and has one page, for `drain_batches`."""
DRAIN_SHARE = 0.02
"""Of the time, at most, is spent on draining, which has a worker run on each CPU that has a batch."""


class Ranges(NamedTuple):
    """What to clear."""

    spans: Spans
    huge: Bools | None = None  # [n] one page of 2 MiB each; None: none is

    @staticmethod
    def none() -> Ranges:
        """Nothing."""
        return Ranges(Spans.empty())


class Clearing(Protocol):
    """A way to clear accessed bits."""

    whole: bool
    """True: `clear` clears everything the process has, so it is called once, at the end of a scan."""

    def flushes(self) -> bool:
        """Whether the TLBs forget what is cleared: where not, a page in use can look idle."""

    def clear(self, files: ProcessFiles, ranges: Ranges, pieces: Spans) -> None:
        """Clear the bits of `ranges`, as far as the kernel does.

        Args:
            files: of the process.
            ranges: see `ranges_of`.
            pieces: of mappings: the borders within a range, should the kernel refuse to go on somewhere in it.
        Raises:
            ProcessGone: it exited.
            AccessDenied: it is somebody else's, or cannot be reached by a pidfd.
        """


class Cold:
    """MADV_COLD, in small calls."""

    whole = False

    def __init__(self) -> None:
        self.calls = 0

    def flushes(self) -> bool:
        """It does: tlb_finish_mmu() after each range of which a bit was cleared."""
        return True

    def clear(self, files: ProcessFiles, ranges: Ranges, pieces: Spans) -> None:
        """See `Clearing`."""
        try:
            if len(ranges.spans):
                refused = self._advise(files.pidfd, ranges)
                if refused is not None:
                    parts = overlaps(refused, pieces).spans
                    if len(parts) > len(refused):
                        self._advise(files.pidfd, Ranges(parts))
        except ProcessGone:
            why = files.why_not_by_pidfd()
            if why is None:
                raise
            raise AccessDenied(why, errno.ESRCH) from None

    def _advise(self, pidfd: int, ranges: Ranges) -> Spans | None:
        """All of `ranges`; those that the kernel refused. None: it did not refuse any."""
        starts, ends = ranges.spans.starts, ranges.spans.ends
        rows = np.column_stack((starts, ends - starts))
        sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(rows[:, 1])))
        refused: list[int] = []
        first = 0
        with Undisturbed() as undisturbed:
            for last in _calls(rows[:, 1] >> np.uint64(PAGE_SHIFT), ranges.huge):
                while first < last:
                    undisturbed.breathe()
                    try:
                        advised = syscalls.process_madvise_rows(pidfd, rows, first, last, MADV_COLD)
                    except KernelCallError as failure:
                        # EINVAL: locked memory, hugetlbfs, device memory. ENOMEM: unmapped meanwhile.
                        if failure.errno not in (errno.EINVAL, errno.ENOMEM, errno.EINTR):
                            raise
                        advised = 0
                    self.calls += 1
                    done = advised + int(sums[first])
                    if done >= int(sums[last]):
                        first = last
                    else:  # it counts whole ranges, and stops at the first that it refuses
                        stopped = max(first, int(np.searchsorted(sums, done, side="right")) - 1)
                        refused.append(stopped)
                        first = stopped + 1
        return Spans(starts[refused], ends[refused]) if refused else None


def _calls(pages: U64, huge: Bools | None) -> list[int]:
    """Where calls end, so that none costs the kernel more than `CALL_COST` and one range."""
    costs = pages.astype(np.int64) + RANGE_COST
    if huge is not None:
        costs[huge] = HUGE_COST
    numbers = (np.cumsum(costs) - costs) // CALL_COST
    ends = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    counts = np.diff(np.concatenate(([0], ends, [len(pages)])))
    if int(counts.max()) > UIO_MAXIOV:  # cannot be, as long as CALL_COST / RANGE_COST is less
        raise AssertionError("too many ranges in one call")
    return [*ends.tolist(), len(pages)]


class ClearRefs:
    """/proc/PID/clear_refs, all of the process."""

    whole = True

    def __init__(self, host: Host) -> None:
        self._host = host
        self._flush: bool | None = None

    def flushes(self) -> bool:
        """See `flush_is_free`."""
        if self._flush is None:
            self._flush = flush_is_free(self._host)
        return self._flush

    def clear(self, files: ProcessFiles, ranges: Ranges, pieces: Spans) -> None:
        """See `Clearing`: here all of it, whatever is asked for."""
        files.write("clear_refs", str(CLEAR_REFS_REFERENCED))
        if self.flushes():
            files.write("clear_refs", str(CLEAR_REFS_SOFT_DIRTY))


class BestClearing:
    """`Cold` where that is allowed, `ClearRefs` of the processes, or on the kernels, where it is not."""

    def __init__(self, host: Host, *, cold: bool = True) -> None:
        """`cold`: False: `ClearRefs` for all."""
        self._cold = Cold() if cold and cold_works() else None
        self.refs = ClearRefs(host)
        self._refused: set[ProcessId] = set()

    def flushes(self) -> bool:
        """Of the way that is used by default."""
        return (self._cold or self.refs).flushes()

    def of(self, process: ProcessId) -> Clearing:
        """The way for this process."""
        return self.refs if self._cold is None or process in self._refused else self._cold

    def refused(self, process: ProcessId, failure: AccessDenied) -> None:
        """The kernel does not let us advise on `process`: the other way from now on."""
        if self._cold is not None and process not in self._refused:
            level = "DEBUG" if self._refused else "INFO"  # a thousand may be refused, for one reason
            self._refused.add(process)
            logger.log(level, "process {}: accessed bits are cleared by clear_refs: {}", process.pid, failure)

    def all_is_better(self, files: ProcessFiles, touched: int, shared: int) -> bool:
        """Whether to clear everything of a process, of which `shared` of `touched` pages belong to others too.

        For one that is so small that nobody notices, and shares much of its memory (a forked child): then all of it is
        known page by page. Not where that would leave the TLBs as they are: what is in use would look idle.
        """
        if shared * SHARED_PART <= touched or not self.refs.flushes():
            return False
        resident_pages = int(files.read("statm").split()[1])
        return resident_pages << PAGE_SHIFT <= SMALL_BYTES

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """Forget all other processes."""
        self._refused &= processes


def cold_works() -> bool:
    """Whether MADV_COLD for processes is there (Linux 5.10) and allowed, as far as a trial on ourselves tells."""
    trial = TrialPages(1)
    try:
        pidfd = syscalls.pidfd_open(os.getpid())
        try:
            rows = np.array([[trial.start, trial.end - trial.start]], np.uint64)
            return syscalls.process_madvise_rows(pidfd, rows, 0, 1, MADV_COLD) > 0
        finally:
            os.close(pidfd)
    except KernelCallError:
        return False
    finally:
        trial.close()


def flush_is_free(host: Host) -> bool:
    """Whether clear_refs 4 does nothing on this kernel but flush the TLBs of the process.

    clear_refs 1 clears the accessed bits without a flush, and a page that a CPU has in its TLB does not set the bit
    again: a busy process with a small working set looked idle by half (seen on 6.18). clear_refs 4 flushes; without
    CONFIG_MEM_SOFT_DIRTY that is all it does, in 1 ms per GiB. With it, every page would be write-protected, which
    costs the process a fault per page written: then we leave it to the kernel's own flushes.
    Source: fs/proc/task_mmu.c, clear_refs_write().
    """
    trial = TrialPages(1)
    try:
        clear_refs(host, host.own_pid, CLEAR_REFS_SOFT_DIRTY)
        trial.touch(0, 1)
        with Pagemap(host, host.own_pid) as pagemap:
            return not soft_dirty(pagemap.read(trial.start, trial.end)).any()
    except KernelCallError:  # EINVAL: newer kernels refuse it without CONFIG_MEM_SOFT_DIRTY
        return False
    finally:
        trial.close()


def ranges_of(runs: Spans, pieces: Spans, huge: Bools | None = None) -> Ranges:
    """Runs of touched pages as ranges for `Clearing.clear`.

    Ranges end at multiples of 1 MiB, so that a large folio of up to that size is not cut: the kernel splits what it is
    asked to clear a part of. For the same reason a huge page is one range of its own, and left out if its pages are not
    all there.

    Args:
        runs: ascending, none over the end of a huge page, all within `pieces`.
        pieces: what is tracked: no range reaches outside.
        huge: bool[n]: which of the runs belong to pages of 2 MiB. None: none.
    """
    small = runs if huge is None else Spans(runs.starts[~huge], runs.ends[~huge])
    found = in_steps(_bridged(small, pieces), CALL_BYTES)
    if huge is None:
        return Ranges(found)
    whole = huge & (runs.ends - runs.starts == np.uint64(2 * CALL_BYTES))
    starts = np.concatenate((found.starts, runs.starts[whole]))
    order = np.argsort(starts, kind="stable")
    ends = np.concatenate((found.ends, runs.ends[whole]))
    return Ranges(Spans(starts[order], ends[order]), order >= len(found))


def _bridged(runs: Spans, pieces: Spans) -> Spans:
    """`runs` without the small gaps between them, as far as these are tracked too."""
    if len(runs) < 2:
        return runs
    apart = runs.starts[1:] - runs.ends[:-1] > np.uint64(GAP_PAGES << PAGE_SHIFT)
    holes = pieces.starts[1:][pieces.starts[1:] != pieces.ends[:-1]]
    if len(holes):
        island = np.searchsorted(holes, runs.starts, side="right")
        apart |= island[1:] != island[:-1]
    return Spans(runs.starts[np.concatenate(([True], apart))], runs.ends[np.concatenate((apart, [True]))])


def in_steps(spans: Spans, step_bytes: int) -> Spans:
    """`spans` cut at multiples of `step_bytes`; at multiples of 2 MiB no huge page is cut."""
    size = np.uint64(step_bytes)
    first = spans.starts // size
    counts = ((spans.ends - np.uint64(1)) // size - first).astype(np.int64) + 1
    rows = np.repeat(np.arange(len(spans)), counts)
    steps = first[rows] + (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.uint64)
    starts = np.maximum(spans.starts[rows], steps * size)
    return Spans(starts, np.minimum(spans.ends[rows], (steps + np.uint64(1)) * size))


class Undisturbed(Closing):
    """For the time of a block, the calling thread is not put aside while it holds another process's lock.

    The kernel lets go of a CPU in the middle of a call if another thread is due, and the lock is held until we are due
    again: with 8 busy threads on 2 CPUs, and the engine at nice 5, mmap(2) of a target waited 99 to 186 ms for a scan.
    So the thread is a real-time one, of the lowest priority, for a millisecond at a time. Needs CAP_SYS_NICE, as
    MADV_COLD does; where it is not allowed (a cpu cgroup v1 without cpu.rt_runtime_us), nothing changes.
    """

    def __init__(self) -> None:
        self._policy, self._parameters = os.SCHED_OTHER, os.sched_param(0)
        try:
            self._policy, self._parameters = os.sched_getscheduler(0), os.sched_getparam(0)
            self._allowed = self._policy in (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)
        except OSError:  # a seccomp filter
            self._allowed = False
        self._until_s = -float("inf")

    def breathe(self) -> None:
        """Before each call: others who are due run now, and not during the call."""
        now_s = time.monotonic()
        if self._allowed and now_s >= self._until_s:
            self.close()
            try:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            except OSError:
                self._allowed = False
                return
            self._until_s = time.monotonic() + UNDISTURBED_S

    def close(self) -> None:
        """Be again what it was."""
        if self._until_s > 0:
            os.sched_setscheduler(0, self._policy, self._parameters)
            self._until_s = -float("inf")


class Batches:
    """The CPUs' batches of pages on their way to an LRU list, drained when asked for, but not too often."""

    def __init__(self) -> None:
        self.most_pages = 31 * (os.cpu_count() or 1)  # PAGEVEC_SIZE of Linux 6.9 and later; 15 before
        self._next_s = -float("inf")

    def drain(self) -> bool:
        """Have the kernel empty them; False if that was a moment ago, or cannot be done."""
        began_s = time.monotonic()
        if began_s < self._next_s:
            return False
        done = drain_batches()
        ended_s = time.monotonic()
        self._next_s = ended_s + (ended_s - began_s) / DRAIN_SHARE
        return done


def drain_batches() -> bool:
    """Have every CPU put the pages of its batch on their LRU lists; False if this system does not let us.

    POSIX_FADV_DONTNEED on a page that cannot be dropped because it is mapped makes the kernel empty the batches of the
    CPUs that have any, to try again. Nothing is dropped. It waits for a worker on each of these CPUs: 0.02 ms where
    there is none, 2 to 7 ms on a busy machine. The file has one page: of a larger one that was written lately, such as
    the interpreter in an image that was just unpacked, the first page is part of a large folio, which the kernel passes
    over. Source: mm/fadvise.c, generic_fadvise(); mm/filemap.c, find_lock_entries().
    """
    try:
        fd = os.open(_ONE_PAGE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
                mapped[0]
                os.posix_fadvise(fd, 0, PAGE_BYTES, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True
