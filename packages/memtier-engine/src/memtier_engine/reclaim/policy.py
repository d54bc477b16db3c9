"""Policy `reclaim`: a goal and what is known of a whole cgroup in, bytes to ask the kernel for out. No IO.

For cgroups where nobody should look at single pages: which ones go is the kernel's choice (`memory.reclaim`), how
many is ours. Feedback decides, as in Transparent Memory Offloading (ASPLOS 2022): stall time and refaults of the
cgroup are measured after every decision, and the nearer they are to the goal the less is asked for.

Where the kernel keeps ages of a cgroup's memory (MGLRU), no more is asked for than has been idle for a threshold,
and the feedback moves that: a good window lowers it by a fifth, a bad one doubles it. Without ages a share of the
cgroup is asked for, and the feedback moves the share. After a bad window nothing goes out during the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES
from memtier_engine.policies.goals import Goal, GoalConfig

SAFE_STALL_PERCENT = 0.5
SAFE_REFAULTS_PERCENT = 2.0
"""Per minute. Limits that hold where the goal is another one."""
SHARES_PERCENT = (0.05, 10.0)
"""Of the cgroup's memory per minute: between these moves what is asked for without ages."""
SHARE_START_PERCENT = 1.0
THRESHOLD_MAX_S = 12 * 3600.0
GROW, SHRINK = 1.25, 0.5
REFAULT_BASE_LEAST_BYTES = 16 << 20
"""Refaults are taken as a share of at least this: a handful of pages is no rate."""

