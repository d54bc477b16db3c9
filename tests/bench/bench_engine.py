"""The engine's costs per GiB, its memory, and its start-up time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench.measure import best_s, holder, ratio_line
from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_PAGEOUT
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, MoveTask, PageChunk, ProcessId, Spans
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.pages.ages import AgeClock, ProcessPages
from support.swap import temporary_zram_swap

GIB = 1 << 30
BIN = Path(sys.executable).parent


def run() -> bool:
    """Print all lines; True if all limits hold."""
    results = [pagemap_against_pread(), ages_per_gib(), mover_against_one_call(), rates(), memory(), start_up()]
    return all(results)


def pagemap_against_pread() -> bool:
    """Bulk reading against the same bytes by bare pread calls of the same size."""
    with holder(GIB) as (pid, address), Pagemap(Host(), pid) as pagemap:
        buffer = np.empty(CHUNK_PAGES, np.uint64)

        def ours() -> None:
            for at in range(address, address + GIB, CHUNK_PAGES * PAGE_BYTES):
                pagemap.read(at, at + CHUNK_PAGES * PAGE_BYTES, buffer)

        def bare() -> None:
            with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
                for at in range(address, address + GIB, CHUNK_PAGES * PAGE_BYTES):
                    os.pread(file.fileno(), CHUNK_PAGES * 8, at // PAGE_BYTES * 8)

        ours_s, bare_s = best_s(ours, 9), best_s(bare, 9)
    return ratio_line("pagemap bulk scan of 1 GiB", f"{ours_s * 1e3:.2f} ms", ours_s / bare_s, 1.5)


def ages_per_gib() -> bool:
    """Ages and region counts of 1 GiB of 4 KiB pages, a quarter of them touched."""
    pages = GIB // PAGE_BYTES
    own = ProcessPages(ProcessId(1, 1))
    own.set_spans(Spans(np.array([0x7F0000000000], np.uint64), np.array([0x7F0000000000 + GIB], np.uint64)))
    touched = np.random.default_rng(1).random(CHUNK_PAGES) < 0.25
    resident = np.ones(CHUNK_PAGES, np.bool_)
    clock = AgeClock()
    clock.begin_scan(0.0)
    table = clock.step_table()

    def update() -> None:
        for first in range(0, pages, CHUNK_PAGES):
            own.update(PageChunk(0x7F0000000000 + first * PAGE_BYTES, touched, resident), table)
        own.region_counts(1)

    update_s = best_s(update, 9)
    return ratio_line("age update and region counts per GiB", f"{update_s * 1e3:.2f} ms", update_s / 0.002, 1.0)


def mover_against_one_call() -> bool:
    """Paging out 128 MiB through the mover against one process_madvise call for as much."""
    size = 128 << 20
    speeds: dict[str, float] = {}
    with temporary_zram_swap(1 << 30):
        for name in ("one call", "mover", "one call", "mover"):
            with holder(size) as (pid, address):
                process = process_id(Host(), pid)
                spans = Spans(np.array([address], np.uint64), np.array([address + size], np.uint64))
                began_s = time.perf_counter()
                if name == "mover":
                    mover = Mover(MoverConfig(bandwidth_mib_per_s=None), Host(), now_s=0.0)
                    mover.add(MoveTask(process, spans))
                    while mover.wait_s() is not None:
                        mover.pump(0.0)
                    mover.close()
                else:
                    pidfd = syscalls.pidfd_open(pid)
                    syscalls.process_madvise(pidfd, spans.starts, spans.ends - spans.starts, MADV_PAGEOUT)
                    os.close(pidfd)
                took_s = time.perf_counter() - began_s
                with Pagemap(Host(), pid) as pagemap:
                    out = pagemap.swapped_bytes(spans.starts, spans.ends)
                if out < size * 0.95:
                    print(f"mover throughput: only {out >> 20} of {size >> 20} MiB went out by {name}")
                    return False
                speeds[name] = max(speeds.get(name, 0.0), out / took_s / (1 << 20))
    return ratio_line(
        "mover throughput",
        f"{speeds['mover']:.0f} MiB/s",
        speeds["mover"] / speeds["one call"],
        0.9,
        at_least=True,
    )


def rates() -> bool:
    """What really leaves RAM in 10 s under each bandwidth limit, against the limit."""
    held = True
    for mib_per_s in (10, 50, 200):
        size = 12 * mib_per_s << 20
        with temporary_zram_swap(4 << 30), holder(size) as (pid, address):
            spans = Spans(np.array([address], np.uint64), np.array([address + size], np.uint64))
            began_s = time.monotonic()
            mover = Mover(MoverConfig(bandwidth_mib_per_s=mib_per_s), Host(), now_s=began_s)
            mover.add(MoveTask(process_id(Host(), pid), spans))
            while (now_s := time.monotonic()) < began_s + 10:
                mover.pump(now_s)
                time.sleep(mover.wait_s() or 0.0)
            took_s = time.monotonic() - began_s
            with Pagemap(Host(), pid) as pagemap:
                moved = pagemap.swapped_bytes(spans.starts, spans.ends) / (1 << 20)
            mover.close()
        off = abs(moved / took_s / mib_per_s - 1)
        name = f"paging out at {mib_per_s} MiB/s for 10 s: distance from the limit"
        held &= ratio_line(name, f"{moved / took_s:.1f} MiB/s", off, 0.05)
    return held


_RESIDENT = """
import json, sys
from memtier_engine import Engine, EngineConfig
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.hostfs.host import Host
config = EngineConfig(tracker=sys.argv[2], scan_interval_ms=1000, dry_run=True)
engine = Engine(PidsTarget(Host(), [int(sys.argv[1])]), config)
for _ in range(4):
    engine.step()
