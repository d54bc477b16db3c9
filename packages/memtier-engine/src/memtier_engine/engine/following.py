"""Which processes of a target are worked on now: the answer of its last poll, less those too young or refused."""

from __future__ import annotations

import math
import time
from collections.abc import Container

from memtier_engine.model import ProcessId
from memtier_engine.targets.base import Target

YOUNG_S = 1.0
"""Processes younger than this, or than one scan interval, are left alone: in fork storms most die young."""
_CLOCK_TICKS_PER_S = 100.0  # USER_HZ, fixed on every architecture we support


class Following:
    """Asks a target and remembers what it said."""

    def __init__(self, scan_interval_s: float) -> None:
        self._young_s = min(YOUNG_S, scan_interval_s)
        self.known: frozenset[ProcessId] = frozenset()
        """All that the target means, also the young and the refused."""
        self.wanted: frozenset[ProcessId] = frozenset()
        """Those to work on."""
        self.due_s = math.inf
        """When the oldest of the young comes of age."""
        self._refused: dict[ProcessId, str] = {}

    def ask(
        self, target: Target, tracked: Container[ProcessId], now_s: float
    ) -> tuple[frozenset[ProcessId], frozenset[ProcessId]]:
        """Poll `target`. Returns (processes that appeared, processes that are gone).

        `tracked` processes are wanted whatever their age.
        """
        before, self.known = self.known, target.poll()
        for process in self._refused.keys() - self.known:
            del self._refused[process]
        # The start time is in ticks since boot, CLOCK_BOOTTIME: a suspended machine makes processes older too.
        uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        wanted, self.due_s = set(), math.inf
        for process in self.known:
            age_s = uptime_s - process.start_ticks / _CLOCK_TICKS_PER_S
            if process in tracked or (process not in self._refused and age_s >= self._young_s):
                wanted.add(process)
            elif process not in self._refused:
                self.due_s = min(self.due_s, now_s + self._young_s - age_s)
        self.wanted = frozenset(wanted)
        return self.known - before, before - self.known

    def refuse(self, process: ProcessId, why: str) -> None:
        """Leave it alone as long as it lives."""
        self._refused[process] = why
