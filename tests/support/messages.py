"""What the engine's library logs, which is silent unless a program switches it on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger


@contextmanager
def messages(level: str) -> Iterator[list[str]]:
    """The texts of this level and above, as they come."""
    found: list[str] = []
    logger.enable("memtier_engine")
    sink = logger.add(lambda message: found.append(message.record["message"]), level=level)
    try:
        yield found
    finally:
        logger.remove(sink)
        logger.disable("memtier_engine")
