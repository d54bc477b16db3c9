"""Waiting for what other processes do: over as soon as it is so, and failed only when it never comes."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 120.0
"""Far more than anything here takes, also on a machine with ten times as much to do as it has processors for."""


def until(holds: Callable[[], object], what: object = "it did not come true", wait_s: float = WAIT_S) -> None:
    """Wait until `holds()`.

    Raises:
        AssertionError: not within `wait_s`; with `what`, or what `what()` gives.
    """
    end_s = time.monotonic() + wait_s
    while not holds():
        assert time.monotonic() < end_s, what() if callable(what) else what
        time.sleep(0.02)
