"""Policy `age`: idle memory goes out or to the idle nodes, active memory to the active nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveTask, ProcessId
from memtier_engine.pages.ages import AGE_MAX, AgeClock, ProcessPages
from memtier_engine.policies.base import BasePolicy, check_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class AgePolicyConfig:
    """The keys of the reference's `age` policy, with units in their names."""

    interval_ms: int = 5000
    """Time between decisions (`intervalms`)."""
    swap_out_ms: int | None = None
    """Page out what has been idle for this long (`swapoutms`). None: never."""
    idle_duration_ms: int | None = None
    """Move what has been idle for this long to `idle_numas` (`idledurationms`). None: never."""
    idle_numas: tuple[int, ...] = ()
    active_duration_ms: int | None = None
    """Move what every scan saw touched for this long to `active_numas` (`activedurationms`). None: never."""
    active_numas: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_interval(self.interval_ms)
        for key, value in (
            ("swapoutms", self.swap_out_ms),
            ("idledurationms", self.idle_duration_ms),
            ("activedurationms", self.active_duration_ms),
        ):
            if value is not None and value < 0:
                raise ConfigError(f"value {value}", key_path=key, hint="use 0 or more, or leave it out")


class AgePolicy(BasePolicy):
    """Three rules, promotions before demotions, swapping out before demoting."""

    name = "age"

    def __init__(self, config: AgePolicyConfig, *, scan_interval_ms: int | None = None) -> None:
        """`scan_interval_ms`: how often pages are looked at; None: once per decision."""
        self.config = config
        self._interval_ms = config.interval_ms
        self._scan_interval_ms = scan_interval_ms or config.interval_ms
        self.needs_streaks = config.active_duration_ms is not None and bool(config.active_numas)
        demotes = config.idle_duration_ms is not None and bool(config.idle_numas)
        self.needs_places = self.needs_streaks or demotes

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """See `Policy.decide`."""
        config = self.config
        budget = _Budget(budget_bytes)
        tasks: list[MoveTask] = []
        if config.active_duration_ms is not None and config.active_numas:
            node = config.active_numas[0]
            # The reference: touched in each of the last r + 1 rounds, r = duration // interval.
            rounds = min(255, config.active_duration_ms // self._scan_interval_ms + 1)
            for process, own in pages.items():
                _add(tasks, budget, own, process, node, "active", age_to=0, streak_from=rounds)
        out = _least_age(clock, config.swap_out_ms)
        if out is not None:
            for process, own in pages.items():
                _add(tasks, budget, own, process, SWAP_NODE, "swap out", age_from=out)
        if config.idle_duration_ms is not None and config.idle_numas:
            idle = _least_age(clock, config.idle_duration_ms)
            last = AGE_MAX if out is None else out - 1
            if idle is not None and idle <= last:
                for process, own in pages.items():
                    _add(tasks, budget, own, process, config.idle_numas[0], "idle", age_from=idle, age_to=last)
        return tasks


class _Budget:
    """Pages that may still be asked for; None: as many as there are."""

    def __init__(self, budget_bytes: int | None) -> None:
        self.left = None if budget_bytes is None else max(1, budget_bytes // PAGE_BYTES)


def _least_age(clock: AgeClock, duration_ms: int | None) -> int | None:
    # Age 0 means touched in the last window, whatever the duration.
    if not duration_ms:
        return None
    least = clock.least_age(duration_ms / 1000)
    return None if least is None else max(1, least)


def _add(
    tasks: list[MoveTask],
    budget: _Budget,
    own: ProcessPages,
    process: ProcessId,
    node: int,
    reason: str,
    *,
    age_from: int = 0,
    age_to: int = AGE_MAX,
    streak_from: int = 0,
) -> None:
    if budget.left == 0:
        return
    spans = own.select(
        age_from=age_from,
        age_to=age_to,
        streak_from=streak_from,
        not_on_node=None if node == SWAP_NODE else node,
        limit_pages=budget.left,
        leave_kept=node == SWAP_NODE,
    )
    if not len(spans):
        return
    if budget.left is not None:
        budget.left -= int(spans.pages.sum())
    tasks.append(MoveTask(process, spans, node, reason))
