"""What a scan costs its target and us: stalls, many mappings, memory that nobody tracks, many small processes.

"Was" is what trackers did before: clear_refs over the whole process, in the same run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import numpy as np

from bench.measure import ratio_line
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id, read_mappings
from memtier_engine.hostfs.proc import meminfo
from memtier_engine.model import ProcessId, Spans
from memtier_engine.trackers.bpf.tracker import BpfTracker
from memtier_engine.trackers.clearing import BestClearing
from memtier_engine.trackers.common import joined
from memtier_engine.trackers.registry import why_not

GIB = 1 << 30


def run() -> bool:
    """Print all lines; True if all limits hold."""
    why = why_not("bpf", Host())
    if why is not None:
        print(f"tracker bpf does not work here: {why[0]}: {why[1]}")
        return False
    results = [stall(1), stall(4), stall(12), stall(1, busy=8, nice=5), stall(4, busy=8, nice=5)]
    return all([*results, maps(), shm(), thousand()])


def tracker(*, cold: bool) -> BpfTracker:
    """`cold`: as it is now; otherwise with clear_refs, as it was."""
    return BpfTracker(Host(), clearing=BestClearing(Host(), cold=cold))


def tierable(pid: int) -> Spans:
    return read_mappings(Host(), pid).tierable()


@contextmanager
def child(program: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """A process, and how to say a line to it and have its answer."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert popen.stdin is not None
    assert popen.stdout is not None

    def ask(line: str) -> str:
        assert popen.stdin is not None
        assert popen.stdout is not None
        popen.stdin.write(line + "\n")
        popen.stdin.flush()
        return popen.stdout.readline()

    try:
        popen.stdout.readline()
        yield popen, ask
    finally:
        os.killpg(popen.pid, 9)
        popen.wait()
        popen.stdin.close()
        popen.stdout.close()


# One thread touches a page that is not there, maps and unmaps one, and sleeps, by turns, and remembers the longest.
_STALLED = """
import mmap, sys, threading, time
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
area = mmap.mmap(-1, int(sys.argv[1]), flags=flags)
area.madvise(mmap.MADV_NOHUGEPAGE)
block = b"x" * (1 << 20)
def fill():
    for at in range(0, len(area), 1 << 20): area[at : at + (1 << 20)] = block
fill()
fresh = mmap.mmap(-1, 64 << 20, flags=flags)
fresh.madvise(mmap.MADV_NOHUGEPAGE)
worst = [0.0, 0.0, 0.0]
def forever():
    at = 0
    while True:
        times = [time.perf_counter()]
        fresh[at] = 1
        times.append(time.perf_counter())
        mmap.mmap(-1, 4096, flags=flags).close()
        times.append(time.perf_counter())
        time.sleep(0.0003)
        times.append(time.perf_counter())
        for number in range(3): worst[number] = max(worst[number], times[number + 1] - times[number])
        at += 65536
        if at == len(fresh):
            at = 0
            fresh.madvise(mmap.MADV_DONTNEED)
threading.Thread(target=forever, daemon=True).start()
print(flush=True)
for line in sys.stdin:
    if line == "touch\\n": fill()
    if line == "begin\\n": worst[:] = [0.0] * 3
    print(*worst, flush=True)
"""


def stall(size_gib: int, *, busy: int = 0, nice: int = 0) -> bool:
    """The worst page fault and mmap during a scan of memory that was all touched; wanted: 2 and 10 ms."""
    who = f"{size_gib} GiB" + (f", {busy} busy processes, scanner at nice {nice}" if busy else "")
    if meminfo(Host())["MemAvailable"] < (size_gib + 3) * GIB:
        print(f"stall, {who}: left out, it needs {size_gib + 3} GiB of free memory")
        return True
    loads = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        with child(_STALLED, size_gib * GIB) as (popen, ask):
            os.setpriority(os.PRIO_PROCESS, 0, before + nice)
            was = _stalls(tracker(cold=False), popen.pid, ask)
            now = _stalls(tracker(cold=True), popen.pid, ask)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
        for load in loads:
            load.kill()
            load.wait()
    print(f"stall, {who}: a sleep of 0.3 ms took {now[2]:.1f} ms at worst, at the time of a scan")
    return all(
        [
            ratio_line(
                f"stall, {who}: worst page fault, of 2 ms", f"was {was[0]:.1f}, now {now[0]:.2f} ms", now[0] / 2, 1.0
            ),
            ratio_line(
                f"stall, {who}: worst mmap, of 10 ms", f"was {was[1]:.1f}, now {now[1]:.2f} ms", now[1] / 10, 1.0
            ),
            ratio_line(
                f"stall, {who}: CPU of a scan, all touched before",
                f"was {was[3]:.0f}, now {now[3]:.0f} ms",
                now[3] / was[3],
                2.0,
            ),
            ratio_line(
                f"stall, {who}: CPU of a scan, nothing touched",
                f"was {was[4]:.0f}, now {now[4]:.0f} ms",
                now[4] / was[4],
                1.5,
            ),
        ]
    )


