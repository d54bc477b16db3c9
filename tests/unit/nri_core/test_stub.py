"""A plugin against FakeRuntime over a real socket: life, time limits, reconnecting, bad input."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from nri_core import (
    Adjustment,
    Backoff,
    ConfigurationRefused,
    ConnectError,
    ConnectionLost,
    Container,
    EventMask,
    LocalProtocolError,
    NriError,
    Plugin,
    PluginAlreadyRunning,
    Pod,
    RegistrationRefused,
    Rejected,
    RpcError,
    Stub,
    Update,
    Validation,
)
from nri_core.testing import FakeRuntime, PluginConnection

POD = Pod("p1", "web", "default")
CONTAINER = Container("c1", "p1", "main")
EXAMPLES = Path(__file__).parents[3] / "packages/nri-core/examples"
QUICK = Backoff(least_s=0.01, most_s=0.05)


class Recorder(Plugin):
    """Notes what it hears."""

    name, index = "recorder", "50"

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.ended: list[BaseException | None] = []

    def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> list[Update]:
        self.heard.append(("synchronize", len(pods), len(containers)))
        return [Update("c0").unified("memory.high", "max")]

    async def disconnected(self, error: BaseException | None) -> None:
        self.ended.append(error)

    async def create_container(self, pod: Pod, container: Container) -> Adjustment:
        self.heard.append(("create", container.id))
        return Adjustment().unified("memory.swap.max", "max")

    def start_container(self, pod: Pod, container: Container) -> None:
        self.heard.append(("start", container.id))

    def remove_pod_sandbox(self, pod: Pod) -> None:
        self.heard.append(("remove pod", pod.id))


def scene(
    tmp_path: Path,
    plugin: Plugin,
    play: Callable[[FakeRuntime, PluginConnection, Stub], Awaitable[None]],
    **options: object,
) -> None:
    """Run `play` with a runtime and the plugin connected to it."""

    async def main() -> None:
        async with FakeRuntime(tmp_path / "nri.sock", **options) as runtime:  # type: ignore[arg-type]
            stub = Stub(plugin, socket_path=runtime.path, backoff=QUICK)
            task = asyncio.create_task(stub.run())
            try:
                await play(runtime, await runtime.connected(), stub)
            finally:
                stub.stop()
                await asyncio.wait_for(task, 5)

    asyncio.run(main())


@pytest.mark.parametrize("old_style", [False, True])
def test_events_of_both_styles_reach_the_same_methods(tmp_path: Path, old_style: bool) -> None:
    plugin = Recorder()

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        assert (connection.name, connection.index) == ("recorder", "50")
        assert connection.updates[0].container_id == "c0"
        response = await connection.create_container(POD, CONTAINER)
        assert dict(response.adjust.linux.resources.unified) == {"memory.swap.max": "max"}
        await connection.notify("StartContainer", POD, CONTAINER)
        await connection.notify("PostStartContainer", POD, CONTAINER)  # not subscribed
        await connection.notify("RemovePodSandbox", POD)

    scene(tmp_path, plugin, play, old_style=old_style, pods=[POD], containers=[CONTAINER])
    assert plugin.heard == [("synchronize", 1, 1), ("create", "c1"), ("start", "c1"), ("remove pod", "p1")]
    assert plugin.ended == [None]


def test_events_that_nobody_knows_are_answered_with_success(tmp_path: Path) -> None:
    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        from nri_core.pb import nri_pb2

        for number in (0, 4, 15, 99):
            event = nri_pb2.StateChangeEvent()
            event.MergeFromString(bytes([8, number]))
            await connection.call("StateChange", event, nri_pb2.Empty())
        await connection.call("Shutdown", nri_pb2.Empty(), nri_pb2.Empty())

    scene(tmp_path, Recorder(), play)


def test_a_split_synchronize_is_one_call_of_the_plugin(tmp_path: Path) -> None:
    plugin = Recorder()
    pods = [Pod(f"p{n}", "n", "ns") for n in range(50)]
    containers = [Container(f"c{n}", "p0", "n", labels={"pad": "x" * 3000}) for n in range(2000)]

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        pass

    scene(tmp_path, plugin, play, pods=pods, containers=containers, request_timeout_s=20)
    assert plugin.heard == [("synchronize", 50, 2000)]


def test_the_plugin_returns_when_the_runtime_restarts(tmp_path: Path) -> None:
    """Again from registration on; the socket is a new one at the same path."""
    plugin = Recorder()

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        await runtime.stop()
        runtime.path.unlink()
        await asyncio.sleep(0.05)  # a while without a socket
        runtime.start()
        again = await runtime.connected()
        await again.create_container(POD, CONTAINER)

    scene(tmp_path, plugin, play)
    assert plugin.heard == [("synchronize", 0, 0), ("synchronize", 0, 0), ("create", "c1")]
    assert isinstance(plugin.ended[0], ConnectionLost)


def test_the_fake_runtime_goes_on_with_the_next_plugin_when_one_leaves_before_it_registers(tmp_path: Path) -> None:
    """As a program that is killed while it starts: nobody waits for its registration until that is overdue."""

    async def main() -> None:
        async with FakeRuntime(tmp_path / "nri.sock", registration_timeout_s=600) as runtime:
            with socket.socket(socket.AF_UNIX) as early:
                early.connect(str(runtime.path))
            stub = Stub(Recorder(), socket_path=runtime.path)
            task = asyncio.ensure_future(stub.run())
            await runtime.connected(60)
            stub.stop()
            await asyncio.wait_for(task, 60)
            assert [str(failure) for failure in runtime.failures] == [
                "the plugin closed the connection before it registered"
            ]

    asyncio.run(main())


def test_waits_between_attempts_grow_to_a_limit_and_differ() -> None:
    backoff = Backoff(least_s=0.5, most_s=30)
    assert [backoff.wait_s(attempt, 0.999) for attempt in range(9)] == sorted(
        backoff.wait_s(attempt, 0.999) for attempt in range(9)
    )
    assert 0.25 <= backoff.wait_s(0, 0) < backoff.wait_s(0, 0.9) <= 0.5
    assert backoff.wait_s(1_000_000, 0.999) <= 30


@pytest.mark.parametrize("blocking", [False, True])
def test_a_method_that_takes_too_long_is_reported_and_answered_in_time(tmp_path: Path, blocking: bool) -> None:
    """The runtime would drop the plugin. The method runs on; the connection lives."""
    released = asyncio.Event()

    class Slow(Recorder):
        late_methods: list[str] = []

        def late(self, method: str, seconds: float) -> None:
            self.late_methods.append(method)

        async def create_container(self, pod: Pod, container: Container) -> Adjustment:
            await released.wait()
            return Adjustment().unified("memory.swap.max", "max")

        def start_container(self, pod: Pod, container: Container) -> None:
            import time

            time.sleep(1.0)

    plugin = Slow()

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        if blocking:
            await connection.notify("StartContainer", POD, CONTAINER)
        else:
            response = await connection.create_container(POD, CONTAINER)
            assert not response.HasField("adjust")
            released.set()
        await connection.notify("RemovePodSandbox", POD) if not blocking else None

    scene(tmp_path, plugin, play, request_timeout_s=0.5)
    assert plugin.late_methods == ["start_container" if blocking else "create_container"]
    plugin.late_methods.clear()


def test_a_validator_that_is_late_rejects(tmp_path: Path) -> None:
    class Slow(Plugin):
        name, index = "slow", "60"

        async def validate_container_adjustment(self, validation: Validation) -> None:
            await asyncio.sleep(30)

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        reason = await connection.validate(POD, CONTAINER)
        assert reason is not None
        assert "in time" in reason

    scene(tmp_path, Slow(), play, request_timeout_s=0.4)


def test_a_validator_accepts_or_rejects_with_a_reason(tmp_path: Path) -> None:
    class Strict(Plugin):
        name, index = "strict", "60"

        def validate_container_adjustment(self, validation: Validation) -> None:
            if validation.container.name == "bad":
                raise Rejected("not here")

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        assert await connection.validate(POD, CONTAINER) is None
        assert await connection.validate(POD, Container("c2", "p1", "bad")) == "not here"

    scene(tmp_path, Strict(), play)


def test_an_exception_fails_the_request_with_its_text_and_keeps_the_connection(tmp_path: Path) -> None:
    class Refusing(Recorder):
        async def create_container(self, pod: Pod, container: Container) -> Adjustment:
            raise ValueError("no such class")

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        for _ in range(2):
            with pytest.raises(RpcError, match="no such class") as caught:
                await connection.create_container(POD, CONTAINER)
            assert caught.value.code == 3

    scene(tmp_path, Refusing(), play)


def test_an_update_of_the_container_under_creation_is_our_own_mistake(tmp_path: Path) -> None:
    class Confused(Plugin):
        name, index = "confused", "60"

        def create_container(self, pod: Pod, container: Container) -> tuple[None, list[Update]]:
            return None, [Update(container.id).unified("memory.high", "1")]

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        with pytest.raises(RpcError, match="use the adjustment"):
            await connection.create_container(POD, CONTAINER)

    scene(tmp_path, Confused(), play)


def test_updates_of_our_own_reach_the_runtime_but_not_from_within_a_handler(tmp_path: Path) -> None:
    class Eager(Recorder):
        errors: list[BaseException] = []
        later: asyncio.Task[list[Update]] | None = None

        async def start_or_fail(self) -> None:
            assert self.stub is not None
            try:
                await self.stub.update_containers([Update("c1")])
            except LocalProtocolError as error:
                self.errors.append(error)

        async def create_container(self, pod: Pod, container: Container) -> Adjustment:
            await self.start_or_fail()
            assert self.stub is not None
            self.later = asyncio.create_task(self.stub.update_containers([Update("c3")]))
            await asyncio.sleep(0.05)
            assert not seen  # it waits for our answer
            return Adjustment()

    plugin = Eager()
    seen: list[object] = []

    def on_update(updates: Sequence[object]) -> list[object]:
        seen.extend(updates)
        return list(updates[:1])

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        await connection.create_container(POD, CONTAINER)
        assert plugin.later is not None
        await plugin.later
        failed = await stub.update_containers([Update("c1").unified("memory.high", "5"), Update("c2")])
        assert failed == [Update("c1").unified("memory.high", "5")]

    scene(tmp_path, plugin, play, on_update=on_update)
    assert len(seen) == 3
    assert "return the updates" in str(plugin.errors[0])


def test_an_older_runtime_is_not_asked_for_events_it_does_not_know(tmp_path: Path) -> None:
    class Curious(Recorder):
        def update_pod_sandbox(self, pod: Pod, overhead: object, resources: object) -> None:
            pass

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        assert connection.events == (
            EventMask.CREATE_CONTAINER | EventMask.START_CONTAINER | EventMask.REMOVE_POD_SANDBOX
        )

    scene(tmp_path, Curious(), play, version="v1.7.24", nri_version="")


def test_a_second_plugin_of_the_same_name_is_told_so_and_the_first_goes_on(tmp_path: Path) -> None:
    """Runtimes take both, and then every container they adjust fails with a conflict."""

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        with pytest.raises(PluginAlreadyRunning, match=r"50-recorder is already connected.*stop the other one"):
            await Stub(Recorder(), socket_path=runtime.path).run()
        done = await asyncio.to_thread(ping, str(runtime.path), "--name", "recorder", "--index", "50")
        assert (done.returncode, done.stdout) == (1, "")
        assert "already connected" in done.stderr
        other = Recorder()
        other.index = "51"
        second = Stub(other, socket_path=runtime.path)
        task = asyncio.create_task(second.run())
        await runtime.connected()
        second.stop()
        await task
        await connection.create_container(POD, CONTAINER)

    scene(tmp_path, Recorder(), play)


def test_unknown_bits_of_a_plugin_s_own_subscription_are_its_mistake(tmp_path: Path) -> None:
    class Odd(Recorder):
        def events(self) -> EventMask:
            return EventMask.CREATE_CONTAINER | 0x8000

    async def main() -> None:
        with pytest.raises(LocalProtocolError, match=r"50-recorder has bits of no event: 0x8000"):
            Stub(Odd(), socket_path=tmp_path / "s")

    asyncio.run(main())


def test_a_plugin_that_requires_an_event_of_newer_runtimes_ends_with_the_reason(tmp_path: Path) -> None:
    class Strict(Plugin):
        name, index = "strict", "60"
        required = EventMask.VALIDATE_CONTAINER_ADJUSTMENT

        def validate_container_adjustment(self, validation: Validation) -> None:
            pass

    async def main() -> None:
        async with FakeRuntime(tmp_path / "s", version="v1.7.24", nri_version="") as runtime:
            with pytest.raises(ConfigurationRefused, match=r"containerd v1\.7\.24 does not know"):
                await Stub(Strict(), socket_path=runtime.path, backoff=QUICK).run()

    asyncio.run(main())


def test_a_subscription_that_the_runtime_does_not_like_is_a_typed_error(tmp_path: Path) -> None:
    """The runtime closes the connection and says why only in its log."""

    class Picky(PluginConnection):
        async def configure(self, config: str = "") -> EventMask:
            await super().configure()
            self.close()
            raise ConnectionLost("picky")

    async def main() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        theirs.setblocking(False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NRI_PLUGIN_SOCKET", str(ours.detach()))
            stub = Stub(Recorder(), reconnect=False)
            task = asyncio.create_task(stub.run())
            with pytest.raises(ConnectionLost, match="picky"):
                await Picky(FakeRuntime(tmp_path / "unused")).start(theirs)
            with pytest.raises(ConfigurationRefused, match=r"closed the connection after the subscription to.*log"):
                await task

    asyncio.run(main())


def test_a_synchronize_answered_too_late_ends_the_connection(tmp_path: Path) -> None:
    """Older runtimes would leave it open and never send an event: it would look healthy for ever."""

    class Blocking(Plugin):
        name, index = "blocking", "60"

        async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
            import time

            time.sleep(0.3)  # noqa: ASYNC251  this is the mistake

    async def main() -> None:
        async with FakeRuntime(tmp_path / "s", request_timeout_s=0.2, patient=True) as runtime:
            with pytest.raises(ConnectionLost, match=r"limit of 0\.2 s.*must not block"):
                await Stub(Blocking(), socket_path=runtime.path, reconnect=False).run()

    asyncio.run(main())


def test_a_method_that_is_cancelled_still_gets_an_answer(tmp_path: Path) -> None:
    class Cancelled(Recorder):
        async def create_container(self, pod: Pod, container: Container) -> Adjustment:
            raise asyncio.CancelledError

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        with pytest.raises(RpcError, match="cancelled"):
            await connection.create_container(POD, CONTAINER)

    scene(tmp_path, Cancelled(), play)


def run_once(path: Path, plugin: Plugin | None = None) -> None:
    asyncio.run(Stub(plugin or Recorder(), socket_path=path, reconnect=False).run())


def test_a_refused_registration_is_a_typed_error_and_not_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with FakeRuntime(tmp_path / "s", refuse="invalid plugin index", registration_timeout_s=1) as runtime:
            with pytest.raises(RegistrationRefused, match="50-recorder: invalid plugin index"):
                await Stub(Recorder(), socket_path=runtime.path, backoff=QUICK).run()

    asyncio.run(main())


def test_a_missing_socket_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match=r"No such file.*is the runtime running"):
        run_once(tmp_path / "absent.sock")


def test_a_path_that_is_no_socket_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectError, match="is not a socket"):
        run_once(tmp_path / "file")


def test_a_socket_that_nobody_serves_says_so(tmp_path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(tmp_path / "s"))
    with pytest.raises(ConnectError, match="nobody listens"):
        run_once(tmp_path / "s")


def serve_bytes(path: Path, data: bytes) -> None:
    """A server that is not NRI, and the plugin's error with it."""

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(data)
            await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(answer, path)
        try:
            await Stub(Recorder(), socket_path=path, reconnect=False, registration_timeout_s=1).run()
        finally:
            server.close()

    asyncio.run(main())


