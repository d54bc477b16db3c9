"""Tracker `bpf`: cost per GiB, growth with size, loaders, and what other processes notice of it."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from bench.measure import holder, ratio_line
from memtier_engine.errors import MemtierError, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.proc import meminfo
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, Spans, Tracker
from memtier_engine.trackers.bpf import loaders
from memtier_engine.trackers.bpf.faults import FaultCounter
from memtier_engine.trackers.bpf.sampling import SampledBpfTracker
from memtier_engine.trackers.bpf.tracker import BpfTracker
from memtier_engine.trackers.idlepage import IdlePageTracker
from memtier_engine.trackers.refs import RefsTracker
from memtier_engine.trackers.registry import why_not

GIB = 1 << 30
STEP = CHUNK_PAGES * PAGE_BYTES


def run() -> bool:
    """Print all lines; True if all limits hold."""
    why = why_not("bpf", Host())
    if why is not None:
        print(f"tracker bpf does not work here: {why[0]}: {why[1]}")
        return False
    results = [per_gib(), linear(), system_calls(), fault_cost(), loading(), slowdown()]
    return all(results)


def best_cpu_s(work: Callable[[], object], rounds: int = 7) -> float:
    """CPU seconds of this thread, kernel included, in the least disturbed of `rounds`."""
    times = []
    for _ in range(rounds):
        began_s = time.thread_time()
        work()
        times.append(time.thread_time() - began_s)
    return min(times)


def spans_of(address: int, size: int) -> Spans:
    return Spans(np.array([address], np.uint64), np.array([address + size], np.uint64))


def scan_cpu_s(tracker: Tracker, pid: int, address: int, size: int, rounds: int = 7) -> float:
    process, spans = process_id(Host(), pid), spans_of(address, size)
    tracker.watch(frozenset({process}))

    def scan() -> None:
        for _ in tracker.scan(process, spans):
            pass

    scan()
    try:
        return best_cpu_s(scan, rounds)
    finally:
        tracker.close()


def per_gib() -> bool:
    """CPU per GiB of 4 KiB pages against what else tells accesses here."""
    with holder(GIB) as (pid, address):
        buffer = np.empty(CHUNK_PAGES, np.uint64)

        def bulk() -> None:
            for at in range(address, address + GIB, STEP):
                pagemap.read(at, at + STEP, buffer)

        with Pagemap(Host(), pid) as pagemap:
            bulk_s = best_cpu_s(bulk)
            tracker = BpfTracker(Host())
            blocks = np.arange(address & ~0x1FFFFF, address + STEP, 2 << 20, dtype=np.uint64)
            out = np.empty((len(blocks), 512), np.uint64)
            walk_s = 4 * best_cpu_s(lambda: tracker.walker.walk(pagemap.fileno(), blocks, out), 30)
            tracker.close()
        ours_s = scan_cpu_s(BpfTracker(Host()), pid, address, GIB)
        refs_s = scan_cpu_s(RefsTracker(Host()), pid, address, GIB)
        sampled_s = scan_cpu_s(SampledBpfTracker(Host(), seed=1), pid, address, GIB)
        results = [
            ratio_line("bpf walk per GiB against pagemap", f"{walk_s * 1e3:.2f} ms", walk_s / bulk_s, 0.2),
            ratio_line("bpf scan per GiB against tracker refs", f"{ours_s * 1e3:.1f} ms", ours_s / refs_s, 1.0),
            ratio_line("bpf-sampled (5 %) against bpf", f"{sampled_s * 1e3:.2f} ms", sampled_s / ours_s, 0.35),
        ]
        if why_not("idlepage", Host()) is None:
            idle_s = scan_cpu_s(IdlePageTracker(Host()), pid, address, GIB, 3)
            value = f"{ours_s * 1e3:.1f} ms"
            results.append(ratio_line("bpf scan per GiB against tracker idlepage", value, ours_s / idle_s, 0.5))
        else:
            print("bpf scan against tracker idlepage: not on this kernel; run `make bench` in the test VM")
    return all(results)


def linear() -> bool:
    """1, 4 and 12 GiB: as much per GiB as one. Sizes that would press the machine are left out."""
    costs: dict[int, float] = {}
    for size_gib in (1, 4, 12):
        if meminfo(Host())["MemAvailable"] < (size_gib + 4) * GIB:
            print(f"bpf scan of {size_gib} GiB: left out, it needs {size_gib + 4} GiB of free memory")
            continue
        with holder(size_gib * GIB) as (pid, address):
            costs[size_gib] = scan_cpu_s(BpfTracker(Host()), pid, address, size_gib * GIB, 4) / size_gib
    sizes = ", ".join(f"{size} GiB {cost * 1e3:.1f} ms/GiB" for size, cost in costs.items())
    return ratio_line(f"bpf scan grows linearly ({sizes})", "cost per GiB", costs[max(costs)] / costs[min(costs)], 1.3)


def system_calls() -> bool:
    """Nothing is attached to any system call: a loop of getppid with the tracker loaded and without."""

    def loop() -> None:
        for _ in range(100_000):
            os.getppid()

    without_s = with_s = float("inf")
    for _ in range(6):
        without_s = min(without_s, best_cpu_s(loop, 3))
        tracker = BpfTracker(Host())
        with_s = min(with_s, best_cpu_s(loop, 3))
        tracker.close()
    return ratio_line("system calls with tracker bpf loaded", f"{with_s * 1e4:.0f} ns each", with_s / without_s, 1.03)


def fault_cost() -> bool:
    """First touches of memory: counted, and not counted while others are."""

    def touch() -> None:
        area = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_NOHUGEPAGE)
        area[::PAGE_BYTES] = zeros
        area.close()

    zeros = bytes((32 << 20) // PAGE_BYTES)
    own = frozenset({process_id(Host(), os.getpid())})
    free_s = others_s = counted_s = float("inf")
    for _ in range(6):
        free_s = min(free_s, best_cpu_s(touch, 2))
        with FaultCounter(Host()) as counter:
            others_s = min(others_s, best_cpu_s(touch, 2))
            counter.watch(own)
            counted_s = min(counted_s, best_cpu_s(touch, 2))
    each_ns = 1e9 / len(zeros)
    return all(
        [
            ratio_line(
                "page faults of others while faults are counted",
                f"{others_s * each_ns:.0f} ns",
                others_s / free_s,
                1.15,
            ),
            ratio_line("page faults that are counted", f"{counted_s * each_ns:.0f} ns", counted_s / free_s, 1.6),
        ]
    )


_LOAD = """
import json, resource, sys, time
from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.bpf.tracker import BpfTracker
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, began = rss(), time.process_time()
tracker = BpfTracker(Host(), loader=sys.argv[1])
print(json.dumps({"cpu_s": time.process_time() - began, "rss": rss() - before}))
"""


def loading() -> bool:
    """Start-up and memory of the two loaders, each in a process of its own."""
    found: dict[str, dict[str, float]] = {}
    for loader in loaders.LOADERS:
        with suppress(subprocess.CalledProcessError):
            output = subprocess.check_output([sys.executable, "-c", _LOAD, loader], stderr=subprocess.DEVNULL)
            found[loader] = json.loads(output)
    ours = found["libbpf"]
    results = [ratio_line("load by libbpf", f"{ours['cpu_s'] * 1e3:.0f} ms CPU", ours["cpu_s"] / 0.2, 1.0)]
    if "bcc" in found:
        other = found["bcc"]
        values = [
            f"{other['cpu_s'] * 1e3:.0f} ms CPU",
            f"{int(ours['rss']) >> 20} against {int(other['rss']) >> 20} MiB",
        ]
        results.append(ratio_line(f"libbpf against bcc ({values[0]})", "CPU", ours["cpu_s"] / other["cpu_s"], 0.5))
        results.append(ratio_line("memory of libbpf against bcc", values[1], ours["rss"] / other["rss"], 0.5))
    else:
        try:
            loaders.load(Host(), ("walk",), "bcc").close()
        except (MemtierError, Unavailable) as why:
            print(f"bcc: not measured: {why}")
    return all(results)


_BOUND = """
import ctypes, mmap, sys, time
import numpy as np
size = 256 << 20
held = np.zeros(size // 8, np.int64)
held += 1
where = np.random.default_rng(1).integers(0, len(held), 1 << 20)
print(held.ctypes.data, flush=True)
for line in sys.stdin:
    end, work, began = time.monotonic() + float(line), 0, time.process_time()
    while time.monotonic() < end:
        held[where].sum()
        work += 1
    print((time.process_time() - began) / work, flush=True)
"""


def slowdown() -> bool:
    """CPU time per unit of work of random reads over 256 MiB; turns with scans and without alternate."""
    popen = subprocess.Popen([sys.executable, "-c", _BOUND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert popen.stdin is not None
    assert popen.stdout is not None
    tracker = BpfTracker(Host())
    try:
        address = int(popen.stdout.readline())
        process, spans = process_id(Host(), popen.pid), spans_of(address & -PAGE_BYTES, 256 << 20)

        def turn(scans: int, seconds: float) -> float:
            assert popen.stdin is not None
            assert popen.stdout is not None
            popen.stdin.write(f"{seconds}\n")
            popen.stdin.flush()
            for _ in range(scans):
                time.sleep(seconds / (scans + 1))
                list(tracker.scan(process, spans))
            return float(popen.stdout.readline())

        turn(1, 0.5)
        free, scanned = [], []
        for _ in range(8):
            free.append(turn(0, 1.0))
            scanned.append(turn(1, 1.0))
        cost = float(np.median(scanned) / np.median(free))
        per_scan_s = (cost - 1) * 1.0
        held = ratio_line("work of a memory-bound process under a scan each second", "CPU per unit", cost, 1.1)
        # One scan costs the same at any interval: what it costs in 1 s is a tenth of that in 10 s.
        value = f"{per_scan_s * 1e3:.1f} ms per scan"
        return ratio_line("the same at a scan each 10 s, computed from that", value, 1 + per_scan_s / 10, 1.01) and held
    finally:
        tracker.close()
        popen.stdin.close()
        popen.stdout.close()
        popen.kill()
        popen.wait()
