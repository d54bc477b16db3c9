"""What a person wants of policy `auto`: "psi: 0.1%", "refaults: 0.2%/min", "free: 2GiB", "save: 30%". No IO."""

from __future__ import annotations

from dataclasses import dataclass

from memtier_engine.errors import ConfigError
from memtier_engine.policies.base import check_interval
from memtier_engine.units import Percents, parse_size

KINDS = ("psi", "refaults", "free", "save")
_PERCENTS = {
    "psi": Percents(hint="write it like 0.1%"),
    "refaults": Percents(hint="write it like 0.2%/min", per_minute=True),
    "save": Percents(hint="write it like 30%"),
}


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal."""

    kind: str
    """`psi`: stall for memory at most so many percent of the time. `refaults`: of the memory in RAM at most so
    many percent come back per minute. `free`: keep so many bytes of the node available. `save`: have so many
    percent of the engine's memory out."""
    value: float
    """Percent; of `free`, bytes."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"no goal is named {self.kind!r}", key_path="goal", hint=f"use one of: {', '.join(KINDS)}"
            )
        most = None if self.kind == "free" else 100
        if self.value < 0 or (most is not None and self.value > most) or (self.value == 0 and self.kind != "psi"):
            raise ConfigError(
                f"value {self.value:g}",
                key_path=f"goal.{self.kind}",
                hint="use a size above 0" if most is None else "use percents above 0 and up to 100",
            )

    def __str__(self) -> str:
        if self.kind == "free":
            return f"free: {self.value / (1 << 30):.3g}GiB"
        return f"{self.kind}: {self.value:g}%{'/min' if self.kind == 'refaults' else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoalConfig:
    """A goal, and how to work for it."""

    goal: Goal
    interval_ms: int = 5000
    """Time between decisions."""
    window_ms: int = 60_000
    """Time for which what was decided is watched before more is made of it."""
    idle_least_s: float = 30.0
    """Nothing younger goes out, whatever the goal."""

    def __post_init__(self) -> None:
        check_interval(self.interval_ms)
        if self.window_ms < self.interval_ms:
            raise ConfigError(
                f"value {self.window_ms}", key_path="windowms", hint=f"use intervalms ({self.interval_ms}) or more"
            )
        if self.idle_least_s <= 0:
            raise ConfigError(f"value {self.idle_least_s}", key_path="idleleastms", hint="use more than 0")


def parse_goal(kind: str, text: str) -> Goal:
    """The goal of a configuration's key and text.

    Raises:
        ConfigError: no such goal, or no value of its kind.
    """
    if kind == "free":
        return Goal(kind, float(parse_size(text, key_path="goal.free")))
    percents = _PERCENTS.get(kind)
    return Goal(kind, 0.0 if percents is None else percents.percent(text, key_path=f"goal.{kind}"))
