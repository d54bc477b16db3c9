"""Signals while the main thread runs commands: none is lost, whatever it waits in."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from memtier_cli.signals import Ended, SessionSignals
from support.waiting import WAIT_S, until


def kill(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def waits(work: Callable[[], object]) -> None:
    """The main thread waits, and `work` is done meanwhile."""
    threading.Timer(0.1, work).start()
    time.sleep(WAIT_S)


def when_it_waits(signals: SessionSignals, work: Callable[[], object]) -> None:
    """`work` is done as soon as the main thread waits: before, a signal would end what it does and not the wait."""

    def wait_and_work() -> None:
        until(lambda: signals._waiting)
        work()

    threading.Thread(target=wait_and_work).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_what_runs(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with SessionSignals(), pytest.raises(Ended):
        waits(lambda: kill(number))
    assert signal.getsignal(number) == before


def test_at_a_terminal_sigint_is_for_the_command_and_sigterm_ends_it_still() -> None:
    with SessionSignals() as signals, signals.interrupting(True):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                waits(lambda: kill(signal.SIGINT))
        with pytest.raises(Ended):
            waits(lambda: kill(signal.SIGTERM))


def test_while_it_waits_a_signal_or_a_failure_ends_the_wait() -> None:
    with SessionSignals() as signals:
        when_it_waits(signals, lambda: kill(signal.SIGTERM))
        signals.wait()
        assert signals.failure is None
    with SessionSignals() as signals:
        failure = ValueError("broken")
        when_it_waits(signals, lambda: signals.fail(failure))
        signals.wait()
        assert signals.failure is failure


def test_only_the_first_signal_counts() -> None:
    """What it began, such as closing everything, is finished."""
    with SessionSignals():
        with pytest.raises(Ended):
            waits(lambda: kill(signal.SIGTERM))
        kill(signal.SIGTERM)
        time.sleep(0.2)


class Signalling:
    """Ends by a signal whose exception the interpreter cannot raise, as in a callback of C code."""

    def __del__(self) -> None:
        kill(signal.SIGTERM)


def test_a_signal_whose_exception_the_interpreter_could_not_raise_is_sent_again() -> None:
    before = sys.unraisablehook

    def lose_one_and_wait() -> None:
        Signalling()
        time.sleep(WAIT_S)

    with SessionSignals(), pytest.raises(Ended):
        lose_one_and_wait()
    assert sys.unraisablehook == before


def test_a_signal_that_does_not_interrupt_the_main_thread_is_sent_again() -> None:
    """Taken by another thread, or just before the main one went to sleep: no system call is interrupted by it."""
    read_end, write_end = os.pipe()
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    assert other.ident is not None
    gave_up: list[int] = []
    give_up = threading.Timer(WAIT_S, lambda: gave_up.append(os.write(write_end, b"x")))
    give_up.start()
    signal_soon = threading.Timer(0.1, signal.pthread_kill, (other.ident, signal.SIGTERM))

    def read() -> None:
        signal_soon.start()  # not before the signal is caught
        os.read(read_end, 1)

    try:
        with SessionSignals(), pytest.raises(Ended):
            read()
        assert not gave_up
    finally:
        give_up.cancel()
        done.set()
        other.join()
        os.close(read_end)
        os.close(write_end)
