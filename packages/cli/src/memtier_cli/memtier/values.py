"""Values on the command line: durations and bandwidths with their units."""

from __future__ import annotations

import re

import click

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MIB = {"KiB/s": 1 / 1024, "MiB/s": 1.0, "GiB/s": 1024.0, "kB/s": 1e3 / (1 << 20), "MB/s": 1e6 / (1 << 20)}


class Duration(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.2 on
    """`500ms`, `10s`, `5m`, `1h`: seconds as a float."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds, more than 0."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)(ms|s|m|h|d)", str(value).strip())
        if not found or float(found[1]) == 0:
            self.fail(f"{value!r} is not a duration above 0; write it like 500ms, 10s, 5m or 1h", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


class Bandwidth(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`50MiB/s`, or `none`: MiB per second as a float, None for no limit."""

    name = "bandwidth"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """MiB/s, more than 0."""
        if isinstance(value, float):
            return value
        if str(value).strip() == "none":
            return None
        found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?(KiB/s|MiB/s|GiB/s|kB/s|MB/s)", str(value).strip())
        if not found or float(found[1]) == 0:
            self.fail(f"{value!r} is not a bandwidth above 0; write it like 50MiB/s, or none", param, ctx)
        return float(found[1]) * _MIB[found[2]]
