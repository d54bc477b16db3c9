"""One engine: targets -> tracker -> ages -> policy -> mover, and a report of each step.

The only file that knows all stages. An engine is a state machine: `advance(now_s)` does what is due and
says when to call again, so that one thread can run many, and a test needs no sleep.
"""

from __future__ import annotations

import errno
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.engine.asleep import AsleepWatch
from memtier_engine.engine.families import Families, histogram_of
from memtier_engine.engine.following import Following
from memtier_engine.engine.membership import Membership
from memtier_engine.engine.pace import CPU_SHARE, Looks, Pace
from memtier_engine.engine.probing import Probing
from memtier_engine.engine.report import StepReport
from memtier_engine.engine.returns import ReturnsWatch
from memtier_engine.engine.scanning import Halted, Scanner
from memtier_engine.engine.settings import EngineConfig, swap_config
from memtier_engine.engine.stopped import note_stopped
from memtier_engine.engine.telling import tell
from memtier_engine.errors import KernelCallError, MemtierError, ProcessGone, TrackerUnavailable
from memtier_engine.guards.guardset import GuardSet
from memtier_engine.hostfs.handles import FileSharingTracker, OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.observers import Observers
from memtier_engine.hostfs.privileges import TRACKERS, named
from memtier_engine.hostfs.proc import meminfo
from memtier_engine.model import (
    NOWHERE,
    PAGE_BYTES,
    SWAP_NODE,
    LookingTracker,
    MoveOutcome,
    MoveTask,
    PacedTracker,
    ProcessId,
    Tracker,
)
from memtier_engine.mover.edge import went
from memtier_engine.mover.mover import Mover, open_processes
from memtier_engine.pages.ages import AGE_MAX, PAGED_OUT, AgeClock, ProcessPages
from memtier_engine.pages.governor import governed, withheld_bytes
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.pages.space import AddressSpace, Probe, Spaces
from memtier_engine.pages.spaceledger import SwapInsSeen, idle_alike
from memtier_engine.policies.age import AgePolicy
from memtier_engine.policies.base import Policy
from memtier_engine.stats.observer import Observer, event_prefix
from memtier_engine.targets.base import Target, TellingTarget, innermost
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.trackers.bpf.feed import SwapInWatch, total
from memtier_engine.trackers.registry import create_tracker

