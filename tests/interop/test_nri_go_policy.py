"""What NRI v0.12.4 brought, failure policies, on both sides; and a Go plugin of our kind that is there before us."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

import pytest

from interop.nri import Recorder, Release, connected, create, go_plugin, go_runtime, patiently, request
from interop.peers import WAIT_S, Peer
from nri_core import Adjustment, Container, FailurePolicy, PluginAlreadyRunning, Pod, Stub
from nri_core.testing import FakeRuntime


class Busy(Recorder):
    """Blocks the event loop for the containers called `slow`: nothing can be answered for it."""

    def __init__(self, policy: FailurePolicy | None, *, blocks_s: float = 0.0) -> None:
        super().__init__()
        self.failure_policy = policy
        self.blocks_s = blocks_s

    async def create_container(self, pod: Pod, container: Container) -> Adjustment:
        if container.name == "slow":
            if self.blocks_s:
                time.sleep(self.blocks_s)  # noqa: ASYNC251 - on purpose
            else:
                await asyncio.sleep(30)
        return Adjustment().env("A", "1")


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_plugin_that_does_not_answer_is_treated_as_its_policy_says(
    release: Release, path: Path, fail: bool, keep: bool
) -> None:
    """Older runtimes do not know the policy: they drop the plugin and go on."""
    known = release.has(0, 12, 4)

    async def main(limit_ms: int) -> None:
        plugin = Busy(FailurePolicy(fail_request=fail, keep_connected=keep), blocks_s=3 * limit_ms / 1000)
        async with go_runtime(release, path, request_timeout_ms=limit_ms) as runtime, connected(plugin, path, runtime):
            answer = await request(runtime, "CreateContainer", container={"id": "c", "name": "slow"})
            failed = "plugin 50-ours failed to handle CreateContainer" in answer.get("error", "")
            assert failed == (fail and known), answer
            if keep and known:
                assert (await create(runtime))["env"] == [{"key": "A", "value": "1"}]
                assert plugin.ended == []
            else:
                await runtime.logged("closing plugin 50-ours")

    patiently(main)


@pytest.mark.parametrize("fail", [False, True])
def test_a_late_method_fails_the_request_if_the_policy_says_so_and_the_plugin_stays(
    release: Release, path: Path, fail: bool
) -> None:
    """We answer before the limit: with an error then, which every release understands, and not with nothing."""

    async def main(limit_ms: int) -> None:
        plugin = Busy(FailurePolicy(fail_request=fail))
        async with go_runtime(release, path, request_timeout_ms=limit_ms) as runtime, connected(plugin, path, runtime):
            answer = await request(runtime, "CreateContainer", container={"id": "c", "name": "slow"})
            assert ("did not answer in time" in answer.get("error", "")) == fail, answer
            assert plugin.lates == ["create_container"]
            assert (await create(runtime))["env"] == [{"key": "A", "value": "1"}]
            assert plugin.ended == []

    patiently(main)


def test_the_policy_of_a_go_plugin_is_heeded_by_fake_runtime(release: Release, path: Path) -> None:
    settings = {"name": "theirs", "index": "30", "fail_request": True, "keep_connected": True}
    known = release.has(0, 12, 4)
    pod, container = Pod("p", "web", "default"), Container("c", "p", "main")
    told = release.version if release.has(0, 12) else ""

    async def main(limit_ms: int) -> None:
        settings["delay_ms"] = {"CreateContainer": 2 * limit_ms}
        limit_s = limit_ms / 1000
        async with (
            FakeRuntime(path, nri_version=told, old_style=not release.has(0, 12), request_timeout_s=limit_s) as fake,
            Peer(release.program, "plugin", str(path), json.dumps(settings)),
        ):
            plugin = await fake.connected(WAIT_S)
            assert plugin.policy == (
                FailurePolicy(fail_request=True, keep_connected=True) if known else FailurePolicy()
            )
            with pytest.raises(TimeoutError):
                await plugin.create_container(pod, container)
            if known:
                await plugin.notify("StartContainer", pod, container)
            else:
                await asyncio.wait_for(plugin.wait_closed(), WAIT_S)

    patiently(main)


def test_a_go_plugin_of_our_kind_keeps_us_out_where_it_can_be_seen(release: Release, path: Path) -> None:
    """It takes no claim; it is known by its program's name, and by its connection to this very socket."""

    class Ours(Recorder):
        exclusive = "memtierd"
        rivals = ("nri-memtierd",)

    async def main() -> None:
        program = path.parent / "45-nri-memtierd"
        program.symlink_to(release.program)
        theirs = Release(release.version, program)
        async with go_runtime(release, path) as runtime:
            async with go_plugin(theirs, path, runtime, name="nri-memtierd", index="45") as peer:
                with pytest.raises(
                    PluginAlreadyRunning, match=rf"45-nri-memtierd, process {peer.process.pid}, is already"
                ):
                    await Stub(Ours(), socket_path=path).run()
                elsewhere = Stub(Ours(), socket_path=path.parent / "other.sock")  # another runtime's
                task = asyncio.create_task(elsewhere.run())
                await asyncio.sleep(0.05)
                assert not task.done()
                elsewhere.stop()
                await task
            async with connected(Ours(), path, runtime):  # it has gone
                pass

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
