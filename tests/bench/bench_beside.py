"""Kernel reclaim beside us: does a memory-limited program that streams a file lose more of its hot set when tracked?

Clearing accessed bits by MADV_COLD also deactivates the pages: the kernel has to see them touched once more before it
takes them for active again. Here a program reads its hot set over and over while it streams a file, under a memory
limit that leaves little room for both, and none for all that it once touched. What of the hot set comes back from swap
is counted with and without a tracker, in turns, in one run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.measure import ratio_line
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id, read_mappings
from memtier_engine.trackers.registry import create_tracker
from support.swap import temporary_zram_swap

HOT_MIB, COLD_MIB, LIMIT_MIB, FILE_MIB = 150, 100, 220, 600
SECONDS, INTERVAL_S, PERIOD_S = 12.0, 1.0, 0.5
ROUNDS = 2
FEW_PAGES = 512
"""Added to both sides: a handful of pages more is no ratio."""
_PROGRAM = """
import mmap, os, sys, threading, time
sizes, path, period_s = [int(arg) << 20 for arg in sys.argv[1:3]], sys.argv[3], float(sys.argv[4])
hot, cold = (mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for size in sizes)
block = os.urandom(2048) + bytes(2048)
for area in (hot, cold):
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, len(area), 4096):
        area[at:at + 4096] = block
def stream():
    buffer = bytearray(1 << 20)
    while True:
        fd = os.open(path, os.O_RDONLY)
        while os.readv(fd, [buffer]):
            time.sleep(0.002)
        os.close(fd)
threading.Thread(target=stream, daemon=True).start()
print("ready", flush=True)
while True:
    hot[::4096]
    time.sleep(period_s)
"""


def run() -> bool:
    """Print the line; True if the limit holds."""
    counts: dict[str, list[int]] = {"none": [], "auto": []}
    steals: list[int] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, temporary_zram_swap(1 << 30):
        path = Path(folder) / "stream"
        with path.open("wb") as file:
            for _ in range(FILE_MIB):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        for turn in range(ROUNDS):
            for kind in ("none", "auto") if turn % 2 == 0 else ("auto", "none"):
                faults, stolen = _majors(kind, path)
                counts[kind].append(faults)
                steals.append(stolen)
    without, tracked = (sum(counts[kind]) for kind in ("none", "auto"))
    print(f"file pages that the kernel took meanwhile: {min(steals)} at least per round (0 would prove nothing)")
    return ratio_line(
        "refaults of a hot set beside a file stream at its memory limit, tracked against not tracked",
        f"{tracked} and {without} in {ROUNDS * SECONDS:.0f} s",
        (tracked + FEW_PAGES) / (without + FEW_PAGES),
        1.1,
    )


def _majors(kind: str, path: Path) -> tuple[int, int]:
    """(major faults of the program, file pages reclaimed) in one round."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with _cgroup() as cgroup:
        program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(HOT_MIB), str(COLD_MIB), str(path), str(PERIOD_S)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (cgroup / "cgroup.procs").write_text(str(os.getpid())) and None,
        )
        try:
            assert program.stdout is not None
            program.stdout.readline()
            host = Host()
            process = process_id(host, program.pid)
            tracker = None if kind == "none" else create_tracker(kind, host).tracker
            if tracker is not None:
                tracker.watch(frozenset((process,)))
            time.sleep(3)
            before, end_s = _faults(program.pid), time.monotonic() + SECONDS
            stolen = _stolen()
            while time.monotonic() < end_s:
                if tracker is not None:
                    for _ in tracker.scan(process, read_mappings(host, process.pid).tierable()):
                        pass
                time.sleep(INTERVAL_S)
            after = _faults(program.pid)
            if tracker is not None:
                tracker.close()
            return after - before, _stolen() - stolen
        finally:
            program.kill()
            program.wait()


def _faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[9])


def _stolen() -> int:
    return sum(
        int(line.split()[1])
        for line in Path("/proc/vmstat").read_text().splitlines()
        if line.startswith("pgsteal_file")
    )


@contextmanager
def _cgroup() -> Iterator[Path]:
    """A memory cgroup with the limit, of whichever version is here."""
    host = Host()
    v1 = Path("/sys/fs/cgroup/memory")
    root, name = (v1, "memory.limit_in_bytes") if (v1 / "cgroup.procs").exists() else (host.cgroup2_root, "memory.max")
    if root != v1:
        with suppress(OSError):
            (root / "cgroup.subtree_control").write_text("+memory")
    cgroup = root / f"memtier-bench-beside-{os.getpid()}"
    cgroup.mkdir()
    try:
        (cgroup / name).write_text(str(LIMIT_MIB << 20))
        with suppress(OSError):
            (cgroup / "memory.swappiness").write_text("100")  # v1; in v2 it is the machine's
        yield cgroup
    finally:
        for _ in range(100):
            try:
                cgroup.rmdir()
                break
            except OSError:
                time.sleep(0.05)
