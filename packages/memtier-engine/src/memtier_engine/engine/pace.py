"""When each engine of a node scans: spread over the interval, and within a budget of CPU time. No IO.

What a scan costs is measured. When the scans of all engines together would take more than the budget, it is shared out:
who wants less than an equal part scans as configured, and the intervals of the others grow until each takes what is
left in equal parts. So a container whose memory is costly to look at slows its own scans, and nobody else's.
"""

from __future__ import annotations

import math
import threading

from loguru import logger

from memtier_engine.errors import ConfigError

CPU_SHARE = 0.05
"""Of one core, for all scans of the node."""
_GOLDEN = 0.618033988749895
"""Multiples of the golden ratio, less their whole part, lie evenly in 0..1 however many there are."""
_WEIGHT = 0.3
"""Of the newest scan in the running mean of what a scan costs."""
_TELL_FROM = 1.1
"""A factor below this is not worth a message."""
LOOKS_SHARE = 0.5
"""Of what an engine's scans may take, for looks at which processes there are, between them."""
LOOKS_AHEAD_S = 0.2
"""So much CPU time may looks take at once: a few are to be at once, whatever they cost."""


class ScanBudget:
    """The node's budget. Methods may be called from any thread."""

    def __init__(self, cpu_share: float = CPU_SHARE) -> None:
        """`cpu_share`: of one core, above 0; 1 is a whole core.

        Raises:
            ConfigError: not above 0.
        """
        if cpu_share <= 0:
            raise ConfigError(
                f"value {cpu_share}", key_path="scan.maxcpushare", hint="use a share above 0, such as 0.05"
            )
        self.cpu_share = cpu_share
        self._lock = threading.Lock()
        self._paces: dict[Pace, None] = {}
        self._joined = 0
        self._part = math.inf
        self._told = 1.0

    @property
    def factor(self) -> float:
        """By which the intervals of the costliest engine are longer than configured now; 1: as configured."""
        with self._lock:
            return self._factor()

    @property
    def part(self) -> float:
        """Of one core, at most so much for one engine now; inf: all have what they want."""
        return self._part

    def join(self, interval_s: float) -> Pace:
        """A new engine that would like to scan every `interval_s`."""
        with self._lock:
            pace = Pace(self, interval_s, self._joined * _GOLDEN % 1)
            self._joined += 1
            self._paces[pace] = None
        return pace

    def leave(self, pace: Pace) -> None:
        """Its scans cost nothing any more. Safe to call twice."""
        with self._lock:
            if self._paces.pop(pace, 0) is None:
                self._share_out()

    def note(self, pace: Pace, cpu_s: float) -> None:
        """A scan of `pace` took so much CPU time."""
        with self._lock:
            known = pace.cpu_s
            pace.cpu_s = cpu_s if known is None else known + _WEIGHT * (cpu_s - known)
            self._share_out()
            factor = self._factor()
            told, self._told = self._told, factor
            if factor < _TELL_FROM:
                if told >= _TELL_FROM:
                    logger.bind(node="scans").info("scans are back at their configured intervals")
                    self._told = 1.0
                else:
                    self._told = told
            elif not told / 1.5 < factor < told * 1.5 or told < _TELL_FROM:
                logger.bind(node="scans").warning(
                    "scans would take {:.1%} of a core, {:.1%} are allowed: intervals are up to {:.2g} times as long",
                    sum(each.wanted for each in self._paces),
                    self.cpu_share,
                    factor,
                )
            else:
                self._told = told

    def _factor(self) -> float:
        return max((pace.factor for pace in self._paces), default=1.0)

    def _share_out(self) -> None:
        """The part that makes all together take the budget."""
        left, count = self.cpu_share, len(self._paces)
        for wanted in sorted(pace.wanted for pace in self._paces):
            if wanted * count > left:
                self._part = left / count
                return
            left, count = left - wanted, count - 1
        self._part = math.inf


class Looks:
    """When a look between two scans may be: they take a share of a core, and a little in advance."""

    __slots__ = ("_ahead_s", "_at_s", "due_s", "taken_s")

    def __init__(self, now_s: float) -> None:
        self.due_s = now_s
        """Not before."""
        self.taken_s = 0.0
        """CPU time of all of them."""
        self._ahead_s = LOOKS_AHEAD_S
        self._at_s = now_s

    def looked(self, cpu_s: float, now_s: float, cpu_share: float = CPU_SHARE) -> None:
        """One took so much CPU time, until now. `cpu_share`: of one core, what scans may take."""
        share = cpu_share * LOOKS_SHARE
        self.taken_s += cpu_s
        self._ahead_s = min(LOOKS_AHEAD_S, self._ahead_s + (now_s - self._at_s) * share) - cpu_s
        self._at_s = now_s
        self.due_s = now_s + max(0.0, -self._ahead_s) / share


class Pace:
    """One engine's part in it."""

    __slots__ = ("budget", "cpu_s", "phase", "wanted_s")

    def __init__(self, budget: ScanBudget, wanted_s: float, phase: float) -> None:
        self.budget = budget
        self.wanted_s = wanted_s
        self.phase = phase
        """0 to 1: where in the interval its first scan is."""
        self.cpu_s: float | None = None
        """What a scan takes, lately; None: none yet."""

    @property
    def offset_s(self) -> float:
        """After which the first scan should be."""
        return self.phase * self.wanted_s

    @property
    def wanted(self) -> float:
        """Of one core, what its scans would take at the interval that it would like."""
        return (self.cpu_s or 0.0) / self.wanted_s

    @property
    def factor(self) -> float:
        """By which its interval is longer than it would like."""
        return max(1.0, self.wanted / self.budget.part)

    @property
    def interval_s(self) -> float:
        """Time between scans now."""
        return self.wanted_s * self.factor

    @property
    def cpu_share(self) -> float:
        """Of one core, what its scans may take now."""
        return min(self.budget.cpu_share, self.budget.part)

    def scanned(self, cpu_s: float) -> None:
        """A scan, and what came since the one before, took so much CPU time."""
        self.budget.note(self, cpu_s)

    def close(self) -> None:
        """The engine ends. Safe to call twice."""
        self.budget.leave(self)
