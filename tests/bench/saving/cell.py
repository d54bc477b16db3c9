"""One measurement: one workload, one way to take its memory, a warm-up and a window."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.saving.variants import HERE, VARIANTS, CpuSeconds, Scene, has_memory_controller
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host

SAMPLE_S = 1.0
PLAIN_SETTLE_S = 15.0
"""Without an engine there is nothing to wait for but caches."""
SWAP_FLAG_PREFER = 0x8000
SWAP_PRIORITY = 100
_CONTROL = Path("/sys/class/zram-control")


@dataclass(frozen=True, slots=True)
class Load:
    """A program and how hard it is used."""

    title: str
    mib: int
    rate: float = 0.0
    """Requests per second; 0: it works by itself."""
    record_bytes: int = 1000


LOADS: Mapping[str, Load] = {
    "kv": Load("key-value server", 256, 600),
    "compile": Load("compile job", 128),
    "web": Load("idle web service", 256, 40, 16 << 10),
}


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    settle_s: float = 75.0
    """Not measured: the way finds out what is idle, and takes it."""
    window_s: float = 45.0


@dataclass(slots=True)
class Cell:
    """What was measured. Sizes are means over the window."""

    workload: str
    variant: str
    footprint_bytes: int
    """Of the workload's processes, in RAM and out."""
    out_bytes: int
    """Of that, out."""
    cache_bytes: int | None
    """Page cache of the cgroup; None: no memory controller."""
    zram_bytes: int
    """Memory that zram took for what is out."""
    p50_s: float
    p99_s: float
    answers: int
    refaults_per_min: float
    """Major faults: pages that had to be read back, from swap or from files."""
    variant_cpu_percent: float
    """Of one core."""
    load_cpu_percent: float
    course: list[tuple[float, float]]
    """(seconds since the way began, MiB that are out)."""

    @property
    def saved_bytes(self) -> int:
        """Net of what the compressed pages take."""
        return self.out_bytes - self.zram_bytes


def percentile(values: list[float], percent: float) -> float:
    """The nearest-rank percentile. Raises ValueError: there are no values."""
    if not values:
        raise ValueError("no answers were measured")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@contextmanager
def zram_swap(size_bytes: int) -> Iterator[Path]:
    """A swap device that is preferred to all others; yields its directory in /sys/block. Raises OSError.

    Without mkswap and swapon: the test VM has no such programs.
    """
    if not _CONTROL.exists():
        subprocess.run(["modprobe", "zram", "num_devices=0"], check=False, capture_output=True)
    number = int((_CONTROL / "hot_add").read_text())
    device, block = f"/dev/zram{number}", Path(f"/sys/block/zram{number}")
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        (block / "disksize").write_text(str(size_bytes))
        header = bytearray(4096)  # union swap_header, include/linux/swap.h
        struct.pack_into("=III", header, 1024, 1, size_bytes // 4096 - 1, 0)
        header[-10:] = b"SWAPSPACE2"
        with open(device, "r+b", buffering=0) as file:
            file.write(header)
            os.fsync(file.fileno())
        if libc.swapon(device.encode(), SWAP_FLAG_PREFER | SWAP_PRIORITY) != 0:
            raise OSError(ctypes.get_errno(), f"swapon {device}: {os.strerror(ctypes.get_errno())}")
        yield block
    finally:
        libc.swapoff(device.encode())
        (_CONTROL / "hot_remove").write_text(str(number))


@contextmanager
def own_cgroup() -> Iterator[Path]:
    """A new cgroup, with the memory controller where there is one."""
    root = Host().cgroup2_root
    if has_memory_controller():
        (root / "cgroup.subtree_control").write_text("+memory")
    path = root / f"memtier-saving-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        for _ in range(200):
            with suppress(OSError):
                (path / "cgroup.kill").write_text("1")
            with suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.02)


class Listener:
    """Reads the lines of a process; those between `begin` and `end` are seconds of answers."""

    def __init__(self, popen: subprocess.Popen[str], *, wait_ready: bool) -> None:
        assert popen.stdout is not None
        if wait_ready and popen.stdout.readline().strip() != "ready":
            raise RuntimeError("the workload did not start")
        self._popen = popen
        self._values: list[float] | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def begin(self) -> None:
        self._values = []

    def end(self) -> list[float]:
        values, self._values = self._values or [], None
        return values

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            values = self._values
            if values is not None:
                values.append(float(line))


@dataclass(slots=True)
class _Totals:
    faults: int
    load_cpu_us: int
    variant_cpu_s: float


