"""Command lines as Go's flag package reads them: `-x` and `--x`, `-x value` and `-x=value`.

Booleans take a value only after `=`; parsing stops at the first word that is no flag, or after `--`. No IO.
"""

from __future__ import annotations

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
    """None: a boolean flag."""
    default: str = ""


@dataclass(slots=True)
class Parsed:
    """The values by name; flags not given are absent."""

    texts: dict[str, str] = field(default_factory=dict)
    booleans: dict[str, bool] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)

    def text(self, flag: str, default: str = "") -> str:
        """The value of a flag with a value."""
        return self.texts.get(flag, default)

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
        elif equals:
            parsed.texts[name] = value
        elif left:
            parsed.texts[name] = left.pop(0)
        else:
            raise UsageError(f"flag needs an argument: -{name}")
    parsed.rest = left
    return parsed


def usage(program: str, flags: Sequence[Flag]) -> str:
    """The help text, in the shape Go prints it."""
    lines = [f"Usage of {program}:"]
    for flag in sorted(flags, key=lambda flag: flag.name):
        lines.append(f"  -{flag.name}" + (f" {flag.value_name}" if flag.value_name else ""))
        default = f" (default {flag.default})" if flag.default else ""
        lines.append(f"    \t{flag.help}{default}")
    return "\n".join(lines)
