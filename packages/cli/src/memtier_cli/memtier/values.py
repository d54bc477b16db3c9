"""Values on the command line: durations and bandwidths with their units."""

from __future__ import annotations

import click

from memtier_engine.errors import ConfigError
from memtier_engine.units import Durations, Rates

_DURATIONS = Durations(above_zero=True, words=True)
_RATES = Rates(hint="write it like 50MiB/s, or none", loose=True)


class Duration(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.2 on
    """`500ms`, `10s`, `5 min`, `1h30m`: seconds as a float."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds, more than 0."""
        if isinstance(value, float):
            return value
        try:
            return _DURATIONS.seconds(str(value))
        except ConfigError as failure:
            self.fail(f"{failure.message}; {failure.hint}", param, ctx)


class Bandwidth(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`50MiB/s`, `50MB`, or `none`: MiB per second as a float, None for no limit."""

    name = "bandwidth"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """MiB/s, more than 0."""
        if isinstance(value, float):
            return value
        if str(value).strip().lower() == "none":
            return None
        try:
            return _RATES.mib_per_s(str(value))
        except ConfigError as failure:
            self.fail(f"{failure.message}; {failure.hint}", param, ctx)
