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
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import PAGE_IS_HUGE
from memtier_engine.errors import ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, Bools, MoveOutcome, MoveTask, ProcessId, Spans, Why
from memtier_engine.mover.backends import ProcessHandle, move_to_node, page_out, runs_of
from memtier_engine.mover.edge import addresses_of
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


_PIECES = """
held, first, at = anonymous(64)
fill(held, first, first + 64 * MIB)
for piece in range(0, 64, 2):
    lock(at + piece * MIB, MIB)
print(at, flush=True)
sys.stdin.read()
"""


def test_many_small_locked_pieces_among_the_rest_cost_a_call_each_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    advise = syscalls.process_madvise

    def counting(*arguments: Any) -> int:
        calls.append(1)
        return advise(*arguments)

    monkeypatch.setattr(syscalls, "process_madvise", counting)
    with temporary_zram_swap(512 * MIB), child(_PIECES) as held, closing(mover()) as moving:
        moving.add(MoveTask(held.process, held.spans(64)))
        outcomes = pump(moving, 60)
        assert held.out_bytes(held.spans(64)) >= 0.98 * 32 * MIB
        assert kept(outcomes, Why.LOCKED) == 32 * MIB
        assert len(calls) <= 32 + 32 + 60  # refusals, lists that go on behind them, batches
        first = len(calls)
        moving.add(MoveTask(held.process, held.spans(64)))
        pump(moving, 60)
        assert len(calls) <= first + 5, "what is locked is known by now"


_FILE = """
with open(sys.argv[1], "wb") as file:
    file.write(os.urandom(32 * MIB))
    os.fsync(file.fileno())
file = open(sys.argv[1], "rb")
held = mmap.mmap(file.fileno(), 32 * MIB, flags=mmap.MAP_PRIVATE, prot=3)
sum(held[0::4096])
for at in range(0, 4 * MIB, 4096):
    held[at] = 1
print(ctypes.addressof(ctypes.c_char.from_buffer(held)), flush=True)
sys.stdin.read()
"""


def test_clean_pages_of_a_file_stay_and_what_was_written_over_them_goes(tmp_path: Path) -> None:
    with temporary_zram_swap(512 * MIB), child(_FILE, str(tmp_path / "data")) as held, closing(mover()) as moving:
        moving.add(MoveTask(held.process, held.spans(32)))
        outcomes = pump(moving)
        assert held.out_bytes(held.spans(4)) >= 0.95 * 4 * MIB
        assert held.resident_bytes(held.spans(28, 4)) == 28 * MIB
        assert kept(outcomes, Why.FILE) == 28 * MIB


_HUGE = """
held, first, at = anonymous(64, huge=True)
fill(held, first, first + 64 * MIB)
print(at, flush=True)
for line in sys.stdin:
    sum(held[first:first + 64 * MIB:4096])
    print("touched", flush=True)
"""


def _splits() -> int:
    return next(
        int(line.split()[1])
        for line in Path("/proc/vmstat").read_text().splitlines()
        if line.startswith("thp_split_page ")
    )


@pytest.mark.parametrize("bandwidth", [None, 20, 300])
def test_idle_huge_pages_go_out_whole_and_parts_of_them_stay(bandwidth: float | None) -> None:
    with temporary_zram_swap(512 * MIB), child(_HUGE) as held, closing(mover(bandwidth)) as moving:
        with Pagemap(Host(), held.process.pid) as pagemap:
            huge = runs_of(pagemap, held.spans(64), PAGE_IS_HUGE).total_bytes
        if huge < 48 * MIB:
            pytest.skip("the kernel had no huge pages to give (/sys/kernel/mm/transparent_hugepage)")
        before = _splits()
        start, end = int(held.spans(64).starts[0]), int(held.spans(64).ends[0]) - MIB
        moving.add(MoveTask(held.process, Spans(np.array([start], np.uint64), np.array([end], np.uint64))))
        end_s = time.monotonic() + 60
        outcomes: list[MoveOutcome] = []
        while moving.has_work and time.monotonic() < end_s:
            outcomes += moving.pump(time.monotonic())
            time.sleep(min(0.01, moving.wait_s() or 0))
        assert _splits() == before
        assert held.out_bytes(held.spans(62)) >= 0.9 * 62 * MIB
        assert kept(outcomes, Why.HUGE) == MIB or huge < 64 * MIB
        assert held.out_bytes(held.spans(1, 62)) == 0


