"""Container events -> engines: started, adopted, reconfigured, restarted, stopped; keyed by container id.

One thread does all of it in the order of the events, so no two hooks can race for a container. Whoever reports
an event only puts it on a queue and goes on.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loguru import logger

from memtier_cli.nri_memtierd import allocator
from memtier_cli.nri_memtierd.classify import ContainerRefused, OnUnknownClass, classify
from memtier_cli.nri_memtierd.config import PluginConfig, WorkloadClass, render
from memtier_cli.nri_memtierd.container_cgroup import CgroupNotFound, ContainerCgroup, find_container_cgroup
from memtier_cli.nri_memtierd.events import ContainerInfo, Ended, Event, Listed, Reconfigured, Started, Stopped
from memtier_cli.nri_memtierd.rundir import CONFIG_NAME, ContainerDirectory, Place, RunDirectory, RunDirError
from memtier_engine.errors import MemtierError

CHECK_S = 1.0
"""Time between looks at whether the engines still run."""
HOUSEKEEPING_S = 30.0
"""Time between looks for cgroups that are gone and outputs that are full."""
RETRY_FIRST_S = 1.0
RETRY_MOST_S = 300.0
STOP_S = 4.0


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine is to do."""

    label: str
    """NAMESPACE/POD:CONTAINER, for people."""
    text: str
    """The memtierd configuration, variables replaced."""
    cgroup: ContainerCgroup
    files: ContainerDirectory


class RunningEngine(Protocol):
    """An engine at work."""

    def ended(self) -> str | None:
        """Why it ended by itself; None while it works."""

    def stop(self) -> None:
        """Begin to stop it, without waiting. Nothing is written to its files afterwards by us."""

    def tend(self) -> None:
        """Bound the files it writes to."""


class Launcher(Protocol):
    """Makes engines."""

    def clean(self, run_directory: RunDirectory) -> None:
        """End the engines that an earlier run of the program left."""

    def configure(self, config: PluginConfig) -> None:
        """What holds for all engines together."""

    def launch(self, job: Job) -> RunningEngine:
        """Start an engine. Raises: MemtierError."""

    def tend(self) -> bool:
        """Finish what was stopped, as far as it has ended; True if it wants to be called again soon."""

    def close(self, timeout_s: float) -> None:
        """Wait for what was stopped; after the time limit, by force."""


@dataclass(slots=True)
class _Managed:
    """A container that has, or shall have, an engine."""

    container: ContainerInfo
    workload_class: WorkloadClass
    job: Job
    place: Place
    due_s: float | None
    """When to launch; None while the engine runs."""
    engine: RunningEngine | None = None
    failures: int = 0


