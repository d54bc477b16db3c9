"""The policy that the prompt works with: its configuration, and the engine that runs it beside the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loguru import logger

from memtier_cli.memtierd.prompt.command import Machine
from memtier_cli.memtierd.prompt.configs import has_part
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.tracker_part import PolicyTracker, regions_of
from memtier_cli.memtierd.prompt.watcher_part import PolicyWatcher
from memtier_engine.config.files import Spec, parse_policy
from memtier_engine.config.policies import POLICIES
from memtier_engine.engine.loop import Engine, StepReport
from memtier_engine.engine.runner import EngineThread
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import read_swaps
from memtier_engine.mover.control import MoverControl
from memtier_engine.stats.counts import AccessCounts
from memtier_engine.stats.raw_events import RawEvents


class PolicyPart:
    """One policy. It may be configured, started and stopped any number of times."""

    def __init__(
        self,
        machine: Machine,
        name: str,
        *,
        spec: Spec | None = None,
        text: str | None = None,
        on_failure: Callable[[Exception], None] | None = None,
        asked: bool = True,
    ) -> None:
        """Not started.

        Args:
            machine: whose host and statistics it uses.
            name: of the policy.
            spec: its configuration, decoded; None: not configured yet.
            text: its configuration as it was given.
            asked: whether anybody can ask for counters: what nobody asks for is not counted.
            on_failure: told when the engine ends by an error, in its thread; None: it is logged.
        Raises:
            CommandError: no policy has that name.
        """
        if name not in POLICIES:
            raise CommandError(f'invalid policy name "{name}"')
        self.name = name
        self.spec = spec
        self.config_text = text
        self._machine = machine
        self._on_failure = on_failure
        self._asked = asked
        self._thread: EngineThread | None = None
        self._latest: EngineThread | None = None
        """Stays after the stop: what it saw last can be looked at."""
        self._renew_counts()
        self.tracker = PolicyTracker(self) if has_part(name, "tracker") else None
        self.watcher = PolicyWatcher(self) if has_part(name, "pidwatcher") else None

    def configure(self, text: str, file: str | None = None) -> None:
        """Take a configuration; a running policy goes on with the new one. Raises ConfigError, MemtierError."""
        self.spec = parse_policy(self.name, text, file=file)
        self.config_text = text
        if self.running:
            self.stop()
            self.start()

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._thread is not None and self._thread.running

    def start(self) -> None:
        """Build the engine and run it. Raises CommandError, MemtierError."""
        if self.running:
            raise CommandError("start failed: already started")
        if self.spec is None:
            if self.name != "stub":
                raise CommandError("start failed: not configured, use -config")
            self.spec = parse_policy("stub", "")
        self._renew_counts()
        observers = (self._machine.statistics, self.counts, self.raw) if self._asked else ()
        engine = self.spec.build(self._machine.host, observers=observers, events=True)
        logger.info("tracker {}, policy {}", engine.tracker.name, engine.policy.name)
        if self.spec.swaps and not read_swaps(self._machine.host):
            logger.warning("there is no swap: nothing can be paged out until some is turned on (swapon)")
        self._thread = self._latest = EngineThread(engine, on_report=_log_report, on_failure=self._on_failure)
        self._thread.start()

    def stop(self) -> None:
        """End the engine; what is swapped out stays so. Does nothing if it does not run."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()

    @property
    def mover(self) -> MoverControl | None:
        """The door to its mover; None while it does not run, or moves nothing."""
        thread = self._thread  # another thread may stop it meanwhile
        if thread is None or not thread.running or self.name == "stub":
            return None
        return thread.mover

    @contextmanager
    def held(self) -> Iterator[Engine]:
        """The engine between two steps. Raises CommandError: it does not run."""
        thread = self._thread
        if thread is None or not thread.running:
            raise CommandError("policy is not started")
        with thread.held() as engine:
            yield engine

    @contextmanager
    def seen(self) -> Iterator[Engine | None]:
        """The engine between two steps, or as it was at the stop; None: it was never started."""
        thread = self._latest
        if thread is None:
            yield None
            return
        with thread.held() as engine:
            yield engine

    @property
    def host(self) -> Host:
        """The machine."""
        return self._machine.host

    def pids(self) -> list[int]:
        """The processes it follows, or followed at its stop; empty if it was never started."""
        with self.seen() as engine:
            return [] if engine is None else sorted(process.pid for process in engine.pages)

    def close(self) -> None:
        """Stop. Safe to call twice."""
        self.stop()

    def _renew_counts(self) -> None:
        tracker = None if self.spec is None else self.spec.tracker
        self.counts = AccessCounts(regions_of(tracker))
        self.raw = RawEvents(regions_of(tracker))


def _log_report(report: StepReport) -> None:
    logger.debug(
        "{} processes, {} MiB resident, {} MiB paged out, {} MiB refaulted, scan {:.0f} ms",
        report.processes,
        report.resident_bytes >> 20,
        report.paged_out_bytes >> 20,
        report.refault_bytes_total >> 20,
        report.scan_seconds * 1000,
    )
