"""Scenarios of tracker `bpf` in the test VM; each says its measurements as one JSON line.

The guest has soft-dirty bits, so the tracker does not flush TLBs there. Workload and tracker share a vCPU: a context
switch flushes the emulated CPU's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from saying import say
from scene import daemon_log, main, meme, memtierd, wait_for

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_PAGEOUT
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap, present
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, Tracker
from memtier_engine.trackers.bpf import paging
from memtier_engine.trackers.bpf.faults import FaultCounter, FaultTable
from memtier_engine.trackers.bpf.program import SharedWalker
from memtier_engine.trackers.bpf.tracker import BpfTracker
from memtier_engine.trackers.idlepage import IdlePageTracker
from memtier_engine.trackers.refs import RefsTracker
from memtier_engine.trackers.softdirty import SoftDirtyConfig, SoftDirtyTracker
from support.toucher import KINDS, Toucher, scan, toucher

FOLDER = Path("/tmp")
PAGES = 2000
DAMON_SAMPLE_US = Path("/sys/kernel/mm/damon/admin/kdamonds/0/contexts/0/monitoring_attrs/intervals/sample_us")
BLOCK = paging.BLOCK_PAGES


def rounds(load: Toucher, tracker: Tracker, count: int, expected: Callable[[Iterable[int]], set[int]] = set) -> int:
    """Pages reported wrongly over `count` random windows, reads and writes in turn."""
    chance = random.Random(7)
    wrong = 0
    load.write(range(load.pages))
    scan(tracker, load)
    scan(tracker, load)
    for number in range(count):
        touched = sorted(chance.sample(range(load.pages), chance.choice((1, 30, load.pages // 4))))
        (load.write if number % 2 else load.read)(touched)
        wrong += len(set(scan(tracker, load).accessed.tolist()) ^ expected(touched))
    return wrong


def exact() -> None:
    """Wrong pages over random windows, by kind of memory."""
    tracker = BpfTracker(Host())
    wrong: dict[str, int] = {}
    for kind in sorted(set(KINDS) - {"huge"}):
        with toucher(kind, PAGES, FOLDER) as load:
            wrong[kind] = rounds(load, tracker, 6)
    say(kind="exact", wrong=wrong, flushes=tracker.flushes, base=hex(tracker.walker.base), loader=tracker.loader)


def huge() -> None:
    """The same on pages of 2 MiB: of each, all 512 parts or none."""
    tracker = BpfTracker(Host())
    with toucher("huge", 6 * BLOCK, FOLDER) as load:
        wrong = rounds(
            load,
            tracker,
            4,
            lambda pages: {n for p in pages for n in range(p // BLOCK * BLOCK, p // BLOCK * BLOCK + BLOCK)},
        )
        wrong_one = 0
        for block in range(6):
            load.read([block * BLOCK + 77])
            wrong_one += len(
                set(scan(tracker, load).accessed.tolist()) ^ set(range(block * BLOCK, block * BLOCK + BLOCK))
            )
        blocks = np.arange(load.address, int(load.spans.ends[0]), paging.BLOCK_BYTES, dtype=np.uint64)
        with Pagemap(Host(), load.process.pid) as pagemap:
            states = SharedWalker(Host()).walker.walk(pagemap.fileno(), blocks).states & np.uint64(255)
    say(
        kind="huge",
        wrong=wrong,
        wrong_one=wrong_one,
        huge=int((states == paging.STATE_HUGE_PMD).sum()),
        blocks=len(blocks),
    )


def high() -> None:
    """Memory that only five levels of page tables reach."""
    tracker = BpfTracker(Host())
    with toucher("high", PAGES, FOLDER) as load:
        wrong = rounds(load, tracker, 6)
    say(kind="high", wrong=wrong, address=load.address)


def gigantic() -> None:
    """A page of 1 GiB: all its 262 144 parts are resident and in use, since `clear_refs` passes over hugetlb pages."""
    tracker = BpfTracker(Host())
    pages = (1 << 30) // PAGE_BYTES
    with toucher("gigantic", pages, FOLDER) as load:
        before = scan(tracker, load)
        load.write([40_000])
        windows = [scan(tracker, load) for _ in range(3)]
        with Pagemap(Host(), load.process.pid) as pagemap:
            block = np.array([load.address], np.uint64)
            state = int(SharedWalker(Host()).walker.walk(pagemap.fileno(), block).states[0]) & 255
    say(
        kind="gigantic",
        resident_before=len(before.resident),
        wrong=sum(2 * pages - len(seen.accessed) - len(seen.resident) for seen in windows),
        one_entry=state == paging.STATE_HUGE_PUD,
    )


def memory_map() -> None:
    """Where this kernel maps physical memory, and by how many levels."""
    walker = SharedWalker(Host()).walker
    say(kind="memory-map", base=walker.base, levels=5 if Path("/proc/cpuinfo").read_text().find(" la57") > 0 else 4)


def forked() -> None:
    """Parent and child share the frames of copy-on-write memory; each has accessed bits of its own."""
    tracker = BpfTracker(Host())
    missed = of_child = 0
    with toucher("anonymous", PAGES, FOLDER) as load:
        load.write(range(PAGES))
        child = process_id(Host(), int(load.ask("fork")))
        try:
            for _ in range(2):
                for process in (load.process, child):
                    list(tracker.scan(process, load.spans))
            for number in range(4):
                touched = set(range(number, PAGES, 7))
                (load.write if number % 2 else load.read)(touched)
                missed += len(touched - set(scan(tracker, load).accessed.tolist()))
                of_child += sum(int(chunk.accessed.sum()) for chunk in tracker.scan(child, load.spans))
        finally:
            os.kill(child.pid, signal.SIGKILL)
    say(kind="forked", missed=missed, of_child=of_child)


def swapped() -> None:
    """Pages in swap are not resident, those that come back are accessed, and the others are told rightly meanwhile."""
    tracker = BpfTracker(Host())
    wrong = wrong_resident = 0
    with toucher("anonymous", PAGES, FOLDER) as load:
        load.write(range(PAGES))
        scan(tracker, load)
        out = 0
        for number in range(4):
            page_out(load, PAGES // 2)
            with Pagemap(Host(), load.process.pid) as pagemap:
                here = set(np.flatnonzero(present(pagemap.read(load.address, int(load.spans.ends[0])))).tolist())
            out += PAGES - len(here)
            seen = scan(tracker, load)
            wrong_resident += len(set(seen.resident.tolist()) ^ here)
            touched = {5 + number, PAGES // 4, PAGES - 9}
            load.read(touched)
            # Neighbours read ahead stay in the swap cache: they are not mapped, so not resident.
            wrong += len(set(scan(tracker, load).accessed.tolist()) ^ touched)
    say(kind="swapped", wrong=wrong, wrong_resident=wrong_resident, out=out)


def migrating() -> None:
    """The pages move between two NUMA nodes all the time: what was touched shows, what never was does not."""
    tracker = BpfTracker(Host())
    missed = never = late = moved = failures = 0
    stop = threading.Event()
    with toucher("anonymous", PAGES, FOLDER) as load:
        load.write(range(PAGES))
        pages = load.address + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_BYTES)

        def mover() -> None:
            nonlocal moved
            node = 1
            while not stop.is_set():
                moved += int((syscalls.move_pages(load.process.pid, pages, node) == node).sum())
                node ^= 1

        scan(tracker, load)
        scan(tracker, load)
        thread = threading.Thread(target=mover)
        thread.start()
        try:
            for number in range(12):
                touched = set(range(number % 5, PAGES // 2, 5))
                load.read(touched)
                try:
                    seen = scan(tracker, load)
                except MemtierError:
                    failures += 1
                    continue
                # One that is on its way at that moment has no entry: it counts as absent, not as idle. If it is so
                # while the bits are cleared, its own stays for one window more.
                missed += len(touched.intersection(seen.resident.tolist()) - set(seen.accessed.tolist()))
                late += len(set(seen.accessed.tolist()) - touched)
                never += int((seen.accessed >= PAGES // 2).sum())
        finally:
            stop.set()
            thread.join()
        time.sleep(0.2)
        last = scan(tracker, load)
    say(
        kind="migrating",
        missed=missed,
        never_touched=never,
        late=late,
        moved=moved,
        failures=failures,
        resident_at_end=len(last.resident),
    )


def agreement() -> None:
    """The same pages touched before a scan of each tracker: on how many pages they agree."""
    of_bpf, of_idle = BpfTracker(Host()), IdlePageTracker(Host())
    chance = random.Random(9)
    same = pages = touched_pages = 0
    with toucher("anonymous", PAGES, FOLDER) as load:
        load.write(range(PAGES))
        for _ in range(2):
            scan(of_bpf, load)
            scan(of_idle, load)
        for _ in range(10):
            touched = chance.sample(range(PAGES), 500)
            load.read(touched)
            ours = np.zeros(PAGES, np.bool_)
            theirs = np.zeros(PAGES, np.bool_)
            # clear_refs takes the accessed bits that the idle bitmap would look at, so the pages are touched again
            # in between. Marking pages idle clears the bits: the next window of bpf begins clean.
            ours[scan(of_bpf, load).accessed] = True
            load.read(touched)
            theirs[scan(of_idle, load).accessed] = True
            same += int((ours == theirs).sum())
            pages += PAGES
            touched_pages += len(touched)
    say(kind="agreement", same=same, pages=pages, touched=touched_pages)


def order() -> None:
    """What works here, as `memtier check` tells it."""
    found = json.loads(subprocess.run(["memtier", "check", "--json"], stdout=subprocess.PIPE, check=True).stdout)

    def working(part: str) -> list[str]:
        return [name for name, each in found[part].items() if each["works"]]

    say(
        kind="order",
        order=list(found["auto_order"]),
        why_not={name: each["why"] for name, each in found["trackers"].items() if name in found["auto_order"]},
        chosen=found["auto"],
        sources=working("bpf_sources"),
        loaders=working("bpf_loaders"),
    )


def softdirty_reads() -> None:
    """`softdirty` as `auto` takes it: nothing that was touched looks idle, and writes alone are exact."""
    tracker = SoftDirtyTracker(Host(), SoftDirtyConfig(track_referenced=True))
    with toucher("anonymous", PAGES, FOLDER) as load:
        load.write(range(PAGES))
        scan(tracker, load)
        scan(tracker, load)
        nothing = len(scan(tracker, load).accessed)
        load.write(range(0, PAGES, 9))
        written = scan(tracker, load).accessed.tolist() == list(range(0, PAGES, 9))
        load.read([3])
        read = len(scan(tracker, load).accessed)
        load.write(range(10))
        load.read([700])
        both = len(scan(tracker, load).accessed)
    say(kind="softdirty-reads", nothing=nothing, written=written, read=read, both=both, pages=PAGES)


def bcc() -> None:
    """The other loader, with the guest's own kernel headers."""
    began_s = time.monotonic()
    try:
        tracker = BpfTracker(Host(), loader="bcc")
    except MemtierError as failure:
        say(kind="bcc", loader=None, why=str(failure))
        return
    loaded_s = time.monotonic() - began_s
    with toucher("anonymous", PAGES, FOLDER) as load:
        load.write(range(PAGES))
        scan(tracker, load)
        load.read(range(0, PAGES, 9))
        seen = scan(tracker, load).accessed.tolist()
    say(kind="bcc", loader=tracker.loader, exact=seen == list(range(0, PAGES, 9)), loaded_s=loaded_s)


