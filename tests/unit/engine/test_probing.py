"""A few pages first, the rest after a scan, where a busy process can look idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.engine.probing import GROWTH, PROBE_BYTES, Probing
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, PageChunk, ProcessId, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.pages.space import Probe
from memtier_engine.policies.age import AgePolicyConfig
from support.fakes import BASE, PROCESS, FakeTarget, FakeTracker, pages_of, spans
from support.hostfolder import HostFolder

OTHER = ProcessId(4243, 9)
PROBE = PROBE_BYTES // PAGE_BYTES


class Stale:
    stale_tlb = True


class Probes:
    """A `Probing` with the probes of whoever is asked for."""

    def __init__(self, tracker: object) -> None:
        self._probes: defaultdict[ProcessId, Probe] = defaultdict(Probe)
        self._probing = Probing(tracker, lambda process: self._probes[process], self._probes.values)
        self.limit = self._probing.limit
        self.moved = self._probing.moved

    @property
    def waits(self) -> bool:
        return any(probe.waits for probe in self._probes.values())

    def scanned(self, process: ProcessId) -> None:
        self._probing.scanned(self._probes[process])

    def forget(self, process: ProcessId) -> None:
        del self._probes[process]


def task(process: ProcessId = PROCESS, pages: int = 10_000, to_node: int = SWAP_NODE) -> MoveTask:
    return MoveTask(process, spans((0, pages)), to_node, "idle")


def outcome(process: ProcessId = PROCESS, moved: int = PROBE, to_node: int = SWAP_NODE) -> MoveOutcome:
    return MoveOutcome(process, spans((0, PROBE)), to_node, PROBE_BYTES, moved * PAGE_BYTES, 0.0)


def sizes(tasks: list[MoveTask]) -> list[int]:
    """Pages that are to go out, at most."""
    return [min(task.spans.total_bytes, task.most_bytes or 1 << 62) // PAGE_BYTES for task in tasks]


def test_a_tracker_that_flushes_needs_no_probe() -> None:
    probing = Probes(object())
    assert sizes(probing.limit([task()])) == [10_000]
    probing.moved(outcome())
    assert not probing.waits


def test_all_goes_once_something_went_out_and_a_scan_followed() -> None:
    probing = Probes(Stale())
    assert sizes(probing.limit([task()])) == [PROBE]
    probing.moved(outcome())
    assert probing.waits
    assert probing.limit([task()]) == [], "between probe and scan nothing is known yet"
    probing.scanned(PROCESS)
    assert not probing.waits
    assert sizes(probing.limit([task()])) == [10_000]


def test_what_moves_makes_the_next_decision_a_sure_one_too() -> None:
    """So a process that stays idle goes out at full speed."""
    probing = Probes(Stale())
    probing.moved(outcome())
    for _ in range(3):
        probing.scanned(PROCESS)
        assert sizes(probing.limit([task()])) == [10_000]
        probing.moved(outcome())


def test_a_scan_holds_for_the_next_decision_and_no_longer() -> None:
    """Scans between two decisions change nothing; without page-outs, pages hide again."""
    probing = Probes(Stale())
    probing.moved(outcome())
    for _ in range(5):
        probing.scanned(PROCESS)
    assert sizes(probing.limit([task()])) == [10_000]
    probing.scanned(PROCESS)
    assert sizes(probing.limit([task()])) == [PROBE]


def test_each_process_is_probed_by_itself_and_once_a_decision() -> None:
    probing = Probes(Stale())
    probing.moved(outcome(OTHER))
    probing.scanned(OTHER)
    assert sizes(probing.limit([task(), task(), task(OTHER)])) == [PROBE, 10_000]


def test_a_probe_of_which_nothing_went_out_is_followed_by_a_larger_one() -> None:
    probing = Probes(Stale())
    probing.moved(outcome(moved=0))
    assert not probing.waits
    assert sizes(probing.limit([task()])) == [PROBE * GROWTH]
    probing.moved(outcome())
    probing.forget(PROCESS)
    assert sizes(probing.limit([task()])) == [PROBE]


def test_where_nothing_can_go_out_for_long_the_whole_process_is_the_probe() -> None:
    """As after swapoff: the mover's arithmetic ends at 64 bits, and the failures do not."""
    probing = Probes(Stale())
    for _ in range(100):
        assert probing.limit([task()])
        probing.moved(outcome(moved=0))
    assert sizes(probing.limit([task()])) == [10_000]
    probing.moved(outcome())
    probing.scanned(PROCESS)
    probing.limit([])
    assert sizes(probing.limit([task()])) == [PROBE]


