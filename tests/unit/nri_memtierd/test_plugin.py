"""The plugin at the other end of a real NRI connection: what it answers, what it tells the fleet."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from memtier_cli.nri_memtierd.classify import ContainerRefused, classify, read_annotations
from memtier_cli.nri_memtierd.config import PluginConfig, WorkloadClass
from memtier_cli.nri_memtierd.events import ContainerInfo, Event, Listed, Reconfigured, Started, Stopped, Synchronized
from memtier_cli.nri_memtierd.inventory import Inventory, describe
from memtier_cli.nri_memtierd.plugin import AGAIN_MOST_S, AGAIN_S, MemtierdPlugin
from memtier_engine.errors import ConfigError
from nri_core import Backoff, Code, Container, ContainerState, EventMask, Pod, RpcError, Stub
from nri_core.api.model import Allowance, pod_from_bytes
from nri_core.pb import nri_pb2
from nri_core.testing import FakeRuntime, PluginConnection

CLASS = "class.memtierd.nri.io"
CONFIG = PluginConfig((WorkloadClass("swap", True, "x: 1"), WorkloadClass("track", False, "x: 1")))
POD = Pod("p1", "pod", "default", annotations={CLASS: "swap", f"{CLASS}/c1": "track", f"{CLASS}/c2": "", "app": "x"})


def container(name: str, state: ContainerState = ContainerState.UNKNOWN, pod: str = "p1") -> Container:
    return Container(f"id-{name}", pod, name, state, cgroups_path=f"/pods/{name}")


class RecordingFleet:
    def __init__(self, *, reads: bool) -> None:
        self.events: list[Event] = []
        self.looks = 0
        self.hidden_looks = 0
        self.reads = reads

    def report(self, event: Event) -> None:
        self.events.append(event.read() if self.reads and isinstance(event, Synchronized) else event)

    def containers(self) -> list[ContainerInfo]:
        self.looks += 1
        if self.hidden_looks:
            self.hidden_looks -= 1
            return []
        lists = [event.running for event in self.events if isinstance(event, Listed)]
        return [
            *(lists[-1] if lists else ()),
            *(event.container for event in self.events if isinstance(event, Started)),
        ]


@dataclass
class Scene:
    fleet: RecordingFleet
    plugin: MemtierdPlugin
    runtime: FakeRuntime
    connection: PluginConnection
    task: asyncio.Task[None]


class Sent:
    """What the plugin asks of the runtime with UpdateContainers. As containerd, quiet about ignored failures."""

    def __init__(self, pods: Path, refused: Collection[str] = ()) -> None:
        self.requests: list[list[nri_pb2.ContainerUpdate]] = []
        self._pods = pods
        self._refused = refused

    def take(self, updates: Sequence[nri_pb2.ContainerUpdate]) -> Sequence[nri_pb2.ContainerUpdate]:
        self.requests.append(list(updates))
        assert all(update.ignore_failure for update in updates)
        for update in updates:
            for key, value in update.linux.resources.unified.items():
                if update.container_id not in self._refused:
                    (self._pods / update.container_id.removeprefix("id-") / key).write_text(value)
        return ()

    def values(self) -> dict[str, dict[str, str]]:
        found = [update for request in self.requests for update in request]
        return {update.container_id: dict(update.linux.resources.unified) for update in found}

    async def until(self, requests: int) -> None:
        await self.settled(lambda: len(self.requests) >= requests)

    async def settled(self, what: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not what():  # noqa: ASYNC110  # a thread looks at the cgroups
                await asyncio.sleep(0.01)


Body = Callable[[Scene], Coroutine[Any, Any, None]]


def accept(text: str) -> None:
    if "bad" in text:
        raise ConfigError("value bad", line=1)


def run(
    tmp_path: Path, body: Body, *, runtime: dict[str, Any] | None = None, reads: bool = True, **options: Any
) -> None:
    """Run `body` with a connected plugin, and a fleet that reads lists at once."""

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[Scene]:
        fleet = RecordingFleet(reads=reads)
        chosen = {"config": CONFIG, "cgroup_root": tmp_path, "check_template": accept, "again_s": 600.0, **options}
        plugin = MemtierdPlugin(fleet, **chosen)  # type: ignore[arg-type]
        plugin.index, plugin.name = "45", "nri-memtierd"
        patient = {"registration_timeout_s": 600.0, "request_timeout_s": 600.0}
        async with FakeRuntime(tmp_path / "nri.sock", **{**patient, **(runtime or {})}) as fake:
            stub = Stub(plugin, socket_path=fake.path, backoff=Backoff(least_s=0.01))
            task = asyncio.ensure_future(stub.run())
            try:
                yield Scene(fleet, plugin, fake, await fake.connected(120), task)
            finally:
                stub.stop()
                await asyncio.wait_for(asyncio.wait({task}), 120)

    async def main() -> None:
        async with connected() as scene:
            await body(scene)

    asyncio.run(main())


def test_it_subscribes_to_what_it_handles_and_every_runtime_knows_that(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        assert (scene.connection.index, scene.connection.name) == ("45", "nri-memtierd")
        assert scene.connection.events == (
            EventMask.CREATE_CONTAINER
            | EventMask.START_CONTAINER
            | EventMask.UPDATE_CONTAINER
            | EventMask.STOP_CONTAINER
            | EventMask.REMOVE_CONTAINER
        )

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("name", "unified"), [("c0", {"memory.swap.max": "max"}), ("c1", {"memory.swap.max": "0"}), ("c2", {})]
)
def test_creation_is_answered_with_the_unified_values_and_nothing_else(
    tmp_path: Path, name: str, unified: dict[str, str]
) -> None:
    async def body(scene: Scene) -> None:
        answer = await scene.connection.create_container(POD, container(name))
        assert dict(answer.adjust.linux.resources.unified) == unified
        answer.adjust.linux.resources.unified.clear()
        answer.adjust.linux.ClearField("resources")
        answer.adjust.ClearField("linux")
        assert answer.adjust.ByteSize() == 0
        assert not answer.update
        assert scene.fleet.events == [Listed(())], "creation starts nothing"

    run(tmp_path, body)


def test_an_unknown_class_fails_the_creation_with_our_words_and_the_plugin_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(scene: Scene) -> None:
        unknown = replace(POD, annotations={CLASS: "gold"})
        with pytest.raises(RpcError, match=r"class 'gold' .* is not configured .configured classes: swap, track"):
            await scene.connection.create_container(unknown, container("c0"))
        (record,) = [each for each in caplog.records if "create_container" in each.getMessage()]
        assert (record.levelname, record.exc_info) == ("WARNING", None), "whoever mistypes a class is no defect of ours"
        await scene.connection.notify("StartContainer", unknown, container("c0"))  # must not fail
        assert (await scene.connection.create_container(POD, container("c0"))).adjust.ByteSize()

    run(tmp_path, body)


def test_an_unknown_class_is_no_reason_to_fail_when_told_to_ignore_it(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        answer = await scene.connection.create_container(replace(POD, annotations={CLASS: "gold"}), container("c0"))
        assert answer.adjust.ByteSize() == 0

    run(tmp_path, body, on_unknown_class="ignore")


@pytest.mark.parametrize("old_style", [False, True])
def test_starts_and_stops_are_told_to_the_fleet(tmp_path: Path, old_style: bool) -> None:
    async def body(scene: Scene) -> None:
        await scene.connection.notify("StartContainer", POD, container("c0"))
        await scene.connection.stop_container(POD, container("c0"))
        await scene.connection.notify("RemoveContainer", POD, container("c0"))
        _, started, *stopped = scene.fleet.events
        assert isinstance(started, Started)
        told = started.container
        assert (told.id, str(told), told.cgroups_path) == ("id-c0", "default/pod:c0", "/pods/c0")
        assert told.annotations == {CLASS: "swap"}, "nothing is kept that does not count for this container"
        assert stopped == [Stopped("id-c0"), Stopped("id-c0")]

    version = {"version": "v1.7.24", "nri_version": ""} if old_style else {}
    run(tmp_path, body, runtime={"old_style": old_style, **version})


def test_an_update_keeps_our_values(tmp_path: Path) -> None:
    """The kubelet writes memory.swap.max anew whenever it resizes a container."""

    async def body(scene: Scene) -> None:
        (update,) = await scene.connection.update_container(POD, container("c0"))
        assert update.container_id == "id-c0"
        assert dict(update.linux.resources.unified) == {"memory.swap.max": "max"}
        assert update.ignore_failure
        assert await scene.connection.update_container(POD, container("c2")) == []
        unknown = replace(POD, annotations={CLASS: "gold"})
        assert await scene.connection.update_container(unknown, container("c0")) == []

    run(tmp_path, body)


def test_of_a_pods_annotations_each_container_keeps_little_and_gets_what_it_would_have_got() -> None:
    """All of a pod may have 256 KiB, and hundreds of containers."""
    much = {f"{CLASS}/c{number}": "y" * 1000 for number in range(2, 250)} | {f"x{'y' * 99}.memtierd.nri.io": "y" * 1000}
    pod = replace(POD, annotations={**POD.annotations, **much, "memory.high.memtierd.nri.io": "9" * 100_000})
    for name, workload_class in (("c0", "swap"), ("c1", "track"), ("c2", "y" * 1000)):
        told = describe(pod, container(name))
        assert read_annotations(told.annotations, name).values["class"] == workload_class
        assert sum(len(key) + len(value) for key, value in told.annotations.items()) < 4096
    with pytest.raises(ContainerRefused):
        classify({**describe(pod, container("c0")).annotations}, "c0", "default", CONFIG)


def test_running_containers_are_listed_with_their_pods_annotations(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        (listed,) = scene.fleet.events
        assert isinstance(listed, Listed)
        assert listed.adopt
        assert [info.name for info in listed.running] == ["c0", "c3"]
        assert listed.running[0].annotations[CLASS] == "swap"
        assert listed.created == {"id-c1"}

    states = {
        "c0": ContainerState.RUNNING,
        "c1": ContainerState.CREATED,
        "c2": ContainerState.STOPPED,
        "c3": ContainerState.PAUSED,
    }
    there = [container(name, state) for name, state in states.items()]
    orphan = container("c9", ContainerState.RUNNING, pod="no such pod")
    run(tmp_path, body, runtime={"pods": [POD], "containers": [*there, orphan]})


def test_adopted_containers_get_the_memory_values_they_lack(tmp_path: Path) -> None:
    """Those that were created before the plugin was installed; a value that holds already is not written again."""
    values = {"c0": "0", "c1": "0", "c2": "0"}
    for name, value in values.items():
        (tmp_path / "pods" / name).mkdir(parents=True)
        (tmp_path / "pods" / name / "memory.swap.max").write_text(value + "\n")

    sent = Sent(tmp_path / "pods")

    async def body(scene: Scene) -> None:
        assert scene.connection.updates == [], "the answer to Synchronize waits for nothing"
        await sent.until(1)
        assert sent.values() == {"id-c0": {"memory.swap.max": "max"}}

    there = [container(name, ContainerState.RUNNING) for name in values]
    run(tmp_path, body, runtime={"pods": [POD], "containers": there, "on_update": sent.take})


def test_many_values_are_sent_a_few_at_a_time_and_told_when_they_are_confirmed(tmp_path: Path) -> None:
    """A runtime carries updates out one by one, and refuses some: the log must not say otherwise."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{extra[container]} {message}", level="INFO",
                      filter=lambda record: "container" in record["extra"])  # fmt: skip
    sent = Sent(tmp_path / "pods", refused={"id-n3", "id-n30"})
    names = [f"n{number}" for number in range(45)]
    for name in names:
        (tmp_path / "pods" / name).mkdir(parents=True)
        (tmp_path / "pods" / name / "memory.swap.max").write_text("0\n")

    async def body(scene: Scene) -> None:
        await sent.until(3)
        await sent.settled(lambda: len(lines) == len(names))

    there = [container(name, ContainerState.RUNNING) for name in names]
    try:
        run(tmp_path, body, runtime={"pods": [POD], "containers": there, "on_update": sent.take})
    finally:
        logger.remove(sink)
    assert [len(each) for each in sent.requests] == [20, 20, 5]
    why = "the runtime has not done it, its log may say why; it is tried again"
    assert [line for line in lines if "is not set" in line] == [
        f"default/pod:{name} {{'memory.swap.max': 'max'}} is not set: {why}\n" for name in ("n3", "n30")
    ]
    assert sum("set after the fact" in line for line in lines) == 43


