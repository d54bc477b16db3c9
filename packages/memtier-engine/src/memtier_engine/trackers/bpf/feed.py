"""Swap-ins of an engine's processes, whatever its tracker: one fault counter for all engines of this process.

The first that needs it loads and attaches, the last that closes unloads. Where BPF does not work, the kernel's
delay accounting is asked instead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from loguru import logger

from memtier_engine.errors import KernelCallError, ProcessGone, TrackerUnavailable, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.taskstats import SwapInDelay, TaskStats
from memtier_engine.model import U64, ProcessId
from memtier_engine.trackers.bpf.faults import FaultCounter, FaultTable


@dataclass(frozen=True, slots=True)
class SwapIns:
    """Faults on pages in swap since the last reading. Neighbours that came along are not in it."""

    count: int = 0
    waited: int = 0
    """Of them, those that waited for the swap device."""
    wait_s: float = 0.0
    """Time that these took in all."""
    regions: U64 = field(default_factory=lambda: np.zeros(0, np.uint64), compare=False)
    """Addresses of the 2 MiB regions that they were in, where that is known; some more than once."""

    def __add__(self, other: SwapIns) -> SwapIns:
        regions = np.concatenate((self.regions, other.regions))
        return SwapIns(self.count + other.count, self.waited + other.waited, self.wait_s + other.wait_s, regions)

    @staticmethod
    def of(table: FaultTable) -> SwapIns:
        """The sum over all regions."""
        regions = table.regions[table.swap_ins > 0]
        return SwapIns(int(table.swap_ins.sum()), int(table.major.sum()), float(table.major_s.sum()), regions)


def total(each: Mapping[ProcessId, SwapIns]) -> SwapIns:
    """The sum over all processes."""
    return sum(each.values(), SwapIns())


class _Shared:
    """One counter per host: who watches what, and what is waiting for whom."""

    def __init__(self, make: Callable[[Host], FaultCounter] = FaultCounter) -> None:
        self._lock = threading.RLock()  # the garbage collector may close one in the middle of another call
        self._make = make
        self._counters: dict[Host, FaultCounter] = {}
        self._refused: dict[Host, TrackerUnavailable] = {}
        self._watched: dict[Host, dict[int, frozenset[ProcessId]]] = {}
        self._waiting: dict[int, dict[ProcessId, SwapIns]] = {}
        self._last = 0

    def join(self, host: Host) -> int:
        with self._lock:
            if host in self._refused:  # trying costs up to seconds, and the answer would be the same
                raise self._refused[host]
            if host not in self._counters:
                try:
                    self._counters[host] = self._make(host)
                except TrackerUnavailable as failure:
                    self._refused[host] = failure
                    raise
            self._last += 1
            self._watched.setdefault(host, {})[self._last] = frozenset()
            self._waiting[self._last] = {}
            return self._last

    def watch(self, host: Host, number: int, processes: frozenset[ProcessId]) -> None:
        with self._lock:
            members = self._watched[host]
            if members[number] != processes:
                members[number] = processes
                self._counters[host].watch(frozenset().union(*members.values()))

    def read(self, host: Host, number: int) -> dict[ProcessId, SwapIns]:
        with self._lock:
            for process, table in self._counters[host].read().items():
                for member, processes in tuple(self._watched[host].items()):
                    if process in processes and member in self._waiting:
                        own = self._waiting[member]
                        own[process] = own.get(process, SwapIns()) + SwapIns.of(table)
            taken, self._waiting[number] = self._waiting[number], {}
            return taken

    def leave(self, host: Host, number: int) -> None:
        with self._lock:
            del self._waiting[number]
            members = self._watched[host]
            del members[number]
            if members:
                self._counters[host].watch(frozenset().union(*members.values()))
            else:
                del self._watched[host]
                self._counters.pop(host).close()


_shared = _Shared()


class SwapInFeed:
    """One engine's part of the counter. Any thread."""

    def __init__(self, host: Host, *, shared: _Shared | None = None) -> None:
        """Raises TrackerUnavailable: faults cannot be counted here, and why; after the first time at once."""
        self._host = host
        self._shared = shared or _shared
        self._number = self._shared.join(host)
        self._leave = weakref.finalize(self, self._shared.leave, host, self._number)

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """The whole set to count for from now on."""
        self._shared.watch(self._host, self._number, processes)

    def read(self) -> SwapIns:
        """What happened since the last reading."""
        return total(self.read_each())

    def read_each(self) -> dict[ProcessId, SwapIns]:
        """The same by process; one that waited for nothing may be absent."""
        return self._shared.read(self._host, self._number)

    def close(self) -> None:
        """Leave. Safe to call twice."""
        self._leave()


