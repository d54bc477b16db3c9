"""What all engines of a node share: one reader of the node's state, one ceiling for moving, one budget for scans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memtier_engine.clock import Clock, SystemClock
from memtier_engine.engine.loop import Engine
from memtier_engine.engine.pace import CPU_SHARE, ScanBudget
from memtier_engine.engine.runner import OnFailure, OnReport, Runner
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.guardset import GuardSet
from memtier_engine.guards.readers import NodeReader
from memtier_engine.hostfs.host import Host
from memtier_engine.model import TogetherTracker
from memtier_engine.mover.fair import FairBudget, FairMover
from memtier_engine.mover.mover import open_processes


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What the engines of a node may do together."""

    bandwidth_mib_per_s: float | None = None
    """Ceiling on moved memory, above each engine's own. None: only their own."""
    scan_cpu_share: float = CPU_SHARE
    """Of one core, for the scans of all."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """Where the kernel's triggers for the node's pressure fire."""


class Node:
    """Takes engines in before they run. Methods may be called from any thread."""

    def __init__(
        self, config: NodeConfig | None = None, *, host: Host | None = None, clock: Clock | None = None
    ) -> None:
        """Set up without engines."""
        self.config = config = config or NodeConfig()
        self.host = host or Host()
        self._clock = clock or SystemClock()
        self.reader = NodeReader(self.host, config.guards)
        self.moves = FairBudget(config.bandwidth_mib_per_s, now_s=self._clock.now_s())
        self.files = open_processes(self.host)
        self.scans = ScanBudget(config.scan_cpu_share)
        self.shared: dict[str, Any] = {}
        """What trackers of one kind have together, by the name of the kind."""
        self._epoch_s = self._clock.now_s()

    def adopt(self, engine: Engine, *, cgroups: Iterable[Path] | None = None) -> float:
        """Put an engine that has not run yet under the node's limits.

        Args:
            engine: any; its mover, guards and pace are replaced.
            cgroups: the directories of its own cgroups, where its target does not tell.
        Returns:
            Seconds after which its first scan should be, so that the scans of all are spread out.
        """
        interval_s = engine.config.scan_interval_ms / 1000
        engine.mover.close()
        mover = FairMover(
            engine.mover.config, self.host, budget=self.moves, now_s=self._clock.now_s(), files=self.files
        )
        mover.look = engine.mover.look
        engine.mover = mover
        engine.use_files(self.files)
        directories = engine.guards.cgroups if cgroups is None else tuple(cgroups)
        engine.guards.close()
        engine.guards = GuardSet(
            engine.config.guards, host=self.host, cgroups=directories, node=self.reader, scan_interval_s=interval_s
        )
        if engine.pace is not None:
            engine.pace.close()
        engine.pace = self.scans.join(interval_s)
        now_s, offset_s = self._clock.now_s(), engine.pace.offset_s
        if isinstance(engine.tracker, TogetherTracker):
            engine.tracker.look_together(self.shared, interval_s)
            offset_s = (self._epoch_s - now_s) % interval_s  # so that one reading serves all
        engine.first_scan_at(now_s + offset_s)
        return offset_s

    def run(
        self,
        runner: Runner,
        engine: Engine,
        *,
        cgroups: Iterable[Path] | None = None,
        on_report: OnReport | None = None,
        on_failure: OnFailure | None = None,
        delay_s: float = 0.0,
    ) -> None:
        """Adopt an engine and hand it to the runner, its first scan at its place in the interval."""
        offset_s = self.adopt(engine, cgroups=cgroups)
        runner.add(engine, on_report=on_report, on_failure=on_failure, delay_s=delay_s + offset_s)

    def close(self) -> None:
        """After the engines are closed: remove the triggers. Safe to call twice."""
        self.reader.close()
        self.files.close()
