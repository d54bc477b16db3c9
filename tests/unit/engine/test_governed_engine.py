"""An engine whose decisions turn out wrong, process by process; and what its processes free."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.skip import SkipRules
from memtier_engine.model import PAGE_BYTES, PageChunk, ProcessId, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.trackers.bpf.feed import SwapIns
from support.fakes import BASE, FakeTarget, chunk, pages_of
from support.hostfolder import HostFolder

SMALL, BIG = ProcessId(1, 1), ProcessId(2, 2)
PAGES = {SMALL: 500, BIG: 4000}


class Memory:
    """The pages of one process, and where they are."""

    def __init__(self, pages: int) -> None:
        self.touched = np.zeros(pages, np.bool_)
        self.resident = np.ones(pages, np.bool_)
        self.swapped = np.zeros(pages, np.bool_)


class MemoryTracker:
    """Reports what is touched and where pages are, and brings back what is touched."""

    name = "fake"
    page_exact = True

    def __init__(self) -> None:
        self.memory = {process: Memory(pages) for process, pages in PAGES.items()}
        self.swap_known = True
        self.scanned = 0

    def watch(self, processes: frozenset[ProcessId]) -> None: ...

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        self.scanned += 1
        memory = self.memory[process]
        memory.resident |= memory.touched
        memory.swapped &= ~memory.resident
        for first, last in pages_of(spans):
            found = chunk(first, memory.touched[first:last].tolist(), memory.resident[first:last].tolist())
            yield replace(found, swapped=memory.swapped[first:last].copy() if self.swap_known else None)
        memory.touched[:] = False

    def close(self) -> None: ...


class FakeSwapIns:
    """Counts for all processes from the start; tells what the test put in."""

    def __init__(self) -> None:
        self.covered = frozenset(PAGES)
        self.found: dict[ProcessId, SwapIns] = {}

    def paged_out(self, process: ProcessId) -> None: ...

    def read_each(self, alive: Collection[ProcessId]) -> dict[ProcessId, SwapIns]:
        found, self.found = self.found, {}
        return found

    def close(self) -> None: ...


class Scene:
    """Two processes, the mover without a ceiling unless told, guards only those about what came back."""

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        decide_ms: int = 5000,
        bandwidth_mib_per_s: float | None = None,
        guards: GuardsConfig | None = None,
    ) -> None:
        self.machine = HostFolder(root)
        for process, pages in PAGES.items():
            self.map(process, (0, pages))
        self.clock, self.tracker, self.target = FakeClock(), MemoryTracker(), FakeTarget(*PAGES)
        self.out: list[tuple[float, ProcessId, int]] = []
        self.report: StepReport | None = None
        config = EngineConfig(
            scan_interval_ms=5000,
            policy=AgePolicyConfig(interval_ms=decide_ms, swap_out_ms=20_000),
            mover=MoverConfig(bandwidth_mib_per_s=bandwidth_mib_per_s),
            guards=guards or GuardsConfig(skip=SkipRules(rss_least_bytes=0)),
            count_swap_ins=False,
        )
        self.engine = Engine(
            self.target,
            config,
            host=self.machine.host,
            clock=self.clock,
            tracker=self.tracker,
            mover=Mover(config.mover, self.machine.host, now_s=0.0, backend=self._move),
        )

    def state(self, process: ProcessId, letter: str) -> None:
        """Of /proc/PID/stat: "T" is stopped."""
        maps = (self.machine.root / f"proc/{process.pid}/maps").read_text()
        self.machine.process(process.pid, start_ticks=process.start_ticks, state=letter, maps=maps)

    def map(self, process: ProcessId, *ranges: tuple[int, int]) -> None:
        lines = [f"{BASE + a * PAGE_BYTES:x}-{BASE + b * PAGE_BYTES:x} rw-p 00000000 00:00 0 \n" for a, b in ranges]
        self.machine.process(process.pid, maps="".join(lines))
        self.machine.process(process.pid, start_ticks=process.start_ticks, maps="".join(lines))

    def _move(self, handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        process = handle.process
        memory = self.tracker.memory[process]
        moved = 0
        for first, last in pages_of(part):
            moved += int(memory.resident[first:last].sum())
            memory.swapped[first:last] |= memory.resident[first:last]
            memory.resident[first:last] = False
        self.out.append((self.clock.now_s(), process, moved))
        return BatchResult(moved_bytes=moved * PAGE_BYTES)

    def run(self, seconds: float, before: Callable[[float], None] | None = None) -> StepReport:
        end_s = self.clock.now_s() + seconds
        while self.clock.now_s() < end_s:
            if before is not None:
                before(self.clock.now_s())
            report, due_s = self.engine.advance(self.clock.now_s())
            self.report = report or self.report
            self.clock.advance(max(0.001, due_s - self.clock.now_s()))
        assert self.report is not None
        return self.report

    def out_of(self, process: ProcessId, *, after_s: float = 0.0) -> int:
        return sum(pages for at_s, moved, pages in self.out if moved == process and at_s > after_s)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def uses_every(scene: Scene, process: ProcessId, period_s: float) -> Callable[[float], None]:
    used = [0.0]

    def before(now_s: float) -> None:
        if now_s - used[0] >= period_s:
            used[0] = now_s
            scene.tracker.memory[process].touched[:] = True

    return before


def test_memory_used_once_in_100_s_goes_out_twice_at_most_and_the_other_process_stays_out(scene: Scene) -> None:
    report = scene.run(620, uses_every(scene, SMALL, 100))
    assert PAGES[SMALL] <= scene.out_of(SMALL) <= 2 * PAGES[SMALL]
    assert scene.out_of(BIG) == PAGES[BIG]
    assert report.paged_out_bytes == PAGES[BIG] * PAGE_BYTES
    assert list(report.skipped) == [SMALL.pid]
    assert "only what is idle for" in report.skipped[SMALL.pid]


def test_a_large_process_that_is_wrong_does_not_stop_a_small_one_that_is_not(scene: Scene) -> None:
    late = uses_every(scene, SMALL, 1e9)

    def before(now_s: float) -> None:
        scene.tracker.memory[SMALL].touched[:] = now_s < 300
        uses_big(now_s)
        late(now_s)

    uses_big = uses_every(scene, BIG, 60)
    scene.run(500, before)
    assert scene.out_of(SMALL) == PAGES[SMALL]
    assert scene.out_of(BIG) <= 2 * PAGES[BIG]


def stopped_but(scene: Scene, process: ProcessId, *uses: tuple[float, float]) -> Callable[[float], None]:
    """It goes on at each of the times, reads 30 % of its memory, and is stopped again after so long."""

    def before(now_s: float) -> None:
        goes_on = any(begin_s <= now_s < begin_s + length_s for begin_s, length_s in uses)
        scene.state(process, "R" if goes_on else "T")
        if goes_on:
            scene.tracker.memory[process].touched[: PAGES[process] * 3 // 10] = True

    return before


def test_a_stopped_process_that_goes_on_once_is_not_held_back(scene: Scene) -> None:
    """The reference's age scenario: all out while it is stopped, 30 % read again, stopped, all out again."""
    report = scene.run(100, stopped_but(scene, SMALL, (60, 6)))
    assert scene.out_of(SMALL, after_s=66) == PAGES[SMALL] * 3 // 10
    assert report.paged_out_bytes == sum(PAGES.values()) * PAGE_BYTES
    assert report.refaults.early_bytes == PAGES[SMALL] * 3 // 10 * PAGE_BYTES
    assert not report.skipped


