"""Command lines as Go's flag package reads them: `-x` and `--x`, `-x value` and `-x=value`.

Booleans take a value only after `=`; parsing stops at the first word that is no flag, or after `--`. No IO.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_TRUE = {"1", "t", "T", "true", "TRUE", "True"}
_FALSE = {"0", "f", "F", "false", "FALSE", "False"}


class UsageError(Exception):
    """A word that is no flag of this program, or has a value that does not fit; exit status 2."""


class HelpWanted(Exception):
    """-h or -help; exit status 0."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag."""

    name: str
    help: str
    value_name: str | None = None
    """None: a boolean flag. "int", "uint" and "float": the value is such a number."""
    default: str = ""
    """Shown in the usage; text with its quotes."""


_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F_]+|0[oO]?[0-7_]+|0[bB][01_]+|0|[1-9][0-9_]*)")
_OCTAL = re.compile(r"([-+]?)0(_?[0-7][0-7_]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_RANGES = {"int": (-(1 << 63), (1 << 63) - 1), "uint": (0, (1 << 64) - 1)}
_CHARACTERS_MOST = 100


def _integer(text: str) -> int:
    """0x10, 0o10 and 010, 0b1, 1_000: as Go's strconv.ParseInt reads integers. Raises ValueError."""
    if not _INTEGER.fullmatch(text) or len(text) > _CHARACTERS_MOST:
        raise ValueError
    octal = _OCTAL.fullmatch(text)
    return int(f"{octal[1]}0o{octal[2]}" if octal else text, 0)


def _complaint(kind: str, text: str) -> str | None:
    """What is wrong with the value of a flag of this kind, in Go's words."""
    if kind == "float":
        return None if _FLOAT.fullmatch(text) else "parse error"
    if kind not in _RANGES:
        return None
    least, most = _RANGES[kind]
    try:
        value = _integer(text)
    except ValueError:
        return "parse error"
    if kind == "uint" and text.startswith("-"):
        return "parse error"
    return None if least <= value <= most else "value out of range"


@dataclass(slots=True)
class Parsed:
    """The values by name; flags not given are absent."""

    texts: dict[str, str] = field(default_factory=dict)
    booleans: dict[str, bool] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)

    def text(self, flag: str, default: str = "") -> str:
        """The value of a flag with a value."""
        return self.texts.get(flag, default)

    def integer(self, flag: str, default: int) -> int:
        """The value of an "int" or "uint" flag."""
        text = self.texts.get(flag)
        return default if text is None else _integer(text)

    def number(self, flag: str, default: float) -> float:
        """The value of a "float" flag."""
        text = self.texts.get(flag)
        return default if text is None else float(text)

    def has(self, flag: str) -> bool:
        """Whether the flag was given."""
        return flag in self.texts or flag in self.booleans

    def boolean(self, flag: str) -> bool:
        """The value of a boolean flag."""
        return self.booleans.get(flag, False)


def parse(flags: Sequence[Flag], words: Sequence[str]) -> Parsed:
    """Read the command line.

    Raises:
        UsageError: unknown flag, missing or bad value.
        HelpWanted: -h or -help, unless it is a flag of the program.
    """
    known = {flag.name: flag for flag in flags}
    parsed = Parsed()
    left = list(words)
    while left:
        word = left[0]
        if len(word) < 2 or not word.startswith("-"):
            break
        left.pop(0)
        if word == "--":
            break
        name, equals, value = word[2 if word.startswith("--") else 1 :].partition("=")
        if not name or name.startswith(("-", "=")):
            raise UsageError(f"bad flag syntax: {word}")
        flag = known.get(name)
        if flag is None:
            if name in ("h", "help"):
                raise HelpWanted
            raise UsageError(f"flag provided but not defined: -{name}")
        if flag.value_name is None:
            if equals and value not in _TRUE | _FALSE:
                raise UsageError(f'invalid boolean value "{value}" for -{name}: use true or false')
            parsed.booleans[name] = not equals or value in _TRUE
        else:
            if not equals:
                if not left:
                    raise UsageError(f"flag needs an argument: -{name}")
                value = left.pop(0)
            complaint = _complaint(flag.value_name, value)
            if complaint is not None:
                raise UsageError(f'invalid value "{value}" for flag -{name}: {complaint}')
            parsed.texts[name] = value
    parsed.rest = left
    return parsed


def usage(program: str, flags: Sequence[Flag]) -> str:
    """The help text, in the shape Go prints it."""
    lines = [f"Usage of {program}:"]
    for flag in sorted(flags, key=lambda flag: flag.name):
        default = f" (default {flag.default})" if flag.default else ""
        if flag.value_name is None and len(flag.name) == 1:  # short enough for one line
            lines.append(f"  -{flag.name}\t{flag.help}{default}")
            continue
        lines.append(f"  -{flag.name}" + (f" {flag.value_name}" if flag.value_name else ""))
        lines.append(f"    \t{flag.help}{default}")
    return "\n".join(lines)


def version_text(program: str) -> str:
    """What -version prints, in the reference's shape."""
    from importlib.metadata import version  # takes longer than all the rest of a short run

    number = version("memtier-cli")
    return f"{program} version information:\n  - version: {number}\n  - build:   memtier-cli {number}"
