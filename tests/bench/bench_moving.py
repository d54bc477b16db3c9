"""What paging out costs beside the kernel's own work: the mover alone, an engine with a policy, and the rates reached.

The kernel's own work is the call that pages out. What else the moving thread takes is ours. Reading pagemap before and
after that call is measured apart, since that is system time; the rest, the deciding and keeping account, is user time
but for some small files. Ticks of the kernel's clock tell user from system time too, by 250 samples a second, of all
that the thread did.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from bench.measure import holder, ratio_line
from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import PAGE_IS_HUGE, PAGE_IS_PRESENT
from memtier_engine.engine.loop import Engine
from memtier_engine.engine.settings import EngineConfig, swap_config
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import U64, MoveTask, Spans
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.trackers.registry import why_not
from support.swap import temporary_zram_swap

MIB, GIB = 1 << 20, 1 << 30
USER_S_PER_GIB = 0.15
SHARE_OF_KERNEL = 0.1
RATES_MIB_PER_S = (10, 50, 200, 1000)
PACED_MIB_PER_S = 100

_HOLDER = """
import ctypes, mmap, os, sys
size, huge = int(sys.argv[1]), sys.argv[2] == "huge"
area = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
first = -at % (2 << 20)
block = b"".join(os.urandom(2048) + bytes(2048) for _ in range(256))
for offset in range(first, first + size, len(block)):
    area[offset:offset + len(block)] = block
print(at + first, flush=True)
sys.stdin.read()
"""


@contextmanager
def half_random(size_bytes: int, pages: str) -> Iterator[tuple[int, Spans]]:
    """(pid, where) of a process whose pages, "4k" or "huge", compress to about a half."""
    with holder(size_bytes, pages, program=_HOLDER) as (pid, start):
        yield pid, Spans(np.array([start], np.uint64), np.array([start + size_bytes], np.uint64))


@dataclass(slots=True)
class Spent:
    """CPU time of one thread in seconds, and what it brought."""

    cpu_s: float = 0.0
    call_s: float = 0.0
    """Of it, in the call that pages out."""
    look_s: float = 0.0
    """Of it, in reading pagemap."""
    call_elapsed_s: float = 0.0
    calls: int = 0
    user_s: float = 0.0
    """As ticks of the kernel's clock found it."""
    elapsed_s: float = 0.0
    out_bytes: int = 0
    split_bytes: int = 0
    """In RAM, and not part of a huge page."""
    scans_s: float = 0.0
    """Of `cpu_s`, in scans and decisions, and in what is set up once: programs loaded, files opened."""

    def done(self, began_s: float) -> None:
        """Take the times of this thread, in which nothing else was done."""
        self.elapsed_s, self.cpu_s = time.monotonic() - began_s, time.thread_time()
        self.user_s = resource.getrusage(resource.RUSAGE_THREAD).ru_utime

    def per_gib(self, seconds: float) -> float:
        return seconds * GIB / max(1, self.out_bytes)

    @property
    def ours_s(self) -> float:
        """Per GiB, of moving: all but the call and the looks."""
        return self.per_gib(self.cpu_s - self.scans_s - self.call_s - self.look_s)

    @property
    def kernel_s(self) -> float:
        return self.per_gib(self.call_s)

    @property
    def mib_per_s(self) -> float:
        return self.out_bytes / self.elapsed_s / MIB


@contextmanager
def _timed_calls(spent: Spent) -> Iterator[None]:
    original, read = syscalls.process_madvise, os.preadv

    def timed_read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        began_s = time.thread_time()
        try:
            return read(fd, buffers, offset)
        finally:
            spent.look_s += time.thread_time() - began_s

    def timed(pidfd: int, starts: U64, lengths: U64, advice: int) -> int:
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        try:
            return original(pidfd, starts, lengths, advice)
        finally:
            spent.call_s += time.thread_time() - began_cpu_s
            spent.call_elapsed_s += time.monotonic() - began_s
            spent.calls += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "process_madvise", timed)
        patch.setattr(os, "preadv", timed_read)
        yield


def measured(work: Callable[[Spent], None], pid: int, spans: Spans) -> Spent:
    """Have `work` page out in a thread of its own, whose times begin at 0."""
    spent = Spent()
    failures: list[BaseException] = []

    def thread() -> None:
        try:
            work(spent)
        except BaseException as failure:  # shown where it was asked for
            failures.append(failure)

    with _timed_calls(spent):
        worker = threading.Thread(target=thread)
        worker.start()
        worker.join()
    if failures:
        raise failures[0]
    with Pagemap(Host(), pid) as pagemap:
        spent.out_bytes = pagemap.swapped_bytes(spans.starts, spans.ends)
        start, end = int(spans.starts[0]), int(spans.ends[0])
        there, huge = (pagemap.scan_runs(start, end, mask=mask) for mask in (PAGE_IS_PRESENT, PAGE_IS_HUGE))
        spent.split_bytes = int((there[:, 1] - there[:, 0]).sum()) - int((huge[:, 1] - huge[:, 0]).sum())
    return spent


