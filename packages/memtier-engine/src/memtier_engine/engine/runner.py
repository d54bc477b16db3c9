"""Who calls `Engine.advance`: a few threads for many engines, or one engine in a thread of its own.

Each engine is on one thread at a time; of many, the most overdue is first.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from loguru import logger

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.engine.loop import Engine, StepReport
from memtier_engine.mover.control import MoverControl

OnReport = Callable[[StepReport], None]
OnFailure = Callable[[BaseException], None]
IDLE_WAIT_S = 60.0


def _nothing() -> None:
    """Nobody runs the engine."""


@dataclass(order=True, slots=True)
class _Entry:
    due_s: float
    order: int
    engine: Engine = field(compare=False)
    on_report: OnReport | None = field(compare=False)
    on_failure: OnFailure | None = field(compare=False)
    removed: bool = field(default=False, compare=False)
    busy: bool = field(default=False, compare=False)
    woken: bool = field(default=False, compare=False)


class Runner:
    """Threads and timing for any number of engines. All methods may be called from any thread."""

    def __init__(self, *, workers: int = 2, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._condition = threading.Condition()
        self._queue: list[_Entry] = []
        self._entries: dict[Engine, _Entry] = {}
        self._order = itertools.count()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"memtier-engine-{number}", daemon=True)
            for number in range(workers)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def add(
        self,
        engine: Engine,
        *,
        on_report: OnReport | None = None,
        on_failure: OnFailure | None = None,
        delay_s: float = 0.0,
    ) -> None:
        """Run `engine` from `delay_s` on. The callbacks run in a worker thread and must be short."""
        with self._condition:
            entry = _Entry(self._clock.now_s() + delay_s, next(self._order), engine, on_report, on_failure)
            self._entries[engine] = entry
            engine.on_wake = lambda: self._wake(entry)
            heapq.heappush(self._queue, entry)
            self._condition.notify()

    def remove(self, engine: Engine, *, timeout_s: float = 5.0) -> bool:
        """Take `engine` out and close it; waits for the step it may be in. False if that took too long.

        After False the engine is closed by its worker as soon as the step ends.
        """
        with self._condition:
            entry = self._entries.pop(engine, None)
            if entry is None:
                return True
            entry.removed = True
            engine.halt()
            idle = self._condition.wait_for(lambda: not entry.busy, timeout_s)
            # Let go of it now: its page tables are large, and a reference cycle waits for the garbage collector.
            engine.on_wake = _nothing
            if entry in self._queue:
                self._queue.remove(entry)
                heapq.heapify(self._queue)
        if idle:
            engine.close()  # without the lock: a target's thread that it waits for may be just waking us
        return idle

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """Stop all threads and close all engines."""
        with self._condition:
            self._stopping = True
            for engine in self._entries:
                engine.halt()
            self._condition.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)
        for engine in list(self._entries):
            self.remove(engine, timeout_s=timeout_s)

    def _work(self) -> None:
        while True:
            entry = self._next()
            if entry is None:
                return
            due_s: float | None = None
            try:
                report, due_s = entry.engine.advance(self._clock.now_s())
                if report is not None and entry.on_report is not None:
                    entry.on_report(report)
            except Exception as failure:
                # One engine's defect must not take the others with it.
                logger.opt(exception=failure).error("an engine failed and is stopped")
                self._failed(entry, failure)
                due_s = None
            with self._condition:
                ends = entry.removed or due_s is None
            if ends:
                entry.engine.close()
            with self._condition:
                entry.busy = False
                if due_s is not None and not entry.removed:
                    entry.due_s = self._clock.now_s() if entry.woken else due_s
                    heapq.heappush(self._queue, entry)
                else:
                    entry.engine.on_wake = _nothing
                self._condition.notify_all()
            del entry  # an idle worker keeps no engine

    def _wake(self, entry: _Entry) -> None:
        with self._condition:
            entry.woken = True
            if entry in self._queue and not entry.removed:
                entry.due_s = self._clock.now_s()
                heapq.heapify(self._queue)
                self._condition.notify()

    def _failed(self, entry: _Entry, failure: Exception) -> None:
        with self._condition:
            self._entries.pop(entry.engine, None)
        if entry.on_failure is not None:
            entry.on_failure(failure)

    def _next(self) -> _Entry | None:
        """The next due entry, marked busy; None when stopping."""
        with self._condition:
            while not self._stopping:
                while self._queue and self._queue[0].removed:
                    heapq.heappop(self._queue)
                wait_s = self._queue[0].due_s - self._clock.now_s() if self._queue else IDLE_WAIT_S
                if self._queue and wait_s <= 0:
                    entry = heapq.heappop(self._queue)
                    entry.busy, entry.woken = True, False
                    return entry
                self._condition.wait(min(wait_s, IDLE_WAIT_S))
            return None


class EngineThread:
    """Runs an engine from `start` to `stop`. All methods may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        on_report: Callable[[StepReport], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        """Takes the engine over: it is closed when the thread ends. The callbacks run in the thread."""
        self._engine = engine
        self._on_report = on_report
        self._on_failure = on_failure
        self._condition = threading.Condition()
        self._stopping = False
        engine.on_wake = self._wake
        self._thread = threading.Thread(target=self._work, name="memtier-engine", daemon=True)
        self.mover = MoverControl(engine.mover, self._condition, lambda: self.running, engine.clock)

    @property
    def running(self) -> bool:
        """Between `start` and `stop`, or its failure."""
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start. An engine that was stopped cannot start again: build another."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """End it after the step it is in, and close the engine. False if that took too long."""
        self._stopping = True  # seen after the step, which may hold the lock longer than anybody waits
        self._engine.halt()
        end_s = time.monotonic() + timeout_s
        if self._condition.acquire(timeout=timeout_s):
            self._condition.notify_all()
            self._condition.release()
        if self._thread.ident is None:
            self._engine.close()
        else:
            self._thread.join(max(0.0, end_s - time.monotonic()))
        return not self._thread.is_alive()

    @contextmanager
    def held(self) -> Iterator[Engine]:
        """The engine, between two steps for as long as the block lasts."""
        with self._condition:
            yield self._engine

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _work(self) -> None:
        engine = self._engine
        try:
            with self._condition:
                while not self._stopping:
                    report, due_s = engine.advance(engine.clock.now_s())
                    if report is not None and self._on_report is not None:
                        self._on_report(report)
                    self._condition.notify_all()
                    # Never 0: whoever waits for the engine gets its turn.
                    self._condition.wait(max(0.001, due_s - engine.clock.now_s()))
        except Exception as failure:
            if self._on_failure is None:
                logger.opt(exception=failure).error("an engine failed and is stopped")
            else:
                self._on_failure(failure)
        finally:
            engine.close()
            with self._condition:
                self._stopping = True
                self._condition.notify_all()
