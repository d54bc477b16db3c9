"""Engines of a node under its shared limits, run by real threads on a fake kernel."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.engine.node import Node, NodeConfig
from memtier_engine.engine.runner import Runner
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.fair import FairMover
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from support.fakes import BASE, FakeTarget, FakeTracker, pages_of
from support.hostfolder import HostFolder
from support.waiting import WAIT_S

BUSY = "some avg10=20.00 avg60=0.00 avg300=0.00 total=0\n"
CALM = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


class Scene:
    """Engines with a process each, all cold, on one clock."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.machine = HostFolder(root)
        self.machine.write("proc/pressure/memory", CALM)
        self.clock = FakeClock()
        self.moved: dict[int, int] = {}
        self.trackers: dict[int, FakeTracker] = {}

    def engine(self, pid: int, pages: int) -> Engine:
        process = ProcessId(pid, 7)
        self.machine.process(
            pid,
            start_ticks=process.start_ticks,
            maps=f"{BASE:x}-{BASE + pages * PAGE_BYTES:x} rw-p 00000000 00:00 0 \n",
        )
        self.moved[pid] = 0
        tracker = self.trackers[pid] = FakeTracker()
        return Engine(
            FakeTarget(process),
            EngineConfig(
                scan_interval_ms=1000,
                policy=AgePolicyConfig(interval_ms=1000, swap_out_ms=2000),
                mover=MoverConfig(bandwidth_mib_per_s=None),
                guards=GuardsConfig(start_grace_s=0),
            ),
            host=self.machine.host,
            clock=self.clock,
            tracker=tracker,
        )

    def count_moves(self, engine: Engine) -> None:
        engine.mover._backend = self._move

    def _move(self, handle: ProcessHandle, part: Spans, node: int) -> BatchResult:
        self.moved[handle.process.pid] += part.total_bytes
        for first, last in pages_of(part):
            self.trackers[handle.process.pid].absent.update(range(first, last))
        return BatchResult(moved_bytes=part.total_bytes)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_adopted_engines_share_ceiling_reader_and_scan_budget(scene: Scene) -> None:
    """Two engines of very different size under 4 MiB/s: each gets half."""
    node = Node(NodeConfig(bandwidth_mib_per_s=4), host=scene.machine.host, clock=scene.clock)
    engines = [scene.engine(11, 6000), scene.engine(12, 16_000)]
    for engine in engines:
        node.adopt(engine)
        engine.first_scan_at(scene.clock.now_s())  # both at once, for the sums
        scene.count_moves(engine)
    while scene.clock.now_s() < 6:
        for engine in engines:
            engine.advance(scene.clock.now_s())
        scene.clock.advance(0.01)
    assert scene.moved[11] == pytest.approx(scene.moved[12], rel=0.1)
    assert sum(scene.moved.values()) <= 4.5 * (4 << 20)
    assert sum(scene.moved.values()) >= 3 * (4 << 20)
    for engine in engines:
        engine.close()
    node.close()


def test_an_engine_that_ends_leaves_no_files_of_its_processes_open_on_the_node(scene: Scene) -> None:
    """Of two that share memory, the other one's state was read."""
    node = Node(host=scene.machine.host, clock=scene.clock)
    engine = scene.engine(11, 100)
    scene.machine.process(12, start_ticks=7, state="T")
    node.adopt(engine)
    both = (ProcessId(11, 7), ProcessId(12, 7))
    engine.spaces.follow([both])
    for process in both:
        with node.files.of(process):
            pass
    assert len(node.files) == 2
    engine.close()
    assert len(node.files) == 0
    node.close()


def test_pressure_on_the_node_stops_all_engines(scene: Scene) -> None:
    scene.machine.write("proc/pressure/memory", BUSY)
    node = Node(host=scene.machine.host, clock=scene.clock)
    engines = [scene.engine(pid, 100) for pid in (11, 12, 13)]
    for engine in engines:
        node.adopt(engine)
        scene.count_moves(engine)
    while scene.clock.now_s() < 5:
        for engine in engines:
            engine.advance(scene.clock.now_s())
        scene.clock.advance(0.05)
    assert set(scene.moved.values()) == {0}


def test_an_engine_whose_scans_are_too_dear_scans_less_often_and_says_so(scene: Scene) -> None:
    """A share so small that any scan is beyond it."""
    node = Node(NodeConfig(scan_cpu_share=1e-6), host=scene.machine.host, clock=scene.clock)
    engine = scene.engine(11, 100)
    node.adopt(engine)
    report, _ = engine.advance(0.0)
    assert isinstance(report, StepReport)
    assert report.scan_interval_s > 2.0
    assert engine._next_scan_s == pytest.approx(report.scan_interval_s, rel=0.01)
    engine.close()
    assert node.scans.factor == 1.0


def test_adopted_engines_keep_the_cgroups_of_their_guards(scene: Scene) -> None:
    node = Node(host=scene.machine.host, clock=scene.clock)
    engine = scene.engine(11, 100)
    path = scene.machine.cgroup("sys/fs/cgroup/a", memory_pressure=BUSY)
    node.adopt(engine, cgroups=[path])
    node.adopt(engine)
    assert engine.guards.cgroups == (path,)
    assert not engine.guards.check(0).move_allowed


def test_the_runner_runs_adopted_engines(scene: Scene) -> None:
    node = Node(NodeConfig(bandwidth_mib_per_s=100), host=scene.machine.host)
    runner, seen = Runner(workers=2), threading.Semaphore(0)
    runner.start()
    engine = scene.engine(11, 100)
    engine.clock = node._clock
    engine._next_scan_s = 0.0
    node.run(runner, engine, on_report=lambda report: seen.release())
    assert seen.acquire(timeout=WAIT_S)
    assert isinstance(engine.mover, FairMover)
    runner.stop()
    node.close()


def test_scans_of_adopted_engines_stay_spread_over_the_interval(scene: Scene) -> None:
    node = Node(host=scene.machine.host, clock=scene.clock)
    engines = [scene.engine(11 + number, 10) for number in range(4)]
    for engine in engines:
        node.adopt(engine)
        scene.count_moves(engine)
    interval_s = engines[0].scan_interval_s
    seen: dict[int, list[float]] = {number: [] for number in range(4)}
    while scene.clock.now_s() < 5 * interval_s:
        for number, engine in enumerate(engines):
            report, _ = engine.advance(scene.clock.now_s())
            if report is not None:
                seen[number].append(scene.clock.now_s())
        scene.clock.advance(interval_s / 100)
    phases = sorted(times[-1] / interval_s % 1 for times in seen.values())
    gaps = [after - before for before, after in pairwise([*phases, phases[0] + 1])]
    assert all(len(times) >= 4 for times in seen.values())
    assert min(gaps) > 0.1
