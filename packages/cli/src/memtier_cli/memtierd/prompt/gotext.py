"""Values as Go's fmt package prints them. No IO."""

from __future__ import annotations

import json
from collections.abc import Iterable


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
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def share(part: float, whole: float, decimals: int) -> str:
    """Percent of a whole; NaN of nothing."""
    return f"{100 * part / whole:.{decimals}f}" if whole else "NaN"
