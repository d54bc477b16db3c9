"""The engine under its guards: what a closed guard stops, at once, and what it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.skip import SkipRules
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.mover import Mover, MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from support.fakes import BASE, PROCESS, FakeTarget, FakeTracker, pages_of, spans
from support.hostfolder import HostFolder

PAGES = 1000
CALM = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
BUSY = "some avg10=20.00 avg60=0.00 avg300=0.00 total=0\n"


class Scene:
    """A process of 1000 pages, all cold, on a mover that takes 50 pages a second."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, guards: GuardsConfig | None = None) -> None:
        self.machine = HostFolder(root)
        self.machine.process(
            PROCESS.pid,
            start_ticks=PROCESS.start_ticks,
            maps=f"{BASE:x}-{BASE + PAGES * PAGE_BYTES:x} rw-p 00000000 00:00 0 \n",
        )
        self.machine.write("proc/pressure/memory", CALM)
        self.clock = FakeClock()
        self.tracker = FakeTracker()
        self.moves: list[tuple[float, int, int]] = []  # (time, node, pages)
        config = EngineConfig(
            scan_interval_ms=1000,
            policy=AgePolicyConfig(interval_ms=1000, swap_out_ms=3000, active_duration_ms=2000, active_numas=(1,)),
            mover=MoverConfig(interval_ms=100, bandwidth_mib_per_s=50 * PAGE_BYTES / (1 << 20)),
            guards=guards or GuardsConfig(),
        )
        self.engine = Engine(
            FakeTarget(PROCESS),
            config,
            host=self.machine.host,
            clock=self.clock,
            tracker=self.tracker,
            mover=Mover(config.mover, self.machine.host, now_s=0.0, backend=self._move),
        )

    def _move(self, handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        pages = {page for first, last in pages_of(part) for page in range(first, last)}
        self.moves.append((self.clock.now_s(), node, len(pages)))
        if node == SWAP_NODE:
            self.tracker.absent |= pages
        return BatchResult(moved_bytes=len(pages) * PAGE_BYTES)

    def run(self, seconds: float) -> StepReport:
        end_s = self.clock.now_s() + seconds
        last: StepReport | None = None
        while self.clock.now_s() < end_s:
            report, due_s = self.engine.advance(self.clock.now_s())
            last = report or last
            self.clock.advance(max(0.001, due_s - self.clock.now_s()))
        assert last is not None
        return last


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_moving_stops_within_a_second_of_the_pressure_and_goes_on_after_it(scene: Scene) -> None:
    """In mid-task, without waiting for the next scan."""
    scene.run(4.3)
    assert scene.moves
    scene.machine.write("proc/pressure/memory", BUSY)
    pressed_s = scene.clock.now_s()
    report = scene.run(20)
    assert scene.moves[-1][0] <= pressed_s + 0.7
    assert [state.name for state in report.guards if not state.open] == ["psi-memory-node"]
    moved = len(scene.moves)
    scene.machine.write("proc/pressure/memory", CALM)
    report = scene.run(15)
    assert len(scene.moves) > moved
    assert all(state.open for state in report.guards)


def test_a_closed_guard_drops_what_is_pending_within_one_pump(scene: Scene) -> None:
    """Nothing of it is left to go out when the guard opens again: by then the decision is old."""
    scene.run(4.05)
    assert scene.engine.mover.pending_bytes
    scene.machine.write("proc/pressure/memory", BUSY)
    scene.engine.guards.check(scene.clock.now_s() + 0.6)
    moved = len(scene.moves)
    report, _ = scene.engine.advance(scene.clock.now_s())
    assert report is None, "between two scans"
    assert scene.engine.mover.pending_bytes == 0
    assert len(scene.moves) == moved


def test_a_guard_that_stops_only_paging_out_drops_only_that(scene: Scene) -> None:
    scene.run(4.05)
    idle = MoveTask(PROCESS, spans((0, 10)), 1, "idle")
    scene.engine.mover.add(idle)
    scene.machine.write("proc/swaps", "Filename Type Size Used Priority\n/dev/vdb partition 1000 950 -2\n")
    scene.engine.guards.check(scene.clock.now_s() + 0.6)
    scene.engine.advance(scene.clock.now_s())
    assert scene.engine.guards.verdict.demotion_allowed
    assert not scene.engine.guards.verdict.swap_allowed
    assert all(task == idle for task, _ in scene.engine.mover.tasks())
    assert any(node == 1 for _, node, _ in scene.moves) or scene.engine.mover.tasks()


def test_memory_that_does_not_compress_stops_going_out(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what this engine's own batches take where they are now."""
    scene.engine.guards._stored._least = 100 * PAGE_BYTES
    account = scene.engine._account

    def stored(outcome: MoveOutcome) -> None:
        account(replace(outcome, stored_bytes=outcome.moved_bytes))

    monkeypatch.setattr(scene.engine, "_account", stored)
    report = scene.run(30)
    assert 100 <= sum(pages for _, _, pages in scene.moves) < 200
    assert [state.name for state in report.guards if not state.open] == ["compression"]


def test_promotions_go_on_under_pressure(scene: Scene) -> None:
    scene.machine.write("proc/pressure/memory", BUSY)
    scene.tracker.touched = set(range(50))
    scene.run(10)
    assert {node for _, node, _ in scene.moves} == {1}


def test_a_skipped_process_is_reported_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, guards=GuardsConfig(skip=SkipRules(names=("da*",))))
    scene.machine.write(f"proc/{PROCESS.pid}/status", "Name:\tdatabase\nVmRSS:\t  900000 kB\n")
    report = scene.run(6)
    assert scene.moves == []
    assert report.skipped == {PROCESS.pid: "is named like 'da*'"}
    assert report.candidate_bytes > 0


def test_nothing_moves_during_the_grace_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, guards=GuardsConfig(start_grace_s=20))
    scene.run(19.5)
    assert scene.moves == []
    scene.run(3)
    assert scene.moves