class _Meter:
    def __init__(self, cgroup: Path, zram: Path, server: int, cpu: CpuSeconds) -> None:
        self._cgroup = Cgroup(cgroup, Host())
        self._zram = zram
        self._server = server
        self._cpu = cpu

    def sizes(self) -> tuple[int, int, int, int]:
        """(in RAM and out, out, page cache, zram) in bytes."""
        resident = out = 0
        for pid in self._cgroup.pids():
            with suppress(OSError, KeyError):
                status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                resident += int(status["VmRSS"].split()[0]) << 10
                out += int(status["VmSwap"].split()[0]) << 10
        used = int((self._zram / "mm_stat").read_text().split()[2])
        return resident + out, out, self._cgroup.stat().get("file", 0), used

    def totals(self) -> _Totals:
        # Fields 12 and 13: major faults of the process and of its children that ended.
        fields = Path(f"/proc/{self._server}/stat").read_text().rpartition(")")[2].split()
        used_us = self._cgroup.stat("cpu.stat").get("usage_usec", 0)
        return _Totals(int(fields[9]) + int(fields[10]), used_us, self._cpu())


def measure(workload: str, variant: str, times: Times, *, scale: float = 1.0) -> Cell:
    """Run one cell.

    Args:
        workload: key of `LOADS`.
        variant: key of `VARIANTS`.
        times: how long.
        scale: of the workload's memory and rate.
    Raises:
        RuntimeError: something did not start or ended early.
        OSError: no zram, no cgroup v2, or not root.
    """
    load = LOADS[workload]
    if variant == "none":
        times = Times(min(PLAIN_SETTLE_S, times.settle_s), times.window_s)
    mib = max(8, int(load.mib * scale))
    total_s = times.settle_s + times.window_s
    with (
        tempfile.TemporaryDirectory(prefix="memtier-saving-") as name,
        # Little more than needed: tests that look for free swap make one of their own.
        zram_swap((mib * 5 // 4 + 32) << 20) as zram,
        own_cgroup() as cgroup,
    ):
        folder = Path(name)
        argument = str(2 * total_s + 60) if workload == "compile" else str(folder / "socket")

        def enter() -> None:
            (cgroup / "cgroup.procs").write_text("0")

        server = subprocess.Popen(
            [sys.executable, str(HERE / "servers.py"), workload, str(mib), argument],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=enter,
        )
        listener = Listener(server, wait_ready=True)
        client: subprocess.Popen[str] | None = None
        try:
            if load.rate:
                keys, rate = (mib << 20) // load.record_bytes, load.rate * scale
                command = [sys.executable, str(HERE / "clients.py"), workload, argument, str(rate), str(keys)]
                client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                listener = Listener(client, wait_ready=False)
            with VARIANTS[variant].run(Scene(cgroup, folder)) as cpu:
                return _run(workload, variant, times, listener, _Meter(cgroup, zram, server.pid, cpu))
        finally:
            for popen in (client, server):
                if popen is not None:
                    popen.kill()
                    popen.wait()


def _run(workload: str, variant: str, times: Times, listener: Listener, meter: _Meter) -> Cell:
    course: list[tuple[float, float]] = []
    sizes: list[tuple[int, int, int, int]] = []
    began_s = time.monotonic()

    def watch(until_s: float) -> None:
        while (left_s := began_s + until_s - time.monotonic()) > 0:
            time.sleep(min(SAMPLE_S, left_s))
            sizes.append(meter.sizes())
            course.append((time.monotonic() - began_s, sizes[-1][1] / (1 << 20)))

    watch(times.settle_s)
    sizes.clear()
    before, before_s = meter.totals(), time.monotonic()
    listener.begin()
    watch(times.settle_s + times.window_s)
    answers = listener.end()
    after, passed_s = meter.totals(), time.monotonic() - before_s
    footprint, out, cache, zram = (sum(column) // len(sizes) for column in zip(*sizes, strict=True))
    return Cell(
        workload=workload,
        variant=variant,
        footprint_bytes=footprint,
        out_bytes=out,
        cache_bytes=cache if has_memory_controller() else None,
        zram_bytes=zram if out else 0,
        p50_s=percentile(answers, 50),
        p99_s=percentile(answers, 99),
        answers=len(answers),
        refaults_per_min=(after.faults - before.faults) / passed_s * 60,
        variant_cpu_percent=100 * (after.variant_cpu_s - before.variant_cpu_s) / passed_s,
        load_cpu_percent=(after.load_cpu_us - before.load_cpu_us) / 1e4 / passed_s,
        course=[(round(at_s, 2), round(out_mib, 2)) for at_s, out_mib in course],
    )
