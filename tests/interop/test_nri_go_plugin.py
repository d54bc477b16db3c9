"""A plugin on NRI's own Go stub against FakeRuntime: what plugin authors test with behaves like a runtime."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from interop.nri import Release
from interop.peers import WAIT_S, Peer
from nri_core import Container, EventMask, Mount, Pod, RpcError
from nri_core.errors import ConnectionLost, MessageTooLarge
from nri_core.pb import nri_pb2
from nri_core.testing import FakeRuntime, PluginConnection

CTR = Container(
    "ctr1",
    "pod1",
    "main",
    annotations={"k": "v"},
    args=("/bin/true",),
    env=("A=1",),
    mounts=(Mount("/data", "/srv", "bind", ("ro",)),),
    cgroups_path="/kubepods/pod1/ctr1",
    unified={"memory.high": "max"},
    memory_limit_bytes=64 << 20,
)
WEB = Pod("pod1", "web", "default", uid="uid1", annotations={"example.com/class": "swap"}, cgroup_parent="/kubepods")
OLD_EVENTS = (
    "PostCreateContainer",
    "StartContainer",
    "PostStartContainer",
    "PostUpdateContainer",
    "RemoveContainer",
)


@contextlib.asynccontextmanager
async def met(
    release: Release, path: Path, *, runtime: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[FakeRuntime, PluginConnection, Peer]]:
    """FakeRuntime as of this release, with the Go plugin connected to it."""
    options: dict[str, Any] = {
        "version": release.runtime_version,
        "nri_version": release.version if release.has(0, 12) else "",
        "old_style": not release.has(0, 12),
        "pods": [WEB],
        "containers": [CTR],
        "registration_timeout_s": WAIT_S,
        "request_timeout_s": WAIT_S,
        **(runtime or {}),
    }
    text = json.dumps({"name": "theirs", "index": "30", **settings})
    async with FakeRuntime(path, **options) as fake, Peer(release.program, "plugin", str(path), text) as peer:
        yield fake, await fake.connected(WAIT_S), peer


def test_it_registers_and_learns_the_runtime_and_what_is_there(release: Release, path: Path) -> None:
    async def main() -> None:
        update = {"container_id": "ctr1", "linux": {"resources": {"unified": {"memory.high": "5000"}}}}
        async with met(release, path, updates={"Synchronize": update}) as (_, plugin, peer):
            assert (plugin.index, plugin.name) == ("30", "theirs")
            configured = await peer.event("Configure")
            assert (configured["runtime"], configured["version"]) == ("containerd", release.runtime_version)
            synchronized = await peer.event("Synchronize")
            assert (synchronized["pods"], synchronized["containers"]) == (1, 1)
            assert synchronized["first"]["annotations"] == {"k": "v"}
            assert synchronized["first"]["linux"]["cgroups_path"] == "/kubepods/pod1/ctr1"
            assert synchronized["first"]["linux"]["resources"]["memory"]["limit"] == {"value": str(64 << 20)}
            [got] = plugin.updates
            assert (got.container_id, dict(got.linux.resources.unified)) == ("ctr1", {"memory.high": "5000"})
            every = EventMask(0x3FFF) if release.has(0, 10) else EventMask(0x07FF)
            assert plugin.events == every

    asyncio.run(main())


def test_it_hears_every_event(release: Release, path: Path) -> None:
    async def main() -> None:
        async with met(release, path) as (_, plugin, peer):
            methods: list[str] = ["RunPodSandbox", *OLD_EVENTS, "StopPodSandbox", "RemovePodSandbox"]
            if release.has(0, 10):
                methods.insert(1, "PostUpdatePodSandbox")
            for method in methods:
                await plugin.notify(method, WEB, CTR if "Container" in method else None)
                heard = await peer.event(method)
                assert heard["pod"]["annotations"] == {"example.com/class": "swap"}
                assert heard.get("container", {}).get("name") == ("main" if "Container" in method else None)
            if release.has(0, 10):
                resources = nri_pb2.LinuxResources(unified={"a": "b"})
                await plugin.update_pod_sandbox(WEB, None, resources)
                assert (await peer.event("UpdatePodSandbox"))["resources"] == {"unified": {"a": "b"}}

    asyncio.run(main())


def test_its_adjustments_and_updates_come_back(release: Release, path: Path) -> None:
    adjust = {
        "annotations": {"by": "go"},
        "env": [{"key": "B", "value": "2"}],
        "linux": {"resources": {"unified": {"memory.swap.max": "max"}, "memory": {"limit": {"value": "1000"}}}},
    }
    updates = {
        method: {"container_id": "other", "linux": {"resources": {"unified": {"memory.high": str(number)}}}}
        for number, method in enumerate(("CreateContainer", "UpdateContainer", "StopContainer"))
    }

    async def main() -> None:
        async with met(release, path, adjust=adjust, updates=updates) as (_, plugin, peer):
            created = await plugin.create_container(WEB, CTR)
            heard = await peer.event("CreateContainer")
            assert heard["container"]["mounts"][0]["destination"] == "/data"
            assert dict(created.adjust.annotations) == {"by": "go"}
            assert [(pair.key, pair.value) for pair in created.adjust.env] == [("B", "2")]
            assert dict(created.adjust.linux.resources.unified) == {"memory.swap.max": "max"}
            assert created.adjust.linux.resources.memory.limit.value == 1000
            got = [
                *created.update,
                *await plugin.update_container(WEB, CTR, nri_pb2.LinuxResources(unified={"c": "d"})),
                *await plugin.stop_container(WEB, CTR),
            ]
            assert [dict(update.linux.resources.unified)["memory.high"] for update in got] == ["0", "1", "2"]
            assert (await peer.event("UpdateContainer"))["resources"]["unified"] == {"c": "d"}

    asyncio.run(main())


def test_its_errors_come_as_status_with_their_text(release: Release, path: Path) -> None:
    async def main() -> None:
        async with met(release, path, failures={"CreateContainer": "not this one"}) as (_, plugin, _peer):
            with pytest.raises(RpcError, match="not this one"):
                await plugin.create_container(WEB, CTR)
            await plugin.notify("StartContainer", WEB, CTR)

    asyncio.run(main())


def test_its_verdict_on_adjustments_is_asked(release: Release, path: Path) -> None:
    async def main() -> None:
        async with met(release, path, reject="not like this") as (_, plugin, peer):
            if not release.has(0, 10):
                assert EventMask.VALIDATE_CONTAINER_ADJUSTMENT not in plugin.events
                return
            adjust = nri_pb2.ContainerAdjustment(annotations={"a": "b"})
            assert "not like this" in str(await plugin.validate(WEB, CTR, adjust))
            heard = await peer.event("ValidateContainerAdjustment")
            assert heard["request"]["adjust"]["annotations"] == {"a": "b"}

    asyncio.run(main())


def test_2000_containers_in_parts_arrive_as_one_synchronization(release: Release, path: Path) -> None:
    """8 MiB: the Go side reads messages of up to 4 MiB, and from v0.7 on collects parts."""
    pods = [Pod(f"pod{number}", f"name{number}", "default") for number in range(500)]
    pad = "x" * (4000 if release.has(0, 7) else 1500)
    containers = [
        Container(f"ctr{number}", f"pod{number % 500}", "c", annotations={"pad": pad}) for number in range(2000)
    ]

    async def main() -> None:
        runtime = {"pods": pods, "containers": containers}
        async with met(release, path, runtime=runtime) as (_, plugin, peer):
            heard = await peer.event("Synchronize")
            assert (heard["pods"], heard["containers"]) == (500, 2000)
            assert (heard["first"]["id"], heard["last"]["id"]) == ("ctr0", "ctr1999")
            assert heard["last"]["annotations"]["pad"] == pad
            await plugin.notify("StartContainer", WEB, CTR)
            await peer.event("StartContainer")

    asyncio.run(main())


def test_messages_of_every_size_near_the_frame_limits_pass_both_ways(release: Release, path: Path) -> None:
    """A wrong cut of frames makes a Go peer hang up, or crash."""
    sizes = [*range(3650, 3720), *range(4020, 4100), *range(8120, 8200, 3), 65_536, 1 << 20, (4 << 20) - 2000]

    async def main() -> None:
        async with met(release, path, quiet=True) as (_, plugin, peer):
            for size in sizes:
                padded = Container("ctr1", "pod1", "main", annotations={"pad": "x" * size})
                await plugin.create_container(WEB, padded)
            with pytest.raises(MessageTooLarge):
                await plugin.create_container(WEB, Container("c", "pod1", "c", annotations={"pad": "x" * (4 << 20)}))
            await asyncio.gather(*(plugin.create_container(WEB, CTR) for _ in range(300)))
            assert peer.process.returncode is None
        for size in (4040, 4060, 4086, 4096, 8182, 90_000):  # the settings are an argument: at most 128 KiB
            async with met(release, path, adjust={"annotations": {"pad": "x" * size}}) as (_, plugin, _peer):
                assert len((await plugin.create_container(WEB, CTR)).adjust.annotations["pad"]) == size

    asyncio.run(main())


def test_its_own_updates_reach_the_runtime_and_the_failed_ones_go_back(release: Release, path: Path) -> None:
    asked: list[str] = []

    def on_update(updates: Any) -> Any:
        asked.extend(update.container_id for update in updates)
        return [update for update in updates if update.container_id == "bad"]

    async def main() -> None:
        async with met(release, path, runtime={"on_update": on_update}) as (_, _plugin, peer):
            answer = await peer.do("update", updates=[{"container_id": name} for name in ("ctr1", "bad")])
            assert "error" not in answer
            assert [update["container_id"] for update in answer["failed"]] == ["bad"]
            assert asked == ["ctr1", "bad"]

    asyncio.run(main())


def test_a_late_answer_ends_the_connection_as_with_a_real_runtime(release: Release, path: Path) -> None:
    async def main() -> None:
        runtime = {"request_timeout_s": 0.5}
        async with met(release, path, runtime=runtime, delay_ms={"CreateContainer": 1_000_000}) as (_, plugin, peer):
            with pytest.raises((TimeoutError, RpcError)):
                await plugin.create_container(WEB, CTR)
            await peer.event("closed")

    asyncio.run(main())


def test_it_sees_the_end_of_the_runtime(release: Release, path: Path) -> None:
    async def main() -> None:
        async with met(release, path) as (fake, plugin, peer):
            await fake.stop()
            await peer.event("closed")
            with pytest.raises((ConnectionLost, RpcError)):
                await plugin.create_container(WEB, CTR)

    asyncio.run(main())


def test_the_runtime_sees_the_end_of_the_plugin(release: Release, path: Path) -> None:
    async def main() -> None:
        async with met(release, path) as (_, plugin, peer):
            peer.process.kill()
            await asyncio.wait_for(plugin.wait_closed(), WAIT_S)
            with pytest.raises(ConnectionLost):
                await plugin.create_container(WEB, CTR)

    asyncio.run(main())


def test_a_registration_that_is_refused_ends_its_run_with_our_text(release: Release, path: Path) -> None:
    async def main() -> None:
        text = json.dumps({"name": "theirs", "index": "30"})
        async with (
            FakeRuntime(path, refuse="no plugins today", registration_timeout_s=WAIT_S),
            Peer(release.program, "plugin", str(path), text) as peer,
        ):
            ended = await peer.event("ended")
            assert "no plugins today" in ended["error"]

    asyncio.run(main())


def test_a_subscription_with_unknown_events_is_turned_down(release: Release, path: Path) -> None:
    async def main() -> None:
        text = json.dumps({"name": "theirs", "index": "30"})
        # A plugin of NRI v0.10 subscribes to its validator, which a runtime with v0.8 does not know.
        async with (
            FakeRuntime(path, version="v2.1.0", nri_version="", old_style=True, registration_timeout_s=WAIT_S) as fake,
            Peer(release.program, "plugin", str(path), text) as peer,
        ):
            if not release.has(0, 10):
                await fake.connected(WAIT_S)
                return
            await peer.event("closed")
            assert "unknown events" in str(fake.failures[0])

    asyncio.run(main())
