"""Policy `ratio`: of each process, keep a given share on the target, and let it be the least used memory.

Least used: fewest accesses since tracking began, and of equal ones the longest untouched. The share is of the
process's own memory in RAM and swap; address space that was never touched does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memtier_engine.errors import ConfigError, ProcessGone
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId, Spans
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.policies.base import Locator, RegionPolicy, check_interval
from memtier_engine.policies.pagemask import flagged_in, flagged_spans, inside, page_indexes


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioPolicyConfig:
    """The keys of the reference's `ratio` policy, with units in their names."""

    interval_ms: int = 5000
    """Time between decisions (`intervalms`)."""
    ratio: float
    """Share of each process that should be on the target (`ratio`)."""
    ratio_targets: tuple[int, ...] = (SWAP_NODE,)
    """The first is the target (`ratiotargets`)."""

    def __post_init__(self) -> None:
        check_interval(self.interval_ms)
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"value {self.ratio}", key_path="ratio", hint="use more than 0, up to 1")
        if not self.ratio_targets or min(self.ratio_targets) < SWAP_NODE:
            raise ConfigError(
                f"value {list(self.ratio_targets)}", key_path="ratiotargets", hint="a list of nodes, or [-1] for swap"
            )


class RatioPolicy(RegionPolicy):
    """Moves the least used regions until the share is reached; never anything back."""

    name = "ratio"

    def __init__(self, config: RatioPolicyConfig, locator: Locator, *, regions: RegionCounters | None = None) -> None:
        """`regions`: how memory is cut and counted; None: 512 pages, without a cap."""
        super().__init__(config.interval_ms, regions)
        self.config = config
        self._locator = locator

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """See `Policy.decide`."""
        self.regions.keep(pages)
        left = None if budget_bytes is None else max(1, budget_bytes // PAGE_BYTES)
        tasks = []
        for process in sorted(self.regions.processes()):
            if left == 0:
                break
            try:
                spans = self._least_used(pages[process], left)
            except ProcessGone:
                continue
            if len(spans):
                tasks.append(MoveTask(process, spans, self.config.ratio_targets[0], "ratio"))
                left = None if left is None else left - int(spans.pages.sum())
        return tasks

    def _least_used(self, own: ProcessPages, limit_pages: int | None) -> Spans:
        target = self.config.ratio_targets[0]
        nodes = self._locator.nodes(own.process, own.spans)
        total = int(np.count_nonzero(nodes >= SWAP_NODE))
        wanted = int(self.config.ratio * total) - int(np.count_nonzero(nodes == target))
        if limit_pages is not None:
            wanted = min(wanted, limit_pages)
        if wanted <= 0:
            return Spans.empty()
        counters = self.regions.of(own.process)
        firsts, lasts = page_indexes(own.spans, own.offsets, counters.starts, counters.ends)
        movable = (nodes >= 0) & (nodes != target)
        candidates = flagged_in(movable, firsts, lasts)
        youngest = np.minimum.reduceat(own.ages, firsts) if len(firsts) else own.ages[:0]
        order = np.lexsort((-youngest.astype(np.int16), counters.accesses + counters.writes))
        order = order[candidates[order] > 0]
        done = np.cumsum(candidates[order])
        count = int(np.searchsorted(done, wanted, side="left")) + 1
        chosen = np.sort(order[:count])
        last = order[count - 1] if count <= len(order) else None
        flags = movable & inside(len(movable), firsts[chosen], lasts[chosen])
        if last is not None:
            # Of the last region only as many pages as are still wanted.
            spare = int(done[count - 1]) - wanted
            if spare > 0:
                region = np.flatnonzero(movable[firsts[last] : lasts[last]]) + firsts[last]
                flags[region[len(region) - spare :]] = False
        return flagged_spans(own.spans, own.offsets, flags)
