"""What a policy round costs as the memory tracked grows to 16 GiB, and as it falls into more and more ranges.

Page ages and ranges are made up: the cost is that of keeping ages and deciding, which is what could grow out of
hand; reading the kernel's files costs the same per page by its nature (see the benchmark `engine`). A factor is
the growth of the cost divided by the growth of the memory, or of the ranges: 1 is linear, below is better.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.measure import ratio_line
from memtier_engine.model import CHUNK_PAGES, PAGE_BYTES, SWAP_NODE, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.policies.age import AgePolicy, AgePolicyConfig
from memtier_engine.policies.auto import AutoPolicy, AutoPolicyConfig
from memtier_engine.policies.base import Policy
from memtier_engine.policies.demote_idle import DemoteIdlePolicy, DemoteIdlePolicyConfig
from memtier_engine.policies.goals import Goal
from memtier_engine.policies.heat import HeatPolicy, HeatPolicyConfig
from memtier_engine.policies.heatmap import HeatmapConfig
from memtier_engine.policies.ratio import RatioPolicy, RatioPolicyConfig

GIB = 1 << 30
GIBS = (1, 4, 16)
RANGES_GIB = 4
PAGES_IN_RANGE = (512, 128, 32, 8)
"""At 4 GiB: 2048 to 131072 ranges, each touched or not as a whole."""
WHOLE_LIMIT = 1.5
"""Of a factor from the smallest to the largest; quadratic growth would give 16 or 64."""
STEP_LIMIT = 2.0
"""Of a factor from one to the next: caches make steps; quadratic growth would give 4."""
ROUNDS = 9
INTERVAL_S = 5.0
PROCESS = ProcessId(1, 1)
START = 0x7F00_0000_0000


class Nowhere:
    """A `Locator`: everything is on node 0."""

    def nodes(self, process: ProcessId, spans: Spans) -> NDArray[np.int16]:
        return np.zeros(int(spans.pages.sum()), np.int16)


def _heat(pages_in_range: int) -> Policy:
    config = HeatPolicyConfig(heatmap=HeatmapConfig(heat_max=1.0, heat_retention=0.5), heat_numas={0: (SWAP_NODE,)})
    return HeatPolicy(config, Nowhere(), regions=RegionCounters(pages_in_range))


def _ratio(pages_in_range: int) -> Policy:
    return RatioPolicy(RatioPolicyConfig(ratio=0.3), Nowhere(), regions=RegionCounters(pages_in_range))


def _auto(pages_in_range: int) -> Policy:
    config = AutoPolicyConfig(goal=Goal("save", 50.0), window_ms=5000, idle_least_s=1)
    return AutoPolicy(config, RefaultLedger(gaps=True))


POLICIES: dict[str, Callable[[int], Policy]] = {
    "age": lambda pages: AgePolicy(AgePolicyConfig(swap_out_ms=8000), scan_interval_ms=5000),
    "heat": _heat,
    "ratio": _ratio,
    "demote-idle": lambda pages: DemoteIdlePolicy(DemoteIdlePolicyConfig(idle_numas=(SWAP_NODE,))),
    "auto": _auto,
}


@dataclass(frozen=True)
class Cost:
    """Of one round."""

    cpu_ms: float
    peak_mib: float
    asked_pages: int


class Machine:
    """A process with so much memory, 30 % of its ranges touched in each interval, others each time."""

    def __init__(self, policy: Policy, size_bytes: int, pages_in_range: int) -> None:
        self.policy = policy
        self.spans = Spans(np.array([START], np.uint64), np.array([START + size_bytes], np.uint64))
        self.own = ProcessPages(PROCESS, streaks=policy.needs_streaks, places=policy.needs_places)
        self.clock = AgeClock()
        self.now_s = 0.0
        chance = np.random.default_rng(7)
        self._patterns = [np.repeat(chance.random(CHUNK_PAGES // pages_in_range) < 0.3, pages_in_range) for _ in "abc"]
        self._resident = np.ones(CHUNK_PAGES, np.bool_)

    def round(self) -> int:
        """A scan and a decision; returns the pages that it asks to move."""
        self.now_s += INTERVAL_S
        self.clock.begin_scan(self.now_s)
        table = self.clock.step_table()
        self.own.set_spans(self.spans)
        self.policy.begin(PROCESS, self.spans)
        for chunk in self._chunks():
            self.own.update(chunk, table)
            self.policy.observe(PROCESS, chunk)
        tasks = self.policy.decide({PROCESS: self.own}, self.clock, None)
        return sum(int(task.spans.pages.sum()) for task in tasks)

    def _chunks(self) -> Iterator[PageChunk]:
        step = CHUNK_PAGES * PAGE_BYTES
        for index, start in enumerate(range(START, int(self.spans.ends[-1]), step)):
            touched = self._patterns[(index + int(self.now_s / INTERVAL_S)) % len(self._patterns)]
            yield PageChunk(start, touched, self._resident)


def cost(name: str, size_bytes: int, pages_in_range: int) -> Cost:
    """The cheapest of some rounds, after the first ones; memory is the peak above what there was before all."""
    gc.collect()
    tracemalloc.start()
    machine = Machine(POLICIES[name](pages_in_range), size_bytes, pages_in_range)
    for _ in range(2):
        machine.round()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times, asked = [], 0
    for _ in range(ROUNDS):
        began_s = time.thread_time()
        asked = max(asked, machine.round())
        times.append(time.thread_time() - began_s)
    return Cost(min(times) * 1e3, peak_bytes / (1 << 20), asked)


def run() -> bool:
    """Print all lines; True if all limits hold."""
    held = True
    for name in POLICIES:
        held &= _growth(name, "GiB", {gib: cost(name, gib * GIB, 512) for gib in GIBS})
    pages = RANGES_GIB * GIB // PAGE_BYTES
    for name in POLICIES:
        held &= _growth(name, "ranges", {pages // each: cost(name, RANGES_GIB * GIB, each) for each in PAGES_IN_RANGE})
    return held


def _growth(name: str, unit: str, costs: dict[int, Cost]) -> bool:
    """Print the costs, and how they grow against what they depend on."""
    held = True
    for size, found in costs.items():
        per_gib = f" ({found.cpu_ms / size:.2f} ms, {found.peak_mib / size:.2f} MiB per GiB)" if unit == "GiB" else ""
        print(f"{name}, {size} {unit}: {found.cpu_ms:.1f} ms CPU per round, peak {found.peak_mib:.1f} MiB{per_gib}")
        if not found.asked_pages:
            print(f"{name}, {size} {unit}: asked to move nothing, so this shows nothing  NOT HELD")
            held = False
    sizes = list(costs)
    for what, values in (
        ("CPU", [found.cpu_ms for found in costs.values()]),
        ("peak memory", [found.peak_mib for found in costs.values()]),
    ):
        steps = [(values[at + 1] / values[at]) / (sizes[at + 1] / sizes[at]) for at in range(len(sizes) - 1)]
        shown = f"{what} of {name} from {sizes[0]} to {sizes[-1]} {unit}"
        whole = values[-1] / values[0]
        grown = sizes[-1] / sizes[0]
        held &= ratio_line(f"{shown}", f"{whole:.2f} times for {grown:g} times as much", whole / grown, WHOLE_LIMIT)
        held &= ratio_line(f"{shown}, worst step", "against linear", max(steps), STEP_LIMIT)
    return held
