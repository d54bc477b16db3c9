"""Trackers that the prompt works with: its own, on processes chosen by hand, and that of the current policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from memtier_cli.memtierd.prompt.command import Machine
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.owned import PolicyOwned
from memtier_engine.config.files import parse_tracker
from memtier_engine.config.parts import TRACKERS, TrackerSpec
from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.engine.runner import EngineThread
from memtier_engine.errors import MemtierError
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.occupied import occupied
from memtier_engine.model import ProcessId, Spans, Tracker
from memtier_engine.pages.regions import Counters, RegionCounters
from memtier_engine.policies.stub import StubPolicy
from memtier_engine.stats.counts import AccessCounts
from memtier_engine.stats.raw_events import RawEvents
from memtier_engine.targets.base import identify
from memtier_engine.targets.chosen import ChosenTarget
from memtier_engine.trackers.finder import FinderConfig, FinderTracker
from memtier_engine.trackers.registry import TRACKERS as ONE_BY_ONE
from memtier_engine.trackers.registry import why_not

_SCAN_INTERVAL_MS = 5000
NO_GUARDS = GuardsConfig(
    memory_psi_node=None,
    memory_psi_cgroup=None,
    io_psi_node=None,
    io_psi_cgroup=None,
    swap_fill=None,
    swap_writes_bytes_per_day=None,
    compression=None,
    refaults=None,
    start_grace_s=0.0,
)
"""For an engine that only looks."""


class AnyTracker(Protocol):
    """What the command `tracker` can ask for."""

    @property
    def name(self) -> str:
        """Of the component."""

    @property
    def config_text(self) -> str | None:
        """As it was given; None: never configured."""

    def configure(self, text: str, file: str | None = None) -> None:
        """Take a configuration. Raises ConfigError, CommandError."""

    def start(self, pids: Iterable[int]) -> None:
        """Forget all processes, track these. Raises MemtierError, CommandError."""

    def stop(self) -> None:
        """Stop scanning; counters stay. Raises CommandError."""

    def tables(self) -> Mapping[ProcessId, Counters]:
        """What was counted since the last reset."""

    def reset(self) -> None:
        """Count from 0."""

    @property
    def raw(self) -> RawEvents:
        """The recording of single scans."""

    def finders(self) -> list[tuple[int, Mapping[ProcessId, Spans]]]:
        """(index among the parts of `multi`, ranges) of each finder in it."""

    def close(self) -> None:
        """Give everything back. Safe to call twice."""


class OwnTracker:
    """A tracker made by a command."""

    def __init__(self, machine: Machine, name: str) -> None:
        """Raises CommandError for a name that is none; MemtierError: it does not work here."""
        if name not in TRACKERS:
            raise CommandError(f'creating tracker failed: invalid tracker name "{name}"')
        why = why_not(name, machine.host) if name in ONE_BY_ONE else None
        if why is not None:
            hint = f" ({why[1]})" if why[1] else ""
            raise CommandError(f"creating tracker failed: {why[0]}{hint}")
        self.name = name
        self.config_text: str | None = None
        self.target = ChosenTarget(machine.host)
        self._spec = TrackerSpec(name, _SCAN_INTERVAL_MS)
        self._machine = machine
        self._thread: EngineThread | None = None
        self._counts = AccessCounts(self._spec.regions())
        self._raw = RawEvents(self._spec.regions())

    def configure(self, text: str, file: str | None = None) -> None:
        """See `AnyTracker.configure`. A running one goes on with the new configuration."""
        self._spec = parse_tracker(self.name, text, file=file)
        self.config_text = text
        running = self._thread is not None and self._thread.running
        self.stop()
        recording = self._raw.on
        self._counts, self._raw = AccessCounts(self._spec.regions()), RawEvents(self._spec.regions())
        if recording:
            self._raw.start()
        if running:
            self._run()

    def start(self, pids: Iterable[int]) -> None:
        """See `AnyTracker.start`."""
        self.stop()
        self._counts.clear()
        self.target.choose(pids)
        self._run()

    def _run(self) -> None:
        host, statistics = self._machine.host, self._machine.statistics
        config = EngineConfig(
            tracker=self.name,
            scan_interval_ms=self._spec.scan_interval_ms or _SCAN_INTERVAL_MS,
            guards=NO_GUARDS,
        )
        engine = Engine(
            self.target,
            config,
            host=host,
            tracker=self._build(),
            policy=StubPolicy(),  # moves nothing
            observers=(statistics, self._counts, self._raw),
        )
        self._thread = EngineThread(engine)
        self._thread.start()

    def _build(self) -> Tracker:
        if self.name == "multi" and not self._spec.parts:
            raise CommandError("start failed: multi has no trackers yet, use -config")
        return self._spec.build(self._machine.host)

    def stop(self) -> None:
        """See `AnyTracker.stop`."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def add(self, pids: Iterable[int]) -> None:
        """Track these too, as a watcher says."""
        self.target.add(pids)

    def remove(self, pids: Iterable[int]) -> None:
        """Track these no more."""
        self.target.remove(pids)

    def tables(self) -> Mapping[ProcessId, Counters]:
        """See `AnyTracker.tables`. A finder looks at once, others tell what their scans saw."""
        if self.name == "finder":
            options = self._spec.options if isinstance(self._spec.options, FinderConfig) else FinderConfig()
            return found_counters(self._machine.host, options, self.target.pids())
        return self._counts.tables()

    def reset(self) -> None:
        """See `AnyTracker.reset`."""
        self._counts.reset()

    @property
    def raw(self) -> RawEvents:
        """See `AnyTracker.raw`."""
        return self._raw

    def finders(self) -> list[tuple[int, Mapping[ProcessId, Spans]]]:
        """See `AnyTracker.finders`."""
        return [
            (index, found_now(self._machine.host, FinderConfig(), self.target.pids()))
            for index, part in enumerate(self._spec.parts or (self._spec,))
            if part.name == "finder"
        ]

    def close(self) -> None:
        """See `AnyTracker.close`."""
        self.stop()


