"""Signals from the first line to the last: none ends the program by itself, none is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from memtier_cli.nri_memtierd.orders import ENDING, Orders

ALL = (*ENDING, signal.SIGHUP)


@pytest.fixture
def orders() -> Iterator[Orders]:
    before = {number: signal.getsignal(number) for number in ALL}
    made = Orders()
    made.listen()
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_told_to_end_while_it_starts_it_ends_at_once(
    orders: Orders, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exception, which could end up in code that swallows all of them, or leave a lock taken."""
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    signal.raise_signal(number)
    assert ends == [0]
    orders.hold()
    signal.raise_signal(number)
    assert ends == [0], "what was begun is taken back first"


def test_once_something_was_begun_the_order_waits_for_whoever_serves(orders: Orders) -> None:
    told: list[str] = []
    orders.hold()
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    orders.serve(lambda: told.append("end"), lambda: told.append("reload"))
    assert told == ["reload", "end"]


def test_while_it_serves_each_order_is_passed_on(orders: Orders) -> None:
    told: list[str] = []
    orders.hold()
    orders.serve(lambda: told.append("end"), lambda: told.append("reload"))
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.raise_signal(number)
    assert told == ["reload", "reload", "end", "reload", "end"]


def test_a_reload_while_it_starts_is_done_once_it_serves(orders: Orders) -> None:
    told: list[str] = []
    signal.raise_signal(signal.SIGHUP)
    orders.hold()
    orders.serve(lambda: told.append("end"), lambda: told.append("reload"))
    assert told == ["reload"]


def test_nothing_disturbs_the_end(orders: Orders) -> None:
    told: list[str] = []
    orders.hold()
    orders.serve(lambda: told.append("end"), lambda: told.append("reload"))
    orders.served()
    for number in ALL:
        signal.raise_signal(number)
    orders.close()
    assert {signal.getsignal(number) for number in ALL} == {signal.SIG_IGN}, "the interpreter takes handlers away"
    assert told == []


def test_a_hangup_that_is_ignored_stays_so() -> None:
    """nohup."""
    before = {number: signal.getsignal(number) for number in ALL}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        Orders().listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
