"""Clearing accessed bits: what is asked of the kernel, in what steps, and what happens where it refuses."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import PM_MMAP_EXCLUSIVE, PM_PRESENT, UIO_MAXIOV
from memtier_engine.errors import AccessDenied, KernelCallError
from memtier_engine.model import PAGE_BYTES, Spans
from memtier_engine.trackers import clearing
from memtier_engine.trackers.bpf import paging
from memtier_engine.trackers.bpf.blocks import laid_out, runs_of
from memtier_engine.trackers.bpf.program import Walk
from memtier_engine.trackers.bpf.tracker import RETRY_SCANS, BitClearer, look_at
from memtier_engine.trackers.clearing import BestClearing, Cold, Ranges, Undisturbed, ranges_of
from memtier_engine.trackers.words import page_numbers
from support.fakes import BASE, PROCESS, pages_of, spans

BLOCK = 512


class Kernel:
    """process_madvise: refuses what reaches into `locked` pages, as the real one does, and records the rest."""

    def __init__(self, locked: range = range(0)) -> None:
        self.locked = locked
        self.calls: list[list[tuple[int, int]]] = []

    def __call__(self, pidfd: int, rows: Any, first: int, last: int, advice: int) -> int:
        assert last - first <= UIO_MAXIOV
        done = 0
        call: list[tuple[int, int]] = []
        for start, length in rows[first:last].tolist():
            page, pages = (start - BASE) // PAGE_BYTES, length // PAGE_BYTES
            if self.locked and page < self.locked.stop and page + pages > self.locked.start:
                if not done:
                    raise KernelCallError("process_madvise", errno.EINVAL)
                break
            call.append((page, page + pages))
            done += length
        self.calls.append(call)
        return int(done)

    @property
    def advised(self) -> list[int]:
        """Page numbers, in order."""
        return [page for call in self.calls for first, last in call for page in range(first, last)]


class Files:
    pidfd = 3


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(syscalls, "process_madvise_rows", made)
    return made


def cleared(pieces: Spans, touched: set[int], huge: range = range(0)) -> Ranges:
    """The ranges for these pages (numbers from BASE on)."""
    layout = laid_out(pieces)
    numbers = (page_numbers(pieces) - np.uint64(BASE // PAGE_BYTES)).astype(np.int64)
    wanted = np.isin(numbers, sorted(touched))
    of_huge = np.isin(numbers, list(huge)) if huge else None
    runs, flags = runs_of(layout, wanted, of_huge)
    return ranges_of(runs, pieces, flags)


LAYOUT = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 700)), min_size=1, max_size=8)


@settings(deadline=None)
@given(LAYOUT, st.sets(st.integers(0, 3000), min_size=1, max_size=200))
def test_all_that_was_touched_is_cleared_and_nothing_outside_what_is_tracked(
    layout: list[tuple[int, int]], touched: set[int]
) -> None:
    """Small gaps are cleared along, but only where they are tracked too; no range reaches over a multiple of 1 MiB."""
    pairs, at = [], 0
    for gap, length in layout:
        pairs.append((at + gap, at + gap + length))
        at += gap + length
    whole = spans(*pairs)
    own = {page for first, last in pairs for page in range(first, last)}
    if not own & touched:
        return
    found = cleared(whole, touched & own)
    pages = [page for first, last in pages_of(found.spans) for page in range(first, last)]
    assert len(pages) == len(set(pages))
    assert own & touched <= set(pages) <= own
    step = np.uint64(clearing.CALL_BYTES)
    assert (found.spans.starts // step == (found.spans.ends - np.uint64(1)) // step).all()


def test_only_what_was_touched_and_what_lies_close_between_is_cleared() -> None:
    """A page in use once a minute should not be put on the inactive list once a second."""
    found = cleared(spans((0, 1000)), {10, 12, 200, 217, 900})
    assert pages_of(found.spans) == [(10, 13), (200, 218), (900, 901)]


def test_a_small_gap_that_is_not_tracked_is_not_cleared() -> None:
    """Two mappings with a page of somebody else's between them."""
    assert pages_of(cleared(spans((0, 10), (11, 20)), {9, 11}).spans) == [(9, 10), (11, 12)]
    assert pages_of(cleared(spans((0, 10), (10, 20)), {9, 11}).spans) == [(9, 12)]


