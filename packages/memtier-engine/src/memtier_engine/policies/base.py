"""What every policy is: page ages and a time in, move tasks out. No IO.

What a policy wants to know beyond page ages, such as which node a page is on, it is given as an object that
answers questions (`Locator`): the policy decides, others read the kernel's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError
from memtier_engine.model import MoveTask, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import AgeClock, ProcessPages
from memtier_engine.pages.regions import RegionCounters


class Policy(Protocol):
    """Decides where memory should be."""

    name: str
    needs_streaks: bool
    """Keep `ProcessPages.streaks` for it."""
    needs_places: bool
    """Keep `ProcessPages.places` for it."""

    @property
    def interval_ms(self) -> int | None:
        """Least time between two decisions; None: decide after every scan."""

    def begin(self, process: ProcessId, spans: Spans) -> None:
        """A scan of `process` begins and will cover `spans`. Most policies have no need of it."""

    def observe(self, process: ProcessId, chunk: PageChunk) -> None:
        """See every chunk of a scan, before `decide`. Most policies have no need of it."""

    def decide(
        self, pages: Mapping[ProcessId, ProcessPages], clock: AgeClock, budget_bytes: int | None
    ) -> list[MoveTask]:
        """Tasks for the time until the next decision, most urgent first.

        Args:
            pages: every tracked process.
            clock: translates ages to seconds, and knows the time of the scan.
            budget_bytes: the mover cannot move more than this before the next decision; None: no limit.
        """

    def close(self) -> None:
        """Give back what it was given to own. Safe to call twice."""


def check_interval(interval_ms: int, default_ms: int = 5000) -> None:
    """Raise ConfigError for an interval between decisions that is none."""
    if interval_ms <= 0:
        raise ConfigError(f"value {interval_ms}", key_path="intervalms", hint=f"use 1 or more; default {default_ms}")


class BasePolicy:
    """What most policies have in common: inherit it and write `decide`."""

    name = "unnamed"
    needs_streaks = False
    needs_places = False
    _interval_ms: int | None = None

    @property
    def interval_ms(self) -> int | None:
        """See `Policy.interval_ms`."""
        return self._interval_ms

    def begin(self, process: ProcessId, spans: Spans) -> None:
        """See `Policy.begin`."""

    def observe(self, process: ProcessId, chunk: PageChunk) -> None:
        """See `Policy.observe`."""

    def close(self) -> None:
        """See `Policy.close`."""


class RegionPolicy(BasePolicy):
    """A policy by counters of regions instead of page ages."""

    def __init__(self, interval_ms: int, regions: RegionCounters | None) -> None:
        """`regions`: how memory is cut and counted; None: 512 pages, without a cap."""
        self.regions = regions or RegionCounters()
        self._interval_ms = interval_ms

    def begin(self, process: ProcessId, spans: Spans) -> None:
        """See `Policy.begin`."""
        self.regions.begin(process, spans)

    def observe(self, process: ProcessId, chunk: PageChunk) -> None:
        """Count what was touched."""
        self.regions.add(process, chunk)


class Locator(Protocol):
    """Knows where pages are."""

    def nodes(self, process: ProcessId, spans: Spans) -> NDArray[np.int16]:
        """int16[pages of spans]: NUMA node, `SWAP_NODE`, `NOWHERE` or `NOT_OURS`.

        Raises:
            ProcessGone: it exited.
        """
