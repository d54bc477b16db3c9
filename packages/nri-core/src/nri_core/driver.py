"""What a plugin may ask of whatever drives it; `nri_core.aio.stub.Stub` is that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nri_core.api.adjust import Update
from nri_core.session import Session

SLICE_TIMEOUT_S = 30.0
"""For the updates of one slice: nobody waits for them but us."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one slice of updates."""

    applied: tuple[Update, ...]
    """Confirmed by the runtime."""
    failed: tuple[Update, ...]
    """Not applied according to the runtime; with a TimeoutError nobody knows."""
    error: Exception | None
    """Why all of them failed; None: the runtime answered."""


class Driver(Protocol):
    """The connection of one plugin."""

    name: str
    index: str
    """What the plugin is registered as."""
    session: Session
    """Of the connection that there is, or was last."""

    def stop(self) -> None:
        """See `Stub.stop`."""

    async def update_containers(self, updates: Sequence[Update], *, timeout_s: float | None = None) -> list[Update]:
        """See `Stub.update_containers`."""
        ...

    def update_in_slices(
        self, updates: Iterable[Update], *, at_once: int = 20, timeout_s: float = SLICE_TIMEOUT_S
    ) -> AsyncIterator[Outcome]:
        """See `Stub.update_in_slices`."""
        ...
