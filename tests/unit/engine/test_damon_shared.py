"""Trackers `damon` of one program use one kdamond, and those that scan together one reading of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.clock import Clock, FakeClock
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PageChunk, ProcessId, Spans
from memtier_engine.trackers.damon import DamonConfig
from memtier_engine.trackers.damon_shared import SharedDamonTracker
from support.fakes import BASE, spans

A, B = ProcessId(11, 1), ProcessId(12, 1)
MAPPED = spans((0, 2))


class FakeCore:
    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.snapshot_s: float | None = None
        self.watched: list[frozenset[ProcessId]] = []
        self.readings = 0
        self.closed = 0
        self.scan_interval_s: float | None = None

    def scans_every(self, interval_s: float) -> None:
        self.scan_interval_s = interval_s

    def watch(self, processes: frozenset[ProcessId]) -> None:
        self.watched.append(processes)
        self.snapshot_s = None

    def scan(self, process: ProcessId, mapped: Spans) -> Iterator[PageChunk]:
        if self.snapshot_s is None:
            self.readings += 1
            self.snapshot_s = self.clock.now_s()
        yield PageChunk(BASE, np.ones(2, np.bool_), np.ones(2, np.bool_))

    def close(self) -> None:
        self.closed += 1


class Scene:
    def __init__(self, root: Path) -> None:
        self.clock = FakeClock()
        self.cores: list[FakeCore] = []
        self.host = Host(root)

    def tracker(self, config: DamonConfig | None = None) -> SharedDamonTracker:
        return SharedDamonTracker(self.host, config, clock=self.clock, make=self._make)

    def _make(self, host: Host, config: DamonConfig, clock: Clock | None) -> FakeCore:
        self.cores.append(FakeCore(self.clock))
        return self.cores[-1]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def step(tracker: SharedDamonTracker, process: ProcessId) -> None:
    tracker.watch(frozenset({process}))
    list(tracker.scan(process, MAPPED))


def test_the_same_configuration_shares_and_another_does_not(scene: Scene) -> None:
    first, second, other = scene.tracker(), scene.tracker(), scene.tracker(DamonConfig(create=2))
    assert first.core is second.core
    assert other.core is not first.core
    for tracker in (first, second, other):
        tracker.close()
        tracker.close()
    assert [core.closed for core in scene.cores] == [1, 1]
    fresh = scene.tracker()
    assert len(scene.cores) == 3
    fresh.close()


def test_the_processes_of_all_are_watched_and_those_of_who_leaves_are_not(scene: Scene) -> None:
    first, second = scene.tracker(), scene.tracker()
    first.watch(frozenset({A}))
    second.watch(frozenset({B}))
    (core,) = scene.cores
    assert core.watched[-1] == {A, B}
    second.close()
    assert (core.watched[-1], core.closed) == (frozenset({A}), 0)
    first.close()
    assert core.closed == 1


def test_one_reading_serves_those_that_scan_together(scene: Scene) -> None:
    trackers = [scene.tracker() for _ in range(5)]
    processes = [ProcessId(100 + number, 1) for number in range(5)]
    for tracker in trackers:
        tracker.look_together({}, 10.0)
    for tracker, process in zip(trackers, processes, strict=True):
        step(tracker, process)
    (core,) = scene.cores
    before = core.readings
    for _ in range(4):
        scene.clock.advance(10)
        for tracker, process in zip(trackers, processes, strict=True):
            step(tracker, process)
            scene.clock.advance(0.1)
    assert core.readings == before + 4
    for tracker in trackers:
        tracker.close()


def test_a_reading_is_not_used_twice_nor_when_it_is_old(scene: Scene) -> None:
    first, second = scene.tracker(), scene.tracker()
    first.look_together({}, 10.0)
    second.look_together({}, 10.0)
    step(first, A)
    step(second, B)
    (core,) = scene.cores
    before = core.readings
    step(first, A)
    assert core.readings == before + 1
    scene.clock.advance(6)
    step(second, B)
    assert core.readings == before + 2
    first.close()
    second.close()


def test_trackers_that_do_not_scan_together_read_for_themselves(scene: Scene) -> None:
    first, second = scene.tracker(), scene.tracker()
    step(first, A)
    step(second, B)
    (core,) = scene.cores
    before = core.readings
    step(first, A)
    step(second, B)
    assert core.readings == before + 2
    first.close()
    second.close()


def test_what_is_shared_fits_the_one_that_scans_most_often(scene: Scene) -> None:
    first, second = scene.tracker(), scene.tracker()
    first.scans_every(5.0)
    assert scene.cores[0].scan_interval_s == 5.0
    second.scans_every(1.0)
    assert scene.cores[0].scan_interval_s == 1.0
    second.close()
    assert scene.cores[0].scan_interval_s == 5.0
    second.scans_every(1.0)
    assert scene.cores[0].scan_interval_s == 5.0, "it is closed"
    first.close()


@pytest.mark.parametrize(
    ("config", "scan_interval_s", "sample_us", "aggregation_us"),
    [
        (DamonConfig(), None, 5_000, 100_000),  # as the reference
        (DamonConfig(), 0.1, 5_000, 100_000),
        (DamonConfig(), 1.0, 10_000, 200_000),
        (DamonConfig(), 60.0, 25_000, 500_000),  # a reading waits for the end of an aggregation
        (DamonConfig(aggregation_us=2_000_000), 1.0, 100_000, 2_000_000),
        (DamonConfig(sample_us=1_000), 1.0, 1_000, 200_000),
        (DamonConfig(sample_us=100_000), 1.0, 100_000, 2_000_000),
        (DamonConfig(sample_us=1_000, aggregation_us=1_000), 1.0, 1_000, 1_000),
    ],
)
def test_intervals_that_nobody_set_fit_the_time_between_scans(
    config: DamonConfig, scan_interval_s: float | None, sample_us: int, aggregation_us: int
) -> None:
    found = config.attributes(scan_interval_s)
    assert (found.sample_us, found.aggregation_us) == (sample_us, aggregation_us)


def test_there_are_a_hundred_regions_unless_somebody_wants_less() -> None:
    assert DamonConfig().attributes(1).regions_min == 100
    assert DamonConfig(regions_max=10_000).attributes(1).regions_min == 100
    assert DamonConfig(regions_max=200).attributes(1).regions_min == 20, "or the kernel would split none"
    assert DamonConfig(regions_max=50).attributes(1).regions_min == 10
    assert DamonConfig(regions_max=5).attributes(1).regions_min == 5
    assert DamonConfig(regions_min=10).attributes(1).regions_min == 10
    with pytest.raises(ConfigError, match="maxtargetregions"):
        DamonConfig(regions_max=2)
