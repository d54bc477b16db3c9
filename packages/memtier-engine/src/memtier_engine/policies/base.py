"""What every policy is: page ages and a time in, move tasks out. No IO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from memtier_engine.ages import AgeClock, ProcessPages
from memtier_engine.model import MoveTask, PageChunk, ProcessId


class Policy(Protocol):
    """Decides where memory should be."""

    name: str
    needs_streaks: bool
    """Keep `ProcessPages.streaks` for it."""
    needs_places: bool
    """Keep `ProcessPages.places` for it."""

    def observe(self, process: ProcessId, chunk: PageChunk) -> None:
        """See every chunk of a scan, before `decide`. Most policies have no need of it."""

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """Tasks for the time until the next decision, most urgent first.

        Args:
            pages: every tracked process.
            clock: translates ages to seconds.
            budget_bytes: the mover cannot move more than this before the next decision; None: no limit.
        """