AGES = ("auto", "mglru", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReclaimPolicyConfig(GoalConfig):
    """`window_ms`: between judgements of what the decisions did. `idle_least_s`: needs ages."""

    goal: Goal = field(default_factory=lambda: Goal("psi", 0.1))
    ages: str = "auto"
    """`mglru`: by the kernel's generations, or not at all. `none`: by feedback alone. `auto`: what works."""

    def __post_init__(self) -> None:
        GoalConfig.__post_init__(self)
        if self.ages not in AGES:
            raise ConfigError(f"value {self.ages!r}", key_path="ages", hint=f"use one of: {', '.join(AGES)}")


@dataclass(frozen=True, slots=True)
class CgroupFacts:
    """One cgroup now, and what happened in it since the facts before."""

    current_bytes: int
    """In RAM, page cache included."""
    out_bytes: int | None = None
    """In swap; None: not counted."""
    stall_percent: float | None = None
    """Share of the time in which some task waited for memory; None: not known."""
    refault_pages: int | None = None
    """Pages that were wanted back: from swap, and page cache. None: not known."""
    idle_s: NDArray[np.float64] | None = None
    """float64[n]: seconds for which memory has been idle; None: no ages."""
    idle_pages: NDArray[np.int64] | None = None
    """int64[n]: how many pages each."""

    def bytes_idle_for(self, seconds: float) -> int:
        """Memory idle for at least so long; 0 without ages."""
        if self.idle_s is None or self.idle_pages is None:
            return 0
        return int(self.idle_pages[self.idle_s >= seconds].sum()) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class ReclaimState:
    """What it does to one cgroup now and why."""

    threshold_s: float | None = None
    """Memory idle for at least so long is asked for. None: there are no ages."""
    share_percent_per_min: float | None = None
    """So much of its memory is asked for. None: there are ages."""
    stall_percent: float | None = None
    refaults_percent_per_min: float | None = None
    """Of the last window. None: no window is complete yet, or not known."""
    reason: str = "nothing is measured yet"
    paused: bool = False


@dataclass(slots=True)
class _Account:
    """Of one cgroup."""

    window_begin_s: float
    last_s: float
    threshold_s: float
    share_percent: float = SHARE_START_PERCENT
    stall_s: float = 0.0
    stall_known_s: float = 0.0
    refault_pages: int | None = None
    state: ReclaimState = field(default_factory=ReclaimState)


class ReclaimPolicy:
    """Decides for any number of cgroups, each by itself."""

    name = "reclaim"

    def __init__(self, config: ReclaimPolicyConfig) -> None:
        self.config = config
        self._accounts: dict[str, _Account] = {}

    @property
    def states(self) -> Mapping[str, ReclaimState]:
        """By cgroup."""
        return {name: account.state for name, account in self._accounts.items()}

    def threshold_s(self, name: str) -> float:
        """The age from which memory of this cgroup is asked for now."""
        account = self._accounts.get(name)
        return self.config.idle_least_s if account is None else account.threshold_s

    def decide(
        self, cgroups: Mapping[str, CgroupFacts], now_s: float, available_bytes: int | None = None
    ) -> dict[str, int]:
        """Bytes to reclaim from each cgroup until the next decision.

        Args:
            cgroups: those that exist, by name; others are forgotten.
            now_s: the time.
            available_bytes: MemAvailable of the node, for goal `free`; None: not known.
        """
        for name in self._accounts.keys() - cgroups.keys():
            del self._accounts[name]
        wanted = {}
        for name, facts in cgroups.items():
            account = self._accounts.get(name)
            if account is None:  # the first look: nothing is known about it
                self._accounts[name] = _Account(now_s, now_s, self.config.idle_least_s)
                wanted[name] = 0
                continue
            passed_s = max(0.0, now_s - account.last_s)
            account.last_s = now_s
            self._measure(account, facts, passed_s)
            if now_s - account.window_begin_s >= self.config.window_ms / 1000:
                self._judge(account, facts, now_s)
            wanted[name] = self._wanted(account, facts, passed_s)
        if self.config.goal.kind == "free":
            return _shortened(wanted, self._missing_bytes(available_bytes))
        return wanted

    def _measure(self, account: _Account, facts: CgroupFacts, passed_s: float) -> None:
        if facts.stall_percent is not None:
            account.stall_s += facts.stall_percent / 100 * passed_s
            account.stall_known_s += passed_s
        if facts.refault_pages is not None:
            account.refault_pages = (account.refault_pages or 0) + facts.refault_pages

    def _judge(self, account: _Account, facts: CgroupFacts, now_s: float) -> None:
        minutes = (now_s - account.window_begin_s) / 60
        stall = 100 * account.stall_s / account.stall_known_s if account.stall_known_s else None
        base = max(facts.current_bytes, REFAULT_BASE_LEAST_BYTES)
        refaults = None
        if account.refault_pages is not None:
            refaults = 100 * account.refault_pages * PAGE_BYTES / minutes / base
        account.window_begin_s, account.stall_s, account.stall_known_s = now_s, 0.0, 0.0
        account.refault_pages = None
        bad = self._bad(stall, refaults)
        low, high = SHARES_PERCENT
        if bad is not None:
            account.threshold_s = min(THRESHOLD_MAX_S, account.threshold_s / SHRINK)
            account.share_percent = max(low, account.share_percent * SHRINK)
        elif self._nearness(stall, refaults) <= 0.5:
            account.threshold_s = max(self.config.idle_least_s, account.threshold_s / GROW)
            account.share_percent = min(high, account.share_percent * GROW)
        aged = facts.idle_s is not None
        account.state = ReclaimState(
            account.threshold_s if aged else None,
            None if aged else account.share_percent,
            stall,
            refaults,
            bad or f"{self.config.goal}: within the limits",
            bad is not None,
        )

    def _limits(self) -> tuple[float, float]:
        """(stall in percent of the time, refaults in percent of the memory in RAM per minute)."""
        goal = self.config.goal
        if goal.kind == "psi":
            return goal.value, 100.0
        if goal.kind == "refaults":
            return 100.0, goal.value
        return SAFE_STALL_PERCENT, SAFE_REFAULTS_PERCENT

    def _bad(self, stall: float | None, refaults: float | None) -> str | None:
        """Why the window was bad, if it was. What has to be known and is not makes it bad, too."""
        goal = self.config.goal
        stall_most, refaults_most = self._limits()
        if goal.kind == "psi" and stall is None:
            return f"{goal}: the stall time is not known"
        if goal.kind == "refaults" and refaults is None:
            return f"{goal}: refaults are not known"
        if stall is not None and stall > stall_most:
            return f"{goal}: the last window had {stall:.2g} % stall, {stall_most:.2g} % are allowed"
        if refaults is not None and refaults > refaults_most:
            return (
                f"{goal}: {refaults:.2g} % per minute came back in the last window, {refaults_most:.2g} % are allowed"
            )
        return None

    def _nearness(self, stall: float | None, refaults: float | None) -> float:
        """0: far from the limits, 1: at one of them."""
        shares = [
            value / most if most else float(value > 0)
            for value, most in zip((stall, refaults), self._limits(), strict=True)
            if value is not None
        ]
        return max(shares, default=0.0)

    def _wanted(self, account: _Account, facts: CgroupFacts, passed_s: float) -> int:
        if account.state.paused:
            return 0
        # What happened since the last decision counts at once: near the limit less, above it nothing.
        minutes = passed_s / 60
        base = max(facts.current_bytes, REFAULT_BASE_LEAST_BYTES)
        refaults = None
        if facts.refault_pages is not None and minutes:
            refaults = 100 * facts.refault_pages * PAGE_BYTES / minutes / base
        spare = max(0.0, 1 - self._nearness(facts.stall_percent, refaults))
        if facts.idle_s is not None:
            size = int(spare * facts.bytes_idle_for(account.threshold_s))
        else:
            size = int(spare * account.share_percent / 100 * minutes * facts.current_bytes)
        if self.config.goal.kind == "save":
            out = facts.out_bytes or 0
            size = min(size, max(0, int(self.config.goal.value / 100 * (facts.current_bytes + out)) - out))
        return size // PAGE_BYTES * PAGE_BYTES

    def _missing_bytes(self, available_bytes: int | None) -> int:
        return 0 if available_bytes is None else max(0, int(self.config.goal.value) - available_bytes)


def _shortened(wanted: dict[str, int], most: int) -> dict[str, int]:
    """The same in proportion, at most `most` in all."""
    total = sum(wanted.values())
    if total <= most:
        return wanted
    return {name: size * most // total // PAGE_BYTES * PAGE_BYTES for name, size in wanted.items()}
