"""Sizes as people and the reference's configurations write them, into bytes."""

from __future__ import annotations

import re

from memtier_engine.errors import ConfigError

_SIZE = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, *, key_path: str | None = None) -> int:
    """Bytes of "64M", "1.5G", "10 MB", "10GiB" or a plain number; every suffix counts in 1024.

    The reference takes upper case and whole numbers only; what it takes means the same here.

    Raises:
        ConfigError: it is no size, or negative.
    """
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]) or found[1].startswith("-"):
        raise ConfigError(f"{text!r} is no size", key_path=key_path, hint="a number and k, M, G or T, such as 512M")
    value = found[1]
    scale = 1024 ** _POWER[found[2].lower()]
    return int(value) * scale if "." not in value else int(float(value) * scale)


def parse_share(text: str, total_bytes: int, *, key_path: str | None = None) -> int:
    """Bytes of a size, or of a percentage ("8%", "12.5 %") of `total_bytes`.

    Raises:
        ConfigError: it is neither, or beyond 100 %.
    """
    stripped = text.strip()
    if not stripped.endswith("%"):
        return parse_size(text, key_path=key_path)
    try:
        percent = float(stripped[:-1])
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise ConfigError(f"{text!r} is no percentage", key_path=key_path, hint="from 0% to 100%, or a size")
    return int(total_bytes * percent / 100)
