"""The `guards` of a configuration file, decoded: each guard's thresholds, or null to switch it off."""

from __future__ import annotations

from collections.abc import Mapping

from memtier_engine.config.reader import Section
from memtier_engine.errors import ConfigError
from memtier_engine.guards.base import Thresholds
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.skip import SkipRules
from memtier_engine.units import parse_size

THRESHOLDS: Mapping[str, str] = {
    "psimemorynode": "memory_psi_node",
    "psimemorycgroup": "memory_psi_cgroup",
    "psiionode": "io_psi_node",
    "psiiocgroup": "io_psi_cgroup",
    "swapfill": "swap_fill",
    "compression": "compression",
    "refaults": "refaults",
}
"""Keys of a file and fields of `GuardsConfig`."""
_KEYS = {
    **{f"guards.{field}": key for key, field in THRESHOLDS.items()},
    "guards.swap_writes_bytes_per_day": "swapwritesperday",
    "guards.start_grace_s": "startgracems",
    "guards.skip.rss_least_bytes": "skip.rssleast",
}


def decode_guards(root: Section) -> GuardsConfig:
    """The mapping under `guards`; what is missing has its default.

    Raises:
        ConfigError: a key or value that is not understood.
    """
    section = root.section("guards")
    if section is None:
        return GuardsConfig()
    section.use("guards")
    default = GuardsConfig()
    limits = {field: _thresholds(section, key, getattr(default, field)) for key, field in THRESHOLDS.items()}
    writes = None if section.is_off("swapwritesperday") else _size(section, "swapwritesperday")
    grace_ms = section.integer_or_none("startgracems")
    try:
        return GuardsConfig(
            **limits,
            swap_writes_bytes_per_day=writes,
            protection=section.flag("protection"),
            start_grace_s=None if grace_ms is None else grace_ms / 1000,
            skip=_skip(section.section("skip")),
        )
    except ConfigError as failure:
        key = _KEYS.get(failure.key_path or "", "")
        raise section.located(failure, key) from None


def _thresholds(section: Section, key: str, default: Thresholds) -> Thresholds | None:
    if section.is_off(key):
        return None
    own = section.section(key)
    if own is None:
        return default
    own.use("guards.threshold")
    close_at = own.number_or_none("closeat")
    open_at = own.number_or_none("openat")
    if close_at is None and open_at is None:
        close_at, open_at = default.close_at, default.open_at
    elif close_at is None:
        close_at = default.close_at
    elif open_at is None:  # as far from it as by default
        open_at = close_at * default.open_at / default.close_at
    fast_at = own.number_or_none("fastat")
    if fast_at is None and default.fast_at is not None and not own.is_off("fastat"):
        fast_at = max(default.fast_at, close_at)
    assert open_at is not None
    return Thresholds(close_at=close_at, open_at=open_at, hold_s=own.integer("holdms") / 1000, fast_at=fast_at)


def _skip(section: Section | None) -> SkipRules:
    if section is None:
        return SkipRules()
    section.use("guards.skip")
    return SkipRules(
        rss_least_bytes=_size(section, "rssleast"),
        names=section.texts("names"),
        realtime=section.flag("realtime"),
        traced=section.flag("traced"),
    )


def _size(section: Section, key: str) -> int:
    try:
        return parse_size(section.text(key))
    except ConfigError as failure:
        raise section.located(failure, key) from None
