"""Policy `heat`: classes to nodes, limits of nodes, forecasts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError, MemtierError, ProcessGone
from memtier_engine.model import NOT_OURS, NOWHERE, PAGE_BYTES, SWAP_NODE, MoveTask, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.policies.heat import Forecaster, HeatPolicy, HeatPolicyConfig
from memtier_engine.policies.heatmap import HeatmapConfig, Heats
from support.fakes import BASE, PROCESS, pages_of, spans
from support.growth import Prepare, Work, least_ratio

OTHER = ProcessId(4343, 8)
MAP = HeatmapConfig(heat_max=1.0, heat_retention=0.5, heat_classes=4)


class FakeLocator:
    """Where the test says the pages are."""

    def __init__(self) -> None:
        self.places: dict[ProcessId, NDArray[np.int16]] = {}

    def nodes(self, process: ProcessId, spans: Spans) -> NDArray[np.int16]:
        if process not in self.places:
            raise ProcessGone(f"process {process.pid} exited", 3)
        return self.places[process]


class Scene:
    """A policy over regions of 4 pages; `scan` takes the touched pages of each process."""

    def __init__(
        self,
        heat_numas: dict[int, tuple[int, ...]],
        sizes_pages: dict[int, int] | None = None,
        forecaster: Forecaster | None = None,
    ) -> None:
        config = HeatPolicyConfig(
            interval_ms=1000,
            heatmap=MAP,
            heat_numas=heat_numas,
            numa_size_bytes={node: pages * PAGE_BYTES for node, pages in (sizes_pages or {}).items()},
        )
        self.locator = FakeLocator()
        self.events: list[str] = []
        self.policy = HeatPolicy(
            config, self.locator, regions=RegionCounters(4), forecaster=forecaster, on_event=self.events.append
        )
        self.pages: dict[ProcessId, ProcessPages] = {}
        self.clock = AgeClock()
        self.now_s = 0.0

    def process(self, process: ProcessId, nodes: list[int], mappings: Spans | None = None) -> None:
        own = ProcessPages(process)
        own.set_spans(mappings if mappings is not None else spans((0, len(nodes))))
        self.pages[process] = own
        self.locator.places[process] = np.array(nodes, np.int16)

    def decide(self, touched: Mapping[ProcessId, list[int]], budget_pages: int | None = None) -> list[MoveTask]:
        self.now_s += 1.0
        self.clock.begin_scan(self.now_s)
        for process, flags in touched.items():
            own = self.pages[process]
            self.policy.begin(process, own.spans)
            at = 0
            for start, count in zip(own.spans.starts.tolist(), own.spans.pages.tolist(), strict=True):
                accessed = np.array(flags[at : at + count], np.bool_)
                self.policy.observe(process, PageChunk(start, accessed, np.ones(count, np.bool_)))
                at += count
        budget = None if budget_pages is None else budget_pages * PAGE_BYTES
        return self.policy.decide(self.pages, self.clock, budget)


def short(tasks: list[MoveTask]) -> list[tuple[int, list[tuple[int, int]]]]:
    return [(task.to_node, pages_of(task.spans)) for task in tasks]


HOT, WARM, COLD = [1] * 4, [1, 1, 0, 0], [0] * 4


def test_each_class_goes_to_its_node_hottest_first() -> None:
    scene = Scene({3: (1,), 0: (2,)})
    scene.process(PROCESS, [0] * 12)
    tasks = scene.decide({PROCESS: COLD + WARM + HOT})
    assert short(tasks) == [(1, [(8, 12)]), (2, [(0, 4)])]
    assert [task.reason for task in tasks] == ["heat class 3", "heat class 0"]


def test_a_class_without_nodes_stays_and_pages_in_place_are_not_asked_for() -> None:
    scene = Scene({3: (1,), 0: (2, 3)})
    scene.process(PROCESS, [1, 1, 0, 1, 0, 0, 0, 0, 2, 3, 0, 2])
    assert short(scene.decide({PROCESS: HOT + WARM + COLD})) == [(1, [(2, 3)]), (2, [(10, 11)])]


def test_cold_memory_can_go_to_swap_and_what_is_out_or_shared_is_left_alone() -> None:
    scene = Scene({0: (SWAP_NODE,)})
    scene.process(PROCESS, [0, SWAP_NODE, NOWHERE, NOT_OURS, 0, 0, 0, 0])
    assert short(scene.decide({PROCESS: COLD + HOT})) == [(SWAP_NODE, [(0, 1)])]


def test_a_range_needs_its_own_size_of_room_and_no_more() -> None:
    """The reference asks for twice the room."""
    scene = Scene({3: (1,)}, {1: 4})
    scene.process(PROCESS, [0] * 4)
    assert short(scene.decide({PROCESS: HOT})) == [(1, [(0, 4)])]


def test_a_limit_counts_what_is_really_on_the_node() -> None:
    """A failed move, an exit or an munmap never leaves a wrong account: pages are counted each time."""
    scene = Scene({3: (1,)}, {1: 8})
    scene.process(PROCESS, [0] * 4)
    scene.process(OTHER, [1] * 8)
    assert scene.decide({PROCESS: HOT, OTHER: COLD + COLD}) == []
    assert scene.policy.used_pages[1] == 8
    del scene.pages[OTHER], scene.locator.places[OTHER]
    assert short(scene.decide({PROCESS: HOT})) == [(1, [(0, 4)])]


def test_a_node_without_limit_has_room_and_is_taken_in_the_listed_order() -> None:
    scene = Scene({3: (2, 1)}, {1: 100})
    scene.process(PROCESS, [0] * 8)
    assert short(scene.decide({PROCESS: HOT + HOT})) == [(2, [(0, 8)])]


def test_limited_nodes_are_filled_evenly() -> None:
    """Each range to the node with most room: in the end both have the same left."""
    scene = Scene({3: (1, 2)}, {1: 20, 2: 28})
    scene.process(PROCESS, [0] * 24)
    tasks = scene.decide({PROCESS: HOT * 6})
    moved = {task.to_node: int(task.spans.pages.sum()) for task in tasks}
    assert moved == {1: 8, 2: 16}


def test_what_finds_no_room_spills_to_the_nodes_of_the_next_colder_class() -> None:
    """The hottest get the room; spilled ranges are content there until there is room again."""
    scene = Scene({3: (1,), 2: (2,), 0: (SWAP_NODE,)}, {1: 4})
    scene.process(PROCESS, [0] * 8)
    # Both are of class 3; the second is the hotter one.
    touched = [1, 1, 1, 0, 1, 1, 1, 1]
    assert short(scene.decide({PROCESS: touched})) == [(1, [(4, 8)]), (2, [(0, 4)])]
    scene.locator.places[PROCESS] = np.array([2] * 4 + [1] * 4, np.int16)
    assert scene.decide({PROCESS: touched}) == []


def test_without_any_room_ranges_stay_rather_than_go_to_swap() -> None:
    scene = Scene({3: (1,), 0: (SWAP_NODE,)}, {1: 0})
    scene.process(PROCESS, [0] * 4)
    assert scene.decide({PROCESS: HOT}) == []


def test_no_more_is_asked_for_than_the_mover_can_do_but_always_something() -> None:
    scene = Scene({3: (1,)})
    scene.process(PROCESS, [0] * 12)
    touched = [1, 1, 1, 0, *HOT, *HOT]
    assert short(scene.decide({PROCESS: touched}, budget_pages=8)) == [(1, [(4, 12)])]
    assert sum(int(task.spans.pages.sum()) for task in scene.decide({PROCESS: touched}, budget_pages=1)) == 4


def test_runs_of_pages_do_not_cross_from_one_mapping_into_the_next() -> None:
    scene = Scene({3: (1,)})
    scene.process(PROCESS, [0] * 12, spans((0, 4), (4, 8), (100, 104)))
    assert short(scene.decide({PROCESS: HOT * 3})) == [(1, [(0, 4), (4, 8), (100, 104)])]


def test_several_processes_share_the_room_by_heat() -> None:
    scene = Scene({3: (1,)}, {1: 4})
    scene.process(PROCESS, [0] * 4)
    scene.process(OTHER, [0] * 4)
    [task] = scene.decide({PROCESS: [1, 1, 1, 0], OTHER: HOT})
    assert task.process == OTHER


def test_memory_that_is_not_touched_any_more_cools_down_to_class_0() -> None:
    scene = Scene({0: (2,)})
    scene.process(PROCESS, [0] * 4)
    assert scene.decide({PROCESS: HOT}) == []
    assert scene.decide({PROCESS: COLD}) == []  # 0.5: class 2
    assert scene.decide({PROCESS: COLD}) == []  # 0.25: class 1
    assert short(scene.decide({PROCESS: COLD})) == [(2, [(0, 4)])]


def test_a_process_that_exits_during_the_decision_costs_the_others_nothing() -> None:
    scene = Scene({3: (1,)})
    scene.process(PROCESS, [0] * 4)
    scene.process(OTHER, [0] * 4)
    del scene.locator.places[OTHER]
    assert short(scene.decide({PROCESS: HOT, OTHER: HOT})) == [(1, [(0, 4)])]


def test_without_processes_or_memory_nothing_is_decided() -> None:
    scene = Scene({3: (1,), 0: (2,)})
    assert scene.decide({}) == []
    scene.process(PROCESS, [], Spans.empty())
    assert scene.decide({PROCESS: []}) == []


class Invert:
    """A forecaster of the test's: hot becomes cold and the reverse; or it breaks."""

    name = "invert"
    broken = False
    silent = False
    closed = False

    def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
        if self.broken:
            raise MemtierError("child exited")
        if self.silent:
            return None
        return {
            process: Heats(own.starts, own.ends, 1.0 - own.heat, own.created_ns, own.updated_ns)
            for process, own in heats.items()
        }

    def close(self) -> None:
        self.closed = True


