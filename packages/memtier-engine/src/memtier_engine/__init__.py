"""Finds which memory of processes is not used, and pages it out or moves it to another NUMA node.

from memtier_engine import Engine

for report in Engine.for_pid(1234, idle_after_s=10).run(duration_s=60):
    print(report.resident_bytes, report.paged_out_bytes)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loguru import logger

if TYPE_CHECKING:
    from memtier_engine.engine.loop import Engine as Engine
    from memtier_engine.engine.loop import EngineConfig as EngineConfig
    from memtier_engine.engine.loop import StepReport as StepReport

__all__ = ["Engine", "EngineConfig", "StepReport", "from_yaml"]

logger.disable("memtier_engine")  # a program that wants our messages enables them


def __getattr__(name: str) -> Any:
    # numpy takes longer to import than `memtier --version` may: only who uses the engine pays for it.
    if name == "from_yaml":
        from memtier_engine.config import files

        return files.from_yaml
    if name in __all__:
        from memtier_engine import engine

        return getattr(engine, name)
    raise AttributeError(name)