def test_a_huge_page_is_one_range_and_left_alone_if_a_part_is_not_tracked() -> None:
    """The kernel would split it."""
    base = -(BASE // PAGE_BYTES) % BLOCK + BLOCK
    huge = range(base, base + 2 * BLOCK)
    whole = cleared(spans((0, base + 3 * BLOCK)), set(huge) | {huge.stop, base - 1}, huge)
    assert whole.huge is not None
    assert pages_of(Spans(whole.spans.starts[whole.huge], whole.spans.ends[whole.huge])) == [
        (base, base + BLOCK),
        (base + BLOCK, base + 2 * BLOCK),
    ]
    assert len(whole.spans) == 4
    part = cleared(spans((base + 1, base + 2 * BLOCK)), set(huge), huge)
    assert pages_of(part.spans) == [(base + BLOCK, base + 2 * BLOCK)]


def test_no_call_is_large(kernel: Kernel) -> None:
    """By pages, and by ranges, each of which costs something by itself."""
    whole = spans((0, 20_000))
    Cold().clear(Files(), cleared(whole, set(range(20_000))), whole)  # type: ignore[arg-type]
    assert kernel.advised == list(range(20_000))
    assert max(sum(last - first for first, last in call) for call in kernel.calls) <= 2 * clearing.CALL_PAGES
    kernel.calls.clear()
    scattered = set(range(0, 20_000, 20))
    Cold().clear(Files(), cleared(whole, scattered), whole)  # type: ignore[arg-type]
    assert kernel.advised == sorted(scattered)
    assert max(map(len, kernel.calls)) <= clearing.CALL_COST // clearing.RANGE_COST


def test_what_the_kernel_refuses_is_passed_over_and_the_rest_is_not(kernel: Kernel) -> None:
    """A locked mapping between two others: one range spans all three until it is refused."""
    pieces = spans((0, 100), (100, 150), (150, 400))
    kernel.locked = range(100, 150)
    Cold().clear(Files(), cleared(pieces, set(range(400))), pieces)  # type: ignore[arg-type]
    assert sorted(set(kernel.advised)) == [*range(100), *range(150, 400)]


def test_many_small_locked_mappings_among_others_hide_none_of_them(kernel: Kernel) -> None:
    """The count that the kernel returns tells where it stopped, call by call."""
    pairs = [(page, page + 3) for page in range(0, 4000, 40)]
    kernel.locked = range(1000, 2000)
    whole = spans(*pairs)
    Cold().clear(Files(), cleared(whole, {page for first, _ in pairs for page in (first, first + 2)}), whole)  # type: ignore[arg-type]
    assert sorted(set(kernel.advised)) == [
        page for first, last in pairs for page in range(first, last) if page not in kernel.locked
    ]


def test_a_process_that_may_not_be_advised_on_is_cleared_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only that one, until it goes."""
    from memtier_engine.hostfs.host import Host

    monkeypatch.setattr(clearing, "cold_works", lambda: True)
    best = BestClearing(Host())
    assert not best.of(PROCESS).whole
    best.refused(PROCESS, AccessDenied("process_madvise", errno.EPERM))
    assert best.of(PROCESS).whole
    assert not best.of(PROCESS._replace(pid=PROCESS.pid + 1)).whole
    best.watch(frozenset())
    assert not best.of(PROCESS).whole


def test_the_thread_is_what_it_was_after_clearing_whatever_happens() -> None:
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, os.getpriority(os.PRIO_PROCESS, 0)
    undisturbed = Undisturbed()
    undisturbed.breathe()
    undisturbed.__exit__(RuntimeError, RuntimeError(), None)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority, os.getpriority(0, 0)) == before


def test_a_thread_that_is_a_real_time_one_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_RR)
    calls: list[object] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda *each: calls.append(each))
    with Undisturbed() as undisturbed:
        undisturbed.breathe()
    assert calls == []


@pytest.mark.parametrize("call", ["sched_setscheduler", "sched_getscheduler", "sched_getparam"])
def test_where_real_time_is_not_allowed_clearing_goes_on_without(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cpu cgroup without a share for it, or a seccomp filter."""

    def refuse(*each: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, call, refuse)
    with Undisturbed() as undisturbed:
        undisturbed.breathe()
        undisturbed.breathe()


class Machine:
    """1000 touched pages of one process, some of which wait in batches, and some of which others map too."""

    pid = 1

    def __init__(self, waiting: set[int], shared: set[int]) -> None:
        self.mask = (1 << 46) - PAGE_BYTES
        self.waiting, self.shared = waiting, shared
        self.words = np.full(1024, paging.PTE_PRESENT | paging.PTE_ACCESSED, np.uint64)
        self.cleared = 0
        self.drains = 0

    def walk(self, fd: int, addresses: Any, out: Any = None) -> Walk:
        first = (int(addresses[0]) - BASE) // PAGE_BYTES
        words = self.words[first : first + len(addresses) * BLOCK].reshape(-1, BLOCK).copy()
        return Walk(np.full(len(addresses), paging.STATE_TABLE, np.uint64), words, False)

    def clear(self, files: Any, ranges: Ranges, pieces: Spans) -> None:
        for first, last in pages_of(ranges.spans):
            for page in set(range(first, last)) - self.waiting - self.shared:
                self.words[page] = paging.PTE_PRESENT
            self.cleared += last - first

    def drain(self) -> bool:
        self.drains += 1
        self.waiting = set()
        return True

    def fileno(self) -> int:
        return 0

    def read_all(self, pairs: list[tuple[int, int]]) -> Any:
        return np.concatenate([self.read(*pair) for pair in pairs])

    def read(self, start: int, end: int, out: Any = None) -> Any:
        pages = range((start - BASE) // PAGE_BYTES, (end - BASE) // PAGE_BYTES)
        return np.array([PM_PRESENT | (0 if page in self.shared else PM_MMAP_EXCLUSIVE) for page in pages], np.uint64)


class OfProcess:
    process = PROCESS
    pidfd = 3


def clear_once(machine: Any, bits: BitClearer) -> int:
    bits.begin(PROCESS)
    seen = look_at(machine, machine, laid_out(spans((0, 1000))))
    return bits.clear(OfProcess(), machine, seen, machine, np.empty((2, BLOCK), np.uint64))  # type: ignore[arg-type]


def clearer(machine: Any) -> BitClearer:
    bits = BitClearer(machine)
    bits._batches.drain = machine.drain  # type: ignore[method-assign]
    return bits


def test_pages_that_wait_in_the_batch_of_a_cpu_are_cleared_after_it_was_drained() -> None:
    """On a CPU that rests they would wait for ever."""
    machine = Machine({5, 6, 700}, set())
    assert clear_once(machine, clearer(machine)) == 0
    assert machine.drains == 1
    assert not paging.accessed(machine.words[:1000]).any()


def test_pages_of_others_are_not_tried_again_with_each_scan_but_now_and_then() -> None:
    """And are found again when they are nobody else's any more."""
    machine = Machine(set(), set(range(100, 1000)))
    bits = clearer(machine)
    assert clear_once(machine, bits) == 900
    costs = []
    for _ in range(2 * RETRY_SCANS):
        machine.cleared = 0
        assert clear_once(machine, bits) == 900
        costs.append(machine.cleared)
    assert sum(cost > 0 for cost in costs) == 2
    machine.shared = set()
    for _ in range(RETRY_SCANS):
        clear_once(machine, bits)
    assert not paging.accessed(machine.words[:1000]).any()