def test_a_forecast_decides_where_ranges_go_and_leaves_the_heatmap_alone() -> None:
    forecaster = Invert()
    scene = Scene({3: (1,), 0: (2,)}, forecaster=forecaster)
    scene.process(PROCESS, [0] * 8)
    assert short(scene.decide({PROCESS: HOT + COLD})) == [(1, [(4, 8)]), (2, [(0, 4)])]
    assert scene.policy.heatmap.processes[PROCESS].heat.tolist() == [1.0, 0.0]
    assert scene.events == ["use forecast"]
    forecaster.silent = True
    assert short(scene.decide({PROCESS: HOT + COLD})) == [(1, [(0, 4)]), (2, [(4, 8)])]
    scene.policy.close()
    assert forecaster.closed


def test_a_forecaster_that_breaks_is_reported_and_real_heats_are_used() -> None:
    forecaster = Invert()
    forecaster.broken = True
    scene = Scene({3: (1,)}, forecaster=forecaster)
    scene.process(PROCESS, [0] * 4)
    assert short(scene.decide({PROCESS: HOT})) == [(1, [(0, 4)])]
    assert scene.events == ["forecaster invert error: child exited"]


def test_a_forecast_of_memory_that_is_not_mapped_moves_nothing() -> None:
    class Elsewhere(Invert):
        def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
            start = np.array([BASE - 2 * PAGE_BYTES], np.uint64)
            end = np.array([BASE + 2 * PAGE_BYTES], np.uint64)
            time_ns = np.array([now_ns])
            return {PROCESS: Heats(start, end, np.ones(1), time_ns, time_ns)}

    scene = Scene({3: (1,)}, forecaster=Elsewhere())
    scene.process(PROCESS, [0] * 4)
    assert short(scene.decide({PROCESS: COLD})) == [(1, [(0, 2)])]


