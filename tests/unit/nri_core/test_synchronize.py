"""Thousands of containers: nothing is converted that nobody looks at, nothing is kept that is over, one bad record
hurts only itself, and values follow in slices."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import pickle
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nri_core import (
    Backoff,
    ConnectionLost,
    Container,
    ContainerState,
    EventMask,
    LocalProtocolError,
    Mount,
    Outcome,
    Plugin,
    Pod,
    RemoteProtocolError,
    Resources,
    RpcError,
    Stub,
    Update,
)
from nri_core.aio.dispatch import PLUGIN_SERVICE_NAME
from nri_core.aio.hooks import Hooks
from nri_core.aio.rpc import Call
from nri_core.api import model
from nri_core.api.model import (
    Allowance,
    container_from_bytes,
    container_from_message,
    container_to_message,
    pod_from_bytes,
    pod_to_message,
)
from nri_core.errors import Code
from nri_core.pb import nri_pb2
from nri_core.session import MAX_SYNCHRONIZED_BYTES, Session, Step
from nri_core.testing import FakeRuntime, PluginConnection
from nri_core.ttrpc.envelope import CallHead

POD = Pod(
    "p1", "web", "default", "u", {"l": "m"}, {"a": "b"}, "runc", cgroup_parent="/kubepods", pid=7, ips=("::1", "::2")
)
CONTAINER = Container(
    "c1",
    "p1",
    "main",
    ContainerState.RUNNING,
    {"l": "m"},
    {"x": "y"},
    ("sh", "-c", "true"),
    ("A=1",),
    (Mount("/data", "/srv", "bind", ("ro",)),),
    "/kubepods/c1",
    {"memory.high": "1"},
    memory_limit_bytes=0,
    pid=77,
    started_at_ns=5,
)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of attributes, in the order in which they are converted."""
    found: list[str] = []
    convert = model._converted

    def noting(record: Any, name: str, *rest: Any) -> Any:
        found.append(name)
        return convert(record, name, *rest)

    monkeypatch.setattr(model, "_converted", noting)
    return found


def test_a_record_is_the_same_wherever_it_comes_from() -> None:
    pod = pod_from_bytes(pod_to_message(POD).SerializeToString(), Allowance())
    message = container_to_message(CONTAINER)
    container = container_from_bytes(message.SerializeToString(), Allowance())
    assert pod == POD
    assert container == container_from_message(message) == CONTAINER
    assert repr(container) == repr(CONTAINER)
    assert container.raw == message
    assert container.raw is container.raw
    assert dataclasses.replace(container, name="other") == dataclasses.replace(CONTAINER, name="other")
    for again in (copy.copy(container), copy.deepcopy(container), pickle.loads(pickle.dumps(container))):
        assert again == CONTAINER
    with pytest.raises(dataclasses.FrozenInstanceError):
        container.name = "x"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="'Container' object has no attribute 'nothing'"):
        _ = container.nothing  # type: ignore[attr-defined]


def test_only_what_is_looked_at_is_converted_and_only_once(conversions: list[str]) -> None:
    container = container_from_bytes(container_to_message(CONTAINER).SerializeToString(), Allowance())
    assert (container.id, container.pod_id, container.name, container.state) == ("c1", "p1", "main", 3)
    assert conversions == []
    assert container.annotations == {"x": "y"}
    assert container.annotations is container.annotations
    assert container.cgroups_path == "/kubepods/c1"
    assert conversions == ["annotations", "cgroups_path"]
    assert (container.pid, container.started_at_ns) == (77, 5)  # found together with the path
    assert conversions == ["annotations", "cgroups_path"]
    fresh = container_from_message(container_to_message(CONTAINER))
    assert (fresh.pid, fresh.pid) == (77, 77)
    assert conversions == ["annotations", "cgroups_path", "pid"]


def test_values_in_any_order_and_twice_are_read_as_protobuf_reads_them() -> None:
    """The last one of a field holds; two halves of a message are one."""
    first = nri_pb2.Container(id="old", name="n", linux=nri_pb2.LinuxContainer(cgroups_path="/x"))
    last = nri_pb2.Container(id="new", state="CONTAINER_PAUSED")
    last.linux.resources.unified["memory.high"] = "1"
    data = first.SerializeToString() + last.SerializeToString()
    container = container_from_bytes(data, Allowance())
    assert (container.id, container.name, container.state) == ("new", "n", ContainerState.PAUSED)
    assert (container.cgroups_path, dict(container.unified)) == ("/x", {"memory.high": "1"})


