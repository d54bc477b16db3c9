"""Tracker `bpf` on the real kernel: exactly the pages that were touched, whatever the memory and the moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_PAGEOUT
from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id, read_mappings
from memtier_engine.hostfs.pagemap import Pagemap, present
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, ProcessId, Spans
from memtier_engine.mover.backends import ProcessHandle, move
from memtier_engine.trackers import clearing
from memtier_engine.trackers.bpf import paging, program
from memtier_engine.trackers.bpf.program import MAX_BLOCKS, SharedWalker
from memtier_engine.trackers.bpf.tracker import BpfTracker
from memtier_engine.trackers.registry import why_not
from support.swap import temporary_zram_swap
from support.toucher import KINDS, Toucher, scan, toucher

_WHY = why_not("bpf", Host())
pytestmark = pytest.mark.skipif(
    _WHY is not None, reason=f"tracker bpf does not work here: {_WHY}; run as root, or `make e2e` in the test VM"
)
PAGES = 3000


@pytest.fixture
def tracker() -> Iterator[BpfTracker]:
    made = BpfTracker(Host())
    yield made
    made.close()


def exactly(tracker: BpfTracker, load: Toucher, rounds: int = 4) -> None:
    """Random sets of pages, read in one window and written in the next, are what the scans report."""
    rng = random.Random(load.pages)
    load.write(range(load.pages))
    scan(tracker, load)
    scan(tracker, load)
    for number in range(rounds):
        touched = sorted(rng.sample(range(load.pages), rng.choice((1, 17, load.pages // 3))))
        (load.write if number % 2 else load.read)(touched)
        assert scan(tracker, load).accessed.tolist() == touched
        assert scan(tracker, load).accessed.tolist() == []


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"huge"}))
def test_exactly_the_touched_pages_are_accessed(kind: str, tracker: BpfTracker, tmp_path: Path) -> None:
    """Recall and precision 100 %."""
    with toucher(kind, PAGES, tmp_path) as load:
        exactly(tracker, load)


def test_a_huge_page_is_touched_as_a_whole(tracker: BpfTracker, tmp_path: Path) -> None:
    """One byte of 2 MiB: 512 pages."""
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are off: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
    with toucher("huge", 8 * 512, tmp_path) as load:
        load.write(range(load.pages))
        with Pagemap(Host(), load.process.pid) as pagemap, contextlib.closing(SharedWalker(Host())) as shared:
            blocks = np.arange(load.address, int(load.spans.ends[0]), paging.BLOCK_BYTES, dtype=np.uint64)
            states = shared.walker.walk(pagemap.fileno(), blocks).states
        if not (states == paging.STATE_HUGE_PMD).all():
            pytest.skip("the kernel found no free huge pages: echo 1 > /proc/sys/vm/compact_memory")
        assert len(scan(tracker, load).resident) == load.pages
        scan(tracker, load)
        load.read([3, 5 * 512 + 511])
        assert scan(tracker, load).accessed.tolist() == [*range(512), *range(5 * 512, 6 * 512)]


def test_of_a_span_that_is_new_all_resident_pages_count_as_accessed(tracker: BpfTracker, tmp_path: Path) -> None:
    with toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(0, PAGES, 2))
        first = scan(tracker, load)
        assert first.accessed.tolist() == first.resident.tolist() == list(range(0, PAGES, 2))


def test_of_a_span_that_is_new_nothing_is_known_even_where_all_bits_are_clear(
    tracker: BpfTracker, tmp_path: Path
) -> None:
    """Somebody else cleared them, or it was moved there by mremap(2): clear bits say nothing of the time before."""
    with toucher("anonymous", PAGES, tmp_path) as load, contextlib.closing(BpfTracker(Host())) as other:
        load.write(range(PAGES))
        scan(other, load)
        assert scan(other, load).accessed.tolist() == [], "the bits are clear"
        half = Spans(load.spans.starts, load.spans.starts + np.uint64(PAGES // 2 * PAGE_BYTES))
        seen = list(tracker.scan(load.process, half))
        assert sum(int(chunk.accessed.sum()) for chunk in seen) == PAGES // 2
        assert scan(tracker, load).accessed.tolist() == list(range(PAGES // 2, PAGES))
        assert scan(tracker, load).accessed.tolist() == []


def test_pages_that_are_clean_were_only_read(tracker: BpfTracker, tmp_path: Path) -> None:
    """`written` is the dirty bit of pages touched in the window."""
    with toucher("file-shared", PAGES, tmp_path) as load:
        load.read(range(PAGES))
        scan(tracker, load)
        load.read(range(100))
        assert scan(tracker, load).written.tolist() == []
        load.write(range(50, 60))
        load.read(range(100))
        seen = scan(tracker, load)
        assert seen.accessed.tolist() == list(range(100))
        assert seen.written.tolist() == list(range(50, 60))


def test_a_forked_child_and_its_parent_are_told_apart(tracker: BpfTracker, tmp_path: Path) -> None:
    """They share the frames; each has accessed bits of its own."""
    with toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        child = process_id(Host(), int(load.ask("fork")))
        try:
            for process in (load.process, child):
                list(tracker.scan(process, load.spans))
            load.read(range(10))
            load.write(range(20, 30))
            assert scan(tracker, load).accessed.tolist() == [*range(10), *range(20, 30)]
            seen = list(tracker.scan(child, load.spans))
            assert sum(int(chunk.accessed.sum()) for chunk in seen) == 0
            assert sum(int(chunk.resident.sum()) for chunk in seen) == PAGES
        finally:
            os.kill(child.pid, signal.SIGKILL)


def test_pages_in_swap_are_not_resident_and_come_back_accessed(tracker: BpfTracker, tmp_path: Path) -> None:
    with temporary_zram_swap(128 << 20), toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        scan(tracker, load)
        pidfd = syscalls.pidfd_open(load.process.pid)
        syscalls.process_madvise(pidfd, load.spans.starts, np.array([1000 * PAGE_BYTES], np.uint64), MADV_PAGEOUT)
        os.close(pidfd)
        with Pagemap(Host(), load.process.pid) as pagemap:
            resident = np.flatnonzero(present(pagemap.read(load.address, load.address + PAGES * PAGE_BYTES)))
        seen = scan(tracker, load)
        assert len(resident) <= 2100
        assert seen.resident.tolist() == resident.tolist()
        assert seen.accessed.tolist() == []
        load.read([5])
        seen = scan(tracker, load)
        assert 5 in seen.accessed
        assert 5 in seen.resident


def test_pages_without_access_rights_stay_resident(tracker: BpfTracker, tmp_path: Path) -> None:
    """PROT_NONE, as NUMA balancing also sets it."""
    with toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        load.ask("hide 100 200")
        assert scan(tracker, load).resident.tolist() == list(range(PAGES))


def test_unmapped_pages_are_gone(tracker: BpfTracker, tmp_path: Path) -> None:
    with toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        load.ask("unmap 512 600")
        assert scan(tracker, load).resident.tolist() == [*range(512), *range(1112, PAGES)]


def test_the_walk_agrees_with_pagemap_on_everything_this_process_has() -> None:
    """Libraries, heap, stacks, vdso, holes: present in one, present in the other, with the same frame."""
    host = Host()
    mappings = read_mappings(host, os.getpid())
    compared = 0
    with contextlib.closing(SharedWalker(host)) as shared, Pagemap(host, os.getpid()) as pagemap:
        for start, end, name in zip(mappings.starts.tolist(), mappings.ends.tolist(), mappings.names, strict=True):
            if start >> 47 or name.startswith("[v"):
                continue  # the kernel's own: pagemap does not look into [vvar], and vsyscall is in the kernel's half
            first = start & ~(paging.BLOCK_BYTES - 1)
            blocks = np.arange(first, min(end, first + MAX_BLOCKS * paging.BLOCK_BYTES), paging.BLOCK_BYTES)
            end = min(end, first + len(blocks) * paging.BLOCK_BYTES)
            skip = (start - first) // PAGE_BYTES
            rows = slice(skip, skip + (end - start) // PAGE_BYTES)
            walked = shared.walker.walk(pagemap.fileno(), blocks.astype(np.uint64)).words.reshape(-1)[rows]
            words = pagemap.read(start, end)
            again = shared.walker.walk(pagemap.fileno(), blocks.astype(np.uint64)).words.reshape(-1)[rows]
            stable = paging.resident(walked) == paging.resident(again)  # our own allocations go on meanwhile
            assert (paging.resident(walked) == present(words))[stable].all(), hex(start)
            compared += int(stable.sum())
    assert compared > 5000


def test_small_mappings_share_a_run_of_the_walk(tracker: BpfTracker, tmp_path: Path) -> None:
    """Spans of any size and alignment, in order."""
    with toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(PAGES))
        starts = load.address + np.arange(0, PAGES, 30, dtype=np.uint64) * np.uint64(PAGE_BYTES)
        spans = Spans(starts, starts + np.uint64(7 * PAGE_BYTES))
        list(tracker.scan(load.process, spans))
        touched = list(range(0, PAGES, 31))
        load.read(touched)
        chunks = [part for chunk in tracker.scan(load.process, spans) for part in chunk.parts()]
        assert [chunk.start for chunk in chunks] == starts.tolist()
        found = [
            (chunk.start - load.address) // PAGE_BYTES + int(page)
            for chunk in chunks
            for page in np.flatnonzero(chunk.accessed)
        ]
        assert found == [page for page in touched if page % 30 < 7]


_SPIN = """
import ctypes, mmap
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
area = mmap.mmap(-1, 256 * 4096, flags=flags)
area.madvise(mmap.MADV_NOHUGEPAGE)
laps = mmap.mmap(-1, 4096, flags=flags)
at = [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (area, laps)]
area[::4096] = bytes(256)
print(*at, flush=True)
count = ctypes.c_uint64.from_buffer(laps)
busy = 64 * 4096
while True:
    area[:busy:4096]
    count.value += 1
