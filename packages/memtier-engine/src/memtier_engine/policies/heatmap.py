"""Counters and a time in, heat per range out: recent use weighs more than old use. No IO.

Heat is per page: accesses and writes of a range divided by its pages, at most `heat_max`, added to what is left
of the heat before, which falls by the factor `heat_retention` per second.

The stored heat of a range is that of its last update. `now` gives what is left of it at a later time: a range
that nobody reports any more cools down all the same, without being touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from memtier_engine.distinct import distinct
from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_SHIFT, U64, ProcessId, Spans
from memtier_engine.pages.regions import F64, I64, Counters, pieces

NS_PER_S = 1_000_000_000
_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatmapConfig:
    """The `heatmap:` section of policy heat."""

    heat_max: float = 1.0
    """Upper limit of heat (`heatmax`). 0: everything stays cold."""
    heat_retention: float = 0.9513
    """Share of the heat left after a second (`heatretention`); 0.9513: 5 % after a minute."""
    heat_classes: int = 10
    """Classes from 0 (cold) to `heat_classes` - 1 (`heatclasses`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.heat_max < float("inf"):
            raise ConfigError(f"value {self.heat_max}", key_path="heatmap.heatmax", hint="use 0 or more; default 1.0")
        if not 0 <= self.heat_retention <= 1:
            raise ConfigError(
                f"value {self.heat_retention}", key_path="heatmap.heatretention", hint="from 0 to 1; default 0.9513"
            )
        if not 1 <= self.heat_classes <= 1000:
            raise ConfigError(
                f"value {self.heat_classes}", key_path="heatmap.heatclasses", hint="from 1 to 1000; default 10"
            )


@dataclass(frozen=True, slots=True)
class Heats:
    """Ranges of one process [n], ascending and disjoint. Times are nanoseconds."""

    starts: U64
    ends: U64  # exclusive
    heat: F64  # at `updated_ns`
    created_ns: I64
    updated_ns: I64

    @property
    def pages(self) -> I64:
        """Length of each in pages."""
        return ((self.ends - self.starts) >> np.uint64(PAGE_SHIFT)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    @staticmethod
    def empty() -> Heats:
        """No range."""
        none, no_time = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        return Heats(none, none, np.zeros(0), no_time, no_time)


class Heatmap:
    """The heat of all ranges of any number of processes."""

    def __init__(self, config: HeatmapConfig | None = None) -> None:
        self.config = config or HeatmapConfig()
        self.processes: dict[ProcessId, Heats] = {}

    def update(self, process: ProcessId, counters: Counters, now_ns: int) -> None:
        """Take over what was counted up to `now_ns`. Ranges are split where the counters' borders fall."""
        pages = np.maximum(counters.pages, 1)
        fresh = np.minimum((counters.accesses + counters.writes) / pages, self.config.heat_max)
        starts, ends, (heat,) = pieces(counters.starts, counters.ends, (fresh,))
        old = self.processes.get(process, Heats.empty())
        if np.array_equal(old.starts, starts) and np.array_equal(old.ends, ends):
            self.processes[process] = Heats(
                starts, ends, self._warmed(old.heat, old.updated_ns, heat, now_ns), old.created_ns, _times(ends, now_ns)
            )
        else:
            self.processes[process] = self._overlaid(old, starts, ends, heat, now_ns)

    def keep(self, processes: Iterable[ProcessId]) -> None:
        """Forget all other processes."""
        for process in self.processes.keys() - set(processes):
            del self.processes[process]

    def clip(self, process: ProcessId, spans: Spans) -> None:
        """Forget what lies outside `spans`: it is not mapped any more."""
        old = self.processes.get(process)
        if old is not None and len(old):
            self.processes[process] = clipped(old, spans)

    def now(self, heats: Heats, now_ns: int) -> F64:
        """float64[n]: what is left of the heats at `now_ns`."""
        return heats.heat * self._left(heats.updated_ns, now_ns)

    def classes(self, heat: F64) -> NDArray[np.int64]:
        """int64[n]: class of each heat."""
        config = self.config
        if config.heat_max == 0:
            return np.zeros(len(heat), np.int64)
        found = (heat * (config.heat_classes / config.heat_max)).astype(np.int64)
        return np.minimum(found, config.heat_classes - 1)

    def _left(self, updated_ns: I64, now_ns: int) -> F64:
        # The clock may have been set back: nothing cools down then, and nothing heats up.
        seconds = np.maximum(0, now_ns - updated_ns) / NS_PER_S
        left: F64 = np.power(self.config.heat_retention, seconds)
        return left

    def _warmed(self, heat: F64, updated_ns: I64, fresh: F64, now_ns: int) -> F64:
        return np.minimum(self.config.heat_max, fresh + heat * self._left(updated_ns, now_ns))

    def _overlaid(self, old: Heats, starts: U64, ends: U64, fresh: F64, now_ns: int) -> Heats:
        points = distinct(np.concatenate((old.starts, old.ends, starts, ends)))
        if not len(points):
            return Heats.empty()
        first, last = points[:-1], points[1:]
        was, in_old = _covering(old.starts, old.ends, first)
        new, in_new = _covering(starts, ends, first)
        kept = in_old | in_new
        first, last = first[kept], last[kept]
        was, new, in_old, in_new = was[kept], new[kept], in_old[kept], in_new[kept]
        heat = np.where(in_old, _at(old.heat, was), 0.0)
        created_ns = np.where(in_old, _at(old.created_ns, was), now_ns)
        updated_ns = np.where(in_old, _at(old.updated_ns, was), now_ns)
        added = np.where(in_new, _at(fresh, new), 0.0)
        heat = np.where(in_new, self._warmed(heat, updated_ns, added, now_ns), heat)
        updated_ns = np.where(in_new, now_ns, updated_ns)
        return Heats(first, last, heat, created_ns, updated_ns)


def clipped(heats: Heats, spans: Spans) -> Heats:
    """The parts of `heats` that lie in `spans`, cut so that each part is in one span."""
    if not len(spans):
        return Heats.empty()
    # Most often every range lies in one span already.
    span, inside = _covering(spans.starts, spans.ends, heats.starts)
    if bool((inside & (heats.ends <= _at(spans.ends, span))).all()):
        return heats
    points = distinct(np.concatenate((heats.starts, heats.ends, spans.starts, spans.ends)))
    first, last = points[:-1], points[1:]
    row, in_heats = _covering(heats.starts, heats.ends, first)
    _, in_spans = _covering(spans.starts, spans.ends, first)
    kept = in_heats & in_spans
    row = row[kept]
    return Heats(first[kept], last[kept], heats.heat[row], heats.created_ns[row], heats.updated_ns[row])


def _covering(starts: U64, ends: U64, points: U64) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """(index of the range at or before each point, whether the point lies in it)."""
    if not len(starts):
        return np.zeros(len(points), np.intp), np.zeros(len(points), np.bool_)
    row = np.searchsorted(starts, points, side="right") - 1
    return np.maximum(row, 0), (row >= 0) & (points < ends[np.maximum(row, 0)])


def _at(column: NDArray[_Number], rows: NDArray[np.intp]) -> NDArray[_Number]:
    return column[rows] if len(column) else np.zeros(len(rows), column.dtype)


def _times(like: U64, now_ns: int) -> I64:
    return np.full(len(like), now_ns, np.int64)