def by_mover(size: int, pages: str, mib_per_s: float | None, most_s: float = 60.0) -> Spent:
    """A task by nobody's decision, under this limit, until nine tenths are out."""
    with half_random(size, pages) as (pid, spans):

        def work(spent: Spent) -> None:
            began_s, moved = time.monotonic(), 0
            mover = Mover(MoverConfig(bandwidth_mib_per_s=mib_per_s), Host(), now_s=began_s)
            mover.add(MoveTask(process_id(Host(), pid), spans))
            while moved < 0.9 * size and (now_s := time.monotonic()) < began_s + most_s:
                moved += sum(outcome.moved_bytes for outcome in mover.pump(now_s))
                time.sleep(mover.wait_s() or 0.0)
            spent.done(began_s)
            mover.close()

        return measured(work, pid, spans)


def by_engine(size: int, pages: str, mib_per_s: float | None, most_s: float = 60.0) -> Spent:
    """Policy `age` with tracker `bpf`, until nine tenths are out: what moves as the engine's loop does."""
    config = EngineConfig(
        tracker="bpf",
        scan_interval_ms=500,
        mover=MoverConfig(bandwidth_mib_per_s=mib_per_s),
        guards=GuardsConfig(start_grace_s=0.0),
    )
    with half_random(size, pages) as (pid, spans):

        def work(spent: Spent) -> None:
            engine = Engine(PidsTarget(Host(), [pid]), swap_config(config, 1.0))
            spent.scans_s = time.thread_time()
            began_s, moved, first = time.monotonic(), 0, True
            try:
                while moved < 0.9 * size and (now_s := time.monotonic()) < began_s + most_s:
                    began_cpu_s, apart_s = time.thread_time(), spent.call_s + spent.look_s
                    report, due_s = engine.advance(now_s)
                    if report is not None:
                        moved = report.moved_bytes_total
                    if report is not None or first:
                        spent.scans_s += time.thread_time() - began_cpu_s - (spent.call_s + spent.look_s - apart_s)
                    first = first and not spent.calls
                    time.sleep(max(0.0, due_s - time.monotonic()))
                spent.done(began_s)
            finally:
                engine.close()

        return measured(work, pid, spans)


def cost_lines(name: str, spent: Spent, pages: str) -> bool:
    """Print what was spent; True if it is within the limits."""
    in_all = f", {spent.per_gib(spent.cpu_s - spent.call_s):.3f} with scans" if spent.scans_s else ""
    held = ratio_line(
        f"{name}: CPU beside the kernel's per GiB",
        f"{spent.ours_s:.3f} s and {spent.per_gib(spent.look_s):.3f} for looks{in_all} (user time by ticks "
        f"{spent.per_gib(spent.user_s):.3f}), "
        f"{spent.mib_per_s:.0f} MiB/s in {spent.calls} calls",
        spent.ours_s / USER_S_PER_GIB,
        1.0,
    )
    kernel = f"{spent.kernel_s:.2f} s per GiB"
    held &= ratio_line(f"{name}: against the kernel's own", kernel, spent.ours_s / spent.kernel_s, SHARE_OF_KERNEL)
    if pages == "huge":
        split_mib = spent.split_bytes / MIB
        held &= ratio_line(
            f"{name}: of what is still in RAM, no huge page any more", f"{split_mib:g} MiB", split_mib, 0
        )
    return held


def rate_line(mib_per_s: int) -> bool:
    """Print what was reached under this limit; True if it is what was asked for, or what the calls by themselves do."""
    with temporary_zram_swap(2 * GIB, calm=False):
        spent = by_mover(min(4 * mib_per_s, 1024) * MIB, "4k", mib_per_s)
    kernel = spent.out_bytes / spent.call_elapsed_s / MIB
    off = max(1 - spent.mib_per_s / min(mib_per_s, kernel), spent.mib_per_s / mib_per_s - 1)
    name = f"reached at {mib_per_s} MiB/s, where the kernel does {kernel:.0f}: distance"
    return ratio_line(name, f"{spent.mib_per_s:.1f} MiB/s", off, 0.05)


def run() -> bool:
    """Print all lines; True if all limits hold."""
    held = True
    with temporary_zram_swap(2 * GIB, calm=False):
        by_mover(16 * MIB, "4k", None)  # what is imported and made once is no cost of a GiB
    for pages in ("4k", "huge"):
        for limit in (PACED_MIB_PER_S, None):
            with temporary_zram_swap(2 * GIB, calm=False):
                spent = by_mover(512 * MIB, pages, limit)
            held &= cost_lines(f"mover, {pages} pages, {limit or 'no'} MiB/s", spent, pages)
    why = why_not("bpf", Host())
    if why is not None:
        print(f"tracker bpf does not work here: {why[0]}: {why[1]}")
        held = False
    else:
        for pages in ("4k", "huge"):
            with temporary_zram_swap(2 * GIB):
                spent = by_engine(512 * MIB, pages, PACED_MIB_PER_S)
            held &= cost_lines(f"policy age, tracker bpf, {pages} pages, {PACED_MIB_PER_S} MiB/s", spent, pages)
    for mib_per_s in RATES_MIB_PER_S:
        held &= rate_line(mib_per_s)
    return held
