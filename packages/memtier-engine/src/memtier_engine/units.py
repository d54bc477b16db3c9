"""Durations, sizes, rates and percents as people and the reference write them, into numbers. No IO.

One grammar each; a place takes all of it, or says what it leaves out. NUMBER is decimal, with or without a fraction:

    duration  [-+] (NUMBER UNIT)+    ns us µs ms s m h, as Go's time.ParseDuration, and d; 0 needs no unit
    size      [-+] NUMBER [k M G T P E [i]] [B]    each letter is a power of 1024, in upper and lower case
    rate      NUMBER (KiB/s MiB/s GiB/s kB/s MB/s GB/s)    kB, MB and GB are powers of 1000
    percent   NUMBER % [/min]

Any text gives a number or a ConfigError, whose hint says what may be written there. What is less than a byte or a
nanosecond is cut off. A text of more than `TEXT_MOST` characters is nothing of this kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from memtier_engine.errors import ConfigError

TEXT_MOST = 64
INT64_MAX = (1 << 63) - 1
_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_WHOLE = r"[0-9]+"
_POWER_OF_TEN = r"(?:[eE][-+]?[0-9]+)?"
_UNITS_NS: Mapping[str, int] = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, micro sign
    "μs": 10**3,  # U+03BC, Greek letter mu
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}
_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "m"),
    **dict.fromkeys(("hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("day", "days"), "d"),
}
_PREFIXES = "kMGTPE"
_BEYOND = Fraction(1 << 1100)
_RATES_MIB_PER_S: Mapping[str, Fraction] = {
    "KiB/s": Fraction(1, 1024),
    "MiB/s": Fraction(1),
    "GiB/s": Fraction(1024),
    "kB/s": Fraction(10**3, 1 << 20),
    "MB/s": Fraction(10**6, 1 << 20),
    "GB/s": Fraction(10**9, 1 << 20),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """The durations that a place takes; what is not set is as in Go."""

    hint: str = "write it like 500ms, 10s, 5m or 1m30s"
    """What may be written, for the error."""
    bare: str | None = None
    """The unit of a number without one. None: only 0 may have none."""
    days: bool = True
    """Whether `d` is a unit, which it is not in Go."""
    signed: bool = False
    above_zero: bool = False
    whole: bool = False
    """Numbers without a fraction only."""
    loose: bool = False
    """A blank between number and unit, and powers of ten (1e3s), as Go's strconv.ParseFloat takes them."""
    words: bool = False
    """As people type them: blanks between the parts, and units like min and seconds."""

    def nanoseconds(self, text: str, *, key_path: str | None = None) -> int:
        """Raises ConfigError."""
        number, blank = _WHOLE if self.whole else _NUMBER, ""
        if self.loose:
            number, blank = number + _POWER_OF_TEN, r"\s*"
        names = {**{unit: unit for unit in _UNITS_NS}, **(_WORDS if self.words else {})}
        if self.words:
            blank = r"\s*"
        units = "|".join(name for name in sorted(names, key=len, reverse=True) if self.days or names[name] != "d")
        plain = _plain(text)
        minus, rest = plain.startswith("-"), plain[1:] if plain[:1] in ("-", "+") else plain
        part = f"({number}){blank}({units})"
        parts: list[tuple[str, str]] = []
        if minus and not self.signed:
            pass
        elif re.fullmatch(f"(?:{part}{blank})+", rest):
            parts = re.findall(part, rest)
        elif re.fullmatch(number, rest) and (self.bare is not None or _value(rest) == 0):
            parts = [(rest, self.bare or "ns")]
        elif re.fullmatch(number, rest):
            raise ConfigError(f"{_short(text)!r} has no unit", key_path=key_path, hint=self.hint)
        total = sum(_nanoseconds(written, _UNITS_NS[names.get(unit, unit)]) for written, unit in parts)
        if not parts or (self.above_zero and total == 0):
            raise _refusal(text, "no duration" + (" above 0" if self.above_zero else ""), self.hint, key_path)
        if total > INT64_MAX + minus:
            raise ConfigError(f"{_short(text)!r} is more than 292 years", key_path=key_path, hint=self.hint)
        return -total if minus else total

    def seconds(self, text: str, *, key_path: str | None = None) -> float:
        """Raises ConfigError."""
        return self.nanoseconds(text, key_path=key_path) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes that a place takes."""

    hint: str = "a number and k, M, G or T, such as 512M"
    """What may be written, for the error."""
    prefixes: str = _PREFIXES
    any_case: bool = True
    """False: k is a small letter, the others are capitals."""
    i: bool = True
    """Whether Ki may stand for K, and so on."""
    b: bool = True
    """Whether a B may follow."""
    signed: bool = False
    whole: bool = False
    """Numbers without a fraction only."""
    blanks: bool = True
    """Whether blanks may stand behind the number."""
    most_bytes: int = INT64_MAX

    def to_bytes(self, text: str, *, key_path: str | None = None) -> int:
        """Raises ConfigError."""
        pattern = (
            ("([-+]?)" if self.signed else "()")
            + f"({_WHOLE if self.whole else _NUMBER})"
            + (r"\s*" if self.blanks else "")
            + f"(?:([{self.prefixes}])({'i?' if self.i else ''}))?"
            + ("B?" if self.b else "")
        )
        found = re.fullmatch(pattern, _plain(text), re.IGNORECASE | re.ASCII if self.any_case else re.ASCII)
        if found is None:
            raise _refusal(text, "no size", self.hint, key_path)
        power = 0 if found[3] is None else 1 + _PREFIXES.lower().index(found[3].lower())
        value = int(_value(found[2]) * 1024**power)
        if value > self.most_bytes:
            raise ConfigError(
                f"{_short(text)!r} is more than {self.most_bytes} bytes", key_path=key_path, hint=self.hint
            )
        return -value if found[1] == "-" else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The rates that a place takes: above 0."""

    hint: str = "write it like 50MiB/s"
    """What may be written, for the error."""
    bare: str | None = None
    """The unit of a number without one. None: there must be one."""
    loose: bool = False
    """As people type them: without /s, in small letters, without B (a letter then is a power of 1024, as of sizes)."""

    def mib_per_s(self, text: str, *, key_path: str | None = None) -> float:
        """Raises ConfigError."""
        plain = _plain(text)
        found = re.fullmatch(f"({_NUMBER})(?: ?({'|'.join(_RATES_MIB_PER_S)}))?", plain)
        number, unit = ("0", None) if found is None else (found[1], found[2] or self.bare)
        if self.loose and unit is None and (typed := _typed_rate(plain)) is not None:
            number, unit = typed
        if _value(number) == 0:
            raise _refusal(text, "no rate above 0", self.hint, key_path)
        if unit is None:
            raise ConfigError(f"{_short(text)!r} has no unit", key_path=key_path, hint=self.hint)
        return float(_value(number) * _RATES_MIB_PER_S[unit])