class Listening(Plugin):
    """Looks at what a real one looks at."""

    name, index = "listening", "50"

    def __init__(self) -> None:
        self.seen: list[tuple[list[str], list[str]]] = []
        self.values: list[str] = []

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> list[Update]:
        wanted = {pod.id for pod in pods if pod.annotations.get("class") == "swap"}
        self.values = [c.cgroups_path for c in containers if c.pod_id in wanted and c.state is ContainerState.RUNNING]
        self.seen.append(([pod.id for pod in pods], [container.id for container in containers]))
        return []


def scene(
    tmp_path: Path,
    plugin: Plugin,
    play: Callable[[FakeRuntime, PluginConnection, Stub], Awaitable[None]],
    **options: Any,
) -> None:
    async def main() -> None:
        async with FakeRuntime(
            tmp_path / "nri.sock", **{"request_timeout_s": 60, "registration_timeout_s": 60, **options}
        ) as runtime:
            stub = Stub(plugin, socket_path=runtime.path, backoff=Backoff(least_s=0.01, most_s=0.05))
            task = asyncio.create_task(stub.run())
            try:
                await play(runtime, await runtime.connected(120), stub)
            finally:
                stub.stop()
                await asyncio.wait_for(task, 120)

    asyncio.run(main())


def test_5000_containers_cost_what_is_looked_at(tmp_path: Path, conversions: list[str]) -> None:
    """A class for one pod in a hundred; the environment and mounts of all stay bytes."""
    pods = [Pod(f"p{n}", "n", "ns", annotations={"class": "swap"} if n % 100 == 0 else {}) for n in range(2500)]
    containers = [
        dataclasses.replace(CONTAINER, id=f"c{n}", pod_id=f"p{n // 2}", env=("PAD=" + "x" * 1000,)) for n in range(5000)
    ]
    plugin = Listening()

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        pass

    scene(tmp_path, plugin, play, pods=pods, containers=containers, request_timeout_s=60)
    assert plugin.seen == [([pod.id for pod in pods], [container.id for container in containers])]
    assert plugin.values == ["/kubepods/c1"] * 50
    assert sorted(conversions) == ["annotations"] * 2500 + ["cgroups_path"] * 50


def test_one_record_that_is_none_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = Listening()
    good = pod_to_message(POD).SerializeToString(), container_to_message(CONTAINER).SerializeToString()
    bad = b"\x0a\x02\xff\xff", b"\x0a\x7f"  # no UTF-8; cut short

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2]) + bytes([len(data) & 0x7F | 0x80, len(data) >> 7]) + data

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        parts = [field(1, bad[0]), field(1, good[0]), field(2, good[1]), field(2, bad[1]), field(2, bad[1])]
        await peer.client.call(PLUGIN_SERVICE_NAME, "Synchronize", b"".join(parts), timeout_s=120)

    scene(tmp_path, plugin, play)
    assert plugin.seen == [([], []), (["p1"], ["c1"])]
    assert [line.split(":")[0:2] for line in caplog.messages] == [
        ["1 of 2 pods of Synchronize are left out, they cannot be decoded", caplog.messages[0].split(":")[1]],
        ["2 of 3 containers of Synchronize are left out, they cannot be decoded", caplog.messages[1].split(":")[1]],
    ]


def test_a_part_that_is_malformed_is_the_runtime_s_fault_when_it_is_looked_at() -> None:
    data = nri_pb2.Container(id="c", pid=5).SerializeToString() + b"\x5a\x04\x1a\x02\x0a\x7f"  # a limit cut short
    container = container_from_bytes(data, Allowance())
    assert (container.id, container.pid) == ("c", 5)
    with pytest.raises(RemoteProtocolError, match="a Container of Synchronize cannot be decoded"):
        _ = container.memory_limit_bytes