ERRORS_KEPT = 20
_ENDED_CHECK_S = 1.0
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What this program or machine is short of says nothing against the process that is looked at: next time, then."""
_LATE_S = 0.5
"""A scan that goes on for so long after the end of `run` is broken off."""


class Engine:
    """Tracks the processes of one target and moves what its policy says. One thread at a time."""

    def __init__(
        self,
        target: Target,
        config: EngineConfig | None = None,
        *,
        host: Host | None = None,
        clock: Clock | None = None,
        tracker: Tracker | None = None,
        policy: Policy | None = None,
        mover: Mover | None = None,
        guards: GuardSet | None = None,
        refaults: RefaultLedger | None = None,
        pace: Pace | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Any stage can be replaced by one of your own. `observers` are told of every scan, move and event.

        Raises:
            TrackerUnavailable: the tracker does not work here.
        """
        self.config = config or EngineConfig()
        self.host = host or Host()
        self.clock = clock or SystemClock()
        self.target = target
        source = innermost(target)
        without = ("softdirty",) if self.config.dry_run else ()
        self.tracker = tracker or create_tracker(self.config.tracker, self.host, without=without).tracker
        if self.config.dry_run and getattr(self.tracker, "takes_soft_dirty", False):
            self.tracker.close()
            raise TrackerUnavailable(
                "tracker softdirty: a dry run takes nothing from anybody, and soft-dirty bits may be somebody's (CRIU, "
                "an incremental garbage collector): whoever clears them makes others miss writes",
                hint="use another tracker for the dry run, such as `auto`",
            )
        if isinstance(self.tracker, PacedTracker):
            self.tracker.scans_every(self.config.scan_interval_ms / 1000)
        self.policy: Policy = policy or AgePolicy(self.config.policy, scan_interval_ms=self.config.scan_interval_ms)
        now_s = self.clock.now_s()
        self.files = open_processes(self.host)
        """Open files of the processes: see `use_files`."""
        self._own_files = True
        self.mover = mover or Mover(self.config.mover, self.host, now_s=now_s, files=self.files)
        self.mover.look = self.tracker.look if isinstance(self.tracker, LookingTracker) else None
        self._claim_effects()
        self.guards = guards or GuardSet(
            self.config.guards,
            host=self.host,
            cgroups=source.directories() if isinstance(source, CgroupsTarget) else (),
            scan_interval_s=self.config.scan_interval_ms / 1000,
        )
        self.observers: list[Observer] = list(observers)
        limits = self.config.guards.refaults
        self.refaults = RefaultLedger() if refaults is None else refaults  # an empty one is false
        self.refaults.share_percent = None if limits is None else limits.close_at
        self.pace = pace
        self._swap_ins = SwapInWatch(self.host) if self.config.count_swap_ins else None
        # Weak: what is stopped is freed at once, tables of a byte per page and all, not when garbage is next collected.
        own: Engine = weakref.proxy(self)
        self.spaces = Spaces(lambda process: own._new_pages(process))
        # A tracker that clears no accessed bits may look on beside another one.
        blinds = getattr(self.tracker, "clears_accessed_bits", True)
        observing = Observers(self.host) if blinds else None
        self._membership = Membership(self.host, self.spaces, lambda error: own._note(error), observers=observing)
        self._families = Families(self.files, lambda: own.halted())
        self.age_clock = AgeClock()
        self._returns = ReturnsWatch(self.host)
        self._asleep = AsleepWatch(self.tracker)
        self._probing = Probing(
            self.tracker, lambda process: own._probe_of(process), lambda: (space.probe for space in own.spaces)
        )
        self.halted: Callable[[], bool] = lambda: own._halt
        """Asked in the middle of scans: whether to end at once."""
        self._halt = False
        self._scanner = Scanner(
            self.host,
            self.files,
            self.tracker,
            target,
            self.policy,
            self.refaults,
            self.age_clock,
            self.observers,
            lambda: own.halted(),
        )
        if isinstance(self.tracker, FileSharingTracker):
            self.tracker.use_files(self.files)
        self._next_scan_s = now_s
        self._next_decision_s = now_s
        self._candidate_bytes = 0
        self._requested_bytes = self._moved_bytes = 0
        self._cpu_s = 0.0
        self._errors: list[str] = []
        self.following = Following(self.config.scan_interval_ms / 1000)
        self._looks = Looks(now_s)
        self._changed = threading.Event()
        self.on_wake: Callable[[], None] = lambda: None
        """Called by `wake`, from any thread: whoever calls `advance` should do so now."""
        self.closed = False
        if isinstance(target, TellingTarget):
            target.listen(self.wake)

    @classmethod
    def for_pid(cls, pid: int, *, idle_after_s: float, config: EngineConfig | None = None) -> Engine:
        """An engine that pages out what `pid` has not touched for `idle_after_s`.

        Raises:
            MemtierError: there is no such process, or it may not be looked at.
        """
        from memtier_engine.targets.asked import check_pid
        from memtier_engine.targets.pids import PidsTarget

        host = Host()
        check_pid(host, pid)
        return cls(PidsTarget(host, [pid]), swap_config(config, idle_after_s), host=host)

    @classmethod
    def for_cgroup(cls, path: str | Path, *, idle_after_s: float, config: EngineConfig | None = None) -> Engine:
        """An engine for all processes in the cgroup directory `path` and below.

        One that is to be waited for, and the root of a hierarchy, take an `Engine` with a `CgroupsTarget`.

        Raises:
            MemtierError: there is no such cgroup, it is the root, or there is no process in it to look at.
        """
        from memtier_engine.targets.asked import check_cgroup, check_processes
        from memtier_engine.targets.cgroups import CgroupsTarget

        host = Host()
        check_cgroup(host, str(path))
        target = CgroupsTarget(host, [Path(path)])
        check_processes(host, target.poll())
        return cls(target, swap_config(config, idle_after_s), host=host)

    def _claim_effects(self) -> None:
        own: Engine = weakref.proxy(self)
        self.mover.effects.are_ours = lambda pids: pids <= {process.pid for process in own.following.known}

    def use_files(self, files: OpenProcesses) -> None:
        """Share the open files of processes with other engines of a node: they are few, and their number is bounded."""
        if self._own_files:
            self.files.close()
        self.files, self._own_files = files, False
        self._claim_effects()
        self._scanner.files = self._families.files = files
        if isinstance(self.tracker, FileSharingTracker):
            self.tracker.use_files(files)

    @property
    def pages(self) -> dict[ProcessId, ProcessPages]:
        """The pages of each address space, by the process that it is reached by."""
        return self.spaces.pages

    def halt(self) -> None:
        """End the step that may be going on as soon as possible; the engine is to be closed then. Any thread."""
        self._halt = True

    def advance(self, now_s: float) -> tuple[StepReport | None, float]:
        """Do what is due at `now_s`. Returns (the report if there was a scan, when to call again)."""
        report = None
        began = time.thread_time()
        if now_s >= self._next_scan_s:
            try:
                report = self.step(now_s)
            except Halted:
                return None, now_s
            interval_s = self.scan_interval_s
            # A scan that takes long must not crowd out the moving: as much time again is left for that.
            rest_s = max(interval_s / 2, report.scan_seconds)
            self._next_scan_s = max(self._next_scan_s + interval_s, self.clock.now_s() + rest_s)
        elif now_s >= self._look_due_s():
            self._look(now_s)
        elif not self.config.dry_run:
            verdict = self.guards.check(now_s)
            if not verdict.move_allowed:
                self.mover.retain(verdict.allows)
            for outcome in self.mover.pump(now_s):
                self._account(outcome)
                for observer in self.observers:
                    observer.event("mover.taskHandler")
                    observer.moved(outcome)
            self._cpu_s += time.thread_time() - began
        wait_s = None if self.config.dry_run else self.mover.wait_s()
        due_s = min(self._next_scan_s, self._look_due_s())
        return report, due_s if wait_s is None else min(due_s, self.clock.now_s() + wait_s)

    def wake(self) -> None:
        """The target's processes changed: they are looked at as soon as somebody calls `advance`. Any thread."""
        self._changed.set()
        self.on_wake()

    def first_scan_at(self, time_s: float) -> None:
        """When to scan first, before there was a scan; the others follow at the interval from there."""
        self._next_scan_s = self._next_decision_s = time_s

    @property
    def scan_interval_s(self) -> float:
        """Time between scans now: as configured, or longer where the node's scans would take too much CPU time."""
        return self.config.scan_interval_ms / 1000 if self.pace is None else self.pace.interval_s

    def step(self, now_s: float | None = None) -> StepReport:
        """Scan every process once, decide, hand the mover its tasks.

        Raises:
            Halted: `halt` was called meanwhile.
        """
        now_s = self.clock.now_s() if now_s is None else now_s
        began_s, began_cpu_s = time.monotonic(), time.thread_time()
        self._changed.clear()
        self._follow(now_s)
        self.age_clock.begin_scan(now_s, self.scan_interval_s)
        table = self.age_clock.step_table()
        rested = self._may_rest()
        if rested:
            for space in self.spaces:
                space.pages.rest(table)
        else:
            self.refaults.begin_scan(self._swap_bytes())
            self._scan_all(table)
            self._families.count(self.spaces, now_s)
            if self.halted():
                raise Halted
            for space in self.spaces:
                if space.shared_bytes:
                    tell(space)
        self._settle(self._count_swap_ins(), now_s)
        scan_seconds = time.monotonic() - began_s
        if self.pace is not None:
            looks_s, self._looks.taken_s = self._looks.taken_s, 0.0
            self.pace.scanned(time.thread_time() - began_cpu_s + looks_s)
        for observer in self.observers:
            observer.event(f"{event_prefix('Tracker', self.tracker.name)}.sampler")
        ages = histogram_of(self.spaces)
        tasks = self._decide(now_s) if now_s >= self._next_decision_s else None
        if tasks or not rested or self.mover.wait_s() is not None:  # else there is nothing to guard
            self.guards.check(now_s)
        if tasks is not None and not self.config.dry_run:
            tasks = governed(tasks, self.pages, self.age_clock, self.refaults.governors, now_s)
            note_stopped(self.spaces, tasks, self.files)
            self.mover.replace(self.guards.admit(self._probing.limit(tasks), self.guards.verdict, now_s))
        elif tasks:
            self._candidate_bytes = sum(task.spans.total_bytes for task in self.guards.foresee(tasks, now_s))
        self._cpu_s += time.thread_time() - began_cpu_s
        return self._report(now_s, scan_seconds, ages)

    def run(self, duration_s: float | None = None, stop: threading.Event | None = None) -> Iterator[StepReport]:
        """Work until `duration_s` is over or `stop` is set, yielding a report per scan. Closes the engine."""
        stop = stop or threading.Event()
        end_s = None if duration_s is None else self.clock.now_s() + duration_s
        woken = threading.Event()
        self.on_wake = woken.set
        ended = threading.Event()
        if isinstance(self.target, TellingTarget):
            # `stop` is the caller's: a thread of its own passes it on, so that one wait is enough for both.
            threading.Thread(target=_pass_on, args=(stop, woken, ended), name="memtier-stop", daemon=True).start()
            wait_for = woken
        else:
            wait_for = stop
        own: Engine = weakref.proxy(self)
        self.halted = lambda: own._halt or stop.is_set() or (end_s is not None and own.clock.now_s() > end_s + _LATE_S)
        try:
            while not self._halt and not stop.is_set():
                woken.clear()
                now_s = self.clock.now_s()
                if stop.is_set() or (end_s is not None and now_s >= end_s):
                    break
                report, due_s = self.advance(now_s)
                if report is not None:
                    yield report
                if end_s is not None:
                    due_s = min(due_s, end_s)
                self.clock.wait_s(due_s - self.clock.now_s(), wait_for)
        finally:
            ended.set()
            self.close()

    def close(self) -> None:
        """Stop tracking and moving; what is swapped out stays so. Safe to call twice."""
        self.closed = True
        if isinstance(self.target, TellingTarget):
            self.target.close()
        self.mover.close()
        self._membership.close()
        self.guards.close()
        if self.pace is not None:
            self.pace.close()
        self.tracker.close()
        for space in self.spaces:
            for process in space.members:
                self.files.drop(process)
        if self._own_files:
            self.files.close()
        self.policy.close()
        if self._swap_ins is not None:
            self._swap_ins.close()

    def _follow(self, now_s: float) -> None:
        """Poll the target."""
        appeared, gone = self.following.ask(self.target, self.spaces, now_s)
        ended = self._membership.follow(self.following.wanted)
        for space in ended:
            self._forget(space)
        for process in gone.difference(*(space.members for space in ended)):
            self._let_go(process)
        self.tracker.watch(self.spaces.processes)
        self._scanner.retain(self.spaces.processes)
        for observer in self.observers:
            for process in appeared:
                observer.appeared(process)

    def _look(self, now_s: float) -> None:
        """Between two scans: what is gone is forgotten, what is new is watched from now on."""
        began_cpu_s = time.thread_time()
        self._changed.clear()
        self._follow(now_s)
        cpu_s = time.thread_time() - began_cpu_s
        self._cpu_s += cpu_s
        self._looks.looked(cpu_s, self.clock.now_s(), CPU_SHARE if self.pace is None else self.pace.cpu_share)

    def _look_due_s(self) -> float:
        """Where processes come and go all the time, each look is followed by a rest: a scan finds them too."""
        wanted_s = -math.inf if self._changed.is_set() else self.following.due_s
        return max(wanted_s, self._looks.due_s)

    def _may_rest(self) -> bool:
        """Whether the processes are known and have not run since the last scan, so that this one can be left out."""
        asleep = self._asleep.asleep(innermost(self.target))
        return (
            asleep
            and all(space.seen and not space.probe.waits for space in self.spaces)
            and not any(each.every_scan for each in self.observers)
        )

    def _swap_bytes(self) -> int | None:
        try:
            return meminfo(self.host).get("SwapTotal")
        except (KernelCallError, ValueError):
            return None

    def _scan_all(self, table: NDArray[np.uint8]) -> None:
        for space in self.spaces:
            if self.halted():
                raise Halted
            try:
                self._scanner.scan(space, table)
            except ProcessGone:
                self._forget(space)
            except KernelCallError as failure:
                why = str(named(self.host, failure, TRACKERS.get(self.tracker.name, ())))
                self._note(why)
                if failure.errno in _OURS:
                    continue
                for process in space.members:
                    self.following.refuse(process, why)
                self._forget(space)
            else:
                if len(space.left_out):
                    tell(space)
                self._probing.scanned(space.probe)

    def _new_pages(self, process: ProcessId) -> ProcessPages:
        return ProcessPages(process, streaks=self.policy.needs_streaks, places=self.policy.needs_places)

    def _probe_of(self, process: ProcessId) -> Probe | None:
        space = self.spaces.get(process)
        return None if space is None else space.probe

    def _forget(self, space: AddressSpace) -> None:
        """It is gone, or not ours any more: nothing of it is kept anywhere."""
        self.spaces.forget(space)
        for process in {*space.members, space.process}:
            self._let_go(process)

    def _let_go(self, process: ProcessId) -> None:
        self.refaults.forget(process)
        self.mover.drop(process)
        self.files.drop(process)
        for observer in self.observers:
            observer.forgotten(process)

    def _count_swap_ins(self) -> dict[ProcessId, SwapInsSeen]:
        """Returns what is known in full of some processes."""
        each = None if self._swap_ins is None else self._swap_ins.read_each(self.pages.keys())
        if self._swap_ins is None or each is None:
            return {}
        found = total(each)
        self.refaults.swapped_in(found.count, found.waited, found.wait_s)
        for process, own in each.items():
            for observer in self.observers:
                observer.swapped_in(process, own.count, own.waited, own.wait_s)
        return self._returns.read(self._swap_ins, each)

    def _settle(self, seen: dict[ProcessId, SwapInsSeen], now_s: float) -> None:
        """Judge what came back. Where a decision was wrong, what is pending of it is dropped."""
        self.refaults.keep(self.pages.keys())
        wrong = {
            process
            for process, own in self.pages.items()
            if self.refaults.settle(process, own, seen.get(process), now_s)
        }
        for process in wrong:
            logger.info("pid {}: {}", process.pid, self.refaults.governors[process].why(now_s))
        if wrong:
            self.mover.retain(lambda task: task.to_node != SWAP_NODE or task.process not in wrong)

    def _decide(self, now_s: float) -> list[MoveTask]:
        interval_s = (self.policy.interval_ms or self.config.scan_interval_ms) / 1000
        self._next_decision_s = max(self._next_decision_s, now_s - interval_s / 2) + interval_s
        until_next_s = max(interval_s, self.scan_interval_s)
        budget = None if self.config.dry_run else self.mover.budget_bytes(until_next_s)
        if budget is not None:  # what is held back of some must not use up the others' budget
            budget += withheld_bytes(self.pages, self.age_clock, self.refaults.governors, now_s)
        for space in self.spaces:
            space.retry(now_s)
        tasks = self.policy.decide(self.pages, self.age_clock, budget)
        self._candidate_bytes = sum(task.spans.total_bytes for task in tasks)
        for observer in self.observers:
            observer.event(f"{event_prefix('Policy', self.policy.name)}.loop")
            for _ in tasks:
                observer.event("mover.AddTask")
        return tasks

    def _account(self, outcome: MoveOutcome) -> None:
        self._requested_bytes += outcome.requested_bytes
        self._moved_bytes += outcome.moved_bytes
        self._probing.moved(outcome)
        if outcome.error and outcome.requested_bytes:
            self._note(outcome.error)
        space = self.spaces.get(outcome.process)
        if space is None or not len(outcome.spans):
            return
        own, now_s = space.pages, self.clock.now_s()
        if outcome.to_node == SWAP_NODE:
            gone = went(outcome.spans, outcome.kept)
            if outcome.moved_bytes:
                self.guards.stored(outcome.moved_bytes, outcome.stored_bytes, now_s)
                idle_s = idle_alike(own, gone, self.age_clock.idle_s())
                self.refaults.paged_out(
                    space.process,
                    gone,
                    outcome.stuck,
                    idle_s,
                    now_s,
                    trial=space.probe.trial,
                    stopped=space.stopped,
                )
                if self._swap_ins is not None:
                    self._swap_ins.paged_out(outcome.process)
                own.set_age(gone, PAGED_OUT)
            if not outcome.kept:  # stayed, and nobody says why: it begins to age anew, or it would be asked at once
                own.set_age(outcome.stuck if outcome.moved_bytes else outcome.spans, 0)
            for kept in outcome.kept:
                space.keep(kept, now_s)
            if outcome.kept:
                tell(space)
        else:
            own.set_place(outcome.spans, outcome.to_node)
            own.set_place(outcome.later, NOWHERE)

    def _skipped(self, now_s: float) -> dict[int, str]:
        whys = {process.pid: governor.why(now_s) for process, governor in self.refaults.governors.items()}
        skipped = {process.pid: why for process, why in self.guards.skipped.items()}
        return {pid: why for pid, why in whys.items() if why} | skipped

    def _note(self, error: str) -> None:
        if len(self._errors) < ERRORS_KEPT and error not in self._errors:
            self._errors.append(error)
            logger.warning("{}", error)

    def _report(self, now_s: float, scan_seconds: float, pages: NDArray[np.int64]) -> StepReport:
        errors, self._errors = tuple(self._errors), []
        return StepReport(
            time_s=now_s,
            scans=self.age_clock.scans,
            tracker=self.tracker.name,
            processes=len(self.pages),
            tracked_bytes=sum(own.tracked_bytes for own in self.pages.values()),
            resident_bytes=int(pages[: AGE_MAX + 1].sum()) * PAGE_BYTES,
            paged_out_bytes=int(pages[PAGED_OUT]) * PAGE_BYTES,
            candidate_bytes=self._candidate_bytes,
            requested_bytes_total=self._requested_bytes,
            moved_bytes_total=self._moved_bytes,
            refault_bytes_total=self.refaults.wanted_bytes(),
            scan_seconds=scan_seconds,
            cpu_seconds_total=self._cpu_s,
            age_pages=pages,
            idle_s=self.age_clock.idle_s(),
            errors=errors,
            guards=self.guards.verdict.states,
            skipped=self._skipped(now_s),
            sharers={space.process.pid: space.sharers for space in self.spaces if space.shared_bytes},
            kept={space.process.pid: kept for space in self.spaces if (kept := space.kept_bytes())},
            left_out_bytes=sum(space.left_out.total_bytes for space in self.spaces if len(space.left_out)),
            refaults=self.refaults.stats(now_s),
            not_yet_freed_bytes=self.mover.effects.look(),
            scan_interval_s=self.scan_interval_s,
        )


def _pass_on(stop: threading.Event, woken: threading.Event, ended: threading.Event) -> None:
    while not ended.is_set():
        if stop.wait(_ENDED_CHECK_S):
            woken.set()
            return


__all__ = ["Engine", "EngineConfig", "MemtierError", "MoveTask", "StepReport"]
