"""What a whole scan of the engine costs on address spaces that are huge, many, cut into pieces, or shared.

Each line gives the ratio against the same without what makes it hard, in the same run, and what it was before ages
followed what is resident and one object stood for each address space.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.measure import ratio_line
from memtier_engine import Engine, EngineConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.pids import PidsTarget

_HEAD = """
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
size = int(sys.argv[1])
"""
_SPARSE = """
used = ctypes.create_string_buffer(8 << 20)
ctypes.memset(used, 1, 8 << 20)
if size:
    at = libc.mmap(None, size, 3, 0x4022, -1, 0)
    ctypes.memset(at, 1, 8 << 20)
"""
_MAPS = """
at = libc.mmap(None, 60000 * 8192, 3, 0x22, -1, 0)
ctypes.memset(at, 1, 60000 * 8192)
for number in range(0, size, 2):
    libc.mprotect(at + number * 8192, 8192, 1)
"""
_SHARED = """
shared = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) if size else None
for at in range(0, size, 4096):
    shared[at] = 1
for number in range(39):
    if not os.fork():
        total = sum(shared[::4096]) if size else 0
        own = bytearray(b"y" * (4 << 20))
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(1000)
"""
_TAIL = """
os.write(1, b"%d\\n" % os.getpid())
time.sleep(1000)
"""
_SMALL = "own = bytearray(b'y' * (256 << 10))"


def run() -> bool:
    """Print all lines; True if all limits hold."""
    return all([sparse(), many(), pieces(), shared()])


def sparse() -> bool:
    """A reservation of terabytes against none."""
    held = True
    without = _scan_s(_SPARSE, 0)
    for tib in (14, 60, 120):
        with_it = _scan_s(_SPARSE, tib << 40)
        name = f"scan beside a reservation of {tib} TiB, against none (was 9-11 s at 2 TiB, MemoryError at 60)"
        held &= ratio_line(name, f"{with_it * 1e3:.1f} ms", with_it / without, 2.0)
    return held


def many() -> bool:
    """A thousand small processes against one."""
    with _started(_SMALL, 0, processes=1000) as pids:
        all_s, one_s = _cpu_s(pids), _cpu_s(pids[:1])
    name = "scan of 1000 small processes, per process against one alone (was 1.32 s in all)"
    return ratio_line(name, f"{all_s:.2f} s", all_s / 1000 / one_s, 1.5)


def pieces() -> bool:
    """60 000 mappings against the same memory in one."""
    one_s, many_s = _scan_s(_MAPS, 0), _scan_s(_MAPS, 60_000)
    name = "scan of 472 MiB in 60 000 mappings, against one mapping (was 1.0 s)"
    return ratio_line(name, f"{many_s * 1e3:.0f} ms", many_s / one_s, 12.0)


def shared() -> bool:
    """40 processes that share 1 GiB against 40 that do not."""
    without, with_it = (_scan_s(_SHARED, size, pids=40) for size in (0, 1 << 30))
    name = "scan of 40 processes that share 1 GiB, against 40 that share nothing (was 1.72 s against 0.09)"
    return ratio_line(name, f"{with_it * 1e3:.0f} ms", with_it / without, 1.5)


def _scan_s(body: str, size: int, *, pids: int = 1) -> float:
    with _started(body, size, pids=pids) as found:
        return _cpu_s(found)


def _cpu_s(pids: Sequence[int]) -> float:
    """CPU time of the cheapest of five scans, after two that know nothing yet."""
    host = Host()
    policy = AgePolicyConfig(interval_ms=1000, swap_out_ms=3_600_000)
    engine = Engine(PidsTarget(host, pids), EngineConfig(scan_interval_ms=1000, policy=policy), host=host)
    try:
        times = []
        for _ in range(7):
            began_s = time.thread_time()
            engine.step()
            times.append(time.thread_time() - began_s)
        return min(times[2:])
    finally:
        engine.close()


@contextmanager
def _started(body: str, size: int, *, pids: int = 1, processes: int = 1) -> Iterator[list[int]]:
    """The pids of `processes` programs, each of which tells of `pids`."""
    command = [sys.executable, "-S", "-c", _HEAD + body + _TAIL, str(size)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) for _ in range(processes)
    ]
    try:
        found = [int(each.stdout.readline()) for each in started for _ in range(pids) if each.stdout is not None]
        time.sleep(1.2)  # younger processes are left alone
        yield found
    finally:
        for each in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()
            if each.stdout is not None:
                each.stdout.close()