def test_a_process_that_is_stopped_and_goes_on_all_the_time_is_held_back(scene: Scene) -> None:
    """Its memory would go out and come back every minute."""
    uses = [(float(at_s), 6.0) for at_s in range(60, 900, 60)]
    report = scene.run(900, stopped_but(scene, SMALL, *uses))
    assert PAGES[SMALL] < scene.out_of(SMALL) <= PAGES[SMALL] + 3 * (PAGES[SMALL] * 3 // 10)
    assert list(report.skipped) == [SMALL.pid]


def test_a_process_that_runs_is_held_back_by_the_first_wrong_decision(scene: Scene) -> None:
    """What is excused is being stopped, not being idle for a while."""

    def before(now_s: float) -> None:
        if 60 <= now_s < 66:
            scene.tracker.memory[SMALL].touched[: PAGES[SMALL] * 3 // 10] = True

    report = scene.run(100, before)
    assert scene.out_of(SMALL, after_s=66) == 0
    assert list(report.skipped) == [SMALL.pid]


def test_without_the_guard_refaults_nothing_is_governed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = GuardsConfig(skip=SkipRules(rss_least_bytes=0), refaults=None)
    scene = Scene(tmp_path, monkeypatch, guards=off)
    report = scene.run(620, uses_every(scene, SMALL, 100))
    assert scene.out_of(SMALL) >= 6 * PAGES[SMALL]
    assert report.skipped == {}


def test_what_is_pending_of_a_wrong_decision_is_dropped_when_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions are rare and the mover is slow: of the process that comes back nothing more goes out, of the other it
    does."""
    scene = Scene(tmp_path, monkeypatch, decide_ms=60_000, bandwidth_mib_per_s=20 * PAGE_BYTES / (1 << 20))
    while scene.out_of(SMALL) < 200:
        scene.run(1)
    scene.tracker.memory[SMALL].touched[:] = True
    scene.run(6)
    pending = {task.process: left for task, left in scene.engine.mover.tasks()}
    assert set(pending) == {BIG}
    known_s = scene.clock.now_s()
    scene.run(20)
    assert scene.out_of(SMALL, after_s=known_s) == 0
    assert scene.out_of(BIG, after_s=known_s) > 0


def test_what_is_held_back_of_one_process_does_not_use_up_the_movers_time_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is held back comes first, and is larger than what a decision may ask for."""
    scene = Scene(tmp_path, monkeypatch, bandwidth_mib_per_s=60 * PAGE_BYTES / (1 << 20))
    scene.run(1)
    held, other = scene.engine.pages
    governor = scene.engine.refaults.space(held).governor
    assert governor is not None
    governor.went_out(1000, 0.0)
    governor.came_back(1000, 900.0, 0.0, 1.0)
    assert governor.judge(0, 1.0)
    scene.run(120)
    assert scene.out_of(held) == 0
    assert scene.out_of(other) == PAGES[other]


def test_what_a_process_frees_is_no_longer_out_and_filled_anew_it_is_no_refault(scene: Scene) -> None:
    report = scene.run(60)
    assert report.paged_out_bytes == sum(PAGES.values()) * PAGE_BYTES
    scene.tracker.memory[SMALL].swapped[:] = False
    report = scene.run(10)
    assert report.paged_out_bytes == PAGES[BIG] * PAGE_BYTES
    scene.tracker.memory[SMALL].touched[:] = True
    report = scene.run(10)
    assert report.refault_bytes_total == report.refaults.early_bytes == 0
    assert report.refaults.precision == 1.0
    assert report.skipped == {}


def test_unmapped_and_mapped_anew_is_neither_out_nor_back(scene: Scene) -> None:
    scene.run(60)
    scene.map(SMALL)
    report = scene.run(10)
    assert report.refaults.pending_bytes == report.paged_out_bytes == PAGES[BIG] * PAGE_BYTES
    scene.map(SMALL, (0, PAGES[SMALL]))
    scene.tracker.memory[SMALL].touched[:] = True
    report = scene.run(10)
    assert report.refault_bytes_total == 0


@pytest.mark.parametrize(("swapped_in", "major", "refaults"), [(False, 0, 0), (True, 0, 500), (False, 500, 500)])
def test_freed_and_filled_anew_between_two_scans_is_told_from_wanted_back_by_the_kernels_counts(
    scene: Scene, swapped_in: bool, major: int, refaults: int
) -> None:
    counts = FakeSwapIns()
    scene.engine._swap_ins = counts  # type: ignore[assignment]

    def stat(majors: int) -> None:
        for process in PAGES:
            fields = ["S", "1", *["0"] * 7, str(majors), *["0"] * 9, str(process.start_ticks)]
            scene.machine.write(f"proc/{process.pid}/stat", f"{process.pid} (a b) {' '.join(fields)}\n")

    stat(3)
    scene.run(60)
    scene.tracker.memory[SMALL].touched[:] = True
    regions = np.arange(BASE, BASE + PAGES[SMALL] * PAGE_BYTES, 2 << 20, dtype=np.uint64)
    counts.found = {SMALL: SwapIns(500, 500, 0.1, regions)} if swapped_in else {}
    stat(3 + major)
    report = scene.run(10)
    assert report.refault_bytes_total == refaults * PAGE_BYTES
    assert (report.skipped != {}) == bool(refaults)


def test_a_process_that_is_gone_leaves_nothing_behind_also_when_its_last_batch_is_told_late(scene: Scene) -> None:
    scene.run(60)
    assert len(scene.engine.refaults) == 2
    scene.target.processes = frozenset({BIG})
    scene.run(5)
    scene.engine.refaults.paged_out(SMALL, Spans.empty(), Spans.empty(), 0.0, scene.clock.now_s())
    scene.run(6)
    assert set(scene.engine.refaults.governors) == {BIG}


def test_a_pause_between_two_scans_makes_no_page_idle(scene: Scene) -> None:
    """Stopped for an hour after the first scan: one window, of at most three intervals of 5 s."""
    scene.run(1)
    scene.clock.advance(3600)
    scene.run(4)
    assert scene.out == []
    scene.run(10)
    assert scene.out_of(BIG) == PAGES[BIG]