@pytest.mark.parametrize(
    "path",
    ["a.slice:p:x\0y", "/pods/c0\0", "/pods/\ud800", "../../etc", "/", "a:b", "a.slice:p:" + "x" * 5000, "/p\n/q"],
)
def test_a_hostile_cgroup_path_hurts_only_its_own_container(tmp_path: Path, path: str) -> None:
    (tmp_path / "pods" / "c0").mkdir(parents=True)
    (tmp_path / "pods" / "c0" / "memory.swap.max").write_text("0\n")
    sent = Sent(tmp_path / "pods")
    there = [replace(container(name, ContainerState.RUNNING), cgroups_path=f"/pods/{name}") for name in ("bad", "c0")]
    there[0] = replace(there[0], cgroups_path=path.encode(errors="replace").decode())

    async def body(scene: Scene) -> None:
        await sent.until(1)
        assert sent.values() == {"id-c0": {"memory.swap.max": "max"}}

    run(tmp_path, body, runtime={"pods": [POD], "containers": there, "on_update": sent.take})


def test_pods_that_say_nothing_to_us_are_not_kept(tmp_path: Path) -> None:
    other = replace(POD, id="p2", annotations={"app": "x"})

    async def body(scene: Scene) -> None:
        await scene.connection.notify("StartContainer", other, container("c5", pod="p2"))
        await scene.connection.notify("StartContainer", POD, container("c6"))
        listed, started = scene.fleet.events
        assert isinstance(listed, Listed)
        assert [info.id for info in listed.running] == ["id-c0"]
        assert isinstance(started, Started)
        assert started.container.id == "id-c6"

    there = [container("c0", ContainerState.RUNNING), container("c4", ContainerState.RUNNING, pod="p2")]
    run(tmp_path, body, runtime={"pods": [POD, other], "containers": there})


