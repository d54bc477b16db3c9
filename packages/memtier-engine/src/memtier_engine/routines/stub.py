"""Routine `stub`: does nothing."""

from __future__ import annotations


class StubRoutine:
    """Is never due before an hour has passed."""

    name = "stub"

    def advance(self, now_s: float) -> float:
        """Nothing."""
        return now_s + 3600.0

    def close(self) -> None:
        """Nothing."""