def _stalls(tracker: BpfTracker, pid: int, ask: Callable[[str], str], rounds: int = 5) -> list[float]:
    """ms, medians: worst fault, mmap and sleep during a scan, CPU of the scan; CPU of one with nothing touched."""
    process, spans = process_id(Host(), pid), tierable(pid)
    with closing(tracker):
        tracker.watch(frozenset({process}))
        rows = []
        for _ in range(rounds + 1):
            ask("touch")
            ask("begin")
            cpu_s = scan_s(tracker, process, spans)
            rows.append([float(word) * 1e3 for word in ask("end").split()] + [cpu_s * 1e3])
        idle = min(scan_s(tracker, process, spans) for _ in range(3)) * 1e3
    return [*np.median(np.array(rows[1:]), axis=0).tolist(), idle]


def scan_s(tracker: BpfTracker, process: ProcessId, spans: Spans) -> float:
    """CPU seconds of this thread for a scan."""
    began_s = time.thread_time()
    for _ in tracker.scan(process, spans):
        pass
    return time.thread_time() - began_s


_MAPPINGS = """
import ctypes, sys
count = int(sys.argv[1])
libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_long] * 4
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
area = libc.mmap(None, count * 8192, 3, 0x22, -1, 0)
libc.madvise(ctypes.c_void_p(area), ctypes.c_size_t(count * 8192), 15)
ctypes.memset(area, 1, count * 8192)
for number in range(0, count, 2): libc.mprotect(area + number * 8192, 8192, 1)
print(flush=True)
sys.stdin.read()
"""


def maps() -> bool:
    """60 000 mappings of 8 KiB: as the same memory in one piece."""
    costs = {}
    for count in (15_000, 60_000):
        with child(_MAPPINGS, count) as (popen, _), closing(tracker(cold=True)) as now:
            process, spans = process_id(Host(), popen.pid), tierable(popen.pid)
            scan_s(now, process, spans)
            costs[count] = min(scan_s(now, process, spans) for _ in range(5)), len(spans)
            one = joined(spans)
            scan_s(now, process, one)
            alone = min(scan_s(now, process, one) for _ in range(5))
    cost, number = costs[60_000]
    return all(
        [
            ratio_line(f"maps: {number} mappings against {len(one)}", f"{cost * 1e3:.0f} ms", cost / alone, 10.0),
            ratio_line("maps: four times as many cost", f"{cost * 1e3:.0f} ms", cost / costs[15_000][0], 6.0),
        ]
    )


_SHARERS = """
import mmap, os, signal, sys
count, size = int(sys.argv[1]), int(sys.argv[2])
shared = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) if size else None
pids = []
for number in range(count):
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        if shared: shared[::4096] if number else shared.write(b"x" * size)
        own = bytearray(b"y" * (4 << 20))
        os.write(done, b"x")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
    pids.append(pid)
print(flush=True)
for line in sys.stdin: print(*pids, flush=True)
"""


def _round_s(tracker: BpfTracker, processes: list[tuple[ProcessId, Spans]]) -> float:
    began_s = time.thread_time()
    for process, spans in processes:
        for _ in tracker.scan(process, spans):
            pass
    return time.thread_time() - began_s


def _rounds_s(program: str, count: int, size: int, *, cold: bool) -> float:
    with child(program, count, size) as (_, ask), OpenProcesses(Host(), most=1024) as files:
        processes = [(process_id(Host(), pid), tierable(pid)) for pid in map(int, ask("pids").split())]
        with closing(BpfTracker(Host(), files=files, clearing=BestClearing(Host(), cold=cold))) as tracker:
            _round_s(tracker, processes)
            return min(_round_s(tracker, processes) for _ in range(3))


def shm() -> bool:
    """40 processes that share 1 GiB which nobody tracks, against the same without it."""
    was, now = (_rounds_s(_SHARERS, 40, GIB, cold=cold) for cold in (False, True))
    without = _rounds_s(_SHARERS, 40, 0, cold=True)
    value = f"was {was * 1e3:.0f}, now {now * 1e3:.0f} ms, without the shared memory {without * 1e3:.0f} ms"
    return ratio_line("shm: 40 processes sharing 1 GiB, CPU of a scan", value, now / was, 0.2)


def thousand() -> bool:
    """1000 small processes: the tracker's part."""
    was, now = (_rounds_s(_SHARERS.replace("4 << 20", "64 << 10"), 1000, 0, cold=cold) for cold in (False, True))
    value = f"was {was * 1e3:.0f}, now {now * 1e3:.0f} ms"
    return ratio_line("thousand: 1000 small processes, CPU of a scan", value, now / was, 1.0)
