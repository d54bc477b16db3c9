"""Clearing accessed bits on the real kernel, and what trackers tell between, at and after scans that are given up."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_PAGEOUT
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap, present, swapped
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, LookingTracker, PageChunk, Spans, Tracker
from memtier_engine.trackers import clearing
from memtier_engine.trackers.bpf import paging
from memtier_engine.trackers.bpf.program import SharedWalker
from memtier_engine.trackers.bpf.sampling import SampledBpfTracker
from memtier_engine.trackers.bpf.tracker import BpfTracker
from memtier_engine.trackers.clearing import Batches, drain_batches
from memtier_engine.trackers.refs import RefsTracker
from memtier_engine.trackers.registry import why_not
from support.swap import temporary_zram_swap
from support.toucher import Toucher, scan, toucher

_WHY = why_not("bpf", Host())
pytestmark = pytest.mark.skipif(
    _WHY is not None, reason=f"tracker bpf does not work here: {_WHY}; run as root, or `make e2e` in the test VM"
)
PAGES = 3000


@pytest.fixture
def tracker() -> Iterator[BpfTracker]:
    made = BpfTracker(Host())
    yield made
    made.close()


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Toucher]:
    with toucher("anonymous", PAGES, tmp_path) as made:
        made.write(range(PAGES))
        yield made


def part(load: Toucher, *pairs: tuple[int, int]) -> Spans:
    starts, ends = np.array(pairs, np.uint64).T
    base, size = np.uint64(load.address), np.uint64(PAGE_BYTES)
    return Spans(base + starts * size, base + ends * size)


def accessed_bits(load: Toucher) -> list[int]:
    """Which pages have the bit set, by a look that changes nothing."""
    with closing(BpfTracker(Host())) as looking:
        seen = looking.look(load.process, load.spans)
    assert seen is not None
    return np.flatnonzero(seen).tolist()


def whole(chunks: list[PageChunk], name: str) -> list[int]:
    return np.flatnonzero(np.concatenate([getattr(chunk, name) for chunk in chunks])).tolist()


@pytest.mark.parametrize("make", [BpfTracker, partial(SampledBpfTracker, share=1.0), RefsTracker])
def test_no_bit_outside_the_scanned_spans_is_cleared(make: Callable[[Host], Tracker], load: Toucher) -> None:
    """Not those of pages between two spans either, however near."""
    with closing(make(Host())) as tracker:
        load.read(range(PAGES))
        mine = part(load, (0, 10), (14, 600), (1300, 1310))
        list(tracker.scan(load.process, mine))
    left = accessed_bits(load)
    outside = [*range(10, 14), *range(600, 1300), *range(1310, PAGES)]
    # Somebody else may clear bits here and there, by physical memory: DAMON.
    assert len(set(outside) & set(left)) >= 0.95 * len(outside)
    assert len(set(left) - set(outside)) <= 31


def test_pages_of_a_new_process_count_as_touched_though_their_bits_are_clear(
    tracker: BpfTracker, load: Toucher
) -> None:
    """Another tracker cleared them: nothing is known of the time before the first scan."""
    scan(tracker, load)
    assert scan(tracker, load).accessed.tolist() == []
    tracker.watch(frozenset())
    assert scan(tracker, load).accessed.tolist() == list(range(PAGES))
    assert scan(tracker, load).accessed.tolist() == []


def test_pages_of_a_new_span_count_as_touched_though_their_bits_are_clear(tracker: BpfTracker, load: Toucher) -> None:
    scan(tracker, load)
    half = part(load, (0, 700), (900, 1500))
    list(tracker.scan(load.process, half))
    assert accessed_bits(load) == []
    more = part(load, (0, 720), (890, 1500), (2000, 2100))
    found = list(tracker.scan(load.process, more))
    addresses = np.concatenate([np.arange(0, 720), np.arange(890, 1500), np.arange(2000, 2100)])
    assert addresses[whole(found, "accessed")].tolist() == [*range(700, 720), *range(890, 900), *range(2000, 2100)]
    assert whole(list(tracker.scan(load.process, more)), "accessed") == []


def test_a_scan_that_is_given_up_loses_no_touch(tracker: BpfTracker, tmp_path: Path) -> None:
    """What was told is cleared; what was not is told by the next scan."""
    pages = 2 * CHUNK_PAGES + 100
    program = (
        "import ctypes, mmap, sys\n"
        f"area = mmap.mmap(-1, {pages} * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "area.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)\n"
        "for line in sys.stdin:\n"
        f"    area[::4096] = bytes({pages})\n"
        "    print(flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        try:
            start = np.array([int(popen.stdout.readline())], np.uint64)
            spans = Spans(start, start + np.uint64(pages * PAGE_BYTES))
            process = process_id(Host(), popen.pid)
            for _ in range(2):
                popen.stdin.write("\n")
                popen.stdin.flush()
                popen.stdout.readline()
                list(tracker.scan(process, spans))
            popen.stdin.write("\n")
            popen.stdin.flush()
            popen.stdout.readline()
            begun = tracker.scan(process, spans)
            first = next(begun)
            begun.close()  # type: ignore[attr-defined]
            told = len(first.accessed)
            assert first.accessed.mean() > 0.95  # others, such as DAMON, may clear some bits meanwhile
            seen = np.concatenate([chunk.accessed for chunk in tracker.scan(process, spans)])
            assert seen[told:].mean() > 0.95
            assert seen[:told].mean() < 0.05
        finally:
            popen.kill()


def test_a_look_tells_what_was_touched_since_the_scan_and_changes_nothing(tracker: BpfTracker, load: Toucher) -> None:
    assert isinstance(tracker, LookingTracker)
    scan(tracker, load)
    scan(tracker, load)
    load.read([3, 700, 701, 2999])
    for _ in range(2):
        seen = tracker.look(load.process, part(load, (0, 5), (6, 7), (700, 702), (2990, 3000)))
        assert seen is not None
        assert np.flatnonzero(seen).tolist() == [3, 6, 7, 17]
    assert scan(tracker, load).accessed.tolist() == [3, 700, 701, 2999]


def test_a_look_at_a_thousand_spans_is_a_few_runs_of_the_walk(
    tracker: BpfTracker, load: Toucher, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(tracker, load)
    scan(tracker, load)
    load.read(range(0, PAGES, 7))
    runs = 0
    walk = tracker.walker.walk

    def counted(*args: object) -> object:
        nonlocal runs
        runs += 1
        return walk(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tracker.walker, "walk", counted)
    seen = tracker.look(load.process, part(load, *[(page, page + 1) for page in range(0, PAGES, 2)]))
    assert seen is not None
    assert np.flatnonzero(seen).tolist() == list(range(0, PAGES // 2, 7))
    assert runs == 1


def test_what_is_in_swap_is_told_from_what_was_never_there(tracker: BpfTracker, tmp_path: Path) -> None:
    """As pagemap tells it."""
    with temporary_zram_swap(64 << 20), toucher("anonymous", PAGES, tmp_path) as load:
        load.write(range(0, PAGES, 2))
        pidfd = syscalls.pidfd_open(load.process.pid)
        syscalls.process_madvise(pidfd, load.spans.starts, np.array([1000 * PAGE_BYTES], np.uint64), MADV_PAGEOUT)
        os.close(pidfd)
        found = list(tracker.scan(load.process, load.spans))
        with Pagemap(Host(), load.process.pid) as pagemap:
            words = pagemap.read(load.address, load.address + PAGES * PAGE_BYTES)
        assert whole(found, "swapped") == np.flatnonzero(swapped(words)).tolist()
        assert len(whole(found, "swapped")) > 400
        assert whole(found, "resident") == np.flatnonzero(present(words)).tolist()


def test_a_tag_belongs_to_the_frame(tracker: BpfTracker, load: Toucher) -> None:
    """Of pages that were unmapped and filled anew it changes in nearly all cases, of others in none."""

    def tags() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        (chunk,) = tracker.scan(load.process, load.spans)
        assert chunk.tags is not None
        return chunk.tags

    before = tags()
    assert (tags() == before).all()
    assert len(np.unique(before)) > 200
    with closing(RefsTracker(Host())) as refs:
        (chunk,) = refs.scan(load.process, load.spans)
        assert chunk.tags is not None
        assert (chunk.tags == before).all()  # from pagemap the same as from page tables


def test_pages_in_the_batch_of_a_cpu_are_cleared_too(tmp_path: Path) -> None:
    """Up to 31 pages wait there to join an LRU list, for as long as that CPU rests, and MADV_COLD passes over them."""
    pinned = ("taskset", "-c", str(max(os.sched_getaffinity(0))))
    for _ in range(10):
        with toucher("anonymous", 20, tmp_path, command=pinned) as load, closing(BpfTracker(Host())) as tracker:
            load.write(range(20))
            scan(tracker, load)
            tracker._bits._batches = Batches()  # not waiting for its next turn
            scan(tracker, load)
            assert scan(tracker, load).accessed.tolist() == []


def test_draining_is_paced_by_what_it_costs() -> None:
    batches = Batches()
    assert batches.drain()
    drained = sum(batches.drain() for _ in range(1000))
    assert drained < 1000


def test_draining_works_here() -> None:
    assert drain_batches()


def test_what_draining_maps_is_one_page_and_no_part_of_a_larger_folio() -> None:
    """The kernel passes over a part of one and empties nothing: so it was with interpreters that were just unpacked."""
    assert 0 < clearing._ONE_PAGE.stat().st_size <= PAGE_BYTES


def test_locked_memory_keeps_its_bits_and_hides_nobody_elses(tracker: BpfTracker) -> None:
    """Every second page locked: one mapping each."""
    program = (
        "import ctypes, mmap, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "area = mmap.mmap(-1, 1000 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "area.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "area[::4096] = bytes(1000)\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(area))\n"
        "for page in range(0, 200, 2): libc.mlock(ctypes.c_void_p(at + page * 4096), ctypes.c_size_t(4096))\n"
        "print(at, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout is not None
        assert popen.stdin is not None
        try:
            base = int(popen.stdout.readline())
            process = process_id(Host(), popen.pid)
            edges = np.array([*range(200), 200, 1000], np.uint64) * np.uint64(PAGE_BYTES) + np.uint64(base)
            spans = Spans(edges[:-1], edges[1:])
            for _ in range(3):
                found = whole(list(tracker.scan(process, spans)), "accessed")
            assert set(found) <= set(range(0, 200, 2))
        finally:
            popen.kill()


@pytest.mark.parametrize("kind", [BpfTracker, RefsTracker])
def test_files_of_processes_may_be_the_engines(kind: type[BpfTracker], load: Toucher) -> None:
    """Closing the tracker leaves them open."""
    with OpenProcesses(Host()) as files:
        tracker = kind(Host())
        tracker.use_files(files)
        scan(tracker, load)
        assert len(files) == 1
        tracker.watch(frozenset())
        tracker.close()
        assert len(files) == 1


def test_a_process_that_runs_another_program_between_two_scans_is_followed(tracker: BpfTracker) -> None:
    """Its pagemap belongs to the memory of before."""
    command = ["sh", "-c", "read x; exec sleep 100"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as popen:
        assert popen.stdin is not None
        try:
            process = process_id(Host(), popen.pid)
            stack = re.compile(r"^(\w+)-(\w+) .*\[stack\]$", re.M)

            def resident() -> int:
                found = stack.search(Path(f"/proc/{popen.pid}/maps").read_text())
                assert found
                spans = Spans(np.array([int(found[1], 16)], np.uint64), np.array([int(found[2], 16)], np.uint64))
                return sum(int(chunk.resident.sum()) for chunk in tracker.scan(process, spans))

            assert resident() > 0
            popen.stdin.write("\n")
            popen.stdin.flush()
            while "sleep" not in Path(f"/proc/{popen.pid}/comm").read_text():
                os.sched_yield()
            assert resident() > 0
        finally:
            popen.kill()


def test_huge_pages_stay_whole(tracker: BpfTracker, tmp_path: Path) -> None:
    """MADV_COLD on a part of one splits it."""
    with toucher("huge", 4 * 512, tmp_path) as load, contextlib.closing(SharedWalker(Host())) as shared:
        load.write(range(load.pages))
        blocks = np.arange(load.address, int(load.spans.ends[0]), paging.BLOCK_BYTES, dtype=np.uint64)

        def huge() -> int:
            with Pagemap(Host(), load.process.pid) as pagemap:
                return int((shared.walker.walk(pagemap.fileno(), blocks).states == paging.STATE_HUGE_PMD).sum())

        before = huge()
        if not before:
            pytest.skip("the kernel found no free huge pages: echo 1 > /proc/sys/vm/compact_memory")
        for spans in (load.spans, part(load, (0, 100), (130, 700), (1030, 2000))):
            for _ in range(3):
                load.read(range(0, load.pages, 100))
                list(tracker.scan(load.process, spans))
        assert huge() == before
