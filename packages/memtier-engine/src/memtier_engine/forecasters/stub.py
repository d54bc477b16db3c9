"""Forecaster `stub`: never has a forecast."""

from __future__ import annotations

from collections.abc import Mapping

from memtier_engine.model import ProcessId
from memtier_engine.policies.heatmap import Heats


class StubForecaster:
    """Takes anything, answers nothing."""

    name = "stub"

    def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
        """None."""
        return None

    def close(self) -> None:
        """Nothing to give back."""
