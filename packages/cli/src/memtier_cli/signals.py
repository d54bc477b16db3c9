"""SIGINT, SIGTERM and SIGHUP become an event, so that everything is taken back before the program ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(threading.Event):
    """Set by a signal; `number` says which."""

    number: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """An event that SIGINT, SIGTERM and SIGHUP set; the handlers before are put back at the end.

    A signal that is ignored, as nohup does with SIGHUP, stays so.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.number = number
        stop.set()

    numbers = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
