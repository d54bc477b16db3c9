"""An engine in a thread of its own, and what others may do with it: hold it, ask what it counted, change its target."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.engine.runner import EngineThread
from memtier_engine.hostfs.occupied import occupied
from memtier_engine.model import PAGE_BYTES, Spans
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.policies.stub import StubPolicy
from memtier_engine.stats.counts import AccessCounts
from memtier_engine.targets.chosen import ChosenTarget
from memtier_engine.trackers.finder import FinderConfig, FinderTracker
from support.fakes import BASE, PROCESS, FakeTarget, FakeTracker, pages_of, spans
from support.hostfolder import HostFolder
from support.waiting import WAIT_S

MAPS = f"{BASE:x}-{BASE + 8 * PAGE_BYTES:x} rw-p 00000000 00:00 0 \n"
PRESENT, EXCLUSIVE, SWAPPED = 1 << 63, 1 << 56, 1 << 62


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    made = HostFolder(tmp_path)
    made.write("proc/self/mounts", "")
    made.process(PROCESS.pid, start_ticks=PROCESS.start_ticks, maps=MAPS)
    return made


@pytest.fixture
def tracker() -> FakeTracker:
    return FakeTracker()


@pytest.fixture
def counts() -> AccessCounts:
    return AccessCounts(RegionCounters(pages_in_region=4))


@pytest.fixture
def engine(folder: HostFolder, tracker: FakeTracker, counts: AccessCounts) -> Iterator[Engine]:
    """Scans a fake process every 10 ms and moves nothing."""
    made = Engine(
        FakeTarget(PROCESS),
        EngineConfig(scan_interval_ms=10, dry_run=True),
        host=folder.host,
        tracker=tracker,
        policy=StubPolicy(),
        observers=[counts],
    )
    yield made
    made.close()


def test_it_steps_until_it_is_stopped_and_closes_its_engine(engine: Engine, tracker: FakeTracker) -> None:
    enough = threading.Event()
    reports: list[StepReport] = []

    def on_report(report: StepReport) -> None:
        reports.append(report)
        if report.scans >= 3:
            enough.set()

    thread = EngineThread(engine, on_report=on_report)
    assert not thread.running
    thread.start()
    assert enough.wait(WAIT_S)
    assert thread.running
    assert thread.stop()
    assert not thread.running
    assert engine.closed
    assert tracker.closed
    assert [report.scans for report in reports[:3]] == [1, 2, 3]


def test_whoever_holds_it_has_it_alone(engine: Engine) -> None:
    """No step is made meanwhile, however long it is held."""
    stepped = threading.Event()
    thread = EngineThread(engine, on_report=lambda report: stepped.set())
    thread.start()
    assert stepped.wait(WAIT_S)
    with thread.held() as held:
        assert held is engine
        scans = engine.age_clock.scans
        stepped.clear()
        assert not stepped.wait(0.05)  # five intervals
        assert engine.age_clock.scans == scans
    assert stepped.wait(WAIT_S)
    thread.stop()


def test_an_engine_that_fails_is_closed_and_told_of(engine: Engine, tracker: FakeTracker) -> None:
    tracker.failure = RuntimeError("broken")
    failures: list[Exception] = []
    told = threading.Event()

    def on_failure(failure: Exception) -> None:
        failures.append(failure)
        told.set()

    thread = EngineThread(engine, on_failure=on_failure)
    thread.start()
    assert told.wait(WAIT_S)
    assert thread.stop()
    assert engine.closed
    assert [str(failure) for failure in failures] == ["broken"]


def test_one_that_was_never_started_can_be_stopped(engine: Engine) -> None:
    thread = EngineThread(engine)
    assert thread.stop()
    assert engine.closed


def test_counts_are_kept_per_region_until_they_are_reset(
    engine: Engine, tracker: FakeTracker, counts: AccessCounts
) -> None:
    tracker.touched = {0, 1, 5}
    engine.step(1.0)
    engine.step(2.0)
    table = counts.tables()[PROCESS]
    assert table.accesses.tolist() == [4, 2]
    counts.reset()
    assert counts.tables()[PROCESS].accesses.tolist() == [0, 0]
    engine.step(3.0)
    assert counts.tables()[PROCESS].accesses.tolist() == [2, 1]


def test_a_process_that_is_gone_has_no_counts(engine: Engine, counts: AccessCounts) -> None:
    engine.step(1.0)
    assert list(counts.tables()) == [PROCESS]
    target = engine.target
    assert isinstance(target, FakeTarget)
    target.processes = frozenset()
    engine.step(2.0)
    assert counts.tables() == {}


def test_chosen_processes_stay_the_ones_they_were(folder: HostFolder) -> None:
    target = ChosenTarget(folder.host, [PROCESS.pid])
    assert target.poll() == {PROCESS}
    folder.process(PROCESS.pid, start_ticks=PROCESS.start_ticks + 1)
    assert target.poll() == frozenset()  # the pid is another's by now
    target.choose([PROCESS.pid])
    assert [process.start_ticks for process in target.poll()] == [PROCESS.start_ticks + 1]


def test_processes_are_added_removed_and_waited_for(folder: HostFolder) -> None:
    target = ChosenTarget(folder.host)
    assert target.poll() == frozenset()
    target.add([PROCESS.pid, 77])
    assert {process.pid for process in target.poll()} == {PROCESS.pid}
    folder.process(77)
    assert {process.pid for process in target.poll()} == {PROCESS.pid, 77}
    target.remove([PROCESS.pid, 5])
    assert {process.pid for process in target.poll()} == {77}
    assert target.pids() == (77,)


def found(finder: FinderTracker, wanted: Spans) -> list[tuple[int, int]]:
    return pages_of(finder.find(PROCESS, wanted))


def test_a_finder_finds_spans_as_they_are_or_the_runs_of_pages_with_certain_bits(folder: HostFolder) -> None:
    whole = spans((0, 4), (4, 8))  # two mappings side by side
    words = {BASE + page * PAGE_BYTES: PRESENT | EXCLUSIVE for page in (0, 1, 3, 4, 5)}
    words[BASE + 7 * PAGE_BYTES] = PRESENT
    folder.pagemap(PROCESS.pid, {**words, BASE + 6 * PAGE_BYTES: SWAPPED})
    assert found(FinderTracker(folder.host), whole) == [(0, 4), (4, 8)]
    present = FinderConfig(present=True)
    assert found(FinderTracker(folder.host, present), whole) == [(0, 2), (3, 4), (4, 6), (7, 8)]
    assert found(FinderTracker(folder.host, FinderConfig(present=False)), whole) == [(2, 3), (6, 7)]
    assert found(FinderTracker(folder.host, FinderConfig(present=True, exclusive=False)), whole) == [(7, 8)]
    assert found(FinderTracker(folder.host, present), Spans.empty()) == []


def test_occupied_mappings_are_those_that_hold_or_held_something(folder: HostFolder) -> None:
    """In RAM, or only in swap; the heap even when it is empty; address space that was never touched is none."""

    def mapping(first: int, last: int, name: str, anonymous: int, swap: int) -> tuple[str, str]:
        head = f"{BASE + first * PAGE_BYTES:x}-{BASE + last * PAGE_BYTES:x} rw-p 00000000 00:00 0 {name}\n"
        return head, f"{head}Rss: 0 kB\nReferenced: 0 kB\nSwap: {swap} kB\nAnonymous: {anonymous} kB\nVmFlags: rd wr\n"

    rows = [
        mapping(0, 1, "", 4, 0),
        mapping(1, 2, "", 0, 4),
        mapping(2, 3, "", 0, 0),
        mapping(3, 4, "[heap]", 0, 0),
        mapping(4, 5, "[vvar]", 4, 0),
    ]
    folder.process(PROCESS.pid, maps="".join(head for head, _ in rows))
    folder.write(f"proc/{PROCESS.pid}/smaps", "".join(text for _, text in rows))
    assert pages_of(occupied(folder.host, PROCESS.pid)) == [(0, 1), (1, 2), (3, 4)]
    folder.process(PROCESS.pid, maps="")
    folder.write(f"proc/{PROCESS.pid}/smaps", "")
    assert len(occupied(folder.host, PROCESS.pid)) == 0
    assert np.array_equal(occupied(folder.host, PROCESS.pid).starts, [])