def test_a_peer_that_is_no_runtime_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(NriError, match="is the peer an NRI runtime"):
        serve_bytes(tmp_path / "http", b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(ConnectionLost, match=r"closed the connection|connection broke"):
        serve_bytes(tmp_path / "closing", b"")


def test_a_pre_launched_plugin_uses_the_socket_it_was_given_and_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    theirs.setblocking(False)
    monkeypatch.setenv("NRI_PLUGIN_SOCKET", str(ours.detach()))
    plugin = Recorder()

    async def main() -> None:
        runtime = FakeRuntime(tmp_path / "unused")
        connection = PluginConnection(runtime)
        task = asyncio.create_task(Stub(plugin, socket_path="/nonexistent").run())
        await connection.start(theirs)
        await connection.create_container(POD, CONTAINER)
        connection.close()
        await asyncio.wait_for(task, 5)

    asyncio.run(main())
    assert ("create", "c1") in plugin.heard


def test_a_wrong_inherited_socket_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NRI_PLUGIN_SOCKET", "three")
    with pytest.raises(ConnectError, match="NRI_PLUGIN_SOCKET='three'"):
        run_once(tmp_path / "x")


@pytest.mark.parametrize("name", ["logger", "annotator"])
def test_the_examples_are_short_and_work(tmp_path: Path, name: str) -> None:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 40
    module = runpy.run_path(str(path))
    plugin: Plugin = module[name.title()]()

    async def play(runtime: FakeRuntime, connection: PluginConnection, stub: Stub) -> None:
        swap = Pod("p2", "w", "d", annotations={"example.com/swap": "yes"})
        response = await connection.create_container(swap, CONTAINER)
        await connection.notify("StartContainer", POD, CONTAINER)
        await connection.stop_container(POD, CONTAINER)
        if name == "annotator":
            assert response.adjust.annotations["example.com/seen-by"] == "annotator"
            assert response.adjust.linux.resources.unified["memory.swap.max"] == "max"

    scene(tmp_path, plugin, play)


def ping(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nri_core", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_nri_ping_prints_the_runtime_and_what_runs_as_json_lines(tmp_path: Path) -> None:
    async def main() -> subprocess.CompletedProcess[str]:
        async with FakeRuntime(tmp_path / "s", pods=[POD], containers=[CONTAINER]) as runtime:
            return await asyncio.to_thread(ping, str(runtime.path), "--once")

    done = asyncio.run(main())
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["runtime"] == "containerd"
    assert lines[1]["pod"] == "web"
    assert lines[2] == {
        "container": "main",
        "pod": "default/web",
        "id": "c1",
        "state": "UNKNOWN",
        "cgroups_path": "",
    }
    assert lines[3] == {"pods": 1, "containers": 1}


def test_nri_ping_ends_when_nobody_reads_and_fails_no_pod(tmp_path: Path) -> None:
    async def main() -> None:
        async with FakeRuntime(tmp_path / "s") as runtime:
            reader, writer = os.pipe()
            command = [sys.executable, "-m", "nri_core", str(runtime.path)]
            process = await asyncio.create_subprocess_exec(*command, stdout=writer, stderr=subprocess.PIPE)
            os.close(writer)
            connection = await runtime.connected()
            os.close(reader)
            await connection.create_container(POD, CONTAINER)  # answered, although it cannot be told
            _, errors = await asyncio.wait_for(process.communicate(), 10)
            assert (process.returncode, errors) == (0, b"")

    asyncio.run(main())


def test_nri_ping_tells_events_and_why_it_was_refused(tmp_path: Path) -> None:
    async def events() -> list[dict[str, object]]:
        async with FakeRuntime(tmp_path / "s") as runtime:
            command = [sys.executable, "-m", "nri_core", str(runtime.path)]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            connection = await runtime.connected()
            await connection.notify("RunPodSandbox", POD)
            await connection.update_pod_sandbox(POD)
            await connection.create_container(POD, CONTAINER)
            process.terminate()
            out, _ = await process.communicate()
            assert process.returncode == 0
            return [json.loads(line) for line in out.splitlines()]

    assert asyncio.run(events())[2:] == [
        {"event": "RunPodSandbox", "pod": "default/web"},
        {"event": "UpdatePodSandbox", "pod": "default/web"},
        {"event": "CreateContainer", "pod": "default/web", "container": "main", "id": "c1"},
    ]

    async def refused() -> subprocess.CompletedProcess[str]:
        async with FakeRuntime(tmp_path / "r", refuse="invalid plugin", registration_timeout_s=1) as runtime:
            return await asyncio.to_thread(ping, str(runtime.path))

    done = asyncio.run(refused())
    assert done.returncode == 1
    assert done.stderr.startswith("nri-ping: the runtime does not take plugin 99-nri-ping: invalid plugin (")
    assert len(done.stderr.splitlines()) == 1


def test_nri_ping_says_in_one_line_why_it_cannot_connect(tmp_path: Path) -> None:
    done = ping(str(tmp_path / "absent"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"nri-ping: {tmp_path}/absent: No such file or directory (is the runtime running")
    assert len(done.stderr.splitlines()) == 1
    wrong = ping("--index", "7", str(tmp_path / "absent"))
    assert wrong.stderr.startswith("nri-ping: plugin index '7' is not two")
    assert wrong.returncode == 2
    assert ping("--nonsense").returncode == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up root: run the tests as root")
def test_a_socket_without_permission_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            run_once(locked / "nri.sock")
        except ConnectError as error:
            os._exit(0 if "run as root" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
