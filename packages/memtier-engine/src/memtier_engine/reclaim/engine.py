"""Cgroups and a goal in, an engine out that asks the kernel to reclaim and never looks at a single page.

It costs a few small files per cgroup and decision, whatever the cgroup's size. What it cannot tell is which pages
went; how much, after how long, and at which price is known from memory.stat, memory.pressure and `lru_gen`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memtier_engine.clock import Clock
from memtier_engine.distinct import distinct
from memtier_engine.engine.loop import Engine, EngineConfig, StepReport
from memtier_engine.errors import KernelCallError, MemtierError, TrackerUnavailable, Unavailable
from memtier_engine.guards.gauges import HostGauges
from memtier_engine.guards.guardset import Context
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.probe import probe
from memtier_engine.model import PAGE_BYTES
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.pages.ages import AGE_MAX
from memtier_engine.policies.stub import StubPolicy
from memtier_engine.reclaim.policy import CgroupFacts, ReclaimPolicy, ReclaimPolicyConfig
from memtier_engine.reclaim.reclaimer import CgroupReclaimer
from memtier_engine.stats.observer import Observer
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.trackers.mglru import MglruTracker
from memtier_engine.trackers.stub import StubTracker

SCANS_PER_THRESHOLD = 2
"""Generations that begin within the threshold: of the four that the kernel keeps, the oldest is then older."""
_REFAULTS = ("workingset_refault_anon", "workingset_refault_file")


@dataclass(slots=True)
class _Member:
    """One cgroup while it exists."""

    cgroup: Cgroup
    inode: int
    reclaimer: CgroupReclaimer
    gauges: HostGauges
    ages: MglruTracker | None
    aged_s: float | None = None
    refaults_before: int | None = None
    refaults_total: int = 0
    facts: CgroupFacts = field(default_factory=lambda: CgroupFacts(0))


class ReclaimEngine(Engine):
    """An engine of whole cgroups: its step reads what is known of them, its moves are writes to memory.reclaim."""

    def __init__(
        self,
        target: CgroupsTarget,
        policy: ReclaimPolicyConfig,
        config: EngineConfig | None = None,
        *,
        host: Host | None = None,
        clock: Clock | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Of `config`, tracker and policy have no effect; `policy.interval_ms` is the time between looks.

        Raises:
            Unavailable: cgroups have no memory.reclaim here.
            TrackerUnavailable: ages are wanted (`ages: mglru`) and the kernel has none.
        """
        host = host or Host()
        _demand(host, "memory-reclaim", Unavailable)
        self._aged = policy.ages != "none"
        if policy.ages == "mglru":
            _demand(host, "mglru", TrackerUnavailable)
        elif policy.ages == "auto":
            self._aged = probe(host, ("mglru",)).works("mglru")
        config = replace(config or EngineConfig(), scan_interval_ms=policy.interval_ms, count_swap_ins=False)
        super().__init__(
            target,
            config,
            host=host,
            clock=clock,
            tracker=StubTracker(host),
            policy=StubPolicy(),
            observers=observers,
        )
        self.tracker.name = "mglru" if self._aged else "none"
        self.reclaim = ReclaimPolicy(policy)
        self._cgroups = target
        self._members: dict[Path, _Member] = {}
        self._turn = 0
        self._refault_bytes = 0
        self._node_gauges = HostGauges(host)

    def advance(self, now_s: float) -> tuple[StepReport | None, float]:
        """See `Engine.advance`."""
        report = None
        began_cpu_s = time.thread_time()
        if now_s >= self._next_scan_s:
            report = self.step(now_s)
            self._next_scan_s = max(self._next_scan_s + self.scan_interval_s, self.clock.now_s())
        elif not self.config.dry_run:
            if self.guards.check(now_s).swap_allowed:
                self._pump(now_s)
            else:
                self._stop_all()
            self._cpu_s += time.thread_time() - began_cpu_s
        waits = [wait_s for member in self._members.values() if (wait_s := member.reclaimer.wait_s()) is not None]
        if self.config.dry_run or self.mover.paused or not waits:
            return report, self._next_scan_s
        pause_s = max(self.mover.config.interval_ms / 1000, min(waits))
        return report, min(self._next_scan_s, self.clock.now_s() + pause_s)

    def step(self, now_s: float | None = None) -> StepReport:
        """Look at every cgroup once, decide, hand the reclaimers their bytes."""
        now_s = self.clock.now_s() if now_s is None else now_s
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        self._follow(now_s)
        self.age_clock.begin_scan(now_s)
        for path in self._cgroups.directories():
            self._look_at(path, now_s)
        facts = {str(path): member.facts for path, member in self._members.items()}
        wanted = self.reclaim.decide(facts, now_s, self._node_gauges.available_bytes())
        resident = sum(member.facts.current_bytes for member in self._members.values())
        refaults = sum(member.refaults_total for member in self._members.values()) * PAGE_BYTES
        self._refault_bytes = refaults
        verdict = self.guards.check(now_s, Context(resident, refaults))
        for observer in self.observers:
            observer.event("PolicyReclaim.loop")
        self._candidate_bytes = sum(wanted.values())
        if verdict.swap_allowed and not self.config.dry_run:
            # The kernel reclaims more than it is asked for where writing to swap is slow, and of the cgroup that is
            # named it does not look at memory.min (mm/memcontrol.c, mem_cgroup_calculate_protection()).
            left = None if verdict.out_bytes_max is None else verdict.out_bytes_max // 2
            for path, member in self._members.items():
                size = wanted[str(path)] if left is None else min(left, wanted[str(path)])
                left = None if left is None else left - size
                member.reclaimer.replace(size)
        else:
            self._stop_all()
        scan_seconds = time.monotonic() - began_s
        used_s = time.thread_time() - began_cpu_s
        if self.pace is not None:
            self.pace.scanned(used_s)
        self._cpu_s += used_s
        return self._describe(now_s, scan_seconds, resident)

    def _look_at(self, path: Path, now_s: float) -> None:
        try:
            member = self._member(path, now_s)
            if member is None:
                return
            current = member.cgroup.read_int("memory.current")
            if current is None:
                del self._members[path]
                return
            stat = member.cgroup.stat()
            refaults = sum(stat[name] for name in _REFAULTS) if all(name in stat for name in _REFAULTS) else None
            before, member.refaults_before = member.refaults_before, refaults
            new = None if before is None or refaults is None else max(0, refaults - before)
            member.refaults_total += new or 0
            idle_s, idle_pages = self._ages(member, path, now_s)
            member.facts = CgroupFacts(
                current,
                member.cgroup.read_int("memory.swap.current"),
                member.gauges.stall_percent(now_s),
                new,
                idle_s,
                idle_pages,
            )
        except MemtierError as failure:
            self._note(str(failure))
            self._members.pop(path, None)

    def _member(self, path: Path, now_s: float) -> _Member | None:
        """The member for what is at `path` now: a new one where the cgroup was made anew."""
        cgroup = Cgroup(path, self.host)
        member = self._members.get(path)
        if cgroup.inode is None or (member is not None and member.inode != cgroup.inode):
            self._members.pop(path, None)
            member = None
        if cgroup.inode is None:
            return None
        if member is None:
            # The ceiling is the mover's, which a node may put under its own.
            free = MoverConfig(interval_ms=self.config.mover.interval_ms, bandwidth_mib_per_s=None)
            reclaimer = CgroupReclaimer(path, free, self.host, now_s=now_s)
            ages = MglruTracker(self.host, path, below=True) if self._aged else None
            member = _Member(cgroup, cgroup.inode, reclaimer, HostGauges(self.host, (path,)), ages)
            self._members[path] = member
        return member

    def _ages(
        self, member: _Member, path: Path, now_s: float
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]] | tuple[None, None]:
        if member.ages is None:
            return None, None
        every_s = self.reclaim.threshold_s(str(path)) / SCANS_PER_THRESHOLD
        if member.aged_s is None or now_s - member.aged_s >= every_s:
            member.ages.scan()
            member.aged_s = now_s
        found = member.ages.ages()
        return found.idle_s, found.anon_pages + found.file_pages

    def _pump(self, now_s: float) -> None:
        """One call, of the cgroup whose turn it is."""
        pending = [member for member in self._members.values() if member.reclaimer.wanted_bytes]
        if not pending:
            return
        member = pending[self._turn % len(pending)]
        self._turn += 1
        try:
            outcome = member.reclaimer.pump(now_s, self.mover.allowed_bytes(now_s))
        except KernelCallError as failure:
            member.reclaimer.replace(0)
            self._note(str(failure))
            return
        if outcome is None:
            return
        self.mover.charge(outcome.reclaimed_bytes)
        self._requested_bytes += outcome.requested_bytes
        self._moved_bytes += outcome.reclaimed_bytes
        self.guards.stored(outcome.reclaimed_bytes, None, now_s)
        for observer in self.observers:
            observer.event("mover.reclaim")

    def _stop_all(self) -> None:
        for member in self._members.values():
            member.reclaimer.replace(0)

    def _describe(self, now_s: float, scan_seconds: float, resident_bytes: int) -> StepReport:
        members = self._members.values()
        idle_s, pages = _as_ages([member.facts for member in members])
        report = self._report(now_s, scan_seconds, pages)
        return replace(
            report,
            processes=len(self.following.known),
            tracked_bytes=resident_bytes,
            resident_bytes=resident_bytes,
            paged_out_bytes=sum(member.facts.out_bytes or 0 for member in members),
            refault_bytes_total=self._refault_bytes,
            idle_s=idle_s,
        )


