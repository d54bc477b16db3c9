"""Readings and a time in, open or closed out: what every guard is, and the guard with two thresholds. No IO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

MIB = 1 << 20
GIB = 1 << 30


class Scope(Enum):
    """What a closed guard stops. Promotions are never stopped: they give memory back to who needs it."""

    DEMOTION = "demotion"
    """Paging out and moving to slower nodes."""
    SWAP = "swap"
    """Paging out only."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured value, or why there is none."""

    value: float | None = None
    missing: str | None = None
    """What the kernel lacks: the guard is off and says this."""
    fired_s: float | None = None
    """When a kernel trigger last said that the threshold was passed; sooner than averages show it."""
    note: str = ""
    """Where the value comes from, for the reason: a file, a device, a cgroup."""
    excuse: str = ""
    """Why the value, however high, closes nothing now."""


@dataclass(frozen=True, slots=True)
class GuardState:
    """What a guard says now."""

    name: str
    open: bool
    """Moving may go on, as far as this guard is concerned."""
    active: bool
    """False: off, because it was switched off or the kernel lacks what it needs; then it is open."""
    reason: str
    """Why it is closed or off; empty when open."""
    value: float | None
    close_at: float | None
    open_at: float | None
    unit: str
    since_s: float
    """When it last opened or closed."""
    scope: Scope


class Guard(Protocol):
    """Decides whether moving may go on. It reads nothing itself."""

    name: str
    scope: Scope

    def update(self, readings: Mapping[str, Reading], now_s: float) -> GuardState:
        """The state at `now_s`; the same readings and times give the same states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Closes at `close_at`, opens again at `open_at`, and stays closed for at least `hold_s`.

    `close_at` above `open_at` guards against too much of something, below it against too little.
    """

    close_at: float
    open_at: float
    hold_s: float = 10.0
    fast_at: float | None = None
    """Closes at once where so much is reached within about a second, which averages show late. None: `close_at`."""

    @property
    def at_once(self) -> float:
        """`fast_at`, or what stands for it."""
        return self.close_at if self.fast_at is None else self.fast_at

    @property
    def upper(self) -> bool:
        """Whether high values close it."""
        return self.close_at >= self.open_at

    def closes(self, value: float) -> bool:
        """Whether an open guard closes at `value`."""
        return value >= self.close_at if self.upper else value <= self.close_at

    def opens(self, value: float) -> bool:
        """Whether a closed guard opens at `value`."""
        return value <= self.open_at if self.upper else value >= self.open_at


class ThresholdGuard:
    """One reading against two thresholds."""

    def __init__(
        self,
        name: str,
        what: str,
        thresholds: Thresholds | None,
        *,
        unit: str = "%",
        scope: Scope = Scope.DEMOTION,
        scale: float = 1.0,
    ) -> None:
        """Set up open.

        Args:
            name: of the guard and of its reading.
            what: the value in words, for the reason.
            thresholds: None switches the guard off.
            unit: of value and thresholds as they are shown.
            scope: what it stops.
            scale: shown value per measured value: 2**-30 shows bytes as GiB.
        """
        self.name = name
        self.scope = scope
        self._what = what
        self._thresholds = thresholds
        self._unit = unit
        self._scale = scale
        self._closed_s: float | None = None
        self._held_until_s = 0.0
        self._since_s: float | None = None

    def update(self, readings: Mapping[str, Reading], now_s: float) -> GuardState:
        """See `Guard.update`. While a value that was there is missing for a moment, a closed guard stays closed."""
        if self._since_s is None:
            self._since_s = now_s
        limits = self._thresholds
        if limits is None:
            return self._state(None, active=False, reason="switched off")
        self._held_until_s = min(self._held_until_s, now_s + limits.hold_s)  # a clock set back must not hold it
        reading = readings.get(self.name, Reading(missing="not measured here"))
        value, excused = reading.value, bool(reading.excuse)
        fired = reading.fired_s is not None and now_s <= reading.fired_s + limits.hold_s and not excused
        over = value is not None and limits.closes(value) and not excused
        if value is None and not fired:
            if self._closed_s is not None and now_s < self._held_until_s:
                return self._state(None, reason=self._why(None, reading, False))
            self._set_open(now_s)
            return self._state(None, active=False, reason=reading.missing or "no value")
        if fired or over:
            if self._closed_s is None:
                self._closed_s = self._since_s = now_s
            began_s = now_s if reading.fired_s is None or over else reading.fired_s
            self._held_until_s = max(self._held_until_s, began_s + limits.hold_s)
        elif value is not None and now_s >= self._held_until_s and (excused or limits.opens(value)):
            self._set_open(now_s)
        if self._closed_s is None:
            return self._state(value)
        return self._state(value, reason=self._why(value, reading, fired))

    def _set_open(self, now_s: float) -> None:
        if self._closed_s is not None:
            self._closed_s = None
            self._since_s = now_s

    def _why(self, value: float | None, reading: Reading, fired: bool) -> str:
        limits = self._thresholds
        assert limits is not None
        where = f" ({reading.note})" if reading.note else ""
        shown = "not known" if value is None else self._number(value)
        if fired and (value is None or not limits.closes(value)):
            shown = f"or was at {self._number(limits.at_once)} for a moment"
        return (
            f"{self._what}{where} is {shown}: "
            f"closes at {self._number(limits.close_at)}, opens again at {self._number(limits.open_at)}"
        )

    def _number(self, value: float) -> str:
        return f"{value * self._scale:.3g}{' ' if self._unit else ''}{self._unit}"

    def _state(self, value: float | None, *, active: bool = True, reason: str = "") -> GuardState:
        limits = self._thresholds
        return GuardState(
            name=self.name,
            open=self._closed_s is None,
            active=active,
            reason=reason,
            value=None if value is None else value * self._scale,
            close_at=None if limits is None else limits.close_at * self._scale,
            open_at=None if limits is None else limits.open_at * self._scale,
            unit=self._unit,
            since_s=self._since_s or 0.0,
            scope=self.scope,
        )


class GraceGuard:
    """Closed until `grace_s` after the first look: what just started is not yet what it will be."""

    name = "start"
    scope = Scope.DEMOTION

    def __init__(self, grace_s: float) -> None:
        """`grace_s`: 0 switches it off."""
        self._grace_s = grace_s
        self._began_s: float | None = None

    def update(self, readings: Mapping[str, Reading], now_s: float) -> GuardState:
        """See `Guard.update`."""
        if self._began_s is None:
            self._began_s = now_s
        passed_s = max(0.0, now_s - self._began_s)
        closed = passed_s < self._grace_s
        return GuardState(
            name=self.name,
            open=not closed,
            active=self._grace_s > 0,
            reason=f"started {passed_s:.3g} s ago: closed for the first {self._grace_s:.3g} s" if closed else "",
            value=passed_s,
            close_at=self._grace_s,
            open_at=self._grace_s,
            unit="s",
            since_s=self._began_s if closed else self._began_s + self._grace_s,
            scope=self.scope,
        )
