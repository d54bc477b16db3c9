"""What the mover takes to the kernel, and what it leaves alone, on real processes with real swap."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, MoveOutcome, MoveTask, ProcessId, Spans, Why
from memtier_engine.mover.mover import Mover, MoverConfig
from support.swap import temporary_zram_swap

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")

MIB = 1 << 20
_PROGRAM = """
import ctypes, mmap, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
MIB = 1 << 20
def anonymous(mib, huge=False):
    held = mmap.mmap(-1, (mib + 2) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(held))
    return held, (-at) % (2 << 20), at + (-at) % (2 << 20)
def fill(held, first, end):
    block = os.urandom(2048) + bytes(2048)
    for at in range(first, end, 4096):
        held[at:at + 4096] = block
def lock(address, size):
    assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0
"""


@dataclass(frozen=True)
class Child:
    """A process that holds memory and does nothing until it is told to."""

    popen: subprocess.Popen[str]
    process: ProcessId
    words: list[int]

    def spans(self, mib: int, offset_mib: int = 0, word: int = 0) -> Spans:
        start = self.words[word] + offset_mib * MIB
        return Spans(np.array([start], np.uint64), np.array([start + mib * MIB], np.uint64))

    def out_bytes(self, spans: Spans) -> int:
        with Pagemap(Host(), self.process.pid) as pagemap:
            return pagemap.swapped_bytes(spans.starts, spans.ends)

    def resident_bytes(self, spans: Spans) -> int:
        with Pagemap(Host(), self.process.pid) as pagemap:
            return sum(
                int(np.count_nonzero(pagemap.resident(int(start), int(end)))) * PAGE_BYTES
                for start, end in zip(spans.starts, spans.ends, strict=True)
            )

    def go(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("go\n")
        self.popen.stdin.flush()

    def told(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()


@contextmanager
def child(code: str, *arguments: str) -> Iterator[Child]:
    command = [sys.executable, "-c", _PROGRAM + code, *arguments]
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert popen.stdout is not None
        words = [int(word) for word in popen.stdout.readline().split()]
        yield Child(popen, process_id(Host(), popen.pid), words)
    finally:
        os.killpg(popen.pid, signal.SIGKILL)
        popen.communicate()


def pump(mover: Mover, pumps: int = 10_000) -> list[MoveOutcome]:
    """Pump until nothing is pending, at most so often."""
    outcomes: list[MoveOutcome] = []
    for _ in range(pumps):
        if not mover.has_work:
            break
        outcomes += mover.pump(time.monotonic())
    return outcomes


def kept(outcomes: list[MoveOutcome], why: Why) -> int:
    return sum(each.spans.total_bytes for outcome in outcomes for each in outcome.kept if each.why is why)


def mover(bandwidth_mib_per_s: float | None = None) -> Mover:
    return Mover(MoverConfig(bandwidth_mib_per_s=bandwidth_mib_per_s), Host(), now_s=time.monotonic())


_IN_FRONT = """
how, front, behind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
held, first, at = anonymous(front + behind)
fill(held, first, first + front * MIB)
if how == "lock":
    lock(at, front * MIB)
if how == "fork" and not os.fork():
    time.sleep(1000)
    os._exit(0)
if how == "zero":
    held.madvise(mmap.MADV_DONTNEED, first, front * MIB)
    sum(held[first:first + front * MIB:4096])
fill(held, first + front * MIB, first + (front + behind) * MIB)
print(at, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("how", "why"), [("lock", Why.LOCKED), ("fork", Why.SHARED), ("zero", Why.ABSENT)])
def test_what_cannot_go_in_front_does_not_hold_up_what_is_behind(how: str, why: Why) -> None:
    """96 MiB that stay, then 16 that go: it takes no more pumps and no more allowance than the 16 alone."""
    with temporary_zram_swap(512 * MIB), child(_IN_FRONT, how, "96", "16") as held, closing(mover()) as moving:
        moving.add(MoveTask(held.process, held.spans(112)))
        outcomes = pump(moving, 40)
        assert held.out_bytes(held.spans(16, 96)) >= 0.98 * 16 * MIB
        assert kept(outcomes, why) >= 0.99 * 96 * MIB
        assert sum(outcome.moved_bytes for outcome in outcomes) == held.out_bytes(held.spans(112))
        assert sum(outcome.requested_bytes for outcome in outcomes) >= 112 * MIB
        if how != "zero":
            assert held.resident_bytes(held.spans(96)) >= 0.99 * 96 * MIB
