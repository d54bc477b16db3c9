"""Policy `stub`: tracking, statistics and routines without any move."""

from __future__ import annotations

from collections.abc import Mapping

from memtier_engine.model import MoveTask, ProcessId
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.policies.base import BasePolicy


class StubPolicy(BasePolicy):
    """Never moves anything."""

    name = "stub"

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """No tasks."""
        return []
