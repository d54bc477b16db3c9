"""All guards of one engine: when nothing may be taken, from which process nothing, and how much at most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from loguru import logger

from memtier_engine.guards.base import (
    GIB,
    MIB,
    GraceGuard,
    Guard,
    GuardState,
    Reading,
    Scope,
    ThresholdGuard,
    Thresholds,
)
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.meters import StoredMeter, WindowMeter
from memtier_engine.guards.processes import FactsReader
from memtier_engine.guards.readers import IN_RAM, NO_SWAP, READ_EVERY_S, CgroupReader, NodeReader
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId, Spans

PROMOTIONS = frozenset({"active"})
"""Reasons of tasks that bring memory closer to who uses it: no guard stops them."""
GRACE_SCANS = 2
"""Scans after the start without moving: the first tells nothing, and one window is no habit."""
CHECK_EVERY_S = 0.05
REFAULT_WINDOW_S = 60.0
STORED_LEAST_BYTES = 16 * MIB
"""Less than this of an engine's own says nothing about how well its memory compresses."""
TOLD_FROM_BYTES = 8 * MIB
"""A process that is left alone is worth a line where so much was wanted of it."""
WORKING_SET_LEAST_BYTES = 16 * MIB
"""Refaults are taken as a share of at least this: a handful of pages is no rate."""
_PROTECTION = Thresholds(close_at=0.0, open_at=4.0 * MIB, hold_s=0.0)