@dataclass(frozen=True, slots=True, kw_only=True)
class Percents:
    """The percentages that a place takes."""

    hint: str = "write it like 5%"
    """What may be written, for the error."""
    bare: bool = False
    """Whether the sign may be left out."""
    per_minute: bool = False
    """Whether /min may follow."""
    above_zero: bool = False
    most: float = math.inf

    def percent(self, text: str, *, key_path: str | None = None) -> float:
        """Raises ConfigError."""
        sign = r"\s*%" + (r"(?:\s*/\s*min)?" if self.per_minute else "")
        found = re.fullmatch(f"({_NUMBER})" + (f"(?:{sign})?" if self.bare else sign), _plain(text))
        value = None if found is None else _value(found[1])
        if value is None or value > self.most or (self.above_zero and value == 0):
            raise _refusal(text, "no percentage", self.hint, key_path)
        return float(value)


SIZES = Sizes()
_SHARES = Percents(hint="from 0% to 100%, or a size", most=100)


def parse_size(text: str, *, key_path: str | None = None) -> int:
    """Bytes of "64M", "1.5G", "10 MB", "10GiB" or a plain number.

    The reference takes upper case and whole numbers only; what it takes means the same here.

    Raises:
        ConfigError: it is no size, or negative.
    """
    return SIZES.to_bytes(text, key_path=key_path)


def parse_share(text: str, total_bytes: int, *, key_path: str | None = None) -> int:
    """Bytes of a size, or of a percentage ("8%", "12.5 %") of `total_bytes`.

    Raises:
        ConfigError: it is neither, or beyond 100 %.
    """
    if not text.strip().endswith("%"):
        return parse_size(text, key_path=key_path)
    return int(total_bytes * _SHARES.percent(text, key_path=key_path) / 100)


def _plain(text: str) -> str:
    """The text without blanks around it; of what is too long, something that is nothing."""
    stripped = text.strip()
    return stripped if len(stripped) <= TEXT_MOST else "too long"


def _typed_rate(text: str) -> tuple[str, str] | None:
    """(number, unit) of a rate as people type it; a small b behind a capital stands for bits, which nobody means."""
    found = re.fullmatch(rf"({_NUMBER})\s*([kKmMgG])(i?)([bB]?)(?:/s|ps)?", text)
    if found is None or (found[4] == "b" and found[2].isupper()):
        return None
    letter, is_binary = found[2].upper(), found[3] or not found[4]
    if is_binary:
        return found[1], f"{letter}iB/s"
    return found[1], f"{'k' if letter == 'K' else letter}B/s"


def _nanoseconds(number: str, unit_ns: int) -> int:
    """`number` times `unit_ns`, rounded as time.ParseDuration does: a third of an hour in 19 digits is 20 minutes."""
    if "e" in number.lower():
        return int(_value(number) * unit_ns)
    whole, _, digits = number.partition(".")
    return int(whole or "0") * unit_ns + int(float(digits or "0") * (unit_ns / 10.0 ** len(digits)))


def _value(number: str) -> Fraction:
    """The value of a number in decimal; with a power of ten that no float has, more than any limit."""
    if "e" not in number.lower():
        return Fraction(number)
    value = float(number)  # in constant time, which Fraction("1e999999999") is not
    return Fraction(value) if math.isfinite(value) else _BEYOND


def _refusal(text: str, what: str, hint: str, key_path: str | None) -> ConfigError:
    return ConfigError(f"{_short(text)!r} is {what}", key_path=key_path, hint=hint)


def _short(text: str) -> str:
    return text if len(text) <= TEXT_MOST else f"{text[:TEXT_MOST]}..."