def test_a_report_says_what_holds_back_only_when_there_is_something_to_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, monkeypatch, guards=GuardsConfig(start_grace_s=20))
    reports = [scene.engine.step(float(now_s)) for now_s in range(1, 30)]
    held = [(report.candidate_bytes > 0, report.held_back_by) for report in reports]
    assert (False, ()) in held
    waiting = [reasons for wanted, reasons in held if wanted]
    assert waiting[0][0].startswith("start: ")
    assert waiting[-1] == ()
    assert all(not reasons for wanted, reasons in held if not wanted)


def test_the_report_tells_how_right_the_decisions_were(scene: Scene) -> None:
    """A tenth of what went out came back within a few seconds."""
    report = scene.run(8)
    out = report.refaults.pending_bytes
    assert out == report.moved_bytes_total
    assert report.refaults.precision == 1.0
    back = sorted(scene.tracker.absent)[:10]
    scene.tracker.absent -= set(back)
    report = scene.run(2)
    assert report.refaults.early_bytes == len(back) * PAGE_BYTES
    assert report.refaults.precision is not None
    assert report.refaults.precision < 1.0


@pytest.mark.parametrize(("left_kib", "counted"), [(0, False), (4096, True)])
def test_what_comes_back_because_swap_was_taken_away_is_no_refault(scene: Scene, left_kib: int, counted: bool) -> None:
    scene.machine.write("proc/meminfo", "MemTotal: 8192 kB\nSwapTotal: 4096 kB\n")
    scene.run(8)
    back = len(scene.tracker.absent)
    assert back
    scene.machine.write("proc/meminfo", f"MemTotal: 8192 kB\nSwapTotal: {left_kib} kB\n")
    scene.tracker.absent.clear()
    report = scene.run(1.5)
    assert report.refault_bytes_total == back * PAGE_BYTES * counted