def faults() -> None:
    """Which way of counting the guest's kernel offers, and that it counts: first touches, and swap-ins from a disk."""
    with FaultCounter(Host()) as counter, toucher("anonymous", PAGES, FOLDER) as load:
        counter.watch(frozenset({load.process}))
        load.write(range(PAGES))
        first = counter.read()[load.process]
        swap_ins = waited = tries = 0
        wait_s = 0.0
        while not waited and tries < 8:
            tries += 1
            page_out(load, PAGES)
            # What is written to a disk stays in the swap cache until the kernel needs room: those do not wait.
            with contextlib.suppress(OSError):
                Path("/sys/fs/cgroup/memory.reclaim").write_text("64M")
            counter.read()
            load.read(range(0, 1000, 50))
            back = counter.read().get(load.process, FaultTable.empty())
            swap_ins += int(back.swap_ins.sum())
            waited += int(back.major.sum())
            wait_s += float(back.major_s.sum())
        say(
            kind="faults",
            split=counter.reads_and_writes,
            faults=int(first.faults.sum()),
            swap_ins=swap_ins,
            waited=waited,
            wait_s=wait_s,
        )


def page_out(load: Toucher, pages: int) -> None:
    """Ask the kernel to page out the first `pages`."""
    pidfd = syscalls.pidfd_open(load.process.pid)
    syscalls.process_madvise(pidfd, load.spans.starts, np.array([pages * PAGE_BYTES], np.uint64), MADV_PAGEOUT)
    os.close(pidfd)