"""


@dataclass
class Spinner:
    """A process on a CPU of its own that touches the first 64 of its 256 pages all the time."""

    process: ProcessId
    address: int
    laps_address: int
    memory: int

    def laps(self, count: int) -> None:
        """Wait until it was through its pages so often."""
        deadline_s = time.monotonic() + 10
        end = self._lap() + count
        while self._lap() < end:
            assert time.monotonic() < deadline_s, "it does not run"
            time.sleep(0.005)

    def _lap(self) -> int:
        return int.from_bytes(os.pread(self.memory, 8, self.laps_address), "little")

    def pages(self, first: int, count: int) -> Spans:
        start = self.address + first * PAGE_BYTES
        return Spans(np.array([start], np.uint64), np.array([start + count * PAGE_BYTES], np.uint64))


@pytest.fixture
def spinner() -> Iterator[Spinner]:
    command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), sys.executable, "-c", _SPIN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as popen:
        memory = -1
        try:
            assert popen.stdout is not None
            address, counter = map(int, popen.stdout.readline().split())
            memory = os.open(f"/proc/{popen.pid}/mem", os.O_RDONLY)
            yield Spinner(process_id(Host(), popen.pid), address, counter, memory)
        finally:
            if memory >= 0:
                os.close(memory)
            popen.kill()


def test_a_busy_process_on_a_cpu_of_its_own_is_seen_in_every_window(tracker: BpfTracker, spinner: Spinner) -> None:
    """Its pages stay in the CPU's TLB: without a flush the accessed bit would not come back."""
    if not tracker.flushes:
        pytest.skip("this kernel has soft-dirty tracking, where a flush would write-protect every page")
    busy = spinner.pages(0, 64)
    list(tracker.scan(spinner.process, busy))
    for _ in range(20):
        spinner.laps(2)
        (chunk,) = tracker.scan(spinner.process, busy)
        assert int(chunk.accessed.sum()) == 64


