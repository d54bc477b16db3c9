"""One address space in, what a scan saw of it into ages, ledger, policy and observers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from memtier_engine.engine.telling import tell
from memtier_engine.errors import AccessDenied, Unavailable
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.held import by_smaps, held, whole_most
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import MappingsCache
from memtier_engine.hostfs.proc import parse_smaps
from memtier_engine.model import PAGE_BYTES, U8, ProcessId, Spans, Tracker, Why
from memtier_engine.pages.ages import AGE_MAX, PAGED_OUT, AgeClock
from memtier_engine.pages.refaults import RefaultLedger
from memtier_engine.pages.space import AddressSpace
from memtier_engine.policies.base import Policy
from memtier_engine.stats.observer import Observer
from memtier_engine.targets.base import RestrictingTarget, Target


class Halted(Exception):
    """The engine was told to stop in the middle of a scan."""


class Scanner:
    """Looks at one address space after another."""

    def __init__(
        self,
        host: Host,
        files: OpenProcesses,
        tracker: Tracker,
        target: Target,
        policy: Policy,
        refaults: RefaultLedger,
        age_clock: AgeClock,
        observers: Sequence[Observer],
        halted: Callable[[], bool],
    ) -> None:
        """`observers` may change later; `halted` is asked again and again, and ends a scan by `Halted`."""
        self._host = host
        self.files = files
        self._tracker = tracker
        # Asked once: a look at a protocol's attributes takes 10 us, and there may be a thousand processes.
        self._restrict = target.restrict if isinstance(target, RestrictingTarget) else None
        self._policy = policy
        self._refaults = refaults
        self._clock = age_clock
        self._observers = observers
        self._halted = halted
        self._mappings = MappingsCache()
        self._finds_holes = True
        """Whether the kernel has PAGEMAP_SCAN, as far as is known."""

    def retain(self, processes: Collection[ProcessId]) -> None:
        """Nothing is remembered of others."""
        self._mappings.retain(processes)

    def scan(self, space: AddressSpace, table: U8) -> None:
        """Look at all of it.

        Args:
            space: whose.
            table: `AgeClock.step_table` of this scan.
        Raises:
            ProcessGone: it exited.
            KernelCallError: the kernel refused something.
            Halted: in the middle of it.
        """
        began_s = time.monotonic()
        process, own = space.process, space.pages
        spans = self._spans(space)
        self._refaults.remapped(process, own, spans)
        own.set_spans(spans)
        self._policy.begin(process, spans)
        for observer in self._observers:
            observer.scan_began(process, spans, self._clock.now_s)
        idle_s, now_s = self._clock.idle_s(), self._clock.now_s
        for chunk in self._tracker.scan(process, spans):
            self._refaults.observe(process, own, chunk, idle_s, now_s)
            own.update(chunk, table)
            self._policy.observe(process, chunk)
            for observer in self._observers:
                observer.chunk(process, chunk)
            if self._halted():
                raise Halted
        with self.files.of(process) as files:
            if files.headless:
                own.keep(own.select(), Why.HEADLESS)  # nothing of it can go out: no use in asking, nor in promising it
                tell(space)
        space.seen = True
        counts = own.histogram()
        space.known_bytes = int(counts[: AGE_MAX + 1].sum() + counts[PAGED_OUT]) * PAGE_BYTES
        for observer in self._observers:
            observer.scan_ended(process, time.monotonic() - began_s)

    def _spans(self, space: AddressSpace) -> Spans:
        """What to look at: what can be tiered, is meant by the target, and holds something."""
        process = space.process
        with self.files.of(process) as files:
            spans = self._mappings.parse(process, files.read("maps")).tierable()
            if self._restrict is not None:
                spans = self._restrict(process, spans)
            if spans.total_bytes <= whole_most(space.known_bytes):
                space.left_out = Spans.empty()
                return spans
            if self._finds_holes:
                try:
                    found = held(files.pagemap, spans, space.known_bytes)
                    space.left_out = found.left_out
                    return found.spans
                except Unavailable:
                    self._finds_holes = False
                except AccessDenied:  # a tracker that reads no page needs no right to
                    pass
            spans, space.left_out = by_smaps(spans, parse_smaps(files.read("smaps")))
            return spans
