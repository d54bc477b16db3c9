"""A reconciler: which containers run, which engine each should have, which it has; the difference is worked off.

Events only change what is known. After each of them, and at every tick, `reconcile` looks at each container, guarded
from the others: whatever fails for one is tried again for that one, less and less often. One thread does all of it,
so no two hooks can race for a container; whoever reports an event only puts it on a queue and goes on.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from loguru import logger

from memtier_cli import allocator
from memtier_cli.nri_memtierd.care import Care, Cares, Litter
from memtier_cli.nri_memtierd.classify import ContainerRefused, OnUnknownClass, classify
from memtier_cli.nri_memtierd.config import PluginConfig, WorkloadClass, render
from memtier_cli.nri_memtierd.container_cgroup import CgroupTree
from memtier_cli.nri_memtierd.events import (
    ContainerInfo,
    Ended,
    Event,
    Listed,
    Reconfigured,
    Started,
    Stopped,
    Synchronized,
)
from memtier_cli.nri_memtierd.launch.base import Job, Launcher, MayStick, RunningEngine
from memtier_cli.nri_memtierd.rundir import CONFIG_NAME, RunDirectory
from memtier_engine.errors import MemtierError

CHECK_S = 1.0
"""Time between looks at whether the engines still run."""
BEAT_S = 5.0
"""Without anything to do, the fleet shows at least so often that it lives."""
AFTER_LIST_S = 0.05
"""A list comes just before the runtime gets its answer, for which this thread would compete with the event loop."""
AT_ONCE_S = 0.05
"""For so long containers are looked at in a row while events wait: thousands of engines take a while to start."""
HOUSEKEEPING_S = 30.0
"""Time between looks for cgroups that are gone and outputs that are full."""
STOP_S = 4.0


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
        beat: Callable[[str], object] = lambda doing: None,
    ) -> None:
        """`beat` is called with what is about to be done, empty before a wait: for whoever watches the fleet."""
        self._config = config
        self._run_directory = run_directory
        self._launcher = launcher
        self._cgroup_root = cgroup_root
        self._on_unknown_class = on_unknown_class
        self._now_s = now_s
        self._wall_s = wall_s
        self._beat = beat
        self._queue: queue.SimpleQueue[Event | threading.Event] = queue.SimpleQueue()
        self._cares = Cares()
        self._litter = Litter(run_directory)
        self._stuck: dict[str, list[MayStick]] = {}
        """Stopped engines, by container id, in a step that has not returned."""
        self._rest: list[Care] = []
        """Of a round that was broken off: those who have not had their turn."""
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

    def is_alive(self) -> bool:
        """Whether its thread works."""
        return self._thread.is_alive()

    def managed(self) -> Mapping[str, str]:
        """Container ids with their class, of those that have an engine or wait for one."""
        return {care.container.id: care.wanted.name for care in self._cares.all() if care.wanted is not None}

    def containers(self) -> list[ContainerInfo]:
        """Those that run, with an engine or without."""
        return [care.container for care in self._cares.all()]

    def running(self) -> frozenset[str]:
        """Ids of the containers whose engine runs now."""
        return frozenset(care.container.id for care in self._cares.all() if care.engine is not None)

    def status(self) -> list[dict[str, object]]:
        """Each container that names a class or values of ours, with what it has and, if that is no engine, why."""
        now_s = self._now_s()
        return [care.status(now_s) for care in self._cares.all()]

    def _work(self) -> None:
        self._beat("cleaning up")
        self._guarded(self._clean)
        while True:
            self._beat("")
            try:
                event = self._queue.get(timeout=self._wait_s())
            except queue.Empty:
                event = None
            self._beat("handling events")
            if isinstance(event, Ended):
                self._guarded(self._end)
                return
            if event is not None and not isinstance(event, threading.Event):
                self._guarded(self._handle, event)
            self._guarded(self._tick)
            if isinstance(event, threading.Event):
                if self._rest:
                    self._queue.put(event)  # not settled before everybody had a turn
                else:
                    event.set()

    def _guarded(self, call: Callable[..., None], *arguments: object) -> None:
        """A defect in one matter must not leave all others without care."""
        about = next((argument for argument in arguments if isinstance(argument, (Care, ContainerInfo))), None)
        label = str(about.container if isinstance(about, Care) else about)
        with logger.contextualize(**({} if about is None else {"container": label})):
            try:
                call(*arguments)
            except MemtierError as error:
                logger.error("{}", error)
            except Exception:
                logger.exception("{} failed", call.__name__.strip("_"))

    def _wait_s(self) -> float:
        due_s = min(self._cares.soonest_s, self._litter.soonest_s)
        if len(self._cares) or self._leaving:
            due_s = min(due_s, self._check_s)
        return min(BEAT_S, max(0.0, due_s - self._now_s()))

    def _clean(self) -> None:
        if self._config is not None:
            self._guarded(self._launcher.configure, self._config)
        self._guarded(self._launcher.clean, self._run_directory)
        for place in self._run_directory.leftovers():
            logger.bind(container=str(place)).info("removed what an earlier run left")
            self._litter.remove(place, self._now_s())

    def _handle(self, event: Event) -> None:
        if isinstance(event, Started):
            self._started(event.container)
        elif isinstance(event, Stopped):
            self._gone.discard(event.container_id)
            self._forget(event.container_id)
        elif isinstance(event, Synchronized):
            time.sleep(AFTER_LIST_S)
            self._handle(event.read())
        elif isinstance(event, Listed):
            present = {container.id for container in event.running} | event.created
            for container_id in self._cares.ids() - present:
                self._guarded(self._forget, container_id)
            for container in event.running if event.adopt else ():
                self._guarded(self._started, container)
        elif isinstance(event, Reconfigured):
            self._config = event.config
            self._guarded(self._launcher.configure, event.config)
            for care in self._cares.all():
                self._guarded(self._want, care)

    def _started(self, container: ContainerInfo) -> None:
        if container.id in self._gone or container.id in self._cares.ids():
            return
        self._want(self._cares.add(container))

    def _forget(self, container_id: str) -> None:
        care = self._cares.pop(container_id)
        if care is not None:
            self._take_down(care)

    def _want(self, care: Care) -> None:
        """What the container should have by the configuration in force."""
        wanted = self._class_of(care)
        if wanted != care.wanted or care.job is None:
            now_s = self._now_s()
            care.wanted = wanted
            care.failures, care.due_s = 0, now_s + self._grace_left_s(care.container)
            self._cares.due(care.due_s if care.job is None else now_s)

    def _class_of(self, care: Care) -> WorkloadClass | None:
        """The class with an engine that the container is to have now."""
        container = care.container
        try:
            decision = classify(
                container.annotations,
                container.name,
                container.namespace,
                self._config,
                on_unknown_class=self._on_unknown_class,
            )
        except ContainerRefused as error:
            care.why = str(error)
            logger.bind(container=str(container)).warning("no engine: {}", error)
            return None
        chosen = decision.workload_class
        if chosen is not None and chosen.template is not None:
            return chosen
        care.why = "it names no class" if chosen is None else f"class {chosen.name} has no engine"
        return None

    def _grace_left_s(self, container: ContainerInfo) -> float:
        grace_s = self._config.grace_s if self._config else 0.0
        age_s = 0.0 if container.started_at_s is None else max(0.0, self._wall_s() - container.started_at_s)
        return max(0.0, grace_s - age_s)

    def _tick(self) -> None:
        now_s = self._now_s()
        check = now_s >= self._check_s
        if check:
            self._check_s = now_s + CHECK_S
            self._guarded(self._check)
        if check or now_s >= self._cares.soonest_s:
            self.reconcile(now_s)
        self._litter.retry(now_s)
        if now_s >= self._housekeeping_s:
            self._housekeeping_s = now_s + HOUSEKEEPING_S
            self._guarded(self._keep_house)

    def reconcile(self, now_s: float) -> None:
        """Work off the difference between what each container should have and what it has. In the fleet's thread."""
        tree = CgroupTree(self._cgroup_root)  # walked at most once, for those that have to be looked for
        began_s = self._now_s()
        self._cares.soonest_s = now_s if self._rest else math.inf  # who is new comes after the rest of a round
        waiting, self._rest = deque(self._rest or self._cares.all()), []
        while waiting:
            care = waiting.popleft()
            if not self._cares.has(care):  # forgotten meanwhile, or on behalf of another one
                continue
            if _is_fine(care):
                continue
            label = str(care.container)
            self._beat(f"container {label}")
            with logger.contextualize(container=label):
                try:
                    self._reconcile(care, tree, now_s)
                except MemtierError as error:
                    self._failed(care, now_s, f"engine not started: {error}")
                except Exception as defect:
                    logger.exception("a defect")
                    self._failed(care, now_s, f"engine not started: a defect: {type(defect).__name__}")
            if care.wanted is not None and care.engine is None:
                self._cares.due(care.due_s)
            if waiting and self._now_s() - began_s > AT_ONCE_S and not self._queue.empty():
                self._rest = list(waiting)  # after what has just been reported
                self._cares.due(now_s)
                return

    def _reconcile(self, care: Care, tree: CgroupTree, now_s: float) -> None:
        if care.job is not None and care.workload_class != care.wanted:
            self._take_down(care)
        if care.wanted is None:
            return
        if care.engine is not None:
            why = care.engine.ended()
            if why is None:
                return
            self._note_stuck(care.container.id, care.engine)
            care.engine = None
            care.forget_failures(now_s)
            self._failed(care, now_s, f"engine ended: {why}")
        if now_s < care.due_s:
            return
        if self._is_stuck(care.container.id):
            care.why = "a step of its engine before this one does not return"
            care.due_s = now_s + CHECK_S
            return
        if care.job is None:
            self._prepare(care, care.wanted, tree)
        assert care.job is not None
        care.engine = self._launcher.launch(care.job)
        care.launched_s, care.why = now_s, ""
        logger.info("engine started, class {}", care.wanted.name)

    def _prepare(self, care: Care, wanted: WorkloadClass, tree: CgroupTree) -> None:
        """Its cgroup and its files. Raises: MemtierError: what was made is removed."""
        container = care.container
        assert wanted.template is not None
        cgroup = tree.find(container_id=container.id, cgroups_path=container.cgroups_path, pid=container.pid)
        care.cgroup = cgroup
        for older in self._cares.in_the_way(care):
            self._make_way(older)
        place = self._cares.place(care)
        self._litter.taken(place)
        files = self._run_directory.create(place)
        try:
            text = render(wanted.template, cgroup=str(cgroup.path), stats=str(files.stats_path))
            files.write(CONFIG_NAME, text, 0o600)
        except MemtierError:
            self._litter.remove(place, self._now_s())
            raise
        care.job, care.workload_class = Job(str(container), text, cgroup, files), wanted

    def _make_way(self, older: Care) -> None:
        """Another container of its names has started: most often it is about to stop, or gone already."""
        assert older.job is not None
        if not older.job.cgroup.is_there():
            self._forget(older.container.id)
            return
        try:
            self._run_directory.move(older.job.files, self._cares.place(older))
        except MemtierError as error:
            logger.bind(container=str(older.container)).warning("its engine starts anew: {}", error)
            self._take_down(older)
            self._cares.due(older.due_s)

    def _take_down(self, care: Care) -> None:
        """Its engine and its files."""
        engine, job = care.engine, care.job
        care.engine = care.job = care.workload_class = None
        if engine is not None:
            self._stop(care.container.id, engine)
            logger.bind(container=str(care.container)).info("engine stopped")
        if job is not None:
            self._litter.remove(job.files.place, self._now_s())

    def _stop(self, container_id: str, engine: RunningEngine) -> None:
        self._guarded(engine.stop)
        self._leaving = True
        self._note_stuck(container_id, engine)

    def _note_stuck(self, container_id: str, engine: RunningEngine) -> None:
        if isinstance(engine, MayStick) and engine.stuck():
            self._stuck.setdefault(container_id, []).append(engine)

    def _is_stuck(self, container_id: str) -> bool:
        left = [engine for engine in self._stuck.pop(container_id, ()) if engine.stuck()]
        if left:
            self._stuck[container_id] = left
        return bool(left)

    def _failed(self, care: Care, now_s: float, why: str) -> None:
        wait_s = care.failed(now_s, why)
        logger.bind(container=str(care.container)).error("{}; next try in {:.0f} s", why, wait_s)
        if care.job is not None:
            with contextlib.suppress(MemtierError):
                care.job.files.append_output(f"{why}\n")

    def _check(self) -> None:
        self._leaving = self._launcher.tend()

    def _keep_house(self) -> None:
        allocator.release()
        cares = self._cares.all()
        self._run_directory.share_outputs(sum(care.job is not None for care in cares))
        for container_id in list(self._stuck):
            self._is_stuck(container_id)
        tree = CgroupTree(self._cgroup_root)
        for care in cares:
            self._guarded(self._tend, care, tree)

    def _tend(self, care: Care, tree: CgroupTree) -> None:
        if care.is_gone(tree):
            logger.info("its cgroup is gone")
            self._forget(care.container.id)
        elif care.engine is not None:
            with contextlib.suppress(MemtierError):
                care.engine.tend()

    def _end(self) -> None:
        cares = self._cares.all()
        for care in cares:
            if care.engine is not None:
                self._guarded(care.engine.stop)
        self._guarded(self._launcher.close, STOP_S - 1.0)
        for care in cares:
            if care.job is not None:
                self._litter.remove(care.job.files.place, self._now_s())
            self._cares.pop(care.container.id)


def _is_fine(care: Care) -> bool:
    """Whether there is nothing to do: so it is nearly always, for nearly all."""
    try:
        return care.engine is not None and care.workload_class is care.wanted and care.engine.ended() is None
    except Exception:
        return False  # and again where it is caught and told
