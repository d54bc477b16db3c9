"""One engine in a thread of its own, and the door to it for others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loguru import logger

from memtier_engine.engine.loop import Engine, StepReport
from memtier_engine.mover.control import MoverControl


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
