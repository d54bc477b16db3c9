"""Signals become an event, whatever the main thread is doing when they come."""

from __future__ import annotations

import signal

import pytest

from memtier_cli.signals import SessionSignals, stop_on_signals


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_sets_the_event_and_says_which(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        signal.raise_signal(number)
        assert stop.wait(60)
        assert stop.number == number
    assert signal.getsignal(number) == before


@pytest.mark.timeout(120)
def test_a_signal_between_two_steps_of_a_wait_does_not_lock_up() -> None:
    """`Event.wait` holds a lock at its begin and end that `Event.set` needs."""
    with stop_on_signals() as stop:
        with stop._cond:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60)


@pytest.mark.timeout(120)
def test_nor_does_one_that_ends_a_session_that_waits() -> None:
    with SessionSignals() as session:
        session._waiting = True
        with session._event._cond:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)
        session.wait()
