"""Failure policies without a Go peer: what is told, who heeds it, and what we do ourselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nri_core import Backoff, Container, FailurePolicy, Plugin, Pod, RpcError, Stub
from nri_core.errors import Code
from nri_core.testing import FakeRuntime, PluginConnection

POD, CONTAINER = Pod("p1", "web", "default"), Container("c1", "p1", "main")
BOTH = FailurePolicy(fail_request=True, keep_connected=True)


class Slow(Plugin):
    """Never answers CreateContainer."""

    name, index = "slow", "50"

    def __init__(self, policy: FailurePolicy | None) -> None:
        self.failure_policy = policy
        self.ended = 0

    async def create_container(self, pod: Pod, container: Container) -> None:
        await asyncio.Event().wait()

    async def start_container(self, pod: Pod, container: Container) -> None:
        return None

    async def disconnected(self, error: BaseException | None) -> None:
        self.ended += 1


def scene(tmp_path: Path, plugin: Plugin, play: Callable[[PluginConnection], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        options.setdefault("request_timeout_s", 60)
        async with FakeRuntime(tmp_path / "nri.sock", **options) as runtime:
            stub = Stub(plugin, socket_path=runtime.path, backoff=Backoff(least_s=0.01))
            task = asyncio.create_task(stub.run())
            try:
                await play(await runtime.connected(120))
            finally:
                stub.stop()
                await asyncio.wait_for(task, 120)

    asyncio.run(main())


@pytest.mark.parametrize("policy", [None, FailurePolicy(), FailurePolicy(fail_request=True), BOTH])
@pytest.mark.parametrize("version", ["v0.12.5", "v0.13.0", "v0.12.3", ""])
def test_the_policy_is_told_and_runtimes_before_v0_12_4_do_not_know_it(
    tmp_path: Path, policy: FailurePolicy | None, version: str
) -> None:
    async def play(peer: PluginConnection) -> None:
        known = version in ("v0.12.5", "v0.13.0")
        assert peer.policy == (policy or FailurePolicy() if known else FailurePolicy())

    scene(tmp_path, Slow(policy), play, nri_version=version)


@pytest.mark.parametrize("policy", [None, FailurePolicy(keep_connected=True), FailurePolicy(fail_request=True)])
def test_a_late_method_is_an_error_if_the_request_is_to_fail(
    tmp_path: Path, policy: FailurePolicy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that the runtime does not take for its own time limit, which would drop us."""
    monkeypatch.setattr("nri_core.aio.hooks.MARGIN_SHARE", 0.995)

    async def play(peer: PluginConnection) -> None:
        if policy is not None and policy.fail_request:
            with pytest.raises(RpcError, match="create_container of plugin 50-slow did not answer in time") as caught:
                await peer.create_container(POD, CONTAINER)
            assert caught.value.code == Code.ABORTED
        else:
            assert not (await peer.create_container(POD, CONTAINER)).HasField("adjust")
        await peer.notify("StartContainer", POD, CONTAINER)

    scene(tmp_path, Slow(policy), play)


@pytest.mark.parametrize("keep", [False, True])
def test_fake_runtime_keeps_a_plugin_that_does_not_answer_if_it_is_to(
    tmp_path: Path, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nri_core.aio.hooks.Hooks.limit_s", lambda self, call: None)  # we do not notice
    monkeypatch.setattr("nri_core.aio.rpc.Call.timeout_s", None)
    plugin = Slow(FailurePolicy(keep_connected=keep))

    async def play(peer: PluginConnection) -> None:
        with pytest.raises(TimeoutError):
            await peer.create_container(POD, CONTAINER)
        if keep:
            peer._runtime.request_timeout_s = 60.0
            await peer.notify("StartContainer", POD, CONTAINER)
            assert plugin.ended == 0
        else:
            await asyncio.wait_for(peer.wait_closed(), 120)

    scene(tmp_path, plugin, play, request_timeout_s=2)
