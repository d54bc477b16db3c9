"""Forecaster `chain`: each forecaster gets what the one before it made of the heats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from memtier_engine.errors import MemtierError
from memtier_engine.model import ProcessId
from memtier_engine.policies.heat import Forecaster
from memtier_engine.policies.heatmap import Heats


class ChainForecaster:
    """The last forecast of the chain. One that fails or has none is passed over."""

    name = "chain"

    def __init__(self, forecasters: Sequence[Forecaster], *, on_event: Callable[[str], None] | None = None) -> None:
        """`on_event` hears of the ones that failed."""
        self.forecasters = tuple(forecasters)
        self._on_event = on_event or (lambda name: None)

    def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
        """The heats after all forecasters; its own input if none has a forecast."""
        for forecaster in self.forecasters:
            try:
                result = forecaster.forecast(heats, now_ns)
            except MemtierError as failure:
                self._on_event(f"forecaster {forecaster.name} error: {failure}")
                continue
            if result is not None:
                heats = result
        return heats

    def close(self) -> None:
        """Close them all."""
        for forecaster in self.forecasters:
            forecaster.close()
