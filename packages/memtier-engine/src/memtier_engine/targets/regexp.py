"""Go's regular expressions (RE2) as Python's, as far as they mean the same; the rest is refused with a reason.

Source: https://github.com/google/re2/wiki/Syntax. Python's matcher backtracks: a pattern with nested repetitions
can take long on a long text, so what it is run on must be short.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache

from memtier_engine.errors import ConfigError

_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": r"0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
_POSIX = re.compile(r"\[:(\^?)([a-z]+):\]")
_GROUP_FLAGS = re.compile(r"\(\?([imsU]*)(-[imsU]+)?([:)])")
_ONLY_PYTHON = {
    "(?=": "look-ahead",
    "(?!": "look-ahead",
    "(?<=": "look-behind",
    "(?<!": "look-behind",
    "(?(": "a conditional group",
    "(?>": "an atomic group",
    "(?P=": "a back-reference",
    "(?#": "a comment",
}


def compile_re2(pattern: str, *, key_path: str | None = None) -> re.Pattern[str]:
    """The pattern, to be used with `search`: matches are not anchored.

    Raises:
        ConfigError: it is no regular expression, or not one that Go and Python both know.
    """
    try:
        return re.compile(_translated(pattern), re.ASCII)
    except _NotTheSame as reason:
        raise ConfigError(f"{pattern!r} has {reason}", key_path=key_path, hint="use RE2 syntax without it") from None
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}", key_path=key_path) from None


_CATEGORY = re.compile("C[cfos]?|L[lmotu]?|M[cen]?|N[dlo]?|P[cdefios]?|S[ckmo]?|Z[lps]?")
_UNICODE_CLASS = re.compile(r"\\([pP])(?:\{(\^?)([A-Za-z_]+)\}|([A-Z]))")


class _NotTheSame(Exception):
    pass


def _translated(pattern: str) -> str:
    out: list[str] = []
    at = 0
    in_class = False
    multiline = False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            piece, at = _escape(pattern, at, in_class)
            out.append(piece)
        elif in_class:
            found = _POSIX.match(pattern, at)
            if found is not None:
                if found[1] or found[2] not in _CLASSES:
                    raise _NotTheSame(f"the class {found[0]}")
                out.append(_CLASSES[found[2]])
                at = found.end()
                continue
            in_class = char != "]"
            out.append("\\[" if char == "[" else char)  # Python warns of a bare [ in a class
            at += 1
        elif char == "[":
            in_class = True
            end = at + 1 + (pattern[at + 1 : at + 2] == "^")
            end += pattern[end : end + 1] == "]"  # a ] that comes first is a character
            out.append(pattern[at:end])
            at = end
        elif char == "(" and pattern[at + 1 : at + 2] == "?":
            for prefix, what in _ONLY_PYTHON.items():
                if pattern.startswith(prefix, at):
                    raise _NotTheSame(what)
            piece, at, turned_on = _group(pattern, at)
            multiline |= turned_on
            out.append(piece)
        elif char == "$" and not multiline:
            out.append(r"\Z")  # Python's $ also matches before a newline at the end
            at += 1
        elif char in "*+?}" and pattern[at + 1 : at + 2] == "+":
            raise _NotTheSame("a possessive repetition")
        else:
            out.append(char)
            at += 1
    return "".join(out)


def _escape(pattern: str, at: int, in_class: bool) -> tuple[str, int]:
    two = pattern[at : at + 2]
    if two == r"\Q":
        end = pattern.find(r"\E", at + 2)
        text = pattern[at + 2 : len(pattern) if end < 0 else end]
        return re.escape(text), len(pattern) if end < 0 else end + 2
    if two == r"\z":
        return r"\Z", at + 2
    if pattern.startswith(r"\x{", at):
        end = pattern.find("}", at)
        try:
            return re.escape(chr(int(pattern[at + 3 : end], 16))), end + 1
        except (ValueError, OverflowError):
            raise _NotTheSame("a character number that is none") from None
    if two[1:].isdigit() and two != r"\0":
        raise _NotTheSame("a back-reference")
    if two in (r"\p", r"\P"):
        return _unicode_class(pattern, at, in_class)
    if two[1:] in ("Z", "C") or (two == r"\E" and not in_class):
        raise _NotTheSame(two)
    return two, at + 2


def _unicode_class(pattern: str, at: int, in_class: bool) -> tuple[str, int]:
    r"""\pL, \p{Lu}, \P{^M}: characters by their general category."""
    found = _UNICODE_CLASS.match(pattern, at)
    if found is None:
        raise _NotTheSame("a class of Unicode without its name")
    not_in, turned, name = found[1] == "P", bool(found[2]), found[3] or found[4]
    if name != "Any" and not _CATEGORY.fullmatch(name):
        raise _NotTheSame(f"{found[0]}, which is no general category of Unicode, such as L, Lu or Sc")
    ranges = _ranges_of("" if name == "Any" else name, without=not_in != turned)
    return (ranges if in_class else f"[{ranges}]"), found.end()


@cache
def _ranges_of(category: str, *, without: bool) -> str:
    """All characters whose category begins so, or all others, as they stand in brackets."""
    codes = range(sys.maxunicode + 1)
    chosen = [code for code in codes if unicodedata.category(chr(code)).startswith(category) != without]
    spans: list[list[int]] = []
    for code in chosen:
        if spans and spans[-1][1] == code - 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    if not spans:
        raise _NotTheSame("a class of no character")
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in spans)


def _group(pattern: str, at: int) -> tuple[str, int, bool]:
    """(text, where it goes on, whether it turns on multi-line mode) of a group that begins with `(?`."""
    found = _GROUP_FLAGS.match(pattern, at)
    if found is None:
        if pattern.startswith("(?<", at):
            return "(?P<", at + 3, False  # Go 1.22 takes both spellings
        return "(?", at + 2, False
    flags = found[1] + (found[2] or "")
    if "U" in flags:
        raise _NotTheSame("the flag U")
    if found[3] == ")":
        if at:
            raise _NotTheSame("flags that are not at its beginning")
        if found[2]:
            raise _NotTheSame("flags that are switched off at its beginning")
    return found[0], found.end(), "m" in found[1]
