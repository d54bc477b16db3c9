"""The end of a connection: no outcome of a method is lost, nothing is written after it, waits grow."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nri_core import (
    Adjustment,
    Backoff,
    ConnectError,
    ConnectionLost,
    Container,
    LocalProtocolError,
    Plugin,
    Pod,
    Stub,
)
from nri_core.aio.transport import connect, inherited
from nri_core.testing import FakeRuntime, PluginConnection

POD, CONTAINER = Pod("p1", "web", "default"), Container("c1", "p1", "main")
QUICK = Backoff(least_s=0.01, most_s=0.05)
Play = Callable[[FakeRuntime, PluginConnection, Stub], Awaitable[None]]


@pytest.fixture
def troubles(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What asyncio complained of: exceptions that nobody looked at among it."""
    caplog.set_level(logging.INFO)

    def found() -> list[str]:
        gc.collect()
        return [record.getMessage() for record in caplog.records if record.name == "asyncio"]

    yield found
    assert found() == []


def scene(tmp_path: Path, plugin: Plugin, play: Play, **options: Any) -> None:
    async def main() -> None:
        async with FakeRuntime(
            tmp_path / "nri.sock", **{"request_timeout_s": 60, "registration_timeout_s": 60, **options}
        ) as runtime:
            stub = Stub(plugin, socket_path=runtime.path, backoff=QUICK)
            task = asyncio.create_task(stub.run())
            try:
                await play(runtime, await runtime.connected(120), stub)
            finally:
                stub.stop()
                await asyncio.wait_for(task, 120)

    asyncio.run(main())


class Hooked(Plugin):
    """Works until it is let go, and then fails."""

    name, index = "hooked", "50"

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.heard: list[str] = []
        self.go = threading.Event()
        self.in_thread = threading.Event()

    async def create_container(self, pod: Pod, container: Container) -> Adjustment:
        self.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.heard.append("cancelled")
            raise ValueError("boom") from None
        raise AssertionError("nobody waits for this any more")

    def start_container(self, pod: Pod, container: Container) -> None:
        self.in_thread.set()
        self.go.wait(100)
        self.heard.append("thread")
        raise ValueError("bang")

    def stop_container(self, pod: Pod, container: Container) -> None:
        self.heard.append("stop")

    async def disconnected(self, error: BaseException | None) -> None:
        self.heard.append("disconnected")


