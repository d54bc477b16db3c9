"""What the NRI interop tests share: releases, pods and containers in both forms, our plugin beside a Go runtime."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interop import peers, releases
from interop.peers import Peer
from nri_core import Backoff, Container, NriError, Pod, Runtime, Stub, Update
from nri_core.plugin import Plugin

QUICK = Backoff(least_s=0.05, most_s=0.2)
POD = {
    "id": "pod1",
    "name": "web",
    "namespace": "default",
    "uid": "uid1",
    "labels": {"app": "web"},
    "annotations": {"example.com/class": "swap"},
    "runtime_handler": "runc",
    "linux": {"cgroup_parent": "/kubepods/burstable/poduid1"},
}
CONTAINER = {
    "id": "ctr1",
    "pod_sandbox_id": "pod1",
    "name": "main",
    "state": "CONTAINER_RUNNING",
    "labels": {"app": "web"},
    "annotations": {"io.kubernetes.cri.container-name": "main"},
    "args": ["/bin/sh", "-c", "sleep 1"],
    "env": ["A=1"],
    "mounts": [{"destination": "/data", "source": "/srv", "type": "bind", "options": ["rbind", "ro"]}],
    "linux": {
        "cgroups_path": "/kubepods/burstable/poduid1/ctr1",
        "resources": {"memory": {"limit": {"value": "67108864"}}, "unified": {"memory.high": "max"}},
    },
}


@dataclass(frozen=True)
class Release:
    """One NRI release and its program."""

    version: str
    program: Path

    @property
    def numbers(self) -> tuple[int, ...]:
        """Such as (0, 10, 0)."""
        return releases.numbers(self.version)

    @property
    def runtime_version(self) -> str:
        """What a containerd with this NRI calls itself."""
        return releases.NRI[self.version]

    def has(self, *since: int) -> bool:
        """Whether it is this release or a newer one."""
        return self.numbers >= since


def release(version: str) -> Release:
    """Build, or take from the cache. Raises: PeerUnavailable."""
    return Release(version, peers.build("nri", version))


class Recorder(Plugin):
    """Subscribes to everything and notes what it hears."""

    name: str | None = "ours"
    index: str | None = "50"

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.runtime: Runtime | None = None
        self.config = ""
        self.synchronized = asyncio.Event()
        self.pods: Sequence[Pod] = ()
        self.containers: Sequence[Container] = ()
        self.sync_updates: list[Update] = []
        self.ended: list[BaseException | None] = []
        self.lates: list[str] = []

    async def configure(self, config: str, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> list[Update]:
        self.pods, self.containers = pods, containers
        self.synchronized.set()
        return self.sync_updates

    async def disconnected(self, error: BaseException | None) -> None:
        self.ended.append(error)
        self.synchronized.clear()

    def late(self, method: str, seconds: float) -> None:
        self.lates.append(method)


class Everything(Recorder):
    """Subscribes to all events there are."""

    async def run_pod_sandbox(self, pod: Pod) -> None:
        self.heard.append(("RunPodSandbox", pod))

    async def post_update_pod_sandbox(self, pod: Pod) -> None:
        self.heard.append(("PostUpdatePodSandbox", pod))

    async def stop_pod_sandbox(self, pod: Pod) -> None:
        self.heard.append(("StopPodSandbox", pod))

    async def remove_pod_sandbox(self, pod: Pod) -> None:
        self.heard.append(("RemovePodSandbox", pod))

    async def update_pod_sandbox(self, pod: Pod, overhead: Any, resources: Any) -> None:
        self.heard.append(("UpdatePodSandbox", (pod, overhead, resources)))

    async def post_create_container(self, pod: Pod, container: Container) -> None:
        self.heard.append(("PostCreateContainer", (pod, container)))

    async def start_container(self, pod: Pod, container: Container) -> None:
        self.heard.append(("StartContainer", (pod, container)))

    async def post_start_container(self, pod: Pod, container: Container) -> None:
        self.heard.append(("PostStartContainer", (pod, container)))

    async def post_update_container(self, pod: Pod, container: Container) -> None:
        self.heard.append(("PostUpdateContainer", (pod, container)))

    async def remove_container(self, pod: Pod, container: Container) -> None:
        self.heard.append(("RemoveContainer", (pod, container)))

    def stop_container(self, pod: Pod, container: Container) -> list[Update]:
        self.heard.append(("StopContainer", (pod, container)))
        return [Update("other").unified("memory.high", "1000")]

    def update_container(self, pod: Pod, container: Container, resources: Any) -> list[Update]:
        self.heard.append(("UpdateContainer", (pod, container)))
        return [Update(container.id).unified("memory.swap.max", "0")]


@contextlib.asynccontextmanager
async def go_runtime(
    release: Release, socket: Path, state: dict[str, Any] | None = None, **start: Any
) -> AsyncIterator[Peer]:
    """A Go runtime that listens; plugins launched by it come from `plugin_path`."""
    async with Peer(release.program, "runtime", str(socket)) as peer:
        await peer.do("state", **(state or {"pods": [POD], "containers": [CONTAINER]}))
        await start_runtime(peer, release, **start)
        yield peer


async def start_runtime(peer: Peer, release: Release, **options: Any) -> None:
    """Start, or start again after "stop"."""
    wait_ms = int(1000 * peers.WAIT_S)
    options = {
        "plugin_path": "/nonexistent",
        "config_path": "/nonexistent",
        "registration_timeout_ms": wait_ms,
        "request_timeout_ms": wait_ms,
        **options,
    }
    answer = await peer.do("start", name="containerd", version=release.runtime_version, **options)
    assert "error" not in answer, answer


@contextlib.asynccontextmanager
async def connected(plugin: Plugin, socket: Path, runtime: Peer) -> AsyncIterator[Stub]:
    """Our plugin, running, and in the runtime's list of those it calls."""
    stub = Stub(plugin, socket_path=socket, backoff=QUICK)
    task = asyncio.create_task(stub.run())
    listed = asyncio.create_task(in_list(runtime, f"{stub.index}-{stub.name}"))
    try:
        await asyncio.wait({listed, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            raise AssertionError("the plugin stopped by itself")
        await listed
        yield stub
    finally:
        listed.cancel()
        stub.stop()
        await task


def patiently(check: Callable[[int], Coroutine[Any, Any, None]]) -> None:
    """A check with a limit for requests in ms, and if it fails, with longer ones.

    Where being late is the matter, a busy machine is late by itself with a short limit.
    """
    for limit_ms in (500, 5_000):
        try:
            return asyncio.run(check(limit_ms))
        except (AssertionError, TimeoutError, NriError):
            continue
    return asyncio.run(check(20_000))


async def in_list(runtime: Peer, plugin: str, *, count: int = 1) -> None:
    """Wait until the runtime has the plugin NN-NAME in its list: Synchronize comes a little earlier."""
    await runtime.logged(f'plugin "{plugin}" connected', count=count)


@contextlib.asynccontextmanager
async def go_plugin(release: Release, socket: Path, runtime: Peer, **settings: Any) -> AsyncIterator[Peer]:
    """A plugin on Go's stub, in the runtime's list; `settings` are those of plugin.go."""
    settings = {"name": "theirs", "index": "30", **settings}
    async with Peer(release.program, "plugin", str(socket), json.dumps(settings)) as peer:
        await in_list(runtime, f"{settings['index']}-{settings['name']}")
        yield peer


async def request(peer: Peer, method: str, **fields: Any) -> dict[str, Any]:
    """Have the runtime make a request of its plugins; the pod and container are POD and CONTAINER by default."""
    return await peer.do("call", method=method, request={"pod": POD, "container": CONTAINER, **fields})


async def create(peer: Peer, **fields: Any) -> dict[str, Any]:
    """CreateContainer; returns the adjustment that results from all plugins, without what is empty."""
    answer = await request(peer, "CreateContainer", **fields)
    assert "error" not in answer, answer
    found: dict[str, Any] = _pruned(answer["response"].get("adjust", {}))
    return found


def _pruned(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    pruned = {key: _pruned(part) for key, part in value.items()}
    return {key: part for key, part in pruned.items() if part not in ({}, [])}
