"""The engine as a whole: fake tracker and kernel, a dressed /proc, a clock that moves when told."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.engine.runner import Runner
from memtier_engine.errors import ConfigError, KernelCallError, ProcessGone, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, MoveOutcome, MoveTask, ProcessId, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.stats.observer import Observer
from support.fakes import BASE, PROCESS, FakeTarget, FakeTracker, pages_of
from support.hostfolder import HostFolder
from support.waiting import WAIT_S, until

PAGES = 100


class Scene:
    """A process of 100 pages at `BASE`, and the engine on it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, dry_run: bool = False) -> None:
        self.clock = FakeClock()
        self.tracker = FakeTracker()
        self.target = FakeTarget(PROCESS)
        self.out: set[int] = set()
        self.stuck: set[int] = set()
        self.root = root
        self.map_pages(PROCESS, PAGES)
        host = Host(root)
        config = EngineConfig(
            scan_interval_ms=1000,
            policy=AgePolicyConfig(interval_ms=1000, swap_out_ms=3000),
            mover=MoverConfig(interval_ms=10, bandwidth_mib_per_s=None),
            dry_run=dry_run,
        )
        self.engine = Engine(
            self.target,
            config,
            host=host,
            clock=self.clock,
            tracker=self.tracker,
            mover=Mover(config.mover, host, now_s=0.0, backend=self._page_out),
        )

    def map_pages(self, process: ProcessId, pages: int) -> None:
        end = BASE + pages * PAGE_BYTES
        maps = f"{BASE:x}-{end:x} rw-p 00000000 00:00 0 \n"
        HostFolder(self.root).process(process.pid, start_ticks=process.start_ticks, maps=maps)

    def _page_out(self, handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        pages = {page for first, last in pages_of(part) for page in range(first, last)}
        moved = pages - self.stuck
        self.out |= moved
        self.tracker.absent |= moved
        from support.fakes import spans

        kept = [(page, page + 1) for page in sorted(pages & self.stuck)]
        return BatchResult(moved_bytes=len(moved) * PAGE_BYTES, stuck=spans(*kept) if kept else Spans.empty())

    def run(self, seconds: float) -> list[StepReport]:
        reports = []
        end_s = self.clock.now_s() + seconds
        while self.clock.now_s() < end_s:
            report, due_s = self.engine.advance(self.clock.now_s())
            if report is not None:
                reports.append(report)
            self.clock.advance(max(0.001, due_s - self.clock.now_s()))
        return reports


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_cold_pages_go_out_and_hot_pages_stay(scene: Scene) -> None:
    scene.tracker.touched = set(range(20))
    reports = scene.run(10)
    assert scene.out == set(range(20, 100))
    assert reports[-1].paged_out_bytes == 80 * PAGE_BYTES
    assert reports[-1].resident_bytes == 20 * PAGE_BYTES
    assert reports[-1].moved_bytes_total == 80 * PAGE_BYTES
    assert reports[-1].refault_bytes_total == 0


def test_nothing_goes_out_before_its_time(scene: Scene) -> None:
    """First seen at 0 s counts as touched; 3 s later it may go."""
    scene.run(2.9)
    assert scene.out == set()
    scene.run(1.2)
    assert len(scene.out) == PAGES


def test_pages_that_come_back_count_as_refaults_and_age_again(scene: Scene) -> None:
    scene.run(5)
    scene.tracker.absent -= set(range(10))
    report = scene.run(1.5)[-1]
    assert report.refault_bytes_total == 10 * PAGE_BYTES
    assert report.resident_bytes == 10 * PAGE_BYTES


def test_a_dry_run_moves_nothing_and_says_what_it_would_have_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, dry_run=True)
    scene.tracker.touched = {1, 2}
    report = scene.run(8)[-1]
    assert scene.out == set()
    assert report.candidate_bytes == 98 * PAGE_BYTES
    assert report.moved_bytes_total == 0


def test_what_the_kernel_keeps_is_not_asked_for_again_at_once(scene: Scene) -> None:
    scene.stuck = set(range(100))
    asked = []
    original = scene.engine.mover.replace

    def note(tasks: list[MoveTask]) -> None:
        asked.append(sum(task.spans.total_bytes for task in tasks))
        original(tasks)

    scene.engine.mover.replace = note  # type: ignore[method-assign, assignment]
    scene.run(10)
    assert sum(amount > 0 for amount in asked) == 3  # at 3 s, and each time after ageing anew