def test_without_adoption_nothing_is_asked_for(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        assert scene.connection.updates == []
        assert scene.fleet.events == [Listed(scene.fleet.events[0].running, frozenset(), False)]  # type: ignore[union-attr]

    running = [container("c0", ContainerState.RUNNING)]
    run(tmp_path, body, adopt=False, runtime={"pods": [POD], "containers": running})


def test_the_answer_comes_before_anything_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pods of the node wait for it; what 5 000 containers are is read when the fleet comes to it."""
    read: list[bytes] = []

    def note(data: bytes, allowance: Allowance) -> Pod:
        read.append(data)
        return pod_from_bytes(data, allowance)

    monkeypatch.setattr("nri_core.aio.dispatch.pod_from_bytes", note)

    async def body(scene: Scene) -> None:
        assert read == []
        (event,) = scene.fleet.events
        assert isinstance(event, Synchronized)
        assert [info.id for info in event.read().running] == ["id-c0"]
        assert len(read) == 1

    running = [container("c0", ContainerState.RUNNING)]
    run(tmp_path, body, adopt=False, runtime={"pods": [POD], "containers": running}, reads=False)


def test_another_configuration_reaches_the_values_of_what_runs(tmp_path: Path) -> None:
    files = {name: tmp_path / "pods" / name / "memory.swap.max" for name in ("c0", "c1")}
    for file in files.values():
        file.parent.mkdir(parents=True)
    files["c0"].write_text("max\n")
    files["c1"].write_text("0\n")
    requests: list[dict[str, str]] = []

    def write(updates: Sequence[nri_pb2.ContainerUpdate]) -> Sequence[nri_pb2.ContainerUpdate]:
        values = {update.container_id: update.linux.resources.unified["memory.swap.max"] for update in updates}
        for container_id, value in values.items():
            files[container_id.removeprefix("id-")].write_text(value)
        requests.append(values)
        return ()

    async def body(scene: Scene) -> None:
        turned = PluginConfig((WorkloadClass("swap", False, "x: 1"), WorkloadClass("track", True, "x: 1")))
        for config, values in ((turned, {"id-c0": "0", "id-c1": "max"}), (CONFIG, {"id-c0": "max", "id-c1": "0"})):
            scene.plugin.use(config)
            async with asyncio.timeout(30):
                while values not in requests:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    there = [container(name, ContainerState.RUNNING) for name in files]
    run(tmp_path, body, runtime={"pods": [POD], "containers": there, "on_update": write})


def test_values_that_a_runtime_refuses_are_tried_again_until_they_hold(tmp_path: Path) -> None:
    """As one does that has just restarted; what it says of all of them is no reason to give up either."""
    file = tmp_path / "pods" / "c0" / "memory.swap.max"
    file.parent.mkdir(parents=True)
    file.write_text("0\n")
    asked: list[str] = []

    def write(updates: Sequence[nri_pb2.ContainerUpdate]) -> Sequence[nri_pb2.ContainerUpdate]:
        (update,) = updates
        asked.append(update.linux.resources.unified["memory.swap.max"])
        if len(asked) == 2:
            raise RpcError(Code.UNAVAILABLE, "not yet")
        if len(asked) < 4:
            return updates
        file.write_text("max")
        return ()

    async def body(scene: Scene) -> None:
        assert scene.plugin._sending is not None
        await asyncio.wait_for(scene.plugin._sending, 60)
        assert asked == ["max"] * 4

    there = [container("c0", ContainerState.RUNNING)]
    run(tmp_path, body, again_s=0.001, runtime={"pods": [POD], "containers": there, "on_update": write})


def test_a_runtime_that_refuses_for_ever_is_asked_ever_less_often_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pods" / "c0" / "memory.swap.max"
    file.parent.mkdir(parents=True)
    file.write_text("0\n")
    sleep, waits = asyncio.sleep, list[float]()

    async def sleep_not_at_all(seconds: float) -> None:
        task = asyncio.current_task()
        if task is None or "_send_missing" not in repr(task.get_coro()):
            await sleep(seconds)
            return
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep_not_at_all)
    sent = Sent(tmp_path / "pods", refused={"id-c0"})

    async def body(scene: Scene) -> None:
        await sent.settled(lambda: len(waits) >= 12)

    there = [container("c0", ContainerState.RUNNING)]
    run(tmp_path, body, again_s=AGAIN_S, runtime={"pods": [POD], "containers": there, "on_update": sent.take})
    assert waits[1:12] == [min(AGAIN_MOST_S, AGAIN_S * 2**number) for number in range(11)]
    assert AGAIN_MOST_S in waits


def test_of_a_list_that_was_read_nothing_else_is_kept() -> None:
    """It is what the runtime sent, of all pods of the node."""

    class Sent(list[Any]):
        """One that can be seen to be let go of."""

    pods, containers = Sent([POD]), Sent([container("c0", ContainerState.RUNNING), container("c4", pod="p2")])
    gone = weakref.ref(pods), weakref.ref(containers)
    inventory = Inventory(pods, containers)
    del pods, containers
    assert [info.id for info in inventory.running()] == ["id-c0"]
    assert [ref() for ref in gone] == [None, None]
    assert [info.id for info in inventory.listed(adopt=True).running] == ["id-c0"]


def test_a_container_that_was_being_created_when_the_configuration_changed_gets_its_values(tmp_path: Path) -> None:
    """The first look does not know of it yet."""
    file = tmp_path / "pods" / "c0" / "memory.swap.max"
    file.parent.mkdir(parents=True)
    file.write_text("max\n")
    sent = Sent(tmp_path / "pods")

    async def body(scene: Scene) -> None:
        await sent.settled(lambda: scene.fleet.looks > 0)
        await scene.connection.notify("StartContainer", POD, container("c0"))
        scene.fleet.hidden_looks = 1
        scene.plugin._again_s = 0.001
        scene.plugin.use(PluginConfig((WorkloadClass("swap", False, "x: 1"),)))
        await sent.until(1)
        assert scene.fleet.looks >= 3
        assert sent.values() == {"id-c0": {"memory.swap.max": "0"}}

    run(tmp_path, body, runtime={"on_update": sent.take})


def test_a_restart_of_the_runtime_is_a_new_connection_with_a_new_list(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        await scene.runtime.stop()
        scene.runtime.pods, scene.runtime.containers = [POD], [container("c0", ContainerState.RUNNING)]
        scene.runtime.start()
        await scene.runtime.connected()
        first, second = scene.fleet.events
        assert first == Listed(())
        assert isinstance(second, Listed)
        assert [info.name for info in second.running] == ["c0"]
        assert not scene.task.done()

    run(tmp_path, body)


def test_a_configuration_from_the_runtime_replaces_the_files_as_a_whole(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        await scene.connection.configure("classes: [{name: other, allowswap: false}]")
        await scene.connection.synchronize([], [])
        other = replace(POD, annotations={CLASS: "other"})
        answer = await scene.connection.create_container(other, container("c0"))
        assert dict(answer.adjust.linux.resources.unified) == {"memory.swap.max": "0"}
        with pytest.raises(RpcError, match="is not configured"):
            await scene.connection.create_container(POD, container("c0"))
        assert [type(event) for event in scene.fleet.events] == [Listed, Reconfigured, Listed]

    run(tmp_path, body)


def test_a_bad_configuration_from_the_runtime_ends_the_program_with_an_error(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        with pytest.raises(RpcError, match="configuration from the runtime:1: klasses: no such key"):
            await scene.connection.configure("klasses: []")
        await asyncio.wait_for(asyncio.wait({scene.task}), 5)
        assert isinstance(scene.plugin.fatal, ConfigError)

    run(tmp_path, body)


def test_no_hook_waits_for_the_fleet(tmp_path: Path) -> None:
    """Whatever the fleet is busy with, a hook only puts an event on its queue: here, a thousand in a row."""

    async def body(scene: Scene) -> None:
        async with asyncio.timeout(20):
            for number in range(1000):
                await scene.connection.notify("StartContainer", POD, container(f"n{number}"))
        assert len(scene.fleet.events) == 1001

    run(tmp_path, body)
