"""The NRI plugin: what the runtime asks -> an answer at once, and events for the fleet.

Hooks decide from annotations and the configuration, both in memory, and queue the rest. The runtime holds a lock
while it waits for an answer, and drops a plugin that needs more than 2 s: no hook touches a file, starts a thread
or waits for one. What containers lack that run already is found out and sent after Synchronize was answered.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from loguru import logger

from memtier_cli.nri_memtierd.aside import aside
from memtier_cli.nri_memtierd.classify import SUFFIX, ContainerRefused, Decision, OnUnknownClass, classify
from memtier_cli.nri_memtierd.config import CheckTemplate, PluginConfig, load
from memtier_cli.nri_memtierd.container_cgroup import CgroupNotFound, CgroupTree
from memtier_cli.nri_memtierd.events import ContainerInfo, Listed, Reconfigured, Started, Stopped
from memtier_cli.nri_memtierd.fleet import Fleet
from memtier_cli.nri_memtierd.supervisor import Connection
from memtier_engine.errors import ConfigError, MemtierError
from memtier_engine.model import PAGE_BYTES
from nri_core import Adjustment, Container, ContainerState, NriError, Plugin, Pod, Runtime, Update

LAG_CHECK_S = 0.25
LATE_S = 0.5
"""Runtimes give an answer 2 s: worth a warning well before."""

SLICE = 20
"""Updates in one request: a runtime carries them out one by one, and serves nobody else meanwhile."""
SLICE_S = 30.0
AFTER_ANSWER_S = 0.05
"""Looking for what they lack begins so long after Synchronize, which then has been answered."""

Wanted = tuple[ContainerInfo, Mapping[str, str]]
Hook = TypeVar("Hook", bound=Callable[..., Coroutine[Any, Any, Any]])


class HookTimes:
    """How long hooks took, and how late the event loop was: together, what a runtime waits for."""

    def __init__(self, beat: Callable[[], object] = lambda: None) -> None:
        self._beat = beat
        self.answered = 0
        self.slowest_s = 0.0
        self.slowest_hook = "none"
        self.lag_s = 0.0

    def add(self, hook: str, seconds: float) -> None:
        """A hook was answered."""
        self.answered += 1
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest_hook = seconds, hook
        if seconds > LATE_S:
            logger.warning("{} took {:.0f} ms: the runtime drops a plugin that needs 2 s", hook, seconds * 1000)

    async def watch_loop(self) -> None:
        """Measure how late the event loop runs what is due, until cancelled."""
        while True:
            began_s = time.monotonic()
            self._beat()
            await asyncio.sleep(LAG_CHECK_S)
            late_s = time.monotonic() - began_s - LAG_CHECK_S
            self.lag_s = max(self.lag_s, late_s)
            if late_s > LATE_S:
                logger.warning("hooks had to wait {:.0f} ms: this process gets too little CPU", late_s * 1000)

    def __str__(self) -> str:
        return (
            f"{self.answered} hooks answered, slowest {self.slowest_hook} {self.slowest_s * 1000:.1f} ms, "
            f"event loop at most {self.lag_s * 1000:.1f} ms late"
        )


def timed(hook: Hook) -> Hook:
    """Count a hook of MemtierdPlugin."""

    @functools.wraps(hook)
    async def run(self: MemtierdPlugin, *arguments: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return await hook(self, *arguments)
        finally:
            self.times.add(hook.__name__, time.perf_counter() - began_s)

    return cast(Hook, run)


class MemtierdPlugin(Plugin):
    """Answers the runtime and feeds the fleet."""

    exclusive = "memtierd"
    rivals = ("nri-memtierd",)  # the reference's, too

    def __init__(
        self,
        fleet: Fleet,
        *,
        config: PluginConfig | None,
        cgroup_root: Path,
        check_template: CheckTemplate,
        on_unknown_class: OnUnknownClass = "fail",
        adopt: bool = True,
        connection: Connection | None = None,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        """`connection` is told whether there is one; `beat` is called by the event loop now and then."""
        self.fatal: MemtierError | None = None
        """Why the program has to end: the configuration that the runtime gave cannot be used, or a part has died."""
        self._fleet = fleet
        self._config = config
        self._cgroup_root = cgroup_root
        self._check_template = check_template
        self._on_unknown_class = on_unknown_class
        self._adopt = adopt
        self.times = HookTimes(beat)
        self._connection = connection or Connection()
        self._sending: asyncio.Task[None] | None = None

    def use(self, config: PluginConfig) -> None:
        """From now on, another configuration. In the event loop's thread."""
        self._config = config
        self._fleet.report(Reconfigured(config))

    async def configure(self, config: str, runtime: Runtime) -> None:
        """See `Plugin.configure`. A pre-launched plugin may be given its configuration here."""
        self._connection.runtime = f"{runtime.name} {runtime.version}"
        logger.info("{} {}, NRI {}", runtime.name, runtime.version, runtime.nri_version or "unknown")
        if not config.strip():
            return
        try:
            self.use(load(config, self._check_template, file="configuration from the runtime"))
        except ConfigError as error:
            self.fatal = error
            if self.stub is not None:
                asyncio.get_running_loop().call_later(0.1, self.stub.stop)
            raise

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> list[Update]:
        """See `Plugin.synchronize`. Adopts what runs; gives it the memory values it would have got at creation."""
        by_id = {pod.id: pod for pod in pods if concerns_us(pod)}
        running: list[ContainerInfo] = []
        created: set[str] = set()
        wanted: list[tuple[ContainerInfo, Mapping[str, str]]] = []
        for container in containers:
            pod = by_id.get(container.pod_id)
            if pod is None:
                continue
            if container.state in (ContainerState.RUNNING, ContainerState.PAUSED):
                info = describe(pod, container)
                running.append(info)
                decision = self._decide_quietly(pod, container)
                if decision is not None and decision.unified:
                    wanted.append((info, decision.unified))
            elif container.state is ContainerState.CREATED:  # StartContainer is still to come
                created.add(container.id)
        logger.info("{} pods, {} containers; {} running containers of ours", len(pods), len(containers), len(running))
        self._fleet.report(Listed(tuple(running), frozenset(created), self._adopt))
        self._connection.connected()
        if self._sending is not None:
            self._sending.cancel()  # of a connection that has ended
        if self._adopt and wanted:
            self._sending = asyncio.create_task(self._send_missing(wanted))
        return []

    @timed
    async def create_container(self, pod: Pod, container: Container) -> Adjustment | None:
        """See `Plugin.create_container`. Raises: ContainerRefused, which fails the creation."""
        decision = self._decide(pod, container)
        log = logger.bind(container=_label(pod, container))
        for remark in decision.remarks:
            log.warning("{}", remark)
        if decision.workload_class is not None or decision.unified:
            name = decision.workload_class.name if decision.workload_class else "none"
            log.debug("class {}, {}", name, decision.unified)
        adjustment = Adjustment()
        for key, value in decision.unified.items():
            adjustment = adjustment.unified(key, value)
        return adjustment or None

    @timed
    async def start_container(self, pod: Pod, container: Container) -> None:
        """See `Plugin.start_container`. Never fails: a container without an engine is better than none."""
        if concerns_us(pod):
            self._fleet.report(Started(describe(pod, container, started_now=True)))

    @timed
    async def update_container(self, pod: Pod, container: Container, resources: Any) -> list[Update]:
        """See `Plugin.update_container`. Whatever the kubelet writes, our values stay."""
        decision = self._decide_quietly(pod, container)
        if decision is None or not decision.unified:
            return []
        update = Update(container.id, ignore_failure=True)
        for key, value in decision.unified.items():
            update = update.unified(key, value)
        return [update]

    @timed
    async def stop_container(self, pod: Pod, container: Container) -> None:
        """See `Plugin.stop_container`."""
        self._fleet.report(Stopped(container.id))

    @timed
    async def remove_container(self, pod: Pod, container: Container) -> None:
        """See `Plugin.remove_container`. Usually it has stopped before."""
        self._fleet.report(Stopped(container.id))

    async def disconnected(self, error: BaseException | None) -> None:
        """See `Plugin.disconnected`. Engines go on: containers do too."""
        self._connection.lost("" if error is None else str(error))
        if error is not None:
            logger.warning("connection to the runtime lost: {}; engines go on", error)

    def _decide(self, pod: Pod, container: Container) -> Decision:
        return classify(
            pod.annotations,
            container.name,
            pod.namespace,
            self._config,
            on_unknown_class=self._on_unknown_class,
        )

    def _decide_quietly(self, pod: Pod, container: Container) -> Decision | None:
        try:
            return self._decide(pod, container)
        except ContainerRefused as error:
            logger.bind(container=_label(pod, container)).debug("{}", error)
            return None

    async def _send_missing(self, wanted: Sequence[Wanted]) -> None:
        """Give containers that run already the values they lack, a few at a time, and say what came of it.

        Not in the answer to Synchronize: looking at thousands of cgroups takes longer than a runtime waits, and an
        answer that comes too late is lost with all values.
        """
        try:
            await asyncio.sleep(AFTER_ANSWER_S)
            updates = await aside(lambda: self._missing_values(wanted))
            names = {info.id: str(info) for info, _ in wanted}
            for first in range(0, len(updates), SLICE):
                await self._send(updates[first : first + SLICE], names)
        except (NriError, TimeoutError) as error:
            why = str(error) or "the runtime does not answer"
            logger.warning("memory values of running containers are not set: {}; the next connection tries again", why)
        except Exception:
            logger.exception("memory values of running containers are not set")

    async def _send(self, updates: Sequence[Update], names: Mapping[str, str]) -> None:
        assert self.stub is not None
        failed = {update.container_id for update in await self.stub.update_containers(updates, timeout_s=SLICE_S)}
        for update in updates:
            log = logger.bind(container=names[update.container_id])
            if update.container_id in failed:
                log.warning("{} was not set: the runtime refuses", dict(update.resources.unified))
            else:
                log.info("{} set after the fact", dict(update.resources.unified))

    def _missing_values(self, wanted: Sequence[Wanted]) -> list[Update]:
        """Updates for the containers whose cgroup says something else than it should."""
        updates = []
        tree = CgroupTree(self._cgroup_root)
        for info, unified in wanted:
            try:
                cgroup = tree.find(container_id=info.id, cgroups_path=info.cgroups_path, pid=info.pid)
            except CgroupNotFound:
                continue
            update = Update(info.id, ignore_failure=True)
            for key, value in unified.items():
                if not _holds(cgroup.path / key, value):
                    update = update.unified(key, value)
            if update.resources.unified:
                updates.append(update)
        return updates


def _label(pod: Pod, container: Container) -> str:
    return f"{pod.namespace}/{pod.name}:{container.name}"


def concerns_us(pod: Pod) -> bool:
    """Whether a pod says anything to this plugin: of the others nothing is kept, and nothing looked at."""
    return any(SUFFIX in key for key in pod.annotations)


def describe(pod: Pod, container: Container, *, started_now: bool = False) -> ContainerInfo:
    """What the fleet needs to know of a container."""
    return ContainerInfo(
        id=container.id,
        namespace=pod.namespace,
        pod=pod.name,
        name=container.name,
        annotations={key: value for key, value in pod.annotations.items() if SUFFIX in key},
        cgroups_path=container.cgroups_path,
        pid=container.pid,
        started_at_s=time.time() if started_now else (container.started_at_ns or 0) / 1e9 or None,
    )


def _holds(path: Path, value: str) -> bool:
    """Whether a cgroup file holds the value; also if it cannot be read: then an update would not help."""
    try:
        text = path.read_text().strip()
    except OSError:
        return True
    if text == value:
        return True
    # The kernel rounds down to whole pages.
    return text.isdecimal() and value.isdecimal() and int(text) == int(value) // PAGE_BYTES * PAGE_BYTES
