"""A target that follows another one by process events instead of polling it.

A thread waits for the proc connector. When processes start or exit it asks the source about these, or where the
source cannot tell them apart about all, and tells a listener what changed. A new process is seen within some 20 ms; a
machine on which nothing starts costs nothing.
Where the connector is not to be had, the source is polled at an interval.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from functools import partial

from loguru import logger

from memtier_engine.errors import KernelCallError, MemtierError, Unavailable
from memtier_engine.hostfs.proc_events import ProcEvents, ProcEventSocket
from memtier_engine.model import ProcessId, Spans
from memtier_engine.targets.base import RestrictingTarget, SelectiveTarget, Target

OnChange = Callable[[frozenset[ProcessId], frozenset[ProcessId]], None]
"""Gets (added, removed)."""
SETTLE_S = 0.01
"""After an event, wait this long for those that belong to it: a fork is soon followed by an exec."""
SHARE_OF_TIME = 0.05
"""At most this part of a CPU is spent asking the source: in a storm of processes events are batched."""
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
        self.refresh_s = refresh_s
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
        context = contextvars.copy_context()  # whose target it is, for what the thread logs
        self._thread = threading.Thread(target=context.run, args=(self._follow,), name="memtier-events", daemon=True)
        self._thread.start()

    @property
    def by_events(self) -> bool:
        """Whether the kernel tells; False: polling."""
        return self._events is not None

    def poll(self) -> frozenset[ProcessId]:
        """What is known: at once, and at most `refresh_s` old."""
        with self._lock:
            if self._asked_s is not None and time.monotonic() - self._asked_s < self.refresh_s:
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
            before, self._known, self._asked_s = self._known, current, time.monotonic()
        return current, self._told(before, current)

    def _ask_about(self, seen: ProcEvents, source: SelectiveTarget) -> bool:
        """Take in events, asking only for the processes that started. Returns whether anything changed."""
        with self._lock:
            found = source.those_of(seen.started)
            over = seen.started | seen.exited
            before = self._known
            current = self._known = found | {process for process in before if process.pid not in over}
        return self._told(before, current)

    def _told(self, before: frozenset[ProcessId], current: frozenset[ProcessId]) -> bool:
        added, removed = current - before, before - current
        if added or removed:
            self._on_change(added, removed)
        return bool(added or removed)

    def _follow(self) -> None:
        due_s = 0.0
        while not self._stop.is_set():
            if time.monotonic() >= due_s:
                self._take_time(lambda: self._ask()[1])
                due_s = time.monotonic() + self.refresh_s
            seen = self._wait(due_s - time.monotonic())
            if seen is None or not (seen.lost or seen.started or self._concerns_us(seen.exited)):
                continue
            source = self.source
            if seen.lost or not isinstance(source, SelectiveTarget):
                due_s = 0.0
            else:
                self._take_time(partial(self._ask_about, seen, source))

    def _concerns_us(self, pids: frozenset[int]) -> bool:
        return not pids.isdisjoint(process.pid for process in self._known)

    def _take_time(self, ask: Callable[[], bool]) -> None:
        """Ask, tell the listeners what came of it, and rest for so long that asking takes a small share of time."""
        began_s = time.thread_time()  # of the CPU: on a busy machine, waiting for it must not slow this down more
        try:
            changed = ask()
        except MemtierError as failure:
            logger.warning("{}", failure)
            changed = False
        spent_s = time.thread_time() - began_s
        if changed:
            for listener in self._listeners:
                listener()
        self._stop.wait(spent_s / SHARE_OF_TIME)

    def _wait(self, timeout_s: float) -> ProcEvents | None:
        """What happened, if something does within `timeout_s`; None soon after `close` too."""
        if self._events is None:
            self._stop.wait(max(0.0, min(timeout_s, _STOP_CHECK_S)))
            return None
        if not self._events.wait(max(0.0, min(timeout_s, _STOP_CHECK_S))):
            return None
        self._stop.wait(SETTLE_S)
        try:
            return self._events.read()
        except KernelCallError as failure:
            logger.warning("{}: polling for processes every {:g} s instead", failure, self.refresh_s)
            self._events.close()
            self._events = None
            return ProcEvents(frozenset(), frozenset(), lost=True)