def _constant(spans: Spans, accesses: int) -> Counters:
    zeros = np.zeros(len(spans), np.int64)
    return Counters(spans.starts, spans.ends, zeros + accesses, zeros)


def found_counters(host: Host, options: FinderConfig, pids: Iterable[int]) -> dict[ProcessId, Counters]:
    """What a finder counts: the same number for each range, however often it looked."""
    found = found_now(host, options, pids)
    return {process: _constant(spans, options.report_accesses) for process, spans in found.items()}


def found_now(host: Host, options: FinderConfig, pids: Iterable[int]) -> dict[ProcessId, Spans]:
    """The ranges that a finder reports of each of these processes that is alive."""
    finder = FinderTracker(host, options)
    found = {}
    for process in sorted(identify(host, pids)):
        try:
            found[process] = finder.find(process, occupied(host, process.pid))
        except MemtierError:
            continue  # it exited
    return found


class PolicyTracker(PolicyOwned):
    """The tracker of the current policy: it can be asked, and is steered by its policy."""

    kind = "tracker"

    @property
    def name(self) -> str:
        """Of the tracker."""
        spec = self._policy.spec
        return "stub" if spec is None else spec.tracker.name

    def start(self, pids: Iterable[int]) -> None:
        """Refused."""
        raise self._refusal("use policy -start")

    def tables(self) -> Mapping[ProcessId, Counters]:
        """See `AnyTracker.tables`."""
        spec = self._policy.spec
        if spec is not None and isinstance(spec.tracker.options, FinderConfig):
            return found_counters(self._policy.host, spec.tracker.options, self._policy.pids())
        return self._policy.counts.tables()

    def reset(self) -> None:
        """See `AnyTracker.reset`; what the policy itself goes by is not touched."""
        self._policy.counts.reset()

    @property
    def raw(self) -> RawEvents:
        """See `AnyTracker.raw`."""
        return self._policy.raw

    def finders(self) -> list[tuple[int, Mapping[ProcessId, Spans]]]:
        """See `AnyTracker.finders`."""
        spec = self._policy.spec
        parts = () if spec is None else spec.tracker.parts or (spec.tracker,)
        return [
            (index, found_now(self._policy.host, FinderConfig(), self._policy.pids()))
            for index, part in enumerate(parts)
            if part.name == "finder"
        ]


def regions_of(spec: TrackerSpec | None) -> RegionCounters:
    """How memory is cut for counters of a tracker."""
    return RegionCounters() if spec is None else spec.regions()