@dataclass(frozen=True, slots=True)
class Context:
    """What the engine knows itself."""

    resident_bytes: int = 0
    refault_bytes_total: int | None = None
    """None: each address space is judged by itself, see `governor`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be moved now."""

    states: tuple[GuardState, ...] = ()
    swap_allowed: bool = True
    demotion_allowed: bool = True
    out_bytes_max: int | None = None
    """At most this much may be taken from the cgroup; None: no limit."""

    @property
    def move_allowed(self) -> bool:
        """Whether no guard stops anything."""
        return self.swap_allowed and self.demotion_allowed

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why something is stopped."""
        return tuple(f"{state.name}: {state.reason}" for state in self.states if not state.open)

    def allows(self, task: MoveTask) -> bool:
        """Whether `task` may run now."""
        if task.reason in PROMOTIONS:
            return True
        return self.demotion_allowed and (task.to_node != SWAP_NODE or self.swap_allowed)


class GuardSet:
    """The guards of one engine, with their readers. One thread at a time."""

    def __init__(
        self,
        config: GuardsConfig | None = None,
        *,
        host: Host | None = None,
        cgroups: Iterable[Path] = (),
        node: NodeReader | None = None,
        scan_interval_s: float = 5.0,
    ) -> None:
        """Set up.

        Args:
            config: thresholds; None: the defaults.
            host: the machine.
            cgroups: the directories of the engine's own cgroups, for those guards that are about them.
            node: a reader that the engines of a node share, which its owner closes; None: one of its own.
            scan_interval_s: time between scans, for the grace after the start.
        """
        self.config = config = config or GuardsConfig()
        host = host or Host()
        self._own_node = node is None
        self._node = node or NodeReader(host, config)
        self.cgroups = tuple(cgroups)
        self._cgroup = CgroupReader(host, self.cgroups, config)
        self._facts = FactsReader(host, realtime=config.skip.realtime)
        self._refaults = WindowMeter(REFAULT_WINDOW_S, slots=12)
        self._stored = StoredMeter(STORED_LEAST_BYTES)
        grace_s = config.start_grace_s
        if grace_s is None:
            grace_s = GRACE_SCANS * scan_interval_s
        self.guards: tuple[Guard, ...] = (*_guards(config), GraceGuard(grace_s))
        self.skipped: Mapping[ProcessId, str] = {}
        """Processes that the last decision wanted memory of and that are left alone, and why."""
        self.verdict = Verdict()
        """The last one."""
        self._context = Context()
        self._checked_s: float | None = None
        self._judged: Mapping[str, Reading] = {}
        self._judged_s = -math.inf
        """By what the guards last decided, and when."""
        self._of_node: frozenset[str] = frozenset()
        """Guards that all engines of the node find alike."""

    def check(self, now_s: float, context: Context | None = None) -> Verdict:
        """Read what is due and decide. Cheap: may be called before every batch.

        Without a `context`, what the engine knew last still holds.
        """
        if context is None and self._checked_s is not None and 0 <= now_s - self._checked_s < CHECK_EVERY_S:
            return self.verdict
        self._checked_s = now_s
        self._context = context = context or self._context
        readings = dict(self._node.read(now_s))
        self._of_node = frozenset(readings)
        readings.update(self._cgroup.read(now_s))
        idle_disk = readings["swap-writes"].missing
        if idle_disk in (IN_RAM, NO_SWAP):
            readings["psi-io-node"] = readings["psi-io-cgroup"] = Reading(missing=idle_disk)
        if context.refault_bytes_total is None:
            readings["refaults"] = Reading(missing="each process is judged by itself")
        else:
            recent = self._refaults.add(context.refault_bytes_total, now_s)
            readings["refaults"] = Reading(100 * recent / max(context.resident_bytes, WORKING_SET_LEAST_BYTES))
        readings["compression"] = self._compression(readings["compression"], now_s)
        if self._stands(readings, now_s):
            return self.verdict
        self._judged, self._judged_s = readings, now_s
        states = tuple(guard.update(readings, now_s) for guard in self.guards)
        headroom = readings["protection"].value if self.config.protection else None
        verdict = Verdict(
            states=states,
            swap_allowed=all(state.open for state in states),
            demotion_allowed=all(state.open for state in states if state.scope is Scope.DEMOTION),
            out_bytes_max=None if headroom is None else max(0, int(headroom)),
        )
        self._tell(verdict)
        self.verdict = verdict
        return verdict

    def _stands(self, readings: Mapping[str, Reading], now_s: float) -> bool:
        """Whether the last verdict does: all was open a moment ago, and nothing has changed that could close a guard.

        How well our own pages compress changes with each batch; as long as it is well enough, that is no change.
        """
        if not 0 <= now_s - self._judged_s < READ_EVERY_S or not all(state.open for state in self.verdict.states):
            return False
        limits, ratio = self.config.compression, readings["compression"].value
        fine = ratio is not None and limits is not None and not limits.closes(ratio)
        judged = {**self._judged, "compression": readings["compression"]} if fine else self._judged
        return judged == readings

    def admit(self, tasks: Sequence[MoveTask], verdict: Verdict, now_s: float) -> list[MoveTask]:
        """What remains of `tasks`: without what is stopped now, and without what no process may lose."""
        skipped: dict[ProcessId, str] = {}
        left: dict[ProcessId, int | None] = {}
        out_left = verdict.out_bytes_max
        admitted: list[MoveTask] = []
        for task in tasks:
            if task.reason in PROMOTIONS:
                admitted.append(task)
                continue
            if not verdict.allows(task):
                continue
            if task.to_node == SWAP_NODE:
                if task.process not in left:
                    left[task.process] = self._spare_bytes(task.process, now_s, skipped)
                limits = [limit for limit in (left[task.process], out_left) if limit is not None]
                if limits:
                    task = replace(task, spans=first_bytes(task.spans, min(limits)))
                    taken = task.spans.total_bytes
                    spare = left[task.process]
                    left[task.process] = None if spare is None else spare - taken
                    out_left = None if out_left is None else out_left - taken
            elif self._spare_bytes(task.process, now_s, skipped) == 0:
                continue
            if len(task.spans):
                admitted.append(task)
        self._facts.keep(frozenset(task.process for task in tasks))
        for process in skipped.keys() - self.skipped.keys():
            wanted = sum(task.spans.total_bytes for task in tasks if task.process == process)
            level = "INFO" if wanted >= TOLD_FROM_BYTES else "DEBUG"  # of small ones there may be thousands
            logger.log(level, "pid {} is left alone: it {}", process.pid, skipped[process])
        self.skipped = skipped
        return admitted

    def stored(self, moved_bytes: int, stored_bytes: int | None, now_s: float) -> None:
        """A batch went to swap and takes so much of RAM there; None: not known."""
        if moved_bytes:
            self._stored.add(moved_bytes, stored_bytes, now_s)

    def _compression(self, of_node: Reading, now_s: float) -> Reading:
        """How well this engine's own memory compresses, whatever others have stored; where nobody knows, the node's."""
        limits = self.config.compression
        if limits is None or self._stored.unknown_bytes >= STORED_LEAST_BYTES:
            return of_node
        ratio = self._stored.ratio(limits.close_at, now_s)
        if ratio is None:
            return Reading(missing=of_node.missing or "too little of its own is stored to tell")
        return Reading(ratio, note="its own pages")

    def foresee(self, tasks: Sequence[MoveTask], now_s: float) -> list[MoveTask]:
        """What `admit` would leave of `tasks` if no guard were closed: dry runs promise no more."""
        return self.admit(tasks, Verdict(), now_s)

    def close(self) -> None:
        """Close the readers that are its own. Safe to call twice."""
        self._cgroup.close()
        if self._own_node:
            self._node.close()

    def _spare_bytes(self, process: ProcessId, now_s: float, skipped: dict[ProcessId, str]) -> int | None:
        """How much may be paged out of a process: 0 with a reason in `skipped`; None: as much as one likes."""
        if process in skipped:
            return 0
        facts = self._facts.read(process, now_s)
        if facts is None:
            return None
        why = self.config.skip.why(facts)
        if why is not None:
            skipped[process] = why
            return 0
        return None if facts.rss_bytes is None else facts.rss_bytes - self.config.skip.rss_least_bytes

    def _tell(self, verdict: Verdict) -> None:
        before = {state.name: state.open for state in self.verdict.states}
        for state in verdict.states:
            of_node = state.name in self._of_node
            log = logger.bind(node=f"guard {state.name}", state=state.open) if of_node else logger
            if not state.open and before.get(state.name, True):
                log.info("guard {} closed: {}", state.name, state.reason)
            elif state.open and not before.get(state.name, True):
                log.info("guard {} opened", state.name)


def first_bytes(spans: Spans, limit_bytes: int) -> Spans:
    """The first whole pages of `spans`, at most `limit_bytes`."""
    limit = max(0, limit_bytes) // PAGE_BYTES * PAGE_BYTES
    if spans.total_bytes <= limit:
        return spans
    total = np.cumsum(spans.ends - spans.starts)
    count = int(np.searchsorted(total, np.uint64(limit), side="left")) + 1
    starts, ends = spans.starts[:count], spans.ends[:count].copy()
    ends[-1] -= total[count - 1] - np.uint64(limit)
    kept = ends > starts
    return Spans(starts[kept], ends[kept])


def _guards(config: GuardsConfig) -> Sequence[Guard]:
    swap = Scope.SWAP
    budget = config.swap_writes_bytes_per_day
    # Opening below 95 % of the budget: the day's window must first have moved on a good deal.
    writes = None if budget is None else Thresholds(close_at=budget, open_at=0.95 * budget, hold_s=60.0)
    return (
        ThresholdGuard("psi-memory-node", "the node's memory stall time", config.memory_psi_node),
        ThresholdGuard("psi-memory-cgroup", "the cgroup's memory stall time", config.memory_psi_cgroup),
        ThresholdGuard("psi-io-node", "the node's IO stall time", config.io_psi_node, scope=swap),
        ThresholdGuard("psi-io-cgroup", "the cgroup's IO stall time", config.io_psi_cgroup, scope=swap),
        ThresholdGuard("swap-fill", "used swap", config.swap_fill, scope=swap),
        ThresholdGuard("swap-writes", "written to swap", writes, unit="GiB/day", scope=swap, scale=1 / GIB),
        ThresholdGuard("compression", "the compression ratio", config.compression, unit="", scope=swap),
        ThresholdGuard("refaults", "memory that came back within a minute", config.refaults, scope=swap),
        ThresholdGuard(
            "protection",
            "memory above its guarantee",
            _PROTECTION if config.protection else None,
            unit="MiB",
            scope=swap,
            scale=1 / MIB,
        ),
    )