def test_a_process_that_wakes_up_gets_back_one_batch_and_loses_no_other() -> None:
    """Where the tracker cannot tell that it is awake, what comes back at once does."""
    small = _HUGE.replace("huge=True", "huge=False")
    with temporary_zram_swap(512 * MIB), child(small) as held, closing(mover()) as moving:
        moving.add(MoveTask(held.process, held.spans(64)))
        moved = sum(outcome.moved_bytes for outcome in moving.pump(time.monotonic()))
        assert 0 < moved <= 2 * MIB
        held.go()
        held.told()
        moved = sum(outcome.moved_bytes for outcome in pump(moving))
        assert moved == 0
        assert held.resident_bytes(held.spans(64)) >= 63.9 * MIB
        moving.add(MoveTask(held.process, held.spans(64)))
        moving.replace([MoveTask(held.process, held.spans(64))])
        pump(moving)
        assert held.out_bytes(held.spans(64)) >= 0.98 * 64 * MIB, "the next decision counts anew"


def test_what_the_tracker_saw_touched_since_the_decision_ends_it() -> None:
    seen: list[int] = []

    def look(process: ProcessId, spans: Spans) -> Bools:
        """The first 4 MiB are idle; the process is about to use all of the rest."""
        pages = addresses_of(spans)
        seen.append(len(pages))
        touched: Bools = pages >= np.uint64(held.words[0] + 4 * MIB)
        return touched

    unlocked = _PIECES.replace("range(0, 64, 2)", "()")
    with temporary_zram_swap(512 * MIB), child(unlocked) as held, closing(mover()) as moving:
        moving.look = look
        moving.add(MoveTask(held.process, held.spans(64)))
        outcomes = pump(moving, 40)
        assert held.out_bytes(held.spans(64)) == held.out_bytes(held.spans(4)) >= 0.95 * 4 * MIB
        assert 0 < kept(outcomes, Why.TOUCHED) <= 16 * MIB, "it does not go through all of the task"


@contextmanager
def _recycled(process: ProcessId, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Another process with the pid of one that is gone."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(500):
        last.write_text(str(process.pid - 1))
        popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if popen.pid == process.pid:
            break
        popen.kill()
        popen.communicate()
    else:
        pytest.skip("another process kept taking the pid: the machine is busy")
    try:
        assert popen.stdout is not None
        popen.stdout.readline()
        yield popen
    finally:
        popen.kill()
        popen.communicate()


@pytest.mark.skipif(not Path("/proc/sys/kernel/ns_last_pid").exists(), reason="needs CONFIG_CHECKPOINT_RESTORE")
def test_a_process_that_has_the_pid_now_is_never_acted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a handle from before, whose calls go by number or by descriptor, nor by one made for the old."""
    code = (
        _PROGRAM + "held, first, at = anonymous(4)\nfill(held, first, first + 4 * MIB)\nprint(at, flush=True)\ninput()"
    )
    command = ["setarch", "-R", sys.executable, "-c", code]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    address = int(first.stdout.readline())
    process = process_id(Host(), first.pid)
    asked: list[int] = []
    move_pages = syscalls.move_pages

    def counting(*arguments: Any, **rest: Any) -> Any:
        asked.append(1)
        return move_pages(*arguments, **rest)

    monkeypatch.setattr(syscalls, "move_pages", counting)
    with closing(ProcessHandle(Host(), process)) as handle:
        assert handle.pidfd >= 0
        pagemap = Pagemap(Host(), process.pid)
        first.kill()
        first.communicate()
        whole = Spans(np.array([address], np.uint64), np.array([address + 4 * MIB], np.uint64))
        with _recycled(process, command) as second, closing(pagemap):
            other = process_id(Host(), second.pid)
            assert other.pid == process.pid
            assert other != process
            for attempt in (
                lambda: move_to_node(handle, whole, 0),
                lambda: page_out(handle, whole),
                lambda: ProcessHandle(Host(), process),
                lambda: pagemap.read(address, address + PAGE_BYTES),
            ):
                with pytest.raises(ProcessGone):
                    attempt()
            assert not asked, "move_pages would have been answered for the new process"
            with closing(mover()) as moving:
                moving.add(MoveTask(process, whole))
                assert [outcome.error for outcome in pump(moving)] == ["process exited"]