def test_a_synchronize_that_is_no_message_is_answered_with_a_status(tmp_path: Path) -> None:
    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        for data in (b"\x12\x05abc", b"\x12", b"\xff" * 11, b"\x13", b"\x19abc"):
            with pytest.raises(RpcError, match="error unmarshalling payload") as caught:
                await peer.client.call(PLUGIN_SERVICE_NAME, "Synchronize", data, timeout_s=120)
            assert caught.value.code == Code.INTERNAL
        await peer.synchronize([POD], [CONTAINER])

    plugin = Listening()
    scene(tmp_path, plugin, play)
    assert len(plugin.seen) == 2


def configured() -> Session:
    session = Session()
    session.step(Step.REGISTER)
    session.configured(nri_pb2.ConfigureRequest(), EventMask(0))
    return session


def test_bytes_of_one_synchronize_do_not_count_for_the_next() -> None:
    """A runtime may synchronize as often as it likes: each of these is within the limit."""
    session = configured()
    large = nri_pb2.SynchronizeRequest(pods=[nri_pb2.PodSandbox(name="x" * (15 << 20))]).SerializeToString()
    for _ in range(2 * MAX_SYNCHRONIZED_BYTES // len(large)):
        assert session.synchronized_bytes(large) is not None
        assert (session._bytes, session._pods, session._containers) == (0, [], [])


def test_what_was_collected_is_let_go_of_when_it_is_refused_or_the_connection_ends() -> None:
    part = nri_pb2.SynchronizeRequest(containers=[nri_pb2.Container(id="x" * (15 << 20))], more=True)
    data = part.SerializeToString()
    session = configured()
    for _ in range(MAX_SYNCHRONIZED_BYTES // len(data)):
        assert session.synchronized_bytes(data) is None
    with pytest.raises(RemoteProtocolError, match="more than 134217728 bytes"):
        session.synchronized_bytes(data)
    assert (session._bytes, session._containers) == (0, [])
    ended = configured()
    ended.synchronized_bytes(data)
    ended.step(Step.CLOSE)
    assert (ended._bytes, ended._containers) == (0, [])


class Slicing(Listening):
    """Answers at once, and asks for values afterwards."""

    def __init__(self, count: int, *, at_once: int = 10) -> None:
        super().__init__()
        self.updates = [Update(f"c{n}").unified("memory.swap.max", "max") for n in range(count)]
        self.at_once = at_once
        self.outcomes: list[Outcome] = []
        self.error: Exception | None = None
        self.task: asyncio.Task[None] | None = None

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> list[Update]:
        self.task = asyncio.create_task(self.send())
        return await super().synchronize(pods, containers)

    async def send(self) -> None:
        assert self.stub is not None
        try:
            async for outcome in self.stub.update_in_slices(self.updates, at_once=self.at_once, timeout_s=60):
                self.outcomes.append(outcome)
        except (ConnectionLost, LocalProtocolError) as error:
            self.error = error


def test_values_follow_the_answer_in_slices_and_each_is_told_when_it_is_confirmed(tmp_path: Path) -> None:
    plugin = Slicing(25)
    slices: list[list[str]] = []

    def on_update(updates: Sequence[nri_pb2.ContainerUpdate]) -> list[nri_pb2.ContainerUpdate]:
        assert len(plugin.outcomes) == len(slices)  # told before the next one is asked for
        slices.append([update.container_id for update in updates])
        return [update for update in updates if update.container_id in ("c3", "c20")]

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        assert peer.updates == []
        assert plugin.task is not None
        await plugin.task

    scene(tmp_path, plugin, play, on_update=on_update)
    assert [len(each) for each in slices] == [10, 10, 5]
    assert [len(each.applied) for each in plugin.outcomes] == [9, 10, 4]
    assert [update.container_id for each in plugin.outcomes for update in each.failed] == ["c3", "c20"]
    assert [each.error for each in plugin.outcomes] == [None] * 3


def test_a_slice_that_fails_is_told_and_the_others_follow(tmp_path: Path) -> None:
    plugin = Slicing(30)

    def on_update(updates: Sequence[nri_pb2.ContainerUpdate]) -> list[nri_pb2.ContainerUpdate]:
        if updates[0].container_id == "c10":
            raise RpcError(Code.UNAVAILABLE, "not now")
        return []

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        assert plugin.task is not None
        await plugin.task

    scene(tmp_path, plugin, play, on_update=on_update)
    assert [(len(each.applied), len(each.failed)) for each in plugin.outcomes] == [(10, 0), (0, 10), (10, 0)]
    assert "not now" in str(plugin.outcomes[1].error)


def test_a_slice_that_cannot_be_sent_hurts_only_itself(tmp_path: Path) -> None:
    plugin = Slicing(3, at_once=1)
    plugin.updates[1] = Update("c1").limits(Resources(memory_limit_bytes=1 << 70))

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        assert plugin.task is not None
        await plugin.task

    scene(tmp_path, plugin, play)
    assert [len(each.applied) for each in plugin.outcomes] == [1, 0, 1]
    assert isinstance(plugin.outcomes[1].error, ValueError)


def test_a_slice_that_is_not_answered_is_told_with_a_time_out(tmp_path: Path) -> None:
    plugin = Slicing(2, at_once=1)

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        async def never(updates: object, *, timeout_s: float) -> list[Update]:
            raise TimeoutError("no answer")

        stub.update_containers = never  # type: ignore[assignment]
        assert plugin.task is not None
        plugin.outcomes.clear()
        await plugin.send()
        assert [type(each.error) for each in plugin.outcomes] == [TimeoutError] * 2

    scene(tmp_path, plugin, play)


def test_when_the_connection_ends_the_rest_is_not_asked_for(tmp_path: Path) -> None:
    plugin = Slicing(30)
    peers: list[PluginConnection] = []

    def on_update(updates: Sequence[nri_pb2.ContainerUpdate]) -> list[nri_pb2.ContainerUpdate]:
        if updates[0].container_id == "c10":
            peers[0].close()
        return []

    async def main() -> None:
        async with FakeRuntime(tmp_path / "nri.sock", on_update=on_update) as runtime:
            stub = Stub(plugin, socket_path=runtime.path, reconnect=False)
            task = asyncio.create_task(stub.run())
            updates, plugin.updates = plugin.updates, []
            peers.append(await runtime.connected(120))
            plugin.updates = updates
            await plugin.send()
            with pytest.raises(ConnectionLost):
                await task

    asyncio.run(main())
    assert [len(each.applied) for each in plugin.outcomes] == [10]
    assert isinstance(plugin.error, ConnectionLost)


def test_updates_are_made_when_their_turn_comes(tmp_path: Path) -> None:
    """A generator is taken slice by slice: thousands need not be there at once."""
    made: list[str] = []

    def updates() -> Any:
        for number in range(30):
            made.append(f"c{number}")
            yield Update(f"c{number}")

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        slices: AsyncIterator[Outcome] = stub.update_in_slices(updates(), at_once=10)
        await anext(slices)
        assert len(made) == 10

    scene(tmp_path, Listening(), play)


def test_within_a_method_slices_are_refused_as_one_update_is(tmp_path: Path) -> None:
    class Eager(Slicing):
        async def create_container(self, pod: Pod, container: Container) -> None:
            await self.send()

    plugin = Eager(1)

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        assert plugin.task is not None
        await plugin.task
        await peer.create_container(POD, CONTAINER)
        assert "return the updates" in str(plugin.error)

    scene(tmp_path, plugin, play)


def test_what_is_decoded_before_the_method_runs_counts_for_its_time_limit() -> None:
    """The runtime's clock runs from the moment it asked: of 60 s, 51 are for us, and 50 of them are over."""

    class Slow(Plugin):
        name, index = "slow", "50"
        limits: list[float] = []

        async def create_container(self, pod: Pod, container: Container) -> None:
            await asyncio.Event().wait()

        def late(self, method: str, seconds: float) -> None:
            self.limits.append(seconds)

    plugin = Slow()

    async def main() -> None:
        running = Hooks(plugin, Session(), ThreadPoolExecutor(1))
        head = CallHead("s", "CreateContainer", b"", 60 * 10**9)
        began_s = time.monotonic()
        await running.run("create_container", Call(head, arrived_s=began_s - 50), "c", POD, CONTAINER)
        await running.close()

    asyncio.run(asyncio.wait_for(main(), 120))
    assert len(plugin.limits) == 1
    assert plugin.limits[0] < 25  # 1, were nobody else on this machine