def reclaim_engine(
    cgroups: Sequence[str | Path],
    policy: ReclaimPolicyConfig,
    config: EngineConfig | None = None,
    *,
    host: Host | None = None,
    clock: Clock | None = None,
    observers: Sequence[Observer] = (),
) -> ReclaimEngine:
    """An engine that works for the goal of `policy` on `cgroups`, named as people name them. Raises as the class."""
    host = host or Host()
    return ReclaimEngine(CgroupsTarget(host, cgroups), policy, config, host=host, clock=clock, observers=observers)


def _demand(host: Host, feature: str, kind: type[Unavailable]) -> None:
    found = probe(host, (feature,))[feature]
    if not found.works:
        raise kind(f"policy reclaim: {found.why}", hint=found.fix)


def _as_ages(facts: Sequence[CgroupFacts]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(float64[AGE_MAX + 1], int64[256]): idle times, ascending, and pages of each, as reports have them.

    More idle times than a report has room for are put with the next longer one.
    """
    idle_s = np.zeros(AGE_MAX + 1)
    pages = np.zeros(256, np.int64)
    found = [(each.idle_s, each.idle_pages) for each in facts if each.idle_s is not None]
    if not found:
        return idle_s, pages
    times = np.concatenate([times for times, _ in found if times is not None])
    counts = np.concatenate([counts for _, counts in found if counts is not None])
    steps = distinct(times)
    steps = steps[np.linspace(0, len(steps) - 1, min(len(steps), AGE_MAX + 1)).astype(np.intp)]
    idle_s[:] = steps[-1] if len(steps) else 0.0
    idle_s[: len(steps)] = steps
    place = np.minimum(np.searchsorted(idle_s, times, side="left"), AGE_MAX)
    np.add.at(pages, place, counts)
    return idle_s, pages


__all__ = ["ReclaimEngine", "reclaim_engine"]
