"""Tracker `stub`: observes nothing, so that nothing is known and nothing is ever decided."""

from __future__ import annotations

from collections.abc import Iterator

from memtier_engine.hostfs.host import Host
from memtier_engine.model import PageChunk, ProcessId, Spans


class StubTracker:
    """Yields no chunk; pages keep the state "never seen", which no policy moves."""

    name = "stub"
    page_exact = True
    clears_accessed_bits = False

    def __init__(self, host: Host) -> None:
        """`host` is not looked at."""

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """See `Tracker.watch`."""

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        """No chunks."""
        return iter(())

    def close(self) -> None:
        """See `Tracker.close`."""
