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
from memtier_cli.nri_memtierd.classify import ContainerRefused, Decision, OnUnknownClass, classify
from memtier_cli.nri_memtierd.config import CheckTemplate, PluginConfig, load
from memtier_cli.nri_memtierd.events import Reconfigured, Started, Stopped, Synchronized
from memtier_cli.nri_memtierd.fleet import Fleet
from memtier_cli.nri_memtierd.inventory import Inventory, concerns_us, describe, label
from memtier_cli.nri_memtierd.supervisor import Connection
from memtier_cli.nri_memtierd.values import Lack, lacks
from memtier_engine.errors import ConfigError, MemtierError
from nri_core import Adjustment, Code, Container, NriError, Plugin, Pod, RpcError, Runtime, Update

LAG_CHECK_S = 0.25
LATE_S = 0.5
"""Runtimes give an answer 2 s: worth a warning well before."""

SLICE = 20
"""Updates in one request: a runtime carries them out one by one, and serves nobody else meanwhile."""
SLICE_S = 30.0
AGAIN_S = 5.0
AGAIN_MOST_S = 300.0
CLEAN_LOOKS = 2
AFTER_ANSWER_S = 0.05
"""Looking for what they lack begins so long after Synchronize, which then has been answered."""

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
        again_s: float = AGAIN_S,
    ) -> None:
        """Set up.

        Args:
            connection: is told whether there is one.
            beat: is called by the event loop now and then.
            again_s: until containers are looked at again for values that they lack.
        """
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
        self._again_s = again_s
        self._inventory: Inventory | None = None
        self._sending: asyncio.Task[None] | None = None

    def use(self, config: PluginConfig) -> None:
        """From now on, another configuration. In the event loop's thread."""
        self._config = config
        self._fleet.report(Reconfigured(config))
        if self._connection.state == "connected":  # else the next connection does it
            self._see_to_values()

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
        """See `Plugin.synchronize`. Adopts what runs; gives it the memory values it would have got at creation.

        Both after the answer, for which all pods of the node wait.
        """
        inventory = Inventory(pods, containers)
        self._inventory = inventory if self._adopt else None
        self._fleet.report(Synchronized(lambda: inventory.listed(adopt=self._adopt)))
        self._connection.connected()
        self._see_to_values()
        return []

    @timed
    async def create_container(self, pod: Pod, container: Container) -> Adjustment | None:
        """See `Plugin.create_container`. Raises: RpcError, which fails the creation."""
        try:
            decision = self._decide(pod.annotations, container.name, pod.namespace)
        except ContainerRefused as error:
            raise RpcError(Code.UNKNOWN, str(error)) from None  # on purpose, so nobody logs it as a defect
        log = logger.bind(container=label(pod, container))
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
        try:
            decision = self._decide(pod.annotations, container.name, pod.namespace)
        except ContainerRefused as error:
            logger.bind(container=label(pod, container)).debug("{}", error)
            return []
        if not decision.unified:
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

    def _decide(self, annotations: Mapping[str, str], container: str, namespace: str) -> Decision:
        return classify(annotations, container, namespace, self._config, on_unknown_class=self._on_unknown_class)

    def _see_to_values(self) -> None:
        """Begin anew: of another configuration, or another connection."""
        if self._sending is not None:
            self._sending.cancel()
        self._sending = asyncio.create_task(self._send_missing())

    async def _send_missing(self) -> None:
        """Give containers that run already the values they lack, a few at a time, until two looks find none.

        Not in the answer to Synchronize: looking at thousands of cgroups takes longer than a runtime waits, and an
        answer that comes too late is lost with all values. Two looks: a container that was being created when the
        configuration changed has the values of the one before. A runtime that refuses is asked again, ever more seldom.
        """
        refused: set[str] = set()
        wait_s, clean = self._again_s, 0
        try:
            await asyncio.sleep(AFTER_ANSWER_S)
            while True:
                found = await aside(self._lacks)
                for first in range(0, len(found), SLICE):
                    await self._send(found[first : first + SLICE], refused)
                clean = 0 if found else clean + 1
                if clean == CLEAN_LOOKS:
                    return
                await asyncio.sleep(wait_s)
                wait_s = min(AGAIN_MOST_S, 2 * wait_s) if found else wait_s
        except NriError as error:
            logger.warning(
                "memory values of running containers are not set: {}; the next connection tries again", error
            )
        except Exception:
            logger.exception("memory values of running containers are not set")

    async def _send(self, asked: Sequence[Lack], refused: set[str]) -> None:
        """One slice. Raises: NriError: the connection has ended."""
        assert self.stub is not None
        why = "the runtime has not done it, its log may say why"
        try:
            await self.stub.update_containers([each.update() for each in asked], timeout_s=SLICE_S)
        except (RpcError, TimeoutError) as error:
            why = str(error) or "the runtime does not answer"
        left = await aside(lambda: {each.container.id for each in asked if each.persists()})
        for each in asked:
            log = logger.bind(container=str(each.container))
            if each.container.id not in left:
                refused.discard(each.container.id)
                log.info("{} set after the fact", dict(each.values))
            else:
                level = "DEBUG" if each.container.id in refused else "WARNING"
                refused.add(each.container.id)
                log.log(level, "{} is not set: {}; it is tried again", dict(each.values), why)

    def _lacks(self) -> list[Lack]:
        """Of all containers that we know of. In another thread."""
        found = {} if self._inventory is None else {info.id: info for info in self._inventory.running()}
        found.update((info.id, info) for info in self._fleet.containers())
        wanted = lambda info: self._decide(info.annotations, info.name, info.namespace).unified  # noqa: E731
        return lacks(found.values(), wanted, self._cgroup_root)