def test_where_nothing_flushes_paging_out_a_page_shows_what_the_tlb_hid(
    spinner: Spinner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `memtier_engine.engine.probing` relies on: the kernel flushes all of the process's entries for one page."""
    monkeypatch.setattr(clearing, "flush_is_free", lambda host: False)
    busy = spinner.pages(0, 64)
    with (
        temporary_zram_swap(64 << 20),
        closing(ProcessHandle(Host(), spinner.process)) as handle,
        closing(BpfTracker(Host(), clearing=clearing.BestClearing(Host(), cold=False))) as tracker,
    ):
        assert tracker.stale_tlb
        for number in range(20):
            list(tracker.scan(spinner.process, busy))
            # The last pages may still wait in a CPU's batch for the LRU lists, which are passed over.
            assert move(handle, spinner.pages(100 + number, 1), SWAP_NODE).moved_bytes == PAGE_BYTES
            spinner.laps(2)
            (chunk,) = tracker.scan(spinner.process, busy)
            assert int(chunk.accessed.sum()) >= 60  # without the page-out, none in nine windows of ten


def test_two_trackers_share_one_loaded_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loads, the last unloads."""
    monkeypatch.setattr(program, "_shared", program._Shared())
    first, second = BpfTracker(Host()), BpfTracker(Host())
    try:
        assert first.walker is second.walker
        first.close()
        first.close()
        with toucher("anonymous", 100, tmp_path) as load:
            load.write(range(100))
            assert len(scan(second, load).resident) == 100
    finally:
        second.close()
    third = BpfTracker(Host())
    assert third.walker is not second.walker
    third.close()


def test_a_process_that_exited_is_gone(tracker: BpfTracker, tmp_path: Path) -> None:
    with toucher("anonymous", 100, tmp_path) as load:
        scan(tracker, load)
        load.popen.kill()
        load.popen.wait()
        with pytest.raises(ProcessGone):
            scan(tracker, load)


def test_the_walk_of_a_process_that_exited_after_its_pagemap_was_opened_says_gone(tmp_path: Path) -> None:
    """The file keeps the mm_struct alive, but not the page tables."""
    with toucher("anonymous", 1000, tmp_path) as load, contextlib.closing(SharedWalker(Host())) as shared:
        load.write(range(1000))
        with Pagemap(Host(), load.process.pid) as pagemap:
            blocks = np.array([load.address & ~(paging.BLOCK_BYTES - 1)], np.uint64)
            assert shared.walker.walk(pagemap.fileno(), blocks).states.tolist() == [paging.STATE_TABLE]
            load.popen.kill()
            load.popen.wait()
            walk = shared.walker.walk(pagemap.fileno(), blocks)
            assert walk.states.tolist() == [paging.STATE_GONE]
            assert not walk.words.any()


def test_processes_that_exit_in_the_middle_of_a_walk_do_no_harm(tracker: BpfTracker) -> None:
    """Every scan ends well or with ProcessGone, and never reports more than was there."""
    program = (
        "import mmap, sys\na = mmap.mmap(-1, 64 << 20)\na[::4096] = bytes(16384)\nprint(flush=True)\nsys.stdin.read()"
    )
    gone = 0
    for number in range(12):
        popen = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert popen.stdin is not None
        assert popen.stdout is not None
        popen.stdout.readline()
        process = process_id(Host(), popen.pid)
        killer = threading.Timer(0.0005 * number, popen.kill)
        try:
            mappings = read_mappings(Host(), popen.pid)
            spans = Spans(mappings.starts[mappings.starts < 1 << 47], mappings.ends[mappings.starts < 1 << 47])
            killer.start()
            with contextlib.suppress(ProcessGone):
                while True:
                    for chunk in tracker.scan(process, spans):
                        assert not (chunk.accessed & ~chunk.resident).any()
            gone += 1
        finally:
            killer.join()
            popen.wait()
            popen.stdin.close()
            popen.stdout.close()
    assert gone == 12


_STORMS = {
    "mmap and munmap": """
import mmap, os
while True:
    areas = [mmap.mmap(-1, 4 << 20) for _ in range(8)]
    for area in areas:
        area[::4096] = bytes(1024)
        area.close()
""",
    "huge pages made and split": """
import ctypes, mmap
libc = ctypes.CDLL(None)
while True:
    area = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    area[::4096] = bytes(4096)
    for at in range(0, 16 << 20, 1 << 20):
        area.madvise(mmap.MADV_DONTNEED, at, 4096)
    area.close()
""",
    "forks": """
import mmap, os
area = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
while True:
    area[::4096] = bytes(4096)
    child = os.fork()
    if child == 0:
        area[:: 4096 * 7] = bytes(len(area[:: 4096 * 7]))
        os._exit(0)
    os.waitpid(child, 0)
""",
}


@pytest.mark.parametrize("storm", sorted(_STORMS))
def test_memory_that_changes_all_the_time_does_not_disturb(storm: str, tracker: BpfTracker) -> None:
    """What does not change is reported rightly in between; nothing fails."""
    steady = """
import ctypes, mmap, threading
held = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.madvise(mmap.MADV_NOHUGEPAGE)
held[::4096] = bytes(2048)
print(ctypes.addressof(ctypes.c_char.from_buffer(held)), flush=True)
"""
    popen = subprocess.Popen([sys.executable, "-c", steady + _STORMS[storm]], stdout=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    try:
        address = int(popen.stdout.readline())
        process = process_id(Host(), popen.pid)
        steady_end = address + (8 << 20)
        deadline_s = time.monotonic() + 2.5
        scans = 0
        while time.monotonic() < deadline_s:
            mappings = read_mappings(Host(), popen.pid)
            low = mappings.starts < 1 << 47
            spans = Spans(mappings.starts[low], mappings.ends[low])
            resident = accessed = 0
            for chunk in (part for seen in tracker.scan(process, spans) for part in seen.parts()):
                assert not (chunk.accessed & ~chunk.resident).any()
                first, last = max(chunk.start, address), min(chunk.start + len(chunk.accessed) * PAGE_BYTES, steady_end)
                rows = slice((first - chunk.start) // PAGE_BYTES, (last - chunk.start) // PAGE_BYTES)
                if last > first:
                    resident += int(chunk.resident[rows].sum())
                    accessed += int(chunk.accessed[rows].sum())
            scans += 1
            assert resident == 2048
            if scans > 2 and storm != "forks":
                assert accessed <= 1
        assert scans >= 5
        assert popen.poll() is None
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()


def test_a_thousand_processes(tracker: BpfTracker) -> None:
    """Each is found to hold what it holds."""
    program = """
import ctypes, mmap, os, signal
area = mmap.mmap(-1, 4096 * 64, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
pids = []
for number in range(1000):
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        area[: 4096 * (1 + number % 64) : 4096] = bytes(1 + number % 64)
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
    pids.append(pid)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), *pids, flush=True)