def test_a_process_that_exits_in_mid_scan_is_forgotten_without_a_word(scene: Scene) -> None:
    scene.run(2)
    scene.tracker.failure = ProcessGone("read /proc/4242/pagemap", errno.ESRCH)
    [report, *_] = scene.run(1.5)
    assert report.processes == 0
    assert report.errors == ()


def test_a_process_that_refuses_is_told_once_and_left_alone(scene: Scene) -> None:
    scene.tracker.failure = KernelCallError.from_errno("open /proc/4242/pagemap", errno.EACCES)
    reports = scene.run(5)
    assert [len(report.errors) for report in reports] == [1] + [0] * (len(reports) - 1)
    assert "EACCES" in reports[0].errors[0]


def test_an_arriving_process_is_followed_and_a_leaving_one_forgotten(scene: Scene) -> None:
    other = ProcessId(99, 5)
    scene.map_pages(other, 10)
    scene.run(1.5)
    scene.target.processes = frozenset({PROCESS, other})
    assert scene.run(1)[-1].processes == 2
    scene.target.processes = frozenset({other})
    report = scene.run(1)[-1]
    assert report.processes == 1
    assert report.tracked_bytes == 10 * PAGE_BYTES


def test_a_recycled_pid_starts_with_fresh_ages(scene: Scene) -> None:
    scene.run(2.5)
    scene.target.processes = frozenset({ProcessId(PROCESS.pid, PROCESS.start_ticks + 1)})
    scene.run(2)
    assert scene.out == set()


def test_processes_born_a_moment_ago_wait(scene: Scene) -> None:
    """A fork storm's children die before a scan of them would be worth anything."""
    newborn = ProcessId(77, 1 << 60)
    scene.target.processes = frozenset({PROCESS, newborn})
    assert scene.run(1)[-1].processes == 1


def test_a_late_scan_is_not_made_up_for(scene: Scene) -> None:
    scene.run(1)
    scene.clock.advance(10)
    reports = scene.run(2.5)
    assert len(reports) <= 3


class Telling(FakeTarget):
    """A target that tells; the test changes `processes` and calls `tell`."""

    def __init__(self, *processes: ProcessId) -> None:
        super().__init__(*processes)
        self.listeners: list[Callable[[], None]] = []
        self.closed = False

    def listen(self, on_change: Callable[[], None]) -> None:
        self.listeners.append(on_change)

    def tell(self, *processes: ProcessId) -> None:
        self.processes = frozenset(processes)
        for listener in self.listeners:
            listener()

    def close(self) -> None:
        self.closed = True


class Heard(Observer):
    def __init__(self) -> None:
        self.appeared_pids: list[int] = []
        self.forgotten_pids: list[int] = []

    def appeared(self, process: ProcessId) -> None:
        self.appeared_pids.append(process.pid)

    def forgotten(self, process: ProcessId) -> None:
        self.forgotten_pids.append(process.pid)


def telling_engine(scene: Scene) -> tuple[Engine, Telling, Heard]:
    target, heard = Telling(PROCESS), Heard()
    config = EngineConfig(scan_interval_ms=60_000)
    host = Host(scene.root)
    engine = Engine(target, config, host=host, clock=scene.clock, tracker=scene.tracker, observers=[heard])
    return engine, target, heard


def test_a_target_that_tells_wakes_the_engine_between_scans(scene: Scene) -> None:
    """New processes are watched and dead ones forgotten at once, though the next scan is a minute away."""
    engine, target, heard = telling_engine(scene)
    woken: list[float] = []
    engine.on_wake = lambda: woken.append(scene.clock.now_s())
    engine.advance(0.0)
    assert heard.appeared_pids == [PROCESS.pid]

    other = ProcessId(4243, 9)
    scene.map_pages(other, PAGES)
    target.tell(other)
    assert woken == [0.0]
    report, _ = engine.advance(0.05)
    assert report is None
    assert heard.appeared_pids == [PROCESS.pid, other.pid]
    assert heard.forgotten_pids == [PROCESS.pid]
    assert scene.tracker.watched == {other}
    assert list(engine.pages) == []


