"""Faults and access samples counted by BPF programs, on the real kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import MADV_PAGEOUT
from memtier_engine.errors import TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.pagemap import Pagemap, swapped
from memtier_engine.model import PAGE_BYTES, Spans
from memtier_engine.trackers.bpf import attach, faults, hardware
from memtier_engine.trackers.bpf.faults import FaultCounter, FaultTable
from memtier_engine.trackers.bpf.hardware import AccessSampler, Event, HardwareTracker, memory_events
from memtier_engine.trackers.bpf.sampling import SampledBpfTracker, in_panel
from memtier_engine.trackers.registry import why_not
from support.swap import temporary_zram_swap
from support.toucher import Toucher, scan, toucher

_WHY = why_not("bpf", Host())
pytestmark = pytest.mark.skipif(
    _WHY is not None, reason=f"tracker bpf does not work here: {_WHY}; run as root, or `make e2e` in the test VM"
)
REGION = 2 << 20
PAGE_FAULTS = Event("page-faults", attach.PERF_TYPE_SOFTWARE, attach.PERF_COUNT_SW_PAGE_FAULTS, user_only=False)


def within(load: Toucher, table: FaultTable | None) -> dict[str, int | None]:
    """Sums over the regions of the toucher's memory; Python's own faults elsewhere do not count."""
    if table is None:
        return {"faults": 0, "reads": 0, "writes": 0, "not_present": 0, "swap_ins": 0, "major": 0}
    first = load.address // REGION * REGION
    mine = (table.regions >= np.uint64(first)) & (table.regions < load.spans.ends[0])
    names = ("faults", "reads", "writes", "not_present", "swap_ins", "major")
    columns = {name: getattr(table, name) for name in names}
    return {name: None if column is None else int(column[mine].sum()) for name, column in columns.items()}


@pytest.mark.parametrize("tracepoint", ["page_fault_user", None])
def test_every_fault_is_counted_once(tracepoint: str | None, tmp_path: Path) -> None:
    """By kind where the kernel tells. In regions that are the toucher's alone."""
    with FaultCounter(Host(), tracepoint=tracepoint) as counter, toucher("anonymous", 2048, tmp_path) as load:
        split = tracepoint is not None and counter.reads_and_writes
        first = -load.address % REGION // PAGE_BYTES
        counter.watch(frozenset({load.process}))
        load.read(range(first, first + 512))
        load.write(range(first + 512, first + 612))
        table = counter.read()[load.process]
        start = load.address + first * PAGE_BYTES
        rows = [int(np.flatnonzero(table.regions == np.uint64(start + at))[0]) for at in (0, REGION)]
        assert table.faults[rows].tolist() == table.not_present[rows].tolist() == [512, 100]
        assert not table.swap_ins[rows].any()
        assert not table.major[rows].any()
        assert (table.reads is not None) == (table.writes is not None) == counter.reads_and_writes
        if split:
            assert table.reads is not None
            assert table.writes is not None
            assert table.reads[rows].tolist() == [512, 0]
            assert table.writes[rows].tolist() == [0, 100]
        load.read(range(first, first + 512))
        again = counter.read().get(load.process, FaultTable.empty())
        assert not np.isin(again.regions, table.regions[rows]).any()


@pytest.mark.parametrize("tracepoint", ["page_fault_user", None])
def test_refaults_from_swap_are_counted_with_their_duration(tracepoint: str | None, tmp_path: Path) -> None:
    with (
        temporary_zram_swap(128 << 20),
        FaultCounter(Host(), tracepoint=tracepoint) as counter,
        toucher("anonymous", 1024, tmp_path) as load,
    ):
        counter.watch(frozenset({load.process}))
        load.write(range(1024))
        pidfd = syscalls.pidfd_open(load.process.pid)
        syscalls.process_madvise(pidfd, load.spans.starts, load.spans.ends - load.spans.starts, MADV_PAGEOUT)
        os.close(pidfd)
        with Pagemap(Host(), load.process.pid) as pagemap:
            out = np.flatnonzero(swapped(pagemap.read(load.address, int(load.spans.ends[0]))))
        assert len(out) > 500
        counter.read()
        before = (counter.totals.swap_ins, counter.totals.major, counter.totals.major_s)
        load.read(out[:300].tolist())
        load.write(out[300:400].tolist())
        table = counter.read()[load.process]
        found = within(load, table)
        assert found["swap_ins"] == found["not_present"] == found["faults"]
        # Neighbours that come along (readahead, large folios) spare some of the 400 a fault.
        assert 0 < (found["swap_ins"] or 0) <= 400
        assert 0 < (found["major"] or 0) <= (found["swap_ins"] or 0)
        assert 0 < float(table.major_s.sum()) < 4
        assert counter.totals.swap_ins - before[0] >= (found["swap_ins"] or 0)
        assert counter.totals.major - before[1] >= (found["major"] or 0)
        assert counter.totals.major_s > before[2]


