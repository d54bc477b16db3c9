"""Trackers `damon` of one program share one kdamond: its targets are the processes of all of them.

Kernels have few kdamonds, each is a thread that wakes up all the time, and reading one costs four small files per
region. Trackers with the same configuration use one; those that a node has scan together also share what was read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Protocol

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PageChunk, ProcessId, Spans
from memtier_engine.trackers.damon import DamonConfig, DamonTracker

_FRESH = 0.5
"""Trackers that scan together take what was read for another of them within this part of the interval."""


class Core(Protocol):
    """What is shared."""

    @property
    def snapshot_s(self) -> float | None:
        """When what is known was read; None: nothing is, the next scan reads."""

    def scans_every(self, interval_s: float) -> None:
        """See `PacedTracker`."""

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`; forgets what was read."""

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`."""

    def close(self) -> None:
        """See `Tracker.close`."""


class _Hub:
    """One kdamond and who uses it."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.members: dict[SharedDamonTracker, frozenset[ProcessId]] = {}
        self.turn = threading.RLock()

    def fit(self) -> None:
        """To the member that scans most often."""
        known = [member.scan_interval_s for member in self.members if member.scan_interval_s is not None]
        if known:
            self.core.scans_every(min(known))


_hubs: dict[tuple[Host, DamonConfig], _Hub] = {}
_hubs_lock = threading.Lock()


class SharedDamonTracker:
    """A user of the kdamond of its configuration: set up by the first, given back by the last."""

    name = "damon"
    page_exact = False
    stale_tlb = True

    def __init__(
        self,
        host: Host,
        config: DamonConfig | None = None,
        *,
        clock: Clock | None = None,
        make: Callable[[Host, DamonConfig, Clock | None], Core] | None = None,
    ) -> None:
        """`make`: sets up what is shared; for tests. Raises TrackerUnavailable: as `DamonTracker`."""
        self._key = (host, config or DamonConfig())
        self._clock = clock or SystemClock()
        self._interval_s = 0.0
        self.scan_interval_s: float | None = None
        """Time between scans; None: nobody said."""
        self._used_s: float | None = None
        with _hubs_lock:
            hub = _hubs.get(self._key)
            if hub is None:
                core: Core = make(*self._key, clock) if make else DamonTracker(*self._key, clock=clock)
                hub = _hubs[self._key] = _Hub(core)
            hub.members[self] = frozenset()
        self._hub: _Hub | None = hub

    @property
    def core(self) -> Core:
        """What it shares. Raises ValueError once it is closed."""
        if self._hub is None:
            raise ValueError("the tracker is closed")
        return self._hub.core

    def look_together(self, node: MutableMapping[str, Any], interval_s: float) -> None:
        """See `TogetherTracker`: they share their kdamond anyway, whoever's they are."""
        self._interval_s = interval_s

    def scans_every(self, interval_s: float) -> None:
        """See `PacedTracker`."""
        hub = self._hub
        if hub is not None:
            with hub.turn:
                self.scan_interval_s = interval_s
                hub.fit()

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""
        hub = self._hub
        if hub is None:
            return
        with hub.turn:
            changed = hub.members[self] != processes
            hub.members[self] = processes
            if changed or not self._is_fresh(hub.core):
                hub.core.watch(frozenset[ProcessId]().union(*hub.members.values()))

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """See `Tracker.scan`. Two trackers of one program should not scan the same process: each looks back only
        as far as the other's scan."""
        hub = self._hub
        if hub is None:
            return
        with hub.turn:
            yield from hub.core.scan(process, spans)
            self._used_s = hub.core.snapshot_s

    def close(self) -> None:
        """See `Tracker.close`; the last one gives the kdamond back."""
        with _hubs_lock:
            hub, self._hub = self._hub, None
            if hub is None:
                return
            with hub.turn:
                del hub.members[self]
                if hub.members:
                    hub.fit()
                    hub.core.watch(frozenset[ProcessId]().union(*hub.members.values()))
                    return
                del _hubs[self._key]
                hub.core.close()

    def _is_fresh(self, core: Core) -> bool:
        read_s = core.snapshot_s
        if read_s is None or read_s == self._used_s:
            return read_s is None  # nothing read yet: the scan will; this very reading was used: another, please
        return self._clock.now_s() - read_s < _FRESH * self._interval_s