input()
for pid in pids:
    os.kill(pid, 9)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        address, *pids = map(int, popen.stdout.readline().split())
        try:
            spans = Spans(np.array([address], np.uint64), np.array([address + 64 * PAGE_BYTES], np.uint64))
            processes = [process_id(Host(), pid) for pid in pids]
            tracker.watch(frozenset(processes))
            found = [sum(int(c.resident.sum()) for c in tracker.scan(process, spans)) for process in processes]
            assert found == [1 + number % 64 for number in range(1000)]
        finally:
            popen.stdin.write("\n")


def test_memory_of_a_virtual_machine_counts_as_in_use(tracker: BpfTracker, tmp_path: Path) -> None:
    """KVM reads guest memory by page tables of its own: ours would say idle."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    program = (
        "import ctypes, fcntl, mmap, os, sys\n"
        "area = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "area[::4096] = bytes(64)\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)\n"
        "input()\n"
        "kvm = os.open('/dev/kvm', os.O_RDWR)\n"
        "vm = fcntl.ioctl(kvm, 0xAE01, 0)\n"  # KVM_CREATE_VM
        "print(vm, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        try:
            address = int(popen.stdout.readline())
            process = process_id(Host(), popen.pid)
            spans = Spans(np.array([address], np.uint64), np.array([address + 64 * PAGE_BYTES], np.uint64))
            for _ in range(2):
                (chunk,) = tracker.scan(process, spans)
            assert not chunk.accessed.any()
            popen.stdin.write("\n")
            popen.stdin.flush()
            if not popen.stdout.readline():
                pytest.skip("/dev/kvm makes no virtual machine here")
            (chunk,) = tracker.scan(process, spans)
            assert chunk.accessed.all()
        finally:
            popen.kill()


def test_programs_vanish_with_the_process_that_loaded_them() -> None:
    """Even when it is killed: nothing is pinned."""
    program = (
        "import os\n"
        "from memtier_engine.hostfs.host import Host\n"
        "from memtier_engine.trackers.bpf.tracker import BpfTracker\n"
        "tracker = BpfTracker(Host())\n"
        "for fd in os.listdir('/proc/self/fdinfo'):\n"
        "    try: text = open(f'/proc/self/fdinfo/{fd}').read()\n"
        "    except OSError: continue\n"
        "    for line in text.splitlines():\n"
        "        if line.startswith('prog_id:'): print(line.split()[1], end=' ')\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout is not None
        numbers = [int(word) for word in popen.stdout.readline().split()]
        assert len(numbers) == 2
        assert all(_program_exists(number) for number in numbers)
        popen.kill()
    deadline_s = time.monotonic() + 10
    while any(_program_exists(number) for number in numbers):  # freed after a grace period of RCU
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _program_exists(number: int) -> bool:
    import struct

    try:
        os.close(syscalls.bpf(13, struct.pack("<III", number, 0, 0)))  # BPF_PROG_GET_FD_BY_ID
    except KernelCallError:
        return False
    return True
