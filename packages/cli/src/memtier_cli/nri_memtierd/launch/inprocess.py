"""Engines as threads' work within this process: one view of the node, a few threads for all containers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from loguru import logger

from memtier_cli.nri_memtierd.config import PluginConfig
from memtier_cli.nri_memtierd.container_cgroup import ContainerCgroup
from memtier_cli.nri_memtierd.launch.base import Job
from memtier_cli.nri_memtierd.launch.routines import EngineRoutines, check_routines
from memtier_cli.nri_memtierd.rundir import ContainerDirectory, RunDirectory
from memtier_engine.config.files import Spec, parse
from memtier_engine.engine.asleep import TimedTarget
from memtier_engine.engine.loop import Engine, StepReport
from memtier_engine.engine.node import Node
from memtier_engine.engine.runner import Runner
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import Target
from memtier_engine.trackers.registry import remembering

WORKERS = 2
LOCK_S = 1.0
TRIED_AGAIN_S = 300.0
"""So often at most it is tried anew what this kernel offers."""


def check_template(text: str) -> None:
    """Whether an engine can be made from a template with values in it. Raises: ConfigError."""
    check_routines(parse(text, allow_programs=True).routines)  # which refuses all programs, whatever the text says


class InProcessLauncher:
    """Makes engines that run in this process."""

    def __init__(self, host: Host, *, debug_output: bool = False, workers: int = WORKERS) -> None:
        """`debug_output`: a line per scan goes to memtierd.output."""
        self._host = host
        self._debug_output = debug_output
        self._runner = Runner(workers=workers)
        self._runner.start()
        self._node = Node(host=host)
        self._worked: set[tuple[str, bool]] = set()
        """Trackers that were tried here and work; see `remembering`."""
        self._worked_s = 0.0
        self._trackers: dict[str, str] = {}
        """What `auto` chose here: trying all of them costs a while, and the answer does not change."""

    def clean(self, run_directory: RunDirectory) -> None:
        """Nothing: engines of this kind end with their process."""

    def configure(self, config: PluginConfig) -> None:
        """Share the node's bandwidth and scan budget anew; engines that run keep what they have moved."""
        self._node.moves.set_bandwidth(config.bandwidth_mib_per_s, now_s=time.monotonic())
        self._node.scans.cpu_share = config.scan_cpu_share

    def launch(self, job: Job) -> InProcessEngine:
        """Start an engine.

        Raises:
            ConfigError: the text is no configuration.
            TrackerUnavailable: its tracker does not work here.
        """
        spec = parse(job.text, file=str(job.files.config_path))
        engine = self._build(spec)
        engine.target = PinnedTarget(engine.target, job.cgroup)
        delay_s = self._node.adopt(engine, cgroups=[job.cgroup.path])
        return InProcessEngine(self._runner, engine, spec, job, debug_output=self._debug_output, delay_s=delay_s)

    def steps(self) -> list[tuple[Mapping[str, str], float]]:
        """See `Runner.steps`."""
        return self._runner.steps()

    def tend(self) -> bool:
        """Nothing: the runner closes what was stopped."""
        return False

    def close(self, timeout_s: float) -> None:
        """Wait for the scans and moves that go on now."""
        self._runner.stop(timeout_s=timeout_s)
        self._node.close()

    def _build(self, spec: Spec) -> Engine:
        wanted = spec.tracker.name
        chosen = self._trackers.get(wanted, wanted)
        if time.monotonic() - self._worked_s > TRIED_AGAIN_S:
            self._worked.clear()
            self._worked_s = time.monotonic()
        with remembering(self._worked):
            engine = replace(spec, tracker=replace(spec.tracker, name=chosen)).build(self._host)
        self._trackers[wanted] = engine.tracker.name
        return engine


class InProcessEngine:
    """One engine in the runner."""

    def __init__(
        self, runner: Runner, engine: Engine, spec: Spec, job: Job, *, debug_output: bool, delay_s: float
    ) -> None:
        self._runner = runner
        self._engine = engine
        self._label = job.label
        self._files: ContainerDirectory | None = job.files
        self._lock = threading.Lock()
        self._debug_output = debug_output
        self._failure: str | None = None
        self._routines: EngineRoutines | None = EngineRoutines(spec.routines, self._write, now_s=engine.clock.now_s())
        self._write(f"INFO: tracker {engine.tracker.name}, policy {engine.policy.name}, {job.cgroup.path}\n")
        runner.add(
            engine,
            on_report=self._report,
            on_failure=self._failed,
            on_stuck=self._stuck,
            delay_s=delay_s,
            context={"container": job.label, "engine": f"{engine.policy.name}/{engine.tracker.name}"},
        )

    def ended(self) -> str | None:
        """The text of the exception that ended it; None while it works."""
        return self._failure

    def stop(self) -> None:
        """Take it out; a step that goes on now ends by itself and writes nothing any more."""
        taken = self._lock.acquire(timeout=LOCK_S)  # held while it is written to a disk that may hang
        try:
            self._files = self._routines = None  # the latter refers to us: a cycle would wait for the garbage collector
        finally:
            if taken:
                self._lock.release()
        self._runner.remove(self._engine, timeout_s=0.0)

    def stuck(self) -> bool:
        """See `MayStick.stuck`."""
        return self._runner.is_late(self._engine)

    def tend(self) -> None:
        """What is written is bounded as it is written; where there is less room now, it is cut."""
        if self._lock.acquire(timeout=LOCK_S):
            try:
                if self._files is not None:
                    self._files.trim_output()
            finally:
                self._lock.release()

    def _report(self, report: StepReport) -> None:
        for error in report.errors:
            self._write(f"WARN: {error}\n")
        if self._debug_output:
            self._write(
                f"DEBUG: scan {report.scans}: {report.processes} processes, {report.resident_bytes >> 10} KiB resident,"
                f" {report.candidate_bytes >> 10} KiB to move, {report.moved_bytes_total >> 10} KiB moved,"
                f" {report.paged_out_bytes >> 10} KiB out, {report.not_yet_freed_bytes >> 10} KiB of that not yet free,"
                f" {report.refault_bytes_total >> 10} KiB came back,"
                f" {report.scan_seconds * 1000:.0f} ms\n"
            )
        if (routines := self._routines) is not None:
            routines.run_due(self._engine, report.time_s)

    def _stuck(self, where: str) -> None:
        # Without a line in its output: what the step waits for may be that file.
        self._failure = f"a step does not return: it is in {where}"

    def _failed(self, failure: BaseException) -> None:
        self._failure = f"{type(failure).__name__}: {failure}"
        self._write(f"ERROR: {self._failure}\n")

    def _write(self, text: str) -> None:
        with self._lock, contextlib.suppress(MemtierError):
            if self._files is not None:
                self._files.append_output(text)
        logger.bind(container=self._label).trace("{}", text.rstrip())


class PinnedTarget:
    """The processes of another target, as long as the container's own cgroup exists.

    A cgroup that was made later under the same name belongs to someone else: its processes are not touched.
    """

    def __init__(self, target: Target, cgroup: ContainerCgroup) -> None:
        self._target = target
        self._cgroup = cgroup

    def poll(self) -> frozenset[ProcessId]:
        """See `Target.poll`."""
        if not self._cgroup.is_there():
            return frozenset()
        found = self._target.poll()
        return found if self._cgroup.is_there() else frozenset()

    def run_time_us(self) -> int | None:
        """See `TimedTarget`."""
        return self._target.run_time_us() if isinstance(self._target, TimedTarget) else None
