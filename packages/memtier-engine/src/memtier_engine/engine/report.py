"""What an engine tells of each scan and the decision on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memtier_engine.guards.base import GuardState
from memtier_engine.model import PAGE_BYTES, Why
from memtier_engine.pages.ages import AGE_MAX
from memtier_engine.pages.refaults import RefaultStats


@dataclass(frozen=True, slots=True)
class StepReport:
    """The state after a scan and the decision on it. Totals count from the engine's start."""

    time_s: float
    scans: int
    tracker: str
    processes: int
    tracked_bytes: int
    """Address space that is looked at."""
    resident_bytes: int
    paged_out_bytes: int
    """Out because of us, now."""
    candidate_bytes: int
    """What the policy wants to move now, of any reason; in a dry run all there is and
    may be taken (`skipped` has whom nothing is taken from)."""
    requested_bytes_total: int
    moved_bytes_total: int
    refault_bytes_total: int
    """What we paged out and the processes wanted back."""
    scan_seconds: float
    """Time this scan took."""
    cpu_seconds_total: float
    age_pages: NDArray[np.int64]
    """int64[256]: pages of each age, see `memtier_engine.pages.ages`."""
    idle_s: NDArray[np.float64]
    """float64[AGE_MAX + 1]: seconds that each age stands for."""
    errors: tuple[str, ...]
    """Since the report before."""
    guards: tuple[GuardState, ...] = ()
    """What each guard said at this scan."""
    skipped: Mapping[int, str] = field(default_factory=dict)
    """Processes that memory was wanted of and that are left alone, by pid, and why."""
    kept: Mapping[int, Mapping[Why, int]] = field(default_factory=dict)
    """Bytes that are idle and stay in RAM all the same, by pid and why."""
    sharers: Mapping[int, int] = field(default_factory=dict)
    """Processes that share memory after a fork, by pid: what they share is counted once in `resident_bytes`."""
    left_out_bytes: int = 0
    """Address space that is not looked at, since this kernel offers no cheap way through its holes."""
    refaults: RefaultStats = field(default_factory=RefaultStats)
    """How right the decisions to page out were."""
    not_yet_freed_bytes: int = 0
    """Out because of us, written to a disk or file, and in RAM all the same until somebody reclaims: no saving yet."""
    scan_interval_s: float = 0.0
    """Time until the next scan; longer than configured where scans would take too much CPU time."""

    @property
    def held_back_by(self) -> tuple[str, ...]:
        """Why what should move does not: what each closed guard says, as far as there is anything to move."""
        if not self.candidate_bytes:
            return ()
        return tuple(f"{state.name}: {state.reason}" for state in self.guards if not state.open)

    def idle_bytes(self, idle_s: float) -> int:
        """Resident memory not touched for at least `idle_s`."""
        return int(self.age_pages[: AGE_MAX + 1][self.idle_s >= idle_s].sum()) * PAGE_BYTES
