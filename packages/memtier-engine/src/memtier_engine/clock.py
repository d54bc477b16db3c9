"""Time as an argument: the system's clocks, and one for tests that only moves when told."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """What the engine needs to know of time."""

    def now_s(self) -> float:
        """Seconds of a monotonic clock."""

    def wait_s(self, seconds: float, stop: threading.Event) -> bool:
        """Wait until `seconds` have passed or `stop` is set; True if it was set."""


class SystemClock:
    """CLOCK_MONOTONIC."""

    def now_s(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def wait_s(self, seconds: float, stop: threading.Event) -> bool:
        """Wait on the event."""
        return stop.wait(max(0.0, seconds))


class FakeClock:
    """Stands still until told; waiting moves it on at once."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        """The time it was last moved to."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move on."""
        self._now_s += seconds

    def wait_s(self, seconds: float, stop: threading.Event) -> bool:
        """Move on by `seconds` without waiting."""
        if stop.is_set():
            return True
        self._now_s += max(0.0, seconds)
        return False
