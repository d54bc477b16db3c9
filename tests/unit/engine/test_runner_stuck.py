"""Steps that do not return: the others go on, the stuck one is named and given up, and threads do not pile up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from loguru import logger

from memtier_engine.engine import runner as runner_module
from memtier_engine.engine.loop import Engine, StepReport
from memtier_engine.engine.runner import Runner


class FakeEngine:
    """Due all the time; `gate` keeps its step as long as it is closed."""

    def __init__(self) -> None:
        self.on_wake: Callable[[], None] = lambda: None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.steps = 0
        self.closed = False
        self.halted = False

    def advance(self, now_s: float) -> tuple[StepReport | None, float]:
        self.steps += 1
        if not self.gate.is_set():
            self.entered.set()
            self.gate.wait()
        return None, now_s + 0.001

    def halt(self) -> None:
        self.halted = True

    def close(self) -> None:
        self.closed = True


def until(what: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_WATCH_S", 0.01)


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner(workers=2, late_s=0.05, stuck_s=3600.0)
    made.start()
    yield made
    made.stop(timeout_s=0.1)


def add(runner: Runner, engine: FakeEngine, label: str = "x", on_stuck: Callable[[str], None] | None = None) -> Engine:
    own = cast(Engine, engine)
    runner.add(own, on_stuck=on_stuck, context={"container": label})
    return own


def close_gates(*engines: FakeEngine) -> None:
    for engine in engines:
        engine.gate.clear()
    for engine in engines:
        assert engine.entered.wait(60)


def test_as_many_stuck_steps_as_there_are_threads_and_more_do_not_keep_the_others(runner: Runner) -> None:
    stuck = [FakeEngine() for _ in range(5)]
    other = FakeEngine()
    for engine in (*stuck, other):
        add(runner, engine)
    close_gates(*stuck)
    before = other.steps
    until(lambda: other.steps > before + 20)
    assert len(runner._threads) <= 5 + 2
    for engine in stuck:
        engine.gate.set()
    until(lambda: len(runner._threads) == 2)
    until(lambda: all(engine.steps > 10 for engine in stuck))


def test_steps_that_are_late_do_not_start_threads_without_need(runner: Runner) -> None:
    slow = [FakeEngine(), FakeEngine()]
    for engine in slow:
        add(runner, engine)
    close_gates(*slow)
    for _ in range(20):
        time.sleep(0.01)
    assert len(runner._threads) == 2, "nothing else is due"
    for engine in slow:
        engine.gate.set()


def test_there_is_a_limit_to_threads(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "THREADS_MOST", 4)
    stuck = [FakeEngine() for _ in range(8)]
    for engine in stuck:
        engine.gate.clear()
        add(runner, engine)
    until(lambda: sum(engine.entered.is_set() for engine in stuck) == 4)
    for _ in range(20):
        time.sleep(0.01)
    assert len(runner._threads) == 4
    for engine in stuck:
        engine.gate.set()


def test_more_that_are_stuck_for_good_than_there_may_be_threads_hold_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody may have that many containers; what is given up never counts against the limit."""
    monkeypatch.setattr(runner_module, "THREADS_MOST", 4)
    runner = Runner(workers=2, late_s=0.05, stuck_s=0.1)
    runner.start()
    stuck, other, told = [FakeEngine() for _ in range(10)], FakeEngine(), list[str]()
    try:
        for engine in stuck:
            engine.gate.clear()
            add(runner, engine, on_stuck=told.append)
        until(lambda: len(told) == len(stuck))
        runner._stuck_s = 3600.0  # a machine that is slow for a moment must not make the other one stuck
        add(runner, other)
        until(lambda: other.steps > 10)
    finally:
        for engine in stuck:
            engine.gate.set()
        runner.stop()


def test_the_stuck_one_is_named_given_up_and_closed_when_it_returns() -> None:
    runner = Runner(workers=1, late_s=0.05, stuck_s=0.1)
    lines: list[str] = []
    sink = logger.add(
        lambda message: lines.append(str(message)), format="{extra[container]} {message}",
        filter=lambda record: "container" in record["extra"],
    )  # fmt: skip
    logger.enable("memtier_engine")
    runner.start()
    stuck, other, told = FakeEngine(), FakeEngine(), list[str]()
    stuck.gate.clear()
    own = add(runner, stuck, "ns/pod:stuck", told.append)
    add(runner, other, "ns/pod:other")
    try:
        until(lambda: told)
        assert "wait (threading.py" in told[0]
        assert any(line.startswith("ns/pod:stuck a step of its engine has not returned") for line in lines)
        assert not any("ns/pod:other" in line for line in lines)
        assert stuck.halted
        assert runner.is_late(own)
        assert [context for context, _ in runner.steps() if context["container"] == "ns/pod:stuck"]
        before = other.steps
        until(lambda: other.steps > before + 20)
        stuck.gate.set()
        until(lambda: stuck.closed)
        assert not runner.is_late(own)
        assert stuck.steps == 1, "it is not run again"
        until(lambda: len(runner._threads) == 1)
        assert len(told) == 1
    finally:
        logger.remove(sink)
        logger.disable("memtier_engine")
        stuck.gate.set()
        runner.stop(timeout_s=0.1)


def test_the_end_does_not_wait_for_each_stuck_step_in_turn() -> None:
    runner = Runner(workers=2, late_s=0.05, stuck_s=3600.0)
    runner.start()
    stuck = [FakeEngine() for _ in range(6)]
    for engine in stuck:
        engine.gate.clear()
        add(runner, engine)
    for engine in stuck:
        assert engine.entered.wait(60)
    began_s = time.monotonic()
    runner.stop(timeout_s=2.0)
    assert time.monotonic() - began_s < 6 * 2.0
    for engine in stuck:
        engine.gate.set()
    until(lambda: all(engine.closed for engine in stuck))
