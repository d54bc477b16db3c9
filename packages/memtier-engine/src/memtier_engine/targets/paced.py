"""A target that asks another one no more often than at an interval."""

from __future__ import annotations

from memtier_engine.clock import Clock
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import Target


class PacedTarget:
    """Repeats the last answer until the interval is over. Processes that exit meanwhile are still in it."""

    def __init__(self, source: Target, interval_s: float, clock: Clock) -> None:
        self.source = source
        self._interval_s = interval_s
        self._clock = clock
        self._asked_s: float | None = None
        self._answer: frozenset[ProcessId] = frozenset()

    def poll(self) -> frozenset[ProcessId]:
        """What the source said last, at most an interval ago."""
        now_s = self._clock.now_s()
        if self._asked_s is None or now_s - self._asked_s >= self._interval_s:
            self._answer = self.source.poll()
            self._asked_s = now_s
        return self._answer