def test_a_process_that_is_too_young_is_watched_when_it_comes_of_age(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, target, heard = telling_engine(scene)
    engine.advance(0.0)
    child = ProcessId(4243, 100_000)
    monkeypatch.setattr("memtier_engine.engine.following.time.clock_gettime", lambda clock: 1000.2)
    target.tell(PROCESS, child)
    _, due_s = engine.advance(0.01)
    assert heard.appeared_pids == [PROCESS.pid, child.pid]
    assert scene.tracker.watched == {PROCESS}
    assert due_s == pytest.approx(0.01 + 0.8)


def test_run_ends_at_once_when_stopped_and_closes_a_target_that_tells(scene: Scene) -> None:
    """Its one wait serves two: the caller's stop, and the target."""
    target = Telling(PROCESS)
    engine = Engine(target, EngineConfig(scan_interval_ms=60_000), host=Host(scene.root), tracker=scene.tracker)
    stop = threading.Event()
    heard = Heard()
    engine.observers.append(heard)

    def meanwhile() -> None:
        target.tell()
        until(lambda: heard.forgotten_pids == [PROCESS.pid])
        stop.set()

    thread = threading.Thread(target=meanwhile)
    for _ in engine.run(duration_s=100_000, stop=stop):
        thread.start()
    thread.join()
    assert heard.forgotten_pids == [PROCESS.pid]
    assert target.closed


def test_the_runner_wakes_an_engine_whose_target_tells(scene: Scene) -> None:
    target, heard = Telling(PROCESS), Heard()
    config = EngineConfig(scan_interval_ms=60_000)
    engine = Engine(target, config, host=Host(scene.root), tracker=scene.tracker, observers=[heard])
    runner = Runner(workers=1)
    runner.start()
    try:
        runner.add(engine)
        until(lambda: engine.age_clock.scans == 1)
        target.tell()
        until(lambda: heard.forgotten_pids == [PROCESS.pid])
        assert engine.age_clock.scans == 1
    finally:
        runner.stop()
    assert target.closed


def test_run_yields_a_report_per_scan_and_closes_the_engine(scene: Scene) -> None:
    reports = list(scene.engine.run(duration_s=5))
    assert len(reports) == 5
    assert scene.tracker.closed


def test_run_ends_when_told_to(scene: Scene) -> None:
    stop = threading.Event()
    for number, _ in enumerate(scene.engine.run(stop=stop)):
        if number == 2:
            stop.set()
    assert scene.engine.closed


def test_the_runner_runs_engines_until_they_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real threads: two engines make progress, a failing one is stopped without harm to them."""
    scenes = []
    for name in ("a", "b", "c"):
        root = tmp_path / name
        root.mkdir()
        scenes.append(Scene(root, monkeypatch))
    for scene in scenes:
        scene.engine.clock = _real_clock()
        scene.engine._next_scan_s = 0.0
    scenes[2].tracker.failure = RuntimeError("defect")
    runner, seen, failed = Runner(workers=2), threading.Semaphore(0), threading.Event()
    runner.start()
    for scene in scenes:
        runner.add(scene.engine, on_report=lambda report: seen.release(), on_failure=lambda error: failed.set())
    assert seen.acquire(timeout=WAIT_S)
    assert seen.acquire(timeout=WAIT_S)
    assert failed.wait(WAIT_S)
    assert runner.remove(scenes[0].engine)
    assert scenes[0].tracker.closed
    runner.stop()
    assert all(scene.tracker.closed for scene in scenes)


def _real_clock() -> FakeClock:
    from memtier_engine.clock import SystemClock

    return SystemClock()  # type: ignore[return-value]


def test_an_interval_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="use 1 or more"):
        EngineConfig(scan_interval_ms=0)


def test_a_dry_run_takes_soft_dirty_bits_from_nobody(tmp_path: Path) -> None:
    """They may be CRIU's, or those of a garbage collector that would miss writes."""

    class Taking(FakeTracker):
        takes_soft_dirty = True

    tracker = Taking()
    with pytest.raises(TrackerUnavailable, match="takes nothing from anybody"):
        Engine(FakeTarget(), EngineConfig(dry_run=True), host=Host(tmp_path), tracker=tracker)
    assert tracker.closed
    Engine(FakeTarget(), EngineConfig(dry_run=False), host=Host(tmp_path), tracker=Taking()).close()


def test_each_page_of_a_batch_goes_into_the_account_with_its_own_idle_time(scene: Scene) -> None:
    """By the oldest of its batch, what comes back soon would look as if it had been left alone for long."""
    told: list[tuple[int, float]] = []
    account = scene.engine.refaults.paged_out

    def paged_out(
        process: ProcessId,
        moved: Spans,
        stuck: Spans,
        idle_s: Any,
        now_s: float,
        *,
        trial: bool = False,
        stopped: bool = False,
    ) -> None:
        pages = (page for first, last in pages_of(moved) for page in range(first, last))
        told.extend(zip(pages, np.broadcast_to(idle_s, int(moved.pages.sum())).tolist(), strict=True))
        account(process, moved, stuck, idle_s, now_s, trial=trial, stopped=stopped)

    scene.engine.refaults.paged_out = paged_out  # type: ignore[method-assign]
    scene.engine.mover.paused = True
    for second in range(20):
        scene.tracker.touched = set(range(50)) if second < 10 else set()
        scene.run(1)
    scene.engine.mover.paused = False
    scene.run(1)
    assert sorted(page for page, _ in told) == list(range(PAGES))
    young, old = ({idle_s for page, idle_s in told if (page < 50) is low} for low in (True, False))
    assert max(young) < 15
    assert min(old) >= 18


def test_a_stop_at_the_end_of_one_process_leaves_the_others_alone(scene: Scene) -> None:
    other = ProcessId(PROCESS.pid + 1, 5)
    scene.map_pages(other, PAGES)
    scene.target.processes |= {other}
    scanned: list[ProcessId] = []

    class Stopping(Observer):
        def scan_began(self, process: ProcessId, spans: Spans, now_s: float) -> None:
            scanned.append(process)

        def scan_ended(self, process: ProcessId, seconds: float) -> None:
            scene.engine.halt()

    scene.engine.observers.append(Stopping())
    assert scene.engine.advance(scene.clock.now_s()) == (None, scene.clock.now_s())
    assert len(scanned) == 1


def test_a_stop_while_families_are_looked_at_ends_the_step(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene.engine._families, "count", lambda *ignored: scene.engine.halt())
    assert scene.engine.advance(scene.clock.now_s()) == (None, scene.clock.now_s())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_we_are_short_of_is_not_held_against_a_process(scene: Scene, number: int) -> None:
    scene.tracker.failure = KernelCallError("pidfd_open", number)
    assert [len(report.errors) for report in scene.run(0.5)] == [1]
    scene.tracker.failure = None
    assert scene.run(1.5)[-1].resident_bytes == PAGES * PAGE_BYTES


def test_an_engine_keeps_the_empty_ledger_that_it_is_given(tmp_path: Path) -> None:
    """Policy `auto` reads what comes back from the very ledger that the engine writes; empty, it is false."""
    ledger = RefaultLedger(gaps=True)
    engine = Engine(FakeTarget(), host=Host(tmp_path), tracker=FakeTracker(), refaults=ledger)
    assert engine.refaults is ledger
    engine.close()


def test_where_processes_come_and_go_all_the_time_looks_leave_time_for_the_rest(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of forks had an engine do nothing but ask who is there: no move was made, whatever scans may take."""
    engine, target, heard = telling_engine(scene)
    engine.advance(0.0)
    spent_s = 0.0

    def look() -> float:
        nonlocal spent_s
        spent_s += 0.05  # at the beginning and at the end of each look
        return spent_s

    monkeypatch.setattr("memtier_engine.engine.loop.time.thread_time", look)
    pumped = 0

    def pump(now_s: float) -> list[MoveOutcome]:
        nonlocal pumped
        pumped += 1
        return []

    monkeypatch.setattr(engine.mover, "pump", pump)
    due_s = 0.0
    for number in range(100):
        target.tell(ProcessId(5000 + number, 9))
        _, due_s = engine.advance(0.001 * number)
    assert len(heard.appeared_pids) < 20
    assert pumped > 80
    assert due_s > 0.5, "and it is not asked again at once"
    target.tell(ProcessId(7000, 9))
    engine.advance(due_s)
    assert heard.appeared_pids[-1] == 7000
