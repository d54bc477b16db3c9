"""What a routine is: something that is due at times, told the time, beside a policy."""

from __future__ import annotations

import threading
from typing import Protocol

from loguru import logger

from memtier_engine.clock import Clock, SystemClock


class Routine(Protocol):
    """Does its work when told the time."""

    name: str

    def advance(self, now_s: float) -> float:
        """Do what is due at `now_s`. Returns when to call again."""

    def close(self) -> None:
        """End what is still running. Safe to call twice, from any thread."""


class RoutineThread:
    """Runs one routine in a thread of its own: its commands may take long."""

    def __init__(self, routine: Routine, clock: Clock | None = None) -> None:
        self.routine = routine
        self._clock = clock or SystemClock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start; does nothing while it runs."""
        if not self.running:
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, name=f"memtier-{self.routine.name}", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End it; waits for the work it is in. False if that took longer than `timeout_s`."""
        self._stop.set()
        self.routine.close()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.running

    def dump(self) -> str:
        """The reference's one line."""
        return f'routine "{self.routine.name}": running={str(self.running).lower()}'

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                due_s = self.routine.advance(self._clock.now_s())
            except Exception as failure:  # a defect in one routine must not end the others' process
                logger.opt(exception=failure).error("routine {} failed and is stopped", self.routine.name)
                return
            if self._clock.wait_s(due_s - self._clock.now_s(), self._stop):
                return
