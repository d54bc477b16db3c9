"""Who calls `Engine.advance`: a few threads for many engines, or one engine in a thread of its own.

Each engine is on one thread at a time; of many, the most overdue is first. A step that the kernel keeps (a lock of the
target's, a device that hangs) cannot be broken off: others then get a thread more, and such an engine is given up.
"""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.engine.loop import Engine, StepReport
from memtier_engine.mover.control import MoverControl

OnReport = Callable[[StepReport], None]
OnFailure = Callable[[BaseException], None]
OnStuck = Callable[[str], None]
IDLE_WAIT_S = 60.0
LATE_S = 0.5
"""A step that takes longer does not count as work on others: if one of them is due, another thread is started."""
STUCK_S = 30.0
"""A step that takes longer is told, and its engine is never run again."""
THREADS_MOST = 64
"""Beside those in a step that was given up."""
_WATCH_S = 0.25


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
    began_s: float = field(default=0.0, compare=False)
    """Of the step it is in, by `time.monotonic`."""
    thread: int = field(default=0, compare=False)
    on_stuck: OnStuck | None = field(default=None, compare=False)
    given_up: bool = field(default=False, compare=False)
    context: Mapping[str, str] = field(default_factory=dict, compare=False)
    woken: bool = field(default=False, compare=False)


class Runner:
    """Threads and timing for any number of engines. All methods may be called from any thread."""

    def __init__(
        self, *, workers: int = 2, clock: Clock | None = None, late_s: float = LATE_S, stuck_s: float = STUCK_S
    ) -> None:
        """`workers`: threads that work at the same time, not counting those whose step is late."""
        self._clock = clock or SystemClock()
        self._workers = workers
        self._late_s, self._stuck_s = late_s, stuck_s
        self._busy: dict[int, _Entry] = {}
        self._idle = 0
        self._ended = threading.Event()
        self._condition = threading.Condition()
        self._queue: list[_Entry] = []
        self._entries: dict[Engine, _Entry] = {}
        self._order = itertools.count()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._watcher = threading.Thread(target=self._watch, name="memtier-engine-watch", daemon=True)

    def start(self) -> None:
        """Start the threads."""
        with self._condition:
            for _ in range(self._workers):
                self._add_thread()
        self._watcher.start()

    def steps(self) -> list[tuple[Mapping[str, str], float]]:
        """The steps that go on now: the context of the engine, and for how many seconds."""
        now_s = time.monotonic()
        with self._condition:
            return [(entry.context, now_s - entry.began_s) for entry in self._busy.values()]

    def is_late(self, engine: Engine) -> bool:
        """Whether the engine, removed or not, is in a step that takes long."""
        now_s = time.monotonic()
        with self._condition:
            return any(entry.engine is engine and now_s - entry.began_s > self._late_s for entry in self._busy.values())

    def add(
        self,
        engine: Engine,
        *,
        on_report: OnReport | None = None,
        on_failure: OnFailure | None = None,
        on_stuck: OnStuck | None = None,
        delay_s: float = 0.0,
        context: Mapping[str, str] | None = None,
    ) -> None:
        """Run `engine` from `delay_s` on. The callbacks run in a thread of the runner and must be short.

        Args:
            engine: it is closed when it is removed, fails or gets stuck.
            on_report: after each scan.
            on_failure: an exception ended it.
            on_stuck: a step has not returned for a long while, with where that is; the engine is given up, and closed
                if the step ever returns.
            delay_s: before its first step.
            context: loguru's, of what is logged in its steps.
        """
        with self._condition:
            due_s, order = self._clock.now_s() + delay_s, next(self._order)
            entry = _Entry(due_s, order, engine, on_report, on_failure, on_stuck=on_stuck, context=context or {})
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
        self._ended.set()
        end_s = time.monotonic() + timeout_s
        for thread in list(self._threads):
            thread.join(max(0.0, end_s - time.monotonic()))
        for engine in list(self._entries):
            self.remove(engine, timeout_s=max(0.0, end_s - time.monotonic()))

    def _add_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"memtier-engine-{next(self._order)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_S):
            now_s = time.monotonic()
            with self._condition:
                is_due = bool(self._queue) and self._queue[0].due_s <= self._clock.now_s()
                short = not self._idle and self._working(now_s) < self._workers
                # One that is given up is not run again, so there are no more of those than engines.
                given_up = sum(entry.given_up for entry in self._busy.values())
                if is_due and short and len(self._threads) - given_up < THREADS_MOST:
                    self._add_thread()
                stuck = [
                    entry
                    for entry in self._busy.values()
                    if now_s - entry.began_s > self._stuck_s and not entry.given_up
                ]
                for entry in stuck:
                    entry.given_up = entry.removed = True
                    self._entries.pop(entry.engine, None)
            for entry in stuck:
                entry.engine.halt()
                self._tell_stuck(entry)

    def _working(self, now_s: float) -> int:
        """Threads whose step is not late."""
        late = sum(now_s - entry.began_s > self._late_s for entry in self._busy.values())
        return len(self._threads) - late

    def _tell_stuck(self, entry: _Entry) -> None:
        where = _where(entry.thread)
        with logger.contextualize(**entry.context):
            logger.error("a step of its engine has not returned for {:.0f} s: it is in {}", self._stuck_s, where)
            if entry.on_stuck is not None:
                entry.on_stuck(where)

    def _work(self) -> None:
        try:
            self._run_steps()
        finally:
            with self._condition:
                self._threads.remove(threading.current_thread())

    def _run_steps(self) -> None:
        while True:
            entry = self._next()
            if entry is None:
                return
            due_s: float | None = None
            try:
                with logger.contextualize(**entry.context):
                    report, due_s = entry.engine.advance(self._clock.now_s())
                    if report is not None and entry.on_report is not None and not entry.given_up:
                        entry.on_report(report)
            except Exception as failure:
                # One engine's defect must not take the others with it.
                with logger.contextualize(**entry.context):
                    logger.opt(exception=failure).error("an engine failed and is stopped")
                    self._failed(entry, failure)
                due_s = None
            with self._condition:
                ends = entry.removed or due_s is None
            if ends:
                entry.engine.close()
            if entry.given_up:
                with logger.contextualize(**entry.context):
                    logger.warning("the step has returned after {:.0f} s", time.monotonic() - entry.began_s)
            with self._condition:
                entry.busy = False
                del self._busy[entry.order]
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
                if self._working(time.monotonic()) > self._workers:
                    return None  # of more threads, as others' steps were late: they have returned
                while self._queue and self._queue[0].removed:
                    heapq.heappop(self._queue)
                wait_s = self._queue[0].due_s - self._clock.now_s() if self._queue else IDLE_WAIT_S
                if self._queue and wait_s <= 0:
                    entry = heapq.heappop(self._queue)
                    entry.busy, entry.woken = True, False
                    entry.began_s, entry.thread = time.monotonic(), threading.get_ident()
                    self._busy[entry.order] = entry
                    return entry
                self._idle += 1
                try:
                    self._condition.wait(min(wait_s, IDLE_WAIT_S))
                finally:
                    self._idle -= 1
            return None


def _where(thread: int) -> str:
    """The innermost function of ours that a thread is in."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no Python code"
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


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