def test_moves_between_nodes_are_not_held_up_and_prove_nothing() -> None:
    probing = Probes(Stale())
    assert sizes(probing.limit([task(to_node=1)])) == [10_000]
    probing.moved(outcome(to_node=1))
    assert not probing.waits


class HidingTracker(FakeTracker):
    """Pages in use stay in a TLB: they show no access until the kernel flushes it to page something out."""

    stale_tlb = True
    own_accesses_only = True

    def __init__(self, pages: int) -> None:
        super().__init__()
        self.busy = set(range(pages))
        self.flushed = True

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        self.touched = set(self.busy) if self.flushed else set()
        self.flushed = False
        yield from super().scan(process, spans)


@pytest.mark.parametrize(("scan_ms", "decide_ms"), [(1000, 1000), (1000, 4000)])
def test_a_busy_process_that_looks_idle_loses_a_probe_and_no_more(
    scan_ms: int, decide_ms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its 2000 pages are in use; then it falls asleep, and all go out."""
    pages = 2000
    maps = f"{BASE:x}-{BASE + pages * PAGE_BYTES:x} rw-p 00000000 00:00 0 \n"
    HostFolder(tmp_path).process(PROCESS.pid, start_ticks=PROCESS.start_ticks, maps=maps)
    clock, host, tracker, gone = FakeClock(), Host(tmp_path), HidingTracker(pages), []

    def page_out(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        tracker.flushed = True
        gone.append(part.total_bytes)
        tracker.absent |= {page for first, last in pages_of(part) for page in range(first, last)} - tracker.busy
        return BatchResult(moved_bytes=part.total_bytes)

    config = EngineConfig(
        scan_interval_ms=scan_ms,
        policy=AgePolicyConfig(interval_ms=decide_ms, swap_out_ms=6000),
        mover=MoverConfig(interval_ms=10, bandwidth_mib_per_s=None),
        count_swap_ins=False,
    )
    mover = Mover(config.mover, host, now_s=0.0, backend=page_out)
    engine = Engine(FakeTarget(PROCESS), config, host=host, clock=clock, tracker=tracker, mover=mover)

    def run(seconds: float) -> None:
        end_s = clock.now_s() + seconds
        while clock.now_s() < end_s:
            _, due_s = engine.advance(clock.now_s())
            clock.advance(max(0.001, due_s - clock.now_s()))

    run(120)
    assert gone, "it looked idle"
    assert max(gone) <= PROBE_BYTES
    assert len(gone) <= 120 / 6
    tracker.busy = set()
    run(60)
    assert tracker.absent == set(range(pages))


class TimedFake(FakeTarget):
    """Its processes do not run."""

    def run_time_us(self) -> int:
        return 100


def test_a_process_that_sleeps_is_looked_at_all_the_same_while_a_probe_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan after a probe is the one that tells; left out, the rest would wait for the next that is not."""
    pages = 2000
    maps = f"{BASE:x}-{BASE + pages * PAGE_BYTES:x} rw-p 00000000 00:00 0 \n"
    HostFolder(tmp_path).process(PROCESS.pid, start_ticks=PROCESS.start_ticks, maps=maps)
    clock, host, tracker = FakeClock(), Host(tmp_path), HidingTracker(0)
    scans: list[float] = []
    probes: list[float] = []

    def page_out(handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        probes.append(clock.now_s())
        tracker.absent |= {page for first, last in pages_of(part) for page in range(first, last)}
        return BatchResult(moved_bytes=part.total_bytes)

    scan = tracker.scan

    def noted(process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        scans.append(clock.now_s())
        yield from scan(process, spans)

    monkeypatch.setattr(tracker, "scan", noted)
    config = EngineConfig(
        scan_interval_ms=1000,
        policy=AgePolicyConfig(interval_ms=1000, swap_out_ms=3000),
        mover=MoverConfig(interval_ms=10, bandwidth_mib_per_s=None),
        count_swap_ins=False,
    )
    mover = Mover(config.mover, host, now_s=0.0, backend=page_out)
    engine = Engine(TimedFake(PROCESS), config, host=host, clock=clock, tracker=tracker, mover=mover)
    while not probes:
        _, due_s = engine.advance(clock.now_s())
        clock.advance(max(0.001, due_s - clock.now_s()))
    steps = 0
    while any(space.probe.waits for space in engine.spaces):
        report, due_s = engine.advance(clock.now_s())
        steps += report is not None
        clock.advance(max(0.001, due_s - clock.now_s()))
    assert steps == 1
    assert scans[-1] > probes[0]