class Fleet:
    """All engines of a node. The methods without underscore may be called from any thread."""

    def __init__(
        self,
        config: PluginConfig | None,
        run_directory: RunDirectory,
        launcher: Launcher,
        *,
        cgroup_root: Path,
        on_unknown_class: OnUnknownClass = "fail",
        now_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._run_directory = run_directory
        self._launcher = launcher
        self._cgroup_root = cgroup_root
        self._on_unknown_class = on_unknown_class
        self._now_s = now_s
        self._wall_s = wall_s
        self._queue: queue.SimpleQueue[Event | threading.Event] = queue.SimpleQueue()
        self._known: dict[str, ContainerInfo] = {}
        self._managed: dict[str, _Managed] = {}
        self._gone: set[str] = set()
        """Stopped before their start was handled."""
        self._check_s = self._housekeeping_s = 0.0
        self._leaving = False
        self._thread = threading.Thread(target=self._work, name="fleet", daemon=True)

    def start(self) -> None:
        """Clean up after an earlier run and begin to handle events."""
        self._thread.start()

    def report(self, event: Event) -> None:
        """Queue an event; returns at once."""
        if isinstance(event, Stopped):
            self._gone.add(event.container_id)
        self._queue.put(event)

    def settle(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything reported so far is handled; False if that took too long."""
        done = threading.Event()
        self._queue.put(done)
        return done.wait(timeout_s)

    def stop(self, timeout_s: float = STOP_S) -> bool:
        """Stop all engines and remove their files; False if that took too long."""
        self.report(Ended())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def managed(self) -> Mapping[str, str]:
        """Container ids with their class, of those that have an engine or wait for one."""
        return {key: each.workload_class.name for key, each in list(self._managed.items())}

    def running(self) -> frozenset[str]:
        """Ids of the containers whose engine runs now."""
        return frozenset(key for key, each in list(self._managed.items()) if each.engine is not None)

    def _work(self) -> None:
        self._guarded(self._clean)
        while True:
            try:
                event = self._queue.get(timeout=self._wait_s())
            except queue.Empty:
                event = None
            if isinstance(event, threading.Event):
                self._guarded(self._tick)
                event.set()
                continue
            if isinstance(event, Ended):
                self._guarded(self._end)
                return
            if event is not None:
                self._guarded(self._handle, event)
            self._guarded(self._tick)

    def _guarded(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except MemtierError as error:
            logger.error("{}", error)
        except Exception:
            # A defect in handling one container must not leave all others without care.
            logger.exception("handling a container event failed")

    def _wait_s(self) -> float:
        now_s = self._now_s()
        due = [each.due_s for each in self._managed.values() if each.due_s is not None]
        if self._managed or self._leaving:
            due.append(self._check_s)
        return max(0.0, min(due, default=now_s + HOUSEKEEPING_S) - now_s)

    def _clean(self) -> None:
        if self._config is not None:
            self._launcher.configure(self._config)
        self._launcher.clean(self._run_directory)
        for place in self._run_directory.leftovers():
            logger.info("{}: removed what an earlier run left", place)
            self._guarded(self._run_directory.remove, place)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Started):
            self._started(event.container)
        elif isinstance(event, Stopped):
            self._gone.discard(event.container_id)
            self._known.pop(event.container_id, None)
            self._drop(event.container_id)
        elif isinstance(event, Listed):
            self._listed(event)
        elif isinstance(event, Reconfigured):
            self._reconfigure(event.config)

    def _started(self, container: ContainerInfo) -> None:
        if container.id in self._gone:
            return
        self._known[container.id] = container
        if container.id not in self._managed:
            self._manage(container)

    def _listed(self, event: Listed) -> None:
        present = {container.id for container in event.running} | event.created
        for container_id in [key for key in self._known if key not in present]:
            self._known.pop(container_id)
            self._drop(container_id)
        if event.adopt:
            for container in event.running:
                self._guarded(self._started, container)

    def _reconfigure(self, config: PluginConfig) -> None:
        self._config = config
        self._launcher.configure(config)
        for container in list(self._known.values()):
            managed = self._managed.get(container.id)
            if managed is not None and self._class_of(container) == managed.workload_class:
                continue
            if managed is not None:
                self._drop(container.id)
            self._guarded(self._manage, container)

    def _class_of(self, container: ContainerInfo) -> WorkloadClass | None:
        """The class with an engine that the container is to have now."""
        try:
            decision = classify(
                container.annotations,
                container.name,
                container.namespace,
                self._config,
                on_unknown_class=self._on_unknown_class,
            )
        except ContainerRefused as error:
            logger.warning("{}: no engine: {}", container, error)
            return None
        chosen = decision.workload_class
        return chosen if chosen is not None and chosen.template is not None else None

    def _manage(self, container: ContainerInfo) -> None:
        chosen = self._class_of(container)
        if chosen is None or chosen.template is None:
            return
        try:
            place = Place(container.namespace, container.pod, container.name)
            cgroup = find_container_cgroup(
                self._cgroup_root,
                container_id=container.id,
                cgroups_path=container.cgroups_path,
                pid=container.pid,
            )
        except (CgroupNotFound, RunDirError) as error:
            logger.warning("{}: no engine: {}", container, error)
            return
        for other_id, other in list(self._managed.items()):
            if other.place == place:  # an earlier instance, whose stop we have not heard of yet
                self._drop(other_id)
        files = self._run_directory.create(place)
        try:
            text = render(chosen.template, cgroup=str(cgroup.path), stats=str(files.stats_path))
            files.write(CONFIG_NAME, text, 0o600)
        except MemtierError:
            self._run_directory.remove(place)
            raise
        job = Job(str(container), text, cgroup, files)
        due_s = self._now_s() + self._grace_left_s(container)
        self._managed[container.id] = _Managed(container, chosen, job, place, due_s)

    def _grace_left_s(self, container: ContainerInfo) -> float:
        grace_s = self._config.grace_s if self._config else 0.0
        age_s = 0.0 if container.started_at_s is None else max(0.0, self._wall_s() - container.started_at_s)
        return max(0.0, grace_s - age_s)

    def _drop(self, container_id: str) -> None:
        managed = self._managed.pop(container_id, None)
        if managed is None:
            return
        if managed.engine is not None:
            managed.engine.stop()
            self._leaving = True
            logger.info("{}: engine stopped", managed.container)
        self._run_directory.remove(managed.place)

    def _tick(self) -> None:
        now_s = self._now_s()
        for managed in list(self._managed.values()):
            if managed.due_s is not None and managed.due_s <= now_s:
                self._launch(managed, now_s)
        if now_s >= self._check_s:
            self._check_s = now_s + CHECK_S
            self._leaving = self._launcher.tend()
            for managed in list(self._managed.values()):
                if managed.engine is not None and (why := managed.engine.ended()) is not None:
                    managed.engine = None
                    self._retry(managed, now_s, f"engine ended: {why}")
        if now_s >= self._housekeeping_s:
            self._housekeeping_s = now_s + HOUSEKEEPING_S
            allocator.release()
            for container_id, managed in list(self._managed.items()):
                if not managed.job.cgroup.is_there():
                    logger.info("{}: its cgroup is gone", managed.container)
                    self._known.pop(container_id, None)
                    self._drop(container_id)
                elif managed.engine is not None:
                    with contextlib.suppress(MemtierError):
                        managed.engine.tend()

    def _launch(self, managed: _Managed, now_s: float) -> None:
        managed.due_s = None
        try:
            managed.engine = self._launcher.launch(managed.job)
        except MemtierError as error:
            self._retry(managed, now_s, f"engine not started: {error}")
            return
        except Exception:
            self._retry(managed, now_s, "engine not started: a defect")
            raise
        logger.info("{}: engine started, class {}", managed.container, managed.workload_class.name)

    def _retry(self, managed: _Managed, now_s: float, why: str) -> None:
        wait_s = min(RETRY_MOST_S, RETRY_FIRST_S * 2.0**managed.failures)
        managed.failures += 1
        managed.due_s = now_s + wait_s
        logger.error("{}: {}; next try in {:.0f} s", managed.container, why, wait_s)
        with contextlib.suppress(MemtierError):
            managed.job.files.append_output(f"{why}\n")

    def _end(self) -> None:
        managed = list(self._managed.values())
        self._managed.clear()
        for each in managed:
            if each.engine is not None:
                each.engine.stop()
        self._launcher.close(STOP_S - 1.0)
        for each in managed:
            self._guarded(self._run_directory.remove, each.place)
