"""Policy `heat`: ranges go to the nodes of their heat class, the hottest first, as far as there is room.

The heat of every range is kept up to date from what scans saw. Where pages really are is asked anew for each
decision, so a move that failed, or that somebody else made, never leaves a wrong account behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from memtier_engine.errors import ConfigError, MemtierError, ProcessGone
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.policies.base import Locator, RegionPolicy, check_interval
from memtier_engine.policies.heat_placement import Placement, ProcessMap
from memtier_engine.policies.heatmap import NS_PER_S, Heatmap, HeatmapConfig, Heats


class Forecaster(Protocol):
    """Turns heats as they are into heats as they will be."""

    name: str

    def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
        """The heats to place by; None: no forecast this time. Raises MemtierError when it broke."""

    def close(self) -> None:
        """Give everything back. Safe to call twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatPolicyConfig:
    """The keys of the reference's `heat` policy, with units in their names."""

    interval_ms: int = 10_000
    """Time between decisions (`intervalms`)."""
    heatmap: HeatmapConfig = field(default_factory=HeatmapConfig)
    heat_numas: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Nodes of each heat class, the preferred first (`heatnumas`); a class without stays where it is."""
    numa_size_bytes: Mapping[int, int] = field(default_factory=dict)
    """The most that tracked processes may have on a node (`numasize`); absent: no limit."""

    def __post_init__(self) -> None:
        check_interval(self.interval_ms, 10_000)
        last = self.heatmap.heat_classes - 1
        for number, nodes in self.heat_numas.items():
            key = f"heatnumas.{number}"
            if not 0 <= number <= last:
                raise ConfigError(
                    "there is no such heat class", key_path=key, hint=f"from 0 to {last} with heatclasses: {last + 1}"
                )
            for node in nodes:
                if node < SWAP_NODE:
                    raise ConfigError(f"node {node}", key_path=key, hint="a node number, or -1 for swap")
        for node, size in self.numa_size_bytes.items():
            if size < 0:
                raise ConfigError(f"value {size}", key_path=f"numasize.{node}", hint="a size of 0 or more")


class HeatPolicy(RegionPolicy):
    """Keeps a heatmap and places by it."""

    name = "heat"

    def __init__(
        self,
        config: HeatPolicyConfig,
        locator: Locator,
        *,
        regions: RegionCounters | None = None,
        forecaster: Forecaster | None = None,
        unix_offset_s: float = 0.0,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        """Set up with an empty heatmap.

        Args:
            config: what goes where.
            locator: answers where pages are.
            regions: how memory is cut and counted; None: 512 pages, without a cap.
            forecaster: asked before each placement; the policy closes it.
            unix_offset_s: Unix time minus the engine's clock, so that `created` and `updated` are Unix times.
            on_event: told what happened, by the reference's event names.
        """
        super().__init__(config.interval_ms, regions)
        self.config = config
        self.heatmap = Heatmap(config.heatmap)
        self.used_pages: dict[int, int] = {}
        """Pages of the tracked processes on each node, swap included, at the last decision."""
        self._locator = locator
        self._forecaster = forecaster
        self._unix_offset_s = unix_offset_s
        self._on_event = on_event or (lambda name: None)

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """See `Policy.decide`."""
        now_ns = int((clock.now_s + self._unix_offset_s) * NS_PER_S)
        self._update(pages, now_ns)
        heats = self._expected(now_ns)
        if not self.config.heat_numas:
            return []
        placement = Placement(self.config.heat_numas, self.config.numa_size_bytes, self.config.heatmap.heat_classes)
        for process, own in pages.items():
            found = heats.get(process)
            if found is None:
                continue
            try:
                nodes = self._locator.nodes(process, own.spans)
            except ProcessGone:
                continue
            heat = self.heatmap.now(found, now_ns)
            placement.add(ProcessMap(process, own.spans, own.offsets, nodes), found, heat, self.heatmap.classes(heat))
        self.used_pages = placement.used_pages
        return placement.tasks(None if budget_bytes is None else max(1, budget_bytes // PAGE_BYTES))

    def close(self) -> None:
        """Close the forecaster. Safe to call twice."""
        if self._forecaster is not None:
            self._forecaster.close()

    def _update(self, pages: Mapping[ProcessId, ProcessPages], now_ns: int) -> None:
        self.regions.keep(pages)
        self.heatmap.keep(pages)
        for process in self.regions.processes():
            self.heatmap.clip(process, pages[process].spans)
            self.heatmap.update(process, self.regions.of(process), now_ns)
        self.regions.reset()

    def _expected(self, now_ns: int) -> Mapping[ProcessId, Heats]:
        if self._forecaster is None:
            return self.heatmap.processes
        try:
            forecast = self._forecaster.forecast(self.heatmap.processes, now_ns)
        except MemtierError as failure:
            self._on_event(f"forecaster {self._forecaster.name} error: {failure}")
            return self.heatmap.processes
        if forecast is None:
            return self.heatmap.processes
        self._on_event("use forecast")
        return forecast
