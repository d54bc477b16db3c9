"""The engine: targets -> tracker -> ages -> policy -> mover, and a report of each step. `loop` puts them together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memtier_engine.engine.loop import Engine as Engine
    from memtier_engine.engine.loop import EngineConfig as EngineConfig
    from memtier_engine.engine.report import StepReport as StepReport

__all__ = ["Engine", "EngineConfig", "StepReport"]


def __getattr__(name: str) -> Any:
    # Late, so that a part of the engine can be imported without all stages.
    if name in __all__:
        from memtier_engine.engine import loop

        return getattr(loop, name)
    raise AttributeError(name)
