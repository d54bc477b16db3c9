"""Whether a target's processes ran since the last scan: if none did, none of them touched memory.

Their CPU time is exact to the microsecond and costs one small file per cgroup, where a scan costs thousands of page
table entries. Source: Documentation/admin-guide/cgroup-v2.rst, cpu.stat (`usage_usec`, there without any controller).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

SCANS_SKIPPED_MOST = 5
"""In a row: what the kernel itself does to sleeping processes (it swaps them out) is seen by the scan after."""


@runtime_checkable
class TimedTarget(Protocol):
    """A target that knows the CPU time of its processes."""

    def run_time_us(self) -> int | None:
        """Of all processes that are or were in it, so far. None: not known, or some of it is not there."""


class AsleepWatch:
    """One per engine. `True` from `asleep` means: the last scan's findings hold, but for a window more."""

    def __init__(self, tracker: object) -> None:
        """`tracker`: asleep processes look idle to it only if its `own_accesses_only` says so."""
        self._wanted = bool(getattr(tracker, "own_accesses_only", False))
        self._run_time_us: int | None = None
        self._skipped = 0

    def asleep(self, target: object) -> bool:
        """To be asked before each scan, and before anything is read for it: what runs later counts for the next."""
        if not self._wanted or not isinstance(target, TimedTarget):
            return False
        before, self._run_time_us = self._run_time_us, target.run_time_us()
        if before is None or before != self._run_time_us or self._skipped >= SCANS_SKIPPED_MOST:
            self._skipped = 0
            return False
        self._skipped += 1
        return True
