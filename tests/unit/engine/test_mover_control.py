"""A mover under a person's hand: tasks by hand outlive decisions; pause, continue, remove, wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId, Spans
from memtier_engine.mover.backends import BatchResult, ProcessHandle
from memtier_engine.mover.control import MoverStatus, MoverThread
from memtier_engine.mover.mover import BY_HAND, Mover, MoverConfig

WAIT_S = 30.0
DONE = (MoverStatus.PAUSED, MoverStatus.ALL_DONE)


def task(pid: int, pages: int, reason: str = "swap out") -> MoveTask:
    start, end = np.array([PAGE_BYTES], np.uint64), np.array([(pages + 1) * PAGE_BYTES], np.uint64)
    return MoveTask(ProcessId(pid, 1), Spans(start, end), SWAP_NODE, reason)


class Moved:
    """A backend that moves all it is asked for, and remembers it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, handle: ProcessHandle, spans: Spans, node: int) -> BatchResult:
        self.calls.append((node, spans.total_bytes))
        return BatchResult(moved_bytes=spans.total_bytes)


def mover(backend: Moved, **config: float) -> Mover:
    host = Host(Path("/nonexistent"))
    files = OpenProcesses(host, opening=lambda host, process: cast(ProcessHandle, SimpleNamespace(close=lambda: None)))
    return Mover(MoverConfig(bandwidth_mib_per_s=None), host, now_s=0.0, backend=backend, files=files)


@pytest.fixture
def thread() -> Iterator[MoverThread]:
    made = MoverThread(Host(Path("/nonexistent")), mover=mover(Moved()))
    yield made
    made.close()


def test_a_decision_replaces_decisions_and_leaves_what_a_person_asked_for() -> None:
    own = mover(Moved())
    own.add(task(1, 1, BY_HAND))
    own.replace([task(2, 1), task(3, 1, "active")])
    own.replace([task(4, 1)])
    assert [each.process.pid for each, _ in own.tasks()] == [1, 4]
    own.retain(lambda each: False)  # a guard has closed
    assert [each.process.pid for each, _ in own.tasks()] == [1]


def test_a_paused_mover_moves_nothing_and_never_has_anything_due() -> None:
    backend = Moved()
    own = mover(backend)
    own.add(task(1, 1))
    own.paused = True
    assert own.pump(1.0) == []
    assert own.wait_s() is None
    own.paused = False
    assert len(own.pump(1.0)) == 1
    assert backend.calls == [(SWAP_NODE, PAGE_BYTES)]


def test_a_task_is_removed_by_its_place_in_the_list() -> None:
    own = mover(Moved())
    own.add(task(1, 1))
    own.add(task(2, 1))
    assert not own.remove(2)
    assert not own.remove(-1)
    assert own.remove(0)
    assert [each.process.pid for each, _ in own.tasks()] == [2]


def test_another_pace_keeps_what_is_pending() -> None:
    own = mover(Moved())
    own.add(task(1, 1))
    own.configure(MoverConfig(interval_ms=7, bandwidth_mib_per_s=3), now_s=0.0)
    assert own.config.interval_ms == 7
    assert own.budget_bytes(1.0) == int(3 * (1 << 20) * 1.1)
    assert own.has_work


def test_statuses_have_the_references_names(thread: MoverThread) -> None:
    """A pause counts before what there is to do; what is not started says so instead of waiting for ever."""
    assert thread.wait(DONE, WAIT_S) is MoverStatus.NOT_RUNNING
    assert thread.start()
    assert not thread.start()
    assert thread.wait(DONE, WAIT_S) is MoverStatus.ALL_DONE
    thread.pause()
    assert thread.wait(DONE, WAIT_S) is MoverStatus.PAUSED
    thread.pause(False)
    assert thread.status() is MoverStatus.ALL_DONE
    assert thread.stop()
    assert thread.status() is MoverStatus.NOT_RUNNING
    assert [status.value for status in MoverStatus] == ["NotRunning", "Paused", "Busy", "AllDone"]


def test_adding_a_task_goes_on_and_pausing_holds_it(thread: MoverThread) -> None:
    thread.pause()
    thread.add(task(1, 10))
    assert [left.total_bytes for _, left in thread.tasks()] == [10 * PAGE_BYTES]
    thread.pause()
    thread.start()
    assert thread.wait(DONE, WAIT_S) is MoverStatus.PAUSED
    assert len(thread.tasks()) == 1
    thread.pause(False)
    assert thread.wait((MoverStatus.ALL_DONE,), WAIT_S) is MoverStatus.ALL_DONE
    assert thread.tasks() == []


def test_stopping_leaves_tasks_for_the_next_start() -> None:
    told = threading.Event()
    outcomes: list[MoveOutcome] = []

    def on_outcome(outcome: MoveOutcome) -> None:
        outcomes.append(outcome)
        told.set()

    thread = MoverThread(Host(Path("/nonexistent")), mover=mover(Moved()), on_outcome=on_outcome)
    thread.add(task(1, 10))
    assert thread.stop()
    assert len(thread.tasks()) == 1
    thread.start()
    assert told.wait(WAIT_S)
    assert thread.wait(DONE, WAIT_S) is MoverStatus.ALL_DONE
    assert sum(outcome.moved_bytes for outcome in outcomes) == 10 * PAGE_BYTES
    thread.close()
    thread.close()
