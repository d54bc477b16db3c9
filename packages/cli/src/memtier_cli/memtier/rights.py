"""What each tracker and mover needs of a process's rights, and what this one has: a part of `memtier check`."""

from __future__ import annotations

from collections.abc import Mapping

Row = Mapping[str, object]


def rows() -> dict[str, Row]:
    """By the names of trackers, movers, extras and of nri-memtierd: what each needs and what of it is missing here."""
    from memtier_engine.hostfs.host import Host
    from memtier_engine.hostfs.privileges import EXTRAS, MOVERS, PLUGIN_NEEDS, TRACKERS, least, missing

    host = Host()
    parts = {
        **{f"tracker {name}": needs for name, needs in sorted(TRACKERS.items())},
        **{f"mover {name}": needs for name, needs in MOVERS.items()},
        **{f"extra {name}": needs for name, needs in EXTRAS.items()},
        "nri-memtierd": PLUGIN_NEEDS,
    }
    return {
        name: {
            "needs": [each.name for each in least(needs)],
            "missing": [need.capability.name for need in missing(host, needs)],
            "why": {need.capability.name: f"{need.why} ({need.source})" for need in needs},
        }
        for name, needs in parts.items()
    }


def table() -> object:
    """The same for a terminal."""
    from rich.table import Table

    made = Table("part", "capabilities it needs, as user 0", "missing here", title="least privileges")
    for name, row in rows().items():
        needs, missing = (", ".join(row[column]) for column in ("needs", "missing"))  # type: ignore[arg-type]
        made.add_row(name, needs or "none", missing or "")
    return made