def test_copy_on_write_is_a_fault_at_a_present_page(tmp_path: Path) -> None:
    with FaultCounter(Host()) as counter, toucher("anonymous", 512, tmp_path) as load:
        load.write(range(512))
        child = int(load.ask("fork"))
        counter.watch(frozenset({load.process}))
        load.write(range(50))
        found = within(load, counter.read().get(load.process))
        os.kill(child, 9)
        assert (found["faults"] or 0) - (found["not_present"] or 0) >= 50


def test_processes_that_are_not_watched_are_not_counted(tmp_path: Path) -> None:
    with FaultCounter(Host()) as counter, toucher("anonymous", 512, tmp_path) as load:
        load.write(range(10))
        assert counter.read() == {}
        counter.watch(frozenset({load.process}))
        counter.watch(frozenset())
        load.write(range(10, 500))
        assert counter.read() == {}


def test_a_full_map_loses_counts_and_says_how_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing fails; the process does not notice."""
    monkeypatch.setattr(faults, "_SIZES", {**faults._SIZES, "faults": 4})
    with FaultCounter(Host()) as counter, toucher("anonymous", 100 * 512, tmp_path) as load:
        counter.watch(frozenset({load.process}))
        load.write(range(0, 100 * 512, 512))
        found = counter.read()
        assert sum(len(table.regions) for table in found.values()) <= 4
        assert counter.totals.lost >= 80
        load.write([1])
        assert load.process in counter.read()  # reading made room


def test_of_more_processes_than_the_map_holds_the_first_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Room that becomes free is used."""
    monkeypatch.setattr(faults, "_SIZES", {**faults._SIZES, "watched": 1})
    with (
        FaultCounter(Host()) as counter,
        toucher("anonymous", 16, tmp_path) as first,
        toucher("anonymous", 16, tmp_path) as second,
    ):
        both = frozenset({first.process, second.process})
        counter.watch(both)
        first.write(range(16))
        second.write(range(16))
        assert counter.read().keys() == {min(both)}
        counter.watch(frozenset({max(both)}))
        second.read(range(16))
        first.ask("fork")
        second.ask("fork")
        assert counter.read().keys() == {max(both)}


def test_an_unknown_tracepoint_falls_back_to_the_perf_event() -> None:
    with FaultCounter(Host(), tracepoint="no_such_tracepoint") as counter:
        assert not counter.reads_and_writes


def test_in_a_pid_namespace_of_its_own_nothing_is_counted_for_the_wrong_processes() -> None:
    """Programs see the pids of the initial namespace. Tracker bpf itself reads by file, so it works there."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare: apt install util-linux")
    program = (
        "from memtier_engine.errors import MemtierError\n"
        "from memtier_engine.hostfs.host import Host\n"
        "from memtier_engine.trackers.bpf.faults import FaultCounter\n"
        "from memtier_engine.trackers.bpf.tracker import BpfTracker\n"
        "BpfTracker(Host()).close()\n"
        "try: FaultCounter(Host())\n"
        "except MemtierError as failure: print(failure)\n"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pid namespace of its own" in done.stdout
    assert "hostPID: true" in done.stdout


def test_a_closed_counter_leaves_nothing_open() -> None:
    FaultCounter(Host()).close()
    before = len(os.listdir("/proc/self/fd"))
    counter = FaultCounter(Host())
    counter.close()
    counter.close()
    assert len(os.listdir("/proc/self/fd")) == before


def has_memory_events() -> bool:
    try:
        return bool(memory_events(Host()))
    except TrackerUnavailable:
        return False


def test_without_memory_sampling_in_the_cpu_the_tracker_is_refused_with_the_reason() -> None:
    if has_memory_events():
        pytest.skip("this CPU has memory sampling; the refusal is seen on virtual machines without it")
    with pytest.raises(TrackerUnavailable, match=r"no memory sampling: neither PEBS .* bare metal"):
        HardwareTracker(Host())


def test_the_cpu_samples_hot_pages() -> None:
    if not has_memory_events():
        pytest.skip("needs a CPU that shows PEBS or IBS: run it on bare metal")
    program = (
        "import ctypes, mmap\n"
        "area = mmap.mmap(-1, 256 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "area[::4096] = bytes(256)\n"
        "print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)\n"
        "while True: bytes(area)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout is not None
            address = int(popen.stdout.readline())
            process = process_id(Host(), popen.pid)
            spans = Spans(np.array([address], np.uint64), np.array([address + 256 * PAGE_BYTES], np.uint64))
            tracker = HardwareTracker(Host())
            tracker.watch(frozenset({process}))
            list(tracker.scan(process, spans))
            time.sleep(2)
            (chunk,) = tracker.scan(process, spans)
            assert chunk.rates is not None
            assert int((chunk.rates > 0).sum()) > 64
            tracker.close()
        finally:
            popen.kill()


def test_sampled_addresses_arrive_page_by_page(tmp_path: Path) -> None:
    """The same program and map on an event that every machine has: page faults carry data addresses too."""
    sampler = AccessSampler(Host(), events=[PAGE_FAULTS], period=1)
    tracker = HardwareTracker(Host(), sampler=sampler)
    with toucher("anonymous", 3000, tmp_path) as load:
        tracker.watch(frozenset({load.process}))
        assert scan(tracker, load).accessed.tolist() == []
        touched = list(range(7, 3000, 11))
        load.write(touched)
        (chunk,) = tracker.scan(load.process, load.spans)
        assert np.flatnonzero(chunk.accessed).tolist() == touched
        assert chunk.rates is not None
        assert np.flatnonzero(chunk.rates == 1.0).tolist() == touched
        assert scan(tracker, load).accessed.tolist() == []
    tracker.close()


def test_a_full_map_of_samples_loses_some_and_says_how_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing fails; reading makes room."""
    monkeypatch.setattr(hardware, "_SIZES", {**hardware._SIZES, "touches": 8})
    with (
        AccessSampler(Host(), events=[PAGE_FAULTS], period=1) as sampler,
        toucher("anonymous", 400, tmp_path) as load,
    ):
        sampler.watch(frozenset({load.process}))
        load.write(range(300))
        assert sum(len(pages) for pages, _ in sampler.read().values()) <= 8
        assert sampler.lost >= 292
        load.write([350])
        assert load.process in sampler.read()


