"""A target that follows another one by process events instead of polling it.

A thread waits for the proc connector. When processes start or exit it asks the source again, and tells a
listener what changed. A new process is seen within some 20 ms; a machine on which nothing starts costs nothing.
Where the connector is not to be had, the source is polled at an interval.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from loguru import logger

from memtier_engine.errors import KernelCallError, MemtierError, Unavailable
from memtier_engine.hostfs.proc_events import ProcEventSocket
from memtier_engine.model import ProcessId, Spans
from memtier_engine.targets.base import RestrictingTarget, Target

OnChange = Callable[[frozenset[ProcessId], frozenset[ProcessId]], None]
"""Gets (added, removed)."""
SETTLE_S = 0.01
"""After an event, wait this long for those that belong to it: a fork is soon followed by an exec."""
SHARE_OF_TIME = 0.05
"""At most this part of the time is spent asking the source: in a storm of processes events are batched."""
_STOP_CHECK_S = 0.5


class EventsTarget:
    """The processes of `source`, known without asking. Methods may be called from any thread."""

    def __init__(
        self,
        source: Target,
        *,
        refresh_s: float = 5.0,
        on_change: OnChange | None = None,
        open_events: Callable[[], ProcEventSocket] = ProcEventSocket,
    ) -> None:
        """Start to follow.

        Args:
            source: says which processes; asked from the thread.
            refresh_s: asked again after this long without events too: a process may grow, or change its cgroup,
                without any event. Without the proc connector this is the polling interval.
            on_change: called from the thread, also once for the processes that are there at first.
            open_events: how to get the events.
        """
        self.source = source
        self._refresh_s = refresh_s
        self._on_change = on_change or (lambda added, removed: None)
        self._listeners: tuple[Callable[[], None], ...] = ()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._known: frozenset[ProcessId] = frozenset()
        self._asked_s: float | None = None
        self._events: ProcEventSocket | None = None
        try:
            self._events = open_events()
        except Unavailable as failure:
            logger.warning("{}: polling for processes every {:g} s instead", failure, refresh_s)
        self._thread = threading.Thread(target=self._follow, name="memtier-events", daemon=True)
        self._thread.start()

    @property
    def by_events(self) -> bool:
        """Whether the kernel tells; False: polling."""
        return self._events is not None

    def poll(self) -> frozenset[ProcessId]:
        """What is known: at once, and at most `refresh_s` old."""
        with self._lock:
            if self._asked_s is not None and time.monotonic() - self._asked_s < self._refresh_s:
                return self._known
        return self._ask()[0]

    def listen(self, on_change: Callable[[], None]) -> None:
        """See `TellingTarget.listen`."""
        self._listeners = (*self._listeners, on_change)

    def restrict(self, process: ProcessId, mapped: Spans) -> Spans:
        """See `RestrictingTarget.restrict`: as the source does, or all of it."""
        return self.source.restrict(process, mapped) if isinstance(self.source, RestrictingTarget) else mapped

    def close(self) -> None:
        """Stop the thread. Safe to call twice."""
        self._stop.set()
        self._thread.join(5.0)
        if self._events is not None:
            self._events.close()
            self._events = None

    def _ask(self) -> tuple[frozenset[ProcessId], bool]:
        """(the source's answer, whether it is another one than before)."""
        with self._lock:
            current = self.source.poll()
            added, removed = current - self._known, self._known - current
            self._known, self._asked_s = current, time.monotonic()
        changed = bool(added or removed)
        if changed:
            self._on_change(added, removed)
        return current, changed

    def _follow(self) -> None:
        due_s = 0.0
        while not self._stop.is_set():
            now_s = time.monotonic()
            if now_s >= due_s:
                self._ask_safely()
                spent_s = time.monotonic() - now_s
                due_s = time.monotonic() + self._refresh_s
                self._stop.wait(spent_s / SHARE_OF_TIME)
            if self._something_happened(due_s - time.monotonic()):
                due_s = 0.0

    def _something_happened(self, timeout_s: float) -> bool:
        """Wait for processes to start or exit, at most `timeout_s`, and not long after `close`."""
        if self._events is None:
            self._stop.wait(max(0.0, min(timeout_s, _STOP_CHECK_S)))
            return False
        if not self._events.wait(max(0.0, min(timeout_s, _STOP_CHECK_S))):
            return False
        self._stop.wait(SETTLE_S)
        try:
            seen = self._events.read()
        except KernelCallError as failure:
            logger.warning("{}: polling for processes every {:g} s instead", failure, self._refresh_s)
            self._events.close()
            self._events = None
            return True
        gone = {process.pid for process in self._known}
        return seen.lost or bool(seen.started) or bool(seen.exited & gone)

    def _ask_safely(self) -> None:
        try:
            _, changed = self._ask()
        except MemtierError as failure:
            logger.warning("{}", failure)
            return
        if changed:
            for listener in self._listeners:
                listener()
