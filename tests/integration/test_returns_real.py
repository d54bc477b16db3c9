"""On the real kernel: memory that is used now and then stops going out, and what a process frees is not "back"."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.engine.report import StepReport
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.pagemap import Pagemap, swapped
from memtier_engine.model import PAGE_BYTES, PageChunk, ProcessId, Spans, Tracker
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.trackers.registry import create_tracker, why_not
from support.guards import OWN_GUARDS
from support.swap import temporary_zram_swap

_WHY = why_not("bpf", Host())
pytestmark = pytest.mark.skipif(
    _WHY is not None, reason=f"BPF does not work here: {_WHY}; run as root, or `make e2e` in the test VM"
)
MIB = 1 << 20
SIZE = 64 * MIB
SCANS_HELD = 20  # five times as many as make a page idle
_PROGRAM = r"""
import mmap, os, sys
SIZE = int(sys.argv[1])
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
def fill(area):
    block = os.urandom(1024) + bytes(3072)
    for at in range(0, SIZE, 4096):
        area[at:at + 4096] = block
def new():
    area = mmap.mmap(-1, SIZE, flags=FLAGS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    return area
area = new()
fill(area)
print("ready", flush=True)
for line in sys.stdin:
    order = line.strip()
    if order == "touch":
        sum(area[::4096])
    elif order == "read":  # the kernel writes into the buffer, in the program's name
        with open("/dev/zero", "rb", buffering=0) as zeros:
            for at in range(0, SIZE, MIB := 1 << 20):
                zeros.readinto(memoryview(area)[at:at + MIB])
    elif order == "free":
        area.madvise(mmap.MADV_DONTNEED)
    elif order == "unmap":
        area.close()
        area = new()
    elif order == "fill":
        fill(area)
    elif order == "refill":
        area.madvise(mmap.MADV_DONTNEED)
        fill(area)
    elif order == "exec":
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    print("done", flush=True)
"""


@contextmanager
def program() -> Iterator[subprocess.Popen[str]]:
    """A process with `SIZE` bytes that does what it is told."""
    popen = subprocess.Popen(
        ["setarch", "-R", sys.executable, "-c", _PROGRAM, str(SIZE)],  # addresses are the same after execve(2)
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert popen.stdout is not None
    try:
        popen.stdout.readline()
        yield popen
    finally:
        popen.kill()
        popen.communicate()


def tell(popen: subprocess.Popen[str], order: str) -> None:
    assert popen.stdin is not None
    assert popen.stdout is not None
    popen.stdin.write(f"{order}\n")
    popen.stdin.flush()
    popen.stdout.readline()


class SwapTelling:
    """A tracker whose chunks say what is in swap."""

    page_exact = True
    own_accesses_only = False

    def __init__(self, inner: Tracker) -> None:
        self._inner = inner
        self.name = inner.name
        self.watch, self.close = inner.watch, inner.close

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        with Pagemap(Host(), process.pid) as pagemap:
            for found in self._inner.scan(process, spans):
                for part in found.parts():
                    if part.swapped is None:
                        end = part.start + len(part.resident) * PAGE_BYTES
                        part = replace(part, swapped=swapped(pagemap.read(part.start, end)) & ~part.resident)
                    yield part


def engine_on(popen: subprocess.Popen[str], *, scan_ms: int = 500, idle_ms: int = 1500) -> Engine:
    config = EngineConfig(
        guards=OWN_GUARDS,
        scan_interval_ms=scan_ms,
        policy=AgePolicyConfig(interval_ms=scan_ms, swap_out_ms=idle_ms),
        mover=MoverConfig(bandwidth_mib_per_s=None),
    )
    return Engine(PidsTarget(Host(), [popen.pid]), config, tracker=SwapTelling(create_tracker("bpf", Host()).tracker))


def until_out(reports: Iterator[StepReport]) -> StepReport:
    """Wait until all is out that goes, and for two scans more: what the kernel counts is known from then on."""
    seen = before = 0
    for report in reports:
        assert report.errors == ()
        out = report.paged_out_bytes
        seen = seen + 1 if out >= 0.9 * SIZE and out == before else 0
        before = out
        if seen == 3:
            return report
    pytest.fail("the memory did not go out")


@pytest.mark.parametrize("orders", [("free", "fill"), ("refill",), ("unmap", "fill"), ("exec",)])
def test_what_a_process_frees_is_neither_out_nor_back(orders: tuple[str, ...]) -> None:
    """Freed and filled anew, seen in between or not; mapped anew at the same address; another program."""
    with temporary_zram_swap(4 * SIZE, own=True), program() as popen:
        reports = engine_on(popen).run(duration_s=300)
        until_out(reports)
        for order in orders:
            tell(popen, order)
            report = [next(reports) for _ in range(2)][-1]
            assert report.paged_out_bytes <= 0.1 * SIZE
        assert report.refault_bytes_total <= 0.1 * SIZE
        reports.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", ["touch", "read"])
def test_what_a_process_wants_back_counts_whoever_touched_it_for_it(order: str) -> None:
    with temporary_zram_swap(4 * SIZE, own=True), program() as popen:
        reports = engine_on(popen).run(duration_s=300)
        until_out(reports)
        tell(popen, order)
        report = [next(reports) for _ in range(2)][-1]
        assert report.refault_bytes_total >= 0.9 * SIZE
        assert any("only what is idle" in why for why in report.skipped.values())
        reports.close()  # type: ignore[attr-defined]


def test_memory_that_is_used_now_and_then_stops_going_out() -> None:
    """Touched after each page-out, as long after it as it takes: the second wrong round is the last."""
    with temporary_zram_swap(4 * SIZE, own=True), program() as popen:
        rounds = last_moved = 0
        held_at: int | None = None
        for report in engine_on(popen).run(duration_s=300):
            if report.paged_out_bytes >= 0.9 * SIZE:
                rounds += 1
                tell(popen, "touch")
                last_moved = report.moved_bytes_total
            if held_at is None and any("nothing goes out" in why for why in report.skipped.values()):
                held_at = report.scans
            if held_at is not None and report.scans >= held_at + SCANS_HELD:
                break
        assert held_at is not None
        assert 1 <= rounds <= 2
        assert report.moved_bytes_total <= last_moved + 0.1 * SIZE