status = open("/proc/self/status").read()
rss = int(status.split("VmRSS:")[1].split()[0]) * 1024
print(json.dumps({"rss": rss, "tracked": engine.step().tracked_bytes}))
"""


def memory() -> bool:
    """Resident memory of the engine process with 1 GiB and with 8 GiB tracked."""
    found = []
    for size in (GIB, 8 * GIB):
        with holder(size) as (pid, _):
            output = subprocess.check_output([sys.executable, "-c", _RESIDENT, str(pid), "auto"])
            found.append(json.loads(output))
    small, large = found
    growth = large["rss"] - small["rss"]
    share = growth / (large["tracked"] - small["tracked"])
    print(f"resident memory: {small['rss'] >> 20} MiB at 1 GiB, {large['rss'] >> 20} MiB at 8 GiB tracked")
    # Two bytes per page, its age and what tells its frame, are 0.049 %; the allocator adds a little.
    return ratio_line("metadata per tracked byte", f"{share * 100:.4f} %", share / 0.0006, 1.0)


def start_up() -> bool:
    """`memtier --version` against the bare interpreter; `run` to its first scan."""
    version_s = best_s(lambda: subprocess.run([BIN / "memtier", "--version"], check=True, capture_output=True))
    bare_s = best_s(lambda: subprocess.run([sys.executable, "-c", ""], check=True))
    held = ratio_line(
        f"start-up of memtier --version ({version_s / bare_s:.1f} times the bare interpreter)",
        f"{version_s * 1e3:.0f} ms",
        version_s / 0.3,
        1.0,
    )
    with holder(64 << 20) as (pid, _):
        began_s = time.perf_counter()
        command = [str(BIN / "memtier"), "run", "--pid", str(pid), "--dry-run", "--duration", "30s"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "resident" in line:
                break
        first_scan_s = time.perf_counter() - began_s
        process.terminate()
        process.wait()
        process.stdout.close()
    return (
        ratio_line(
            "start-up of memtier run to its first scan",
            f"{first_scan_s * 1e3:.0f} ms",
            first_scan_s / 1.5,
            1.0,
        )
        and held
    )
