"""SIGINT, SIGTERM and SIGHUP become an event, or end a session, so that everything is taken back before the end."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from memtier_cli.libraries import logger

_PATIENCE_S = 0.05
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(threading.Event):
    """Set by a signal; `number` says which."""

    number: int | None = None


def set_from_handler(event: threading.Event) -> None:
    """Set `event` soon. A handler may interrupt the main thread in `wait`, holding the lock that `set` waits for."""
    _thread.start_new_thread(event.set, ())


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """An event that SIGINT, SIGTERM and SIGHUP set; the handlers before are put back at the end.

    A signal that is ignored, as nohup does with SIGHUP, stays so.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.number = number
        set_from_handler(stop)

    numbers = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ended(BaseException):
    """A signal that ends the program, raised in the main thread out of whatever it is doing."""


class SessionSignals:
    """Signals of a program that runs commands in its main thread and engines beside it. A context manager.

    A signal raises `Ended` in the main thread, while it waits (`wait`) ends the wait, and at a terminal
    (`interrupting`) SIGINT raises KeyboardInterrupt instead. Only the first signal counts: what it began is finished.

    The interpreter runs handlers between two steps of its own. A signal that comes just before a system call that
    waits, such as readline's for the next key, would wait with it: a thread sends it again until it was handled.
    It does so too where `Ended` came to nothing: what is raised in a callback of C code or in a finalizer, the
    interpreter hands to `sys.unraisablehook` and goes on.
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        """What an engine ended with."""
        self._event = threading.Event()
        self._waiting = self._interactive = self._ending = self._lost = False
        self._before: dict[int, object] = {}
        self._handled = self._number = 0
        self._arrived, self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def __enter__(self) -> Self:
        for number in _STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        os.set_blocking(self._arrived, True)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._thread = threading.Thread(target=self._insist, name="memtier-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.unraisablehook = self._unraisable_before
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup)
        self._thread.join()  # before the handlers go: what it sends again would kill the program
        os.close(self._arrived)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal gave

    @contextmanager
    def interrupting(self, interactive: bool) -> Iterator[None]:
        """Within the block SIGINT is for the command that runs, if `interactive`."""
        self._interactive = interactive
        try:
            yield
        finally:
            self._interactive = False

    def wait(self) -> None:
        """Until a signal comes or `fail` is called."""
        self._waiting = True
        self._event.wait()

    def fail(self, failure: Exception) -> None:
        """An engine ended by an error. Called from its thread."""
        from memtier_engine.errors import MemtierError

        logger().opt(exception=None if isinstance(failure, MemtierError) else failure).error("{}", failure)
        self.failure = failure
        self._event.set()

    def _insist(self) -> None:
        handled = 0
        main = threading.main_thread().ident
        assert main is not None
        while arrived := os.read(self._arrived, 64):  # a byte per signal; empty: the other end is closed
            time.sleep(_PATIENCE_S)
            known, handled = handled, self._handled
            lost, self._lost = self._lost, False
            if (lost or known == handled) and arrived[-1] in self._before:
                with contextlib.suppress(ProcessLookupError):
                    signal.pthread_kill(main, arrived[-1])  # and its byte comes here

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, Ended):
            self._unraisable_before(unraisable)
            return
        self._ending, self._lost = False, True
        os.write(self._wakeup, bytes([self._number]))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled += 1
        if number == signal.SIGINT and self._interactive:
            raise KeyboardInterrupt
        if self._ending:
            return
        self._ending, self._number = True, number
        if self._waiting:
            set_from_handler(self._event)
        else:
            raise Ended