def test_an_async_method_ends_with_its_connection_and_its_failure_is_logged(
    tmp_path: Path, troubles: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """It went on for a connection that was dead, and its exception was never retrieved."""
    plugin = Hooked()

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        call = asyncio.create_task(peer.create_container(POD, CONTAINER))
        await plugin.begun.wait()
        peer.close()
        with pytest.raises(ConnectionLost):
            await call
        await runtime.connected(120)

    scene(tmp_path, plugin, play)
    assert plugin.heard[:2] == ["cancelled", "disconnected"]  # in this order
    assert "create_container for default/web:main (c1) came to its end" in caplog.text
    assert "it failed: boom" in caplog.text


def test_a_method_in_a_thread_goes_on_and_its_failure_is_logged(
    tmp_path: Path, troubles: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """A thread cannot be cancelled. What waited behind it is of the dead connection, and is not called."""
    plugin = Hooked()

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        calls = [asyncio.create_task(peer.notify("StartContainer", POD, CONTAINER))]
        await asyncio.to_thread(plugin.in_thread.wait, 100)
        calls.append(asyncio.create_task(peer.stop_container(POD, CONTAINER)))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        peer.close()
        for call in calls:
            with pytest.raises(ConnectionLost):
                await call
        again = await runtime.connected(120)
        plugin.go.set()
        await again.stop_container(POD, CONTAINER)  # behind it in the one thread

    scene(tmp_path, plugin, play)
    assert plugin.heard[:3] == ["disconnected", "thread", "stop"]
    assert plugin.heard.count("stop") == 1
    assert "start_container for default/web:main (c1) came to its end" in caplog.text
    assert "it failed: bang" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_a_late_method_s_outcome_is_logged_whatever_it_is(
    tmp_path: Path,
    fails: bool,
    troubles: Callable[[], list[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nri_core.aio.hooks.MARGIN_SHARE", 0.995)  # answered 0.3 s after the call, far from the limit
    released = asyncio.Event()
    ended = asyncio.Event()

    class Late(Plugin):
        name, index = "late", "50"

        async def create_container(self, pod: Pod, container: Container) -> Adjustment:
            await released.wait()
            ended.set()
            if fails:
                raise ValueError("boom")
            return Adjustment()

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        await peer.create_container(POD, CONTAINER)
        released.set()
        await ended.wait()
        await asyncio.sleep(0)

    scene(tmp_path, Late(), play, request_timeout_s=60)
    outcome = "it failed: boom" if fails else "its result is lost"
    [line] = [record.getMessage() for record in caplog.records if "came to its end" in record.getMessage()]
    assert "create_container for default/web:main (c1)" in line
    assert outcome in line


def test_a_method_that_ends_in_the_moment_its_connection_does_is_not_lost(
    tmp_path: Path, troubles: Callable[[], list[str]]
) -> None:
    class Closing(Plugin):
        name, index = "closing", "50"
        peer: PluginConnection | None = None

        async def create_container(self, pod: Pod, container: Container) -> Adjustment:
            assert self.peer is not None
            self.peer.close()
            await asyncio.sleep(0)
            raise ValueError("boom")

    plugin = Closing()

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        for number in range(20):
            plugin.peer = peer
            with contextlib.suppress(Exception):
                await peer.create_container(POD, CONTAINER)
            if number < 19:
                peer = await runtime.connected(120)

    scene(tmp_path, plugin, play)


def test_a_method_that_will_not_be_cancelled_does_not_hold_up_the_next_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nri_core.aio.hooks.CANCEL_S", 0.05)
    begun, released = asyncio.Event(), asyncio.Event()

    class Stubborn(Plugin):
        name, index = "stubborn", "50"

        async def create_container(self, pod: Pod, container: Container) -> None:
            begun.set()
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await released.wait()

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        call = asyncio.create_task(peer.create_container(POD, CONTAINER))
        await begun.wait()
        peer.close()
        with pytest.raises(ConnectionLost):
            await call
        await runtime.connected(120)
        released.set()

    scene(tmp_path, Stubborn(), play)
    assert "create_container for default/web:main (c1) goes on although it was cancelled" in caplog.text


def test_nothing_is_written_after_stop(tmp_path: Path) -> None:
    """A method that ends later has no answer to give any more; nor is an update sent."""
    begun, released = threading.Event(), threading.Event()

    class Slow(Plugin):
        name, index = "slow", "50"

        def start_container(self, pod: Pod, container: Container) -> None:
            begun.set()
            released.wait(100)

    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NRI_PLUGIN_SOCKET", str(ours.detach()))
            stub = Stub(Slow())
            task = asyncio.create_task(stub.run())
            peer = PluginConnection(FakeRuntime(tmp_path / "unused"))
            received: list[bytes] = []
            await peer.start(theirs)
            assert peer._trunk._wire is not None
            peer._trunk._wire._feed = received.append
            call = asyncio.create_task(peer.notify("StartContainer", POD, CONTAINER))
            assert await asyncio.to_thread(begun.wait, 100)
            stub.stop()
            released.set()
            with pytest.raises(Exception, match=r"closed|lost|stopped|not fit"):
                await stub.update_containers([])
            await asyncio.wait_for(task, 120)
            with pytest.raises(Exception, match=r"closed|not fit"):
                await stub.update_containers([])
            with pytest.raises(ConnectionLost):
                await call
            assert received == []

    asyncio.run(main())


SEE = "import os, sys; print(sorted(int(n) for n in os.listdir('/proc/self/fd')), os.environ.get('NRI_PLUGIN_SOCKET'))"


def test_told_to_stop_while_it_connects_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to close yet: it went on, registered and served."""

    async def main() -> None:
        async with FakeRuntime(tmp_path / "nri.sock", registration_timeout_s=600) as runtime:
            stub = Stub(Hooked(), socket_path=runtime.path)

            async def connect_and_stop(path: str) -> socket.socket:
                made = await connect(path)
                stub.stop()
                return made

            monkeypatch.setattr("nri_core.aio.stub.connect", connect_and_stop)
            await asyncio.wait_for(stub.run(), 60)
            assert stub.session.runtime is None, "not even registered"

    asyncio.run(main())


def test_the_inherited_socket_is_not_inherited_by_our_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes without close-on-exec; a child would hold the trunk open after we have gone."""
    ours, theirs = socket.socketpair()
    number = os.dup2(ours.detach(), 77)
    os.set_inheritable(number, True)
    assert "77" in subprocess.run([sys.executable, "-c", SEE], capture_output=True, text=True, close_fds=False).stdout
    monkeypatch.setenv("NRI_PLUGIN_SOCKET", "77")
    found = inherited()
    assert found is not None
    with found, theirs:
        assert found.fileno() == 77
        assert not found.get_inheritable()
        done = subprocess.run([sys.executable, "-c", SEE], capture_output=True, text=True, close_fds=False, check=True)
        assert "77," not in done.stdout.replace("]", ",").split("] ")[0]


def test_a_number_that_is_no_socket_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be anything of ours: standard error, say."""
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    monkeypatch.setenv("NRI_PLUGIN_SOCKET", str(reader))
    with pytest.raises(ConnectError, match="is no open socket"):
        inherited()
    assert os.get_inheritable(reader)
    os.close(reader)
    os.close(writer)


def test_waits_are_short_again_only_after_a_while_that_was_healthy() -> None:
    backoff = Backoff()
    assert backoff.healthy_s == 10
    assert backoff.attempt_after(7, 0.0) == 7
    assert backoff.attempt_after(7, 9.9) == 7
    assert backoff.attempt_after(7, 10.0) == 0
    assert backoff.attempt_after(7, 1e9) == 0


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which attempt in a row each wait was for. None of them takes any time."""
    found: list[int] = []

    def wait_s(self: Backoff, attempt: int, chance: float) -> float:
        found.append(attempt)
        return 0.0

    monkeypatch.setattr(Backoff, "wait_s", wait_s)
    return found


@pytest.mark.parametrize("healthy", [False, True])
def test_a_runtime_that_drops_us_after_each_synchronize_is_asked_ever_less_often(
    tmp_path: Path, healthy: bool, monkeypatch: pytest.MonkeyPatch, attempts: list[int]
) -> None:
    """2.3 connections a second, for ever. The clock of the connection is the test's."""
    monkeypatch.setattr(Stub, "_served_s", lambda self: 0.0 if self._serving_since_s is None else 11.0 * healthy)

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        for _ in range(5):
            peer.close()
            peer = await runtime.connected(120)

    scene(tmp_path, Hooked(), play)
    assert attempts[:5] == ([0] * 5 if healthy else [0, 1, 2, 3, 4])


def test_attempts_that_make_no_connection_do_not_count_as_the_healthy_one_before(
    tmp_path: Path, attempts: list[int]
) -> None:
    """The runtime was stopped: the first wait is a short one, the others grow."""

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        while stub._serving_since_s is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        stub._serving_since_s -= 100
        await runtime.stop()
        while len(attempts) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    scene(tmp_path, Hooked(), play)
    assert attempts[:5] == [0, 1, 2, 3, 4]


def test_the_time_that_a_connection_served_is_counted_from_synchronize_on(tmp_path: Path) -> None:
    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        loop = asyncio.get_running_loop()
        while stub._serving_since_s is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert 0 <= stub._served_s() <= loop.time()
        stub._serving_since_s -= 100
        assert stub._served_s() >= 100

    scene(tmp_path, Hooked(), play)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12, which has eager tasks")
def test_with_eager_tasks_a_method_that_calls_the_runtime_is_still_told_not_to(tmp_path: Path) -> None:
    """Such a task runs before whoever made it has it."""
    errors: list[Exception] = []

    class Eager(Plugin):
        name, index = "eager", "50"

        async def create_container(self, pod: Pod, container: Container) -> None:
            assert self.stub is not None
            try:
                await self.stub.update_containers([])
            except LocalProtocolError as error:
                errors.append(error)

    async def play(runtime: FakeRuntime, peer: PluginConnection, stub: Stub) -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
        await peer.create_container(POD, CONTAINER)

    scene(tmp_path, Eager(), play)
    assert len(errors) == 1
