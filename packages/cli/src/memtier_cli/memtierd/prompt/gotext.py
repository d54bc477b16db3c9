"""Values as Go's fmt package prints them. No IO."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_WHOLE_MOST = 1e21
"""Larger ones have an exponent in Go too."""


def quoted(text: str) -> str:
    """%q: double quotes and escapes."""
    return json.dumps(text, ensure_ascii=False)


def go_list(values: Iterable[object]) -> str:
    """%v of a slice: [1 2 3]."""
    return "[" + " ".join(map(str, values)) + "]"


def go_bool(value: bool) -> str:
    """%v of a bool."""
    return "true" if value else "false"


def go_json(value: object) -> str:
    """One line of JSON without blanks, as encoding/json writes it: <, > and & are escaped."""
    text = json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    """The same with whole numbers without decimals."""
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list():
            return list(map(_plain, value))
        case float() if value.is_integer() and abs(value) < _WHOLE_MOST:
            return int(value)
        case _:
            return value


def share(part: float, whole: float, decimals: int) -> str:
    """Percent of a whole; NaN of nothing."""
    return f"{100 * part / whole:.{decimals}f}" if whole else "NaN"
