"""A mover under a person's hand: paused, continued, asked what is pending, waited for. Any thread may do that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum

from loguru import logger

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.hostfs.host import Host
from memtier_engine.model import MoveOutcome, MoveTask, Spans
from memtier_engine.mover.mover import Mover, MoverConfig

_LONG_S = 60.0


class MoverStatus(StrEnum):
    """What a mover is at, in the reference's words."""

    NOT_RUNNING = "NotRunning"
    PAUSED = "Paused"
    BUSY = "Busy"
    ALL_DONE = "AllDone"


class MoverControl:
    """The door to a mover that a thread pumps while it holds `condition`, and that notifies after each step."""

    def __init__(
        self, mover: Mover, condition: threading.Condition, running: Callable[[], bool], clock: Clock | None = None
    ) -> None:
        """`running`: whether there is a thread that pumps."""
        self.mover = mover
        self._condition = condition
        self._running = running
        self._clock = clock or SystemClock()

    @property
    def config(self) -> MoverConfig:
        """As configured."""
        return self.mover.config

    def configure(self, config: MoverConfig) -> None:
        """Another pace from now on."""
        with self._condition:
            self.mover.configure(config, now_s=self._clock.now_s())
            self._condition.notify_all()

    def add(self, task: MoveTask) -> None:
        """One more task; a paused mover goes on."""
        with self._condition:
            self.mover.add(task)
            self.mover.paused = False
            self._condition.notify_all()

    def pause(self, paused: bool = True) -> None:
        """Move nothing until it is continued (`paused=False`)."""
        with self._condition:
            self.mover.paused = paused
            self._condition.notify_all()

    def tasks(self) -> list[tuple[MoveTask, Spans]]:
        """See `Mover.tasks`."""
        with self._condition:
            return self.mover.tasks()

    def remove(self, index: int) -> bool:
        """See `Mover.remove`."""
        with self._condition:
            found = self.mover.remove(index)
            self._condition.notify_all()
            return found

    def status(self) -> MoverStatus:
        """What it is at. A pause counts before what there is to do."""
        with self._condition:
            if not self._running():
                return MoverStatus.NOT_RUNNING
            if self.mover.paused:
                return MoverStatus.PAUSED
            return MoverStatus.BUSY if self.mover.has_work else MoverStatus.ALL_DONE

    def wait(self, wanted: Collection[MoverStatus], timeout_s: float) -> MoverStatus:
        """Wait until the status is one of `wanted`, it stops running, or time is over. Returns the status then."""
        with self._condition:
            self._condition.wait_for(lambda: self.status() in (*wanted, MoverStatus.NOT_RUNNING), timeout_s)
            return self.status()


class MoverThread(MoverControl):
    """A mover of its own, without an engine, and the thread that pumps it."""

    def __init__(
        self,
        host: Host,
        config: MoverConfig | None = None,
        *,
        on_outcome: Callable[[MoveOutcome], None] | None = None,
        clock: Clock | None = None,
        mover: Mover | None = None,
    ) -> None:
        """Not running yet. `on_outcome` is told of every call that moves, from the thread."""
        self._clock = clock or SystemClock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._ended = False
        self._on_outcome = on_outcome
        own = mover or Mover(config or MoverConfig(), host, now_s=self._clock.now_s())
        super().__init__(own, threading.Condition(), self._is_running, self._clock)

    def start(self) -> bool:
        """Start, or go on with what was left; False if it runs already."""
        with self._condition:
            if self._is_running():
                return False
            if self._thread is not None and self._thread.is_alive():
                self._condition.wait_for(lambda: self._ended, _LONG_S)  # the one before is about to end
            self._stopping = self._ended = False
            self._thread = threading.Thread(target=self._work, name="memtier-mover", daemon=True)
            self._thread.start()
            return True

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End the thread after the call it is in; tasks stay. False if that took too long."""
        self._stopping = True  # seen after the call, which may hold the lock longer than anybody waits
        end_s = time.monotonic() + timeout_s
        if self._condition.acquire(timeout=timeout_s):
            self._condition.notify_all()
            self._condition.release()
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, end_s - time.monotonic()))
        return thread is None or not thread.is_alive()

    def close(self) -> None:
        """Stop and drop everything. Safe to call twice."""
        if self.stop():
            with self._condition:
                self.mover.close()

    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def _work(self) -> None:
        with self._condition:
            while not self._stopping:
                outcomes: Sequence[MoveOutcome] = self.mover.pump(self._clock.now_s())
                for outcome in outcomes:
                    if outcome.error and outcome.requested_bytes:
                        logger.warning("{}", outcome.error)
                    if self._on_outcome is not None:
                        self._on_outcome(outcome)
                if not self.mover.has_work:
                    self.mover.release()  # nobody tells of processes that end
                self._condition.notify_all()
                wait_s = self.mover.wait_s()
                # Never 0: whoever waits for the condition gets its turn.
                self._condition.wait(_LONG_S if wait_s is None else max(0.001, wait_s))
            self._ended = True
            self._condition.notify_all()