def test_an_event_that_the_machine_refuses_is_named() -> None:
    with pytest.raises(TrackerUnavailable, match="event nonsense: perf_event_open"):
        AccessSampler(Host(), events=[Event("nonsense", 0x7FFF, 1)])


BATCH_PAGES = 64
"""More than wait in a CPU's batch (31) to join an LRU list: MADV_COLD passes over those, so they are not compared."""


@contextlib.contextmanager
def settled_toucher(pages: int, folder: Path) -> Iterator[Toucher]:
    """`pages` written pages that have left the batch of their CPU: later ones pushed them out.

    It is pinned, for each CPU has a batch of its own.
    """
    pinned = ("taskset", "-c", str(max(os.sched_getaffinity(0))))
    with toucher("anonymous", pages + BATCH_PAGES, folder, command=pinned) as load:
        load.write(range(load.pages))
        yield load


def test_a_sampled_process_is_exact_within_the_panel_and_in_use_outside(tmp_path: Path) -> None:
    """Share 1/2 of 32 blocks; the estimate lies within three standard errors of the truth."""
    pages = 32 * 512
    with (
        contextlib.closing(SampledBpfTracker(Host(), share=0.5, seed=11)) as tracker,
        settled_toucher(pages, tmp_path) as load,
    ):
        scan(tracker, load)
        scan(tracker, load)
        assert tracker.estimate(load.process) is not None
        touched = np.arange(0, pages, 7)
        load.read(touched.tolist())
        seen = scan(tracker, load)
        blocks = (load.address + np.arange(load.pages) * PAGE_BYTES) // REGION * REGION
        chosen = in_panel(blocks.astype(np.uint64), 11, 0.5)
        accessed = np.zeros(load.pages, np.bool_)
        accessed[seen.accessed] = True
        expected = np.zeros(load.pages, np.bool_)
        expected[touched] = True
        inside = chosen[:pages]
        assert inside.any()
        assert not inside.all()
        assert np.flatnonzero((accessed != expected)[:pages] & inside).tolist() == []
        assert accessed[~chosen].all()
        assert seen.resident.tolist() == list(range(load.pages))
        estimate = tracker.estimate(load.process)
        assert estimate is not None
        truth = len(touched) * PAGE_BYTES
        allowed = 3 * estimate.standard_error_bytes + 0.1 * truth + 2 * BATCH_PAGES * PAGE_BYTES
        assert abs(estimate.accessed_bytes - truth) <= allowed


def test_a_panel_of_everything_is_as_exact_as_the_whole(tmp_path: Path) -> None:
    """Cleared by MADV_COLD instead of clear_refs.

    All but the pages touched last: they may still wait in their CPU's batch, which MADV_COLD passes over, and so
    count as in use until they have left it.
    """
    pages = 3000
    with (
        contextlib.closing(SampledBpfTracker(Host(), share=1.0)) as tracker,
        settled_toucher(pages, tmp_path) as load,
    ):
        scan(tracker, load)
        scan(tracker, load)
        load.read(range(100, 300))
        accessed = scan(tracker, load).accessed
        assert accessed[accessed < pages].tolist() == list(range(100, 300))
