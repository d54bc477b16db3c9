"""Times written by an example, as Go's `time.Format` takes it. No IO.

A layout is text in which parts of the reference time, Mon Jan 2 15:04:05 MST 2006, stand for themselves.
Source: https://pkg.go.dev/time#pkg-constants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime

NAMED_LAYOUTS: Mapping[str, str] = {
    # In this order: a name that contains another comes first.
    "unixdate": "Mon Jan _2 15:04:05 MST 2006",
    "rfc850": "Monday, 02-Jan-06 15:04:05 MST",
    "rfc822z": "02 Jan 06 15:04 -0700",
    "rfc822": "02 Jan 06 15:04 MST",
    "rfc3339nano": "2006-01-02T15:04:05.999999999Z07:00",
    "rfc3339": "2006-01-02T15:04:05Z07:00",
    "rfc1123": "Mon, 02 Jan 2006 15:04:05 MST",
    "ansic": "Mon Jan _2 15:04:05 2006",
}
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


class Moment:
    """A point in time with nanoseconds, in a time zone."""

    def __init__(self, unix_ns: int, local: datetime) -> None:
        """`local`: the same point to the second, in the zone wanted."""
        self.unix_ns = unix_ns
        self.local = local

    @classmethod
    def here(cls, unix_ns: int) -> Moment:
        """In this machine's zone."""
        return cls(unix_ns, datetime.fromtimestamp(unix_ns // 1_000_000_000).astimezone())


def _offset(moment: Moment, *, colon: bool, seconds: bool, minutes: bool = True, z: bool = False) -> str:
    delta = moment.local.utcoffset()
    total = int(delta.total_seconds()) if delta is not None else 0
    if z and total == 0:
        return "Z"
    sign, total = ("-" if total < 0 else "+"), abs(total)
    parts = [f"{total // 3600:02d}"]
    if minutes:
        parts.append(f"{total // 60 % 60:02d}")
    if seconds:
        parts.append(f"{total % 60:02d}")
    return sign + (":" if colon else "").join(parts)


def _zone(moment: Moment) -> str:
    name = moment.local.tzname() or "UTC"
    return name if name[:1] not in "+-" else _offset(moment, colon=False, seconds=False)


_ELEMENTS: Mapping[str, Callable[[Moment], str]] = {
    "January": lambda m: _MONTHS[m.local.month - 1],
    "Jan": lambda m: _MONTHS[m.local.month - 1][:3],
    "Monday": lambda m: _DAYS[m.local.weekday()],
    "Mon": lambda m: _DAYS[m.local.weekday()][:3],
    "MST": _zone,
    "002": lambda m: f"{m.local.timetuple().tm_yday:03d}",
    "01": lambda m: f"{m.local.month:02d}",
    "02": lambda m: f"{m.local.day:02d}",
    "03": lambda m: f"{(m.local.hour - 1) % 12 + 1:02d}",
    "04": lambda m: f"{m.local.minute:02d}",
    "05": lambda m: f"{m.local.second:02d}",
    "06": lambda m: f"{m.local.year % 100:02d}",
    "15": lambda m: f"{m.local.hour:02d}",
    "1": lambda m: str(m.local.month),
    "2006": lambda m: f"{m.local.year:04d}",
    "2": lambda m: str(m.local.day),
    "_2006": lambda m: f"_{m.local.year:04d}",  # an underscore before a year is text
    "__2": lambda m: f"{m.local.timetuple().tm_yday:3d}",
    "_2": lambda m: f"{m.local.day:2d}",
    "3": lambda m: str((m.local.hour - 1) % 12 + 1),
    "4": lambda m: str(m.local.minute),
    "5": lambda m: str(m.local.second),
    "PM": lambda m: "PM" if m.local.hour >= 12 else "AM",
    "pm": lambda m: "pm" if m.local.hour >= 12 else "am",
    "-070000": lambda m: _offset(m, colon=False, seconds=True),
    "-07:00:00": lambda m: _offset(m, colon=True, seconds=True),
    "-0700": lambda m: _offset(m, colon=False, seconds=False),
    "-07:00": lambda m: _offset(m, colon=True, seconds=False),
    "-07": lambda m: _offset(m, colon=False, seconds=False, minutes=False),
    "Z070000": lambda m: _offset(m, colon=False, seconds=True, z=True),
    "Z07:00:00": lambda m: _offset(m, colon=True, seconds=True, z=True),
    "Z0700": lambda m: _offset(m, colon=False, seconds=False, z=True),
    "Z07:00": lambda m: _offset(m, colon=True, seconds=False, z=True),
    "Z07": lambda m: _offset(m, colon=False, seconds=False, minutes=False, z=True),
}
# Longer elements first. "Jan" and "Mon" are not looked for inside words that go on in lower case: month, Monkey.
_FRACTION = r"[.,](?:0+|9+)(?![0-9])"
_PATTERN = re.compile(
    "|".join(
        re.escape(name) + ("(?![a-z])" if name in ("Jan", "Mon") else "")
        for name in sorted(_ELEMENTS, key=len, reverse=True)
    )
    + f"|{_FRACTION}"
)


def format_time(layout: str, moment: Moment) -> str:
    """The layout with its elements replaced."""
    return _PATTERN.sub(lambda found: _element(found[0], moment), layout)


def _element(name: str, moment: Moment) -> str:
    known = _ELEMENTS.get(name)
    if known is not None:
        return known(moment)
    digits = f"{moment.unix_ns % 1_000_000_000:09d}".ljust(len(name) - 1, "0")[: len(name) - 1]
    if name[1] == "9":
        digits = digits.rstrip("0")
        return name[0] + digits if digits else ""
    return name[0] + digits


def stamp(text: str, moment: Moment, running_ns: int) -> str:
    """A `timestamp` of statactions: layout names, then layout elements, then `unix...` and `duration...`.

    Args:
        text: the configured text.
        moment: now.
        running_ns: since the routine was started.
    """
    for name, layout in NAMED_LAYOUTS.items():
        text = text.replace(name, layout)
    text = format_time(text, moment)
    for word, value_ns in (("unix", moment.unix_ns), ("duration", running_ns)):
        for suffix, decimals in ((".nano", 9), (".micro", 6), (".milli", 3), (".s", 0), ("", 0)):
            text = text.replace(word + suffix, _decimal(value_ns, decimals))
    return text


def _decimal(value_ns: int, decimals: int) -> str:
    """Seconds with so many decimals, rounded half to even."""
    unit = 10 ** (9 - decimals)
    whole, rest = divmod(value_ns, unit)
    if rest * 2 > unit or (rest * 2 == unit and whole % 2):
        whole += 1
    if not decimals:
        return str(whole)
    seconds, part = divmod(whole, 10**decimals)
    return f"{seconds}.{part:0{decimals}d}"