class DelayFeed:
    """The same from the kernel's delay accounting: only reads from swap, all of which are waits."""

    def __init__(self, host: Host, make: Callable[[Host], TaskStats] = TaskStats) -> None:
        """Raises Unavailable: why there is none."""
        self._taskstats = make(host)
        self._before: dict[ProcessId, SwapInDelay] = {}

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `SwapInFeed.watch`. Raises KernelCallError."""
        for process in self._before.keys() - processes:
            del self._before[process]
        for process in processes - self._before.keys():
            try:
                self._before[process] = self._taskstats.swap_in(process.pid)
            except ProcessGone:
                continue

    def read_each(self) -> dict[ProcessId, SwapIns]:
        """See `SwapInFeed.read_each`. Raises KernelCallError."""
        found = {}
        for process, before in self._before.items():
            try:
                now = self._taskstats.swap_in(process.pid)
            except ProcessGone:
                continue
            self._before[process] = now
            count = now.count - before.count
            if count > 0:  # less: another process of that pid, about to be found out
                found[process] = SwapIns(count, count, max(0.0, now.seconds - before.seconds))
        return found

    def close(self) -> None:
        """Safe to call twice."""
        self._taskstats.close()


class SwapInWatch:
    """Counts for the processes that memory went out of; costs nothing before that. Where nothing counts, silent."""

    def __init__(
        self,
        host: Host,
        make: Callable[[Host], SwapInFeed] = SwapInFeed,
        make_delays: Callable[[Host], DelayFeed] = DelayFeed,
    ) -> None:
        """Nothing is loaded yet."""
        self._host = host
        self._make = make
        self._make_delays = make_delays
        self._feed: SwapInFeed | DelayFeed | None = None
        self._refused = False
        self._processes: frozenset[ProcessId] = frozenset()
        self._counted: frozenset[ProcessId] = frozenset()  # at the last reading
        self.covered: frozenset[ProcessId] = frozenset()
        """Processes of which the last reading has all faults of their own since the one before, with the regions."""

    def paged_out(self, process: ProcessId) -> None:
        """Memory went out of `process`: count what comes back, from now on."""
        if process in self._processes or self._refused:
            return
        if self._feed is None:
            self._feed = self._open()
            if self._feed is None:
                self._refused = True
                return
        self._processes |= {process}
        try:
            self._feed.watch(self._processes)
        except KernelCallError as failure:
            logger.bind(node="swap-ins").warning("swap-ins are no longer counted as they happen: {}", failure)
            self.close()

    def read(self, alive: Collection[ProcessId]) -> SwapIns | None:
        """What happened since the last reading; forgets processes that are not `alive`. None: nothing is counted."""
        each = self.read_each(alive)
        return None if each is None else total(each)

    def read_each(self, alive: Collection[ProcessId]) -> dict[ProcessId, SwapIns] | None:
        """The same by process; one that waited for nothing may be absent."""
        if self._feed is None:
            return None
        left = self._processes.intersection(alive)
        try:
            found = self._feed.read_each()
            if left != self._processes:
                self._feed.watch(left)
        except KernelCallError as failure:
            logger.bind(node="swap-ins").warning("swap-ins are no longer counted as they happen: {}", failure)
            self.close()
            return None
        self._processes = left
        # Delay accounting has only what waited, and not where.
        self.covered = self._counted & left if isinstance(self._feed, SwapInFeed) else frozenset()
        self._counted = left
        return found

    def close(self) -> None:
        """Stop counting. Safe to call twice."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None
        self._refused = True
        self.covered = self._counted = frozenset()

    def _open(self) -> SwapInFeed | DelayFeed | None:
        try:
            return self._make(self._host)
        except TrackerUnavailable as failure:
            no_bpf = str(failure)  # kept itself, it would be a reference cycle with this frame
        try:
            return self._make_delays(self._host)
        except Unavailable as failure:
            logger.bind(node="swap-ins").info("swap-ins are not counted as they happen: {}; {}", no_bpf, failure)
            return None