def decisions(regions: int) -> Prepare:
    """Decisions on `regions` ranges in 4 processes, the ranges 8 pages, a quarter to be moved."""
    config = HeatPolicyConfig(heatmap=MAP, heat_numas={3: (0,), 0: (1,)}, numa_size_bytes={1: regions * PAGE_BYTES})
    locator = FakeLocator()
    policy = HeatPolicy(config, locator, regions=RegionCounters(8))
    clock, pages = AgeClock(), {}
    rng = np.random.default_rng(3)
    for pid in range(4):
        process = ProcessId(1000 + pid, 1)
        own = pages[process] = ProcessPages(process)
        own.set_spans(spans((0, regions // 4 * 8)))
        locator.places[process] = np.zeros(len(own.ages), np.int16)

    def scanned() -> Work:
        clock.begin_scan(float(clock.scans))
        for process, own in pages.items():
            policy.begin(process, own.spans)
            touched = np.repeat(rng.random(len(own.ages) // 8) < 0.5, 8)
            policy.observe(process, PageChunk(BASE, touched, np.ones(len(own.ages), np.bool_)))
        return lambda: policy.decide(pages, clock, None)

    assert scanned()(), "something is to be moved"
    return scanned


def test_a_decision_on_100_000_ranges_costs_as_little_as_a_few_passes_over_32_mib() -> None:
    """A call of numpy for each range would be some times that. A bound in seconds is in the benchmarks."""
    numbers = np.arange(1 << 22, dtype=np.int64)
    assert least_ratio(decisions(100_000), lambda: lambda: np.cumsum(numbers[numbers % 3 == 0])) < 1.5


def test_a_decision_grows_with_the_ranges_and_not_with_their_square() -> None:
    assert least_ratio(decisions(200_000), decisions(25_000)) < 8 * 4


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("intervalms", {"interval_ms": 0}),
        ("heatnumas.10", {"heat_numas": {10: (1,)}}),
        ("heatnumas.0", {"heat_numas": {0: (-2,)}}),
        ("numasize.1", {"numa_size_bytes": {1: -1}}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        HeatPolicyConfig(**values)  # type: ignore[arg-type]
    assert caught.value.key_path == key