def cost() -> None:
    """CPU per scan of the same 128 MiB by each tracker, and of reading its pagemap."""
    with toucher("anonymous", 64 * 512, FOLDER) as load:
        load.write(range(load.pages))
        spent: dict[str, float] = {}
        trackers: list[Tracker] = [BpfTracker(Host()), IdlePageTracker(Host()), RefsTracker(Host())]
        for tracker in trackers:
            scan(tracker, load)
            spent[tracker.name] = best_cpu_s(partial(scan, tracker, load))
        buffer = np.empty(CHUNK_PAGES, np.uint64)
        with Pagemap(Host(), load.process.pid) as pagemap:
            spent["pagemap"] = best_cpu_s(lambda: pagemap.read(load.address, int(load.spans.ends[0]), buffer))
            walker = SharedWalker(Host()).walker
            blocks = np.arange(
                load.address & -paging.BLOCK_BYTES, int(load.spans.ends[0]), paging.BLOCK_BYTES, dtype=np.uint64
            )
            spent["walk"] = best_cpu_s(lambda: walker.walk(pagemap.fileno(), blocks))
        say(kind="cost", per_gib_s={name: seconds * 8 for name, seconds in spent.items()})


def best_cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this thread in the least disturbed of five."""
    times = []
    for _ in range(5):
        began_s = time.thread_time()
        work()
        times.append(time.thread_time() - began_s)
    return min(times)


def swap(tracker: str = "bpf") -> None:
    """Cold out and hot kept by the daemon; then frozen: all out; then thawed: hot back."""
    with meme(64, 20, write=True) as load, memtierd(tracker, pids=[load.pid]):
        took_s = wait_for(lambda: load.cold_out() >= 0.95, 60)
        worst = 0.0
        for _ in range(8):
            worst = max(worst, load.hot_out())
            time.sleep(1)
        load.signal(signal.SIGSTOP)
        stopped_s = wait_for(lambda: load.hot_out() >= 0.95, 60)
        load.signal(signal.SIGCONT)
        back_s = wait_for(lambda: load.hot_out() <= 0.02, 60)
        say(
            kind="swap",
            cold_out_s=took_s,
            cold_out=load.cold_out(),
            hot_out_worst=worst,
            all_out_after_stop_s=stopped_s,
            hot_back_after_cont_s=back_s,
            damon_sample_us=DAMON_SAMPLE_US.read_text().strip() if DAMON_SAMPLE_US.exists() else None,
            log=daemon_log(),
        )


def demo() -> None:
    """`memtier demo` with this tracker."""
    done = subprocess.run(
        ["memtier", "demo", "--tracker", "bpf", "--json", "--duration", "150s"], stdout=subprocess.PIPE, text=True
    )
    say(kind="demo", status=done.returncode, verdict=json.loads(done.stdout.splitlines()[-1]))


main(
    {
        "exact": exact,
        "huge": huge,
        "high": high,
        "gigantic": gigantic,
        "memory-map": memory_map,
        "forked": forked,
        "swapped": swapped,
        "migrating": migrating,
        "agreement": agreement,
        "order": order,
        "softdirty-reads": softdirty_reads,
        "bcc": bcc,
        "faults": faults,
        "cost": cost,
        "swap": swap,
        "swap-auto": partial(swap, "auto"),
        "demo": demo,
    }
)
