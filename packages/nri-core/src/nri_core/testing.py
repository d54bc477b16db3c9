"""FakeRuntime: the other end of the wire, for tests of plugins. It speaks the real protocol over a real socket.

async with FakeRuntime(tmp_path / "nri.sock") as runtime:
    task = asyncio.create_task(Stub(MyPlugin(), socket_path=runtime.path).run())
    plugin = await runtime.connected()
    response = await plugin.create_container(pod, container)
    assert response.adjust.linux.resources.unified["memory.swap.max"] == "max"
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nri_core.aio.dispatch import PLUGIN_SERVICE_NAME, RUNTIME_SERVICE_NAME
from nri_core.aio.rpc import Call, ClientEndpoint, ServerEndpoint
from nri_core.aio.transport import Trunk
from nri_core.api.events import EventMask, known_events
from nri_core.api.model import Container, Pod, container_to_message, pod_to_message
from nri_core.errors import Code, ConnectionLost, NriError, RpcError
from nri_core.mux import PLUGIN_SERVICE, RUNTIME_SERVICE
from nri_core.pb import nri_pb2
from nri_core.plugin import FailurePolicy
from nri_core.ttrpc.connection import Kind
from nri_core.ttrpc.frame import MAX_DATA_BYTES

MAX_SYNCHRONIZE_BYTES = MAX_DATA_BYTES - 1024
"""Room for what is around it in the frame."""
OnUpdate = Callable[[Sequence[nri_pb2.ContainerUpdate]], Sequence[nri_pb2.ContainerUpdate]]
_OLD_STYLE_EVENTS = {
    "RunPodSandbox": 1,
    "StopPodSandbox": 2,
    "RemovePodSandbox": 3,
    "PostCreateContainer": 5,
    "StartContainer": 6,
    "PostStartContainer": 7,
    "PostUpdateContainer": 9,
    "RemoveContainer": 11,
    "PostUpdatePodSandbox": 13,
}


class PluginConnection:
    """One plugin, as the runtime sees it. Calls raise RpcError, TimeoutError or ConnectionLost."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime
        self._trunk = Trunk()
        self.name = ""
        self.index = ""
        self.events = EventMask(0)
        self.policy = FailurePolicy()
        """What the plugin wants to happen when it does not answer; heeded from NRI v0.12.4 on."""
        self.updates: list[nri_pb2.ContainerUpdate] = []
        """Updates in the answer to Synchronize."""
        self._registered = asyncio.Event()
        self.client = ClientEndpoint(self._trunk.attach(PLUGIN_SERVICE, lambda data: self.client.feed(data)))
        services = {
            RUNTIME_SERVICE_NAME: {
                "RegisterPlugin": (Kind.UNARY, self._register),
                "UpdateContainers": (Kind.UNARY, self._update_containers),
            }
        }
        self._server = ServerEndpoint(
            services, self._trunk.attach(RUNTIME_SERVICE, lambda data: self._server.feed(data))
        )

    async def start(self, sock: socket.socket) -> None:
        """Accept, wait for the registration, configure and synchronize, as a runtime does."""
        await self._trunk.start(sock)
        watcher = asyncio.ensure_future(self._trunk.wait_closed())
        watcher.add_done_callback(lambda done: self._lost(done))
        registered = asyncio.ensure_future(self._registered.wait())
        try:
            async with asyncio.timeout(self._runtime.registration_timeout_s):
                await asyncio.wait({registered, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            registered.cancel()
        if not self._registered.is_set():
            raise ConnectionLost("the plugin closed the connection before it registered")
        await self.configure()
        await self.synchronize(self._runtime.pods, self._runtime.containers)

    async def configure(self, config: str = "") -> EventMask:
        """Configure; returns the subscription. An unknown event closes the connection."""
        runtime = self._runtime
        request = nri_pb2.ConfigureRequest(
            config=config,
            runtime_name=runtime.name,
            runtime_version=runtime.version,
            registration_timeout=int(runtime.registration_timeout_s * 1000),
            request_timeout=int(runtime.request_timeout_s * 1000),
            NRI_version=runtime.nri_version,
        )
        response = await self.call("Configure", request, nri_pb2.ConfigureResponse())
        self.events = EventMask(response.events & 0x3FFF)
        if _numbers(runtime.nri_version) >= (0, 12, 4):
            told = response.failure_policy
            self.policy = FailurePolicy(fail_request=told.fail_request, keep_connected=told.keep_connected)
        known = known_events(runtime.name, runtime.version, runtime.nri_version)
        if response.events & ~int(known):
            self.close()
            raise NriError(f"the plugin subscribed to unknown events {response.events & ~int(known):#x}")
        return self.events

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container], *, parts: int = 1) -> None:
        """Tell the plugin what there is, in `parts` messages, or in more if one would be too long."""
        requests = synchronize_requests(pods, containers, parts)
        while max(request.ByteSize() for request in requests) > MAX_SYNCHRONIZE_BYTES:
            parts *= 2
            requests = synchronize_requests(pods, containers, parts)
        for request in requests:
            response = await self.call("Synchronize", request, nri_pb2.SynchronizeResponse())
            if response.more != request.more or (request.more and response.update):
                self.close()
                raise NriError("the plugin does not handle split sync requests")
            self.updates = list(response.update)

    async def create_container(self, pod: Pod, container: Container) -> nri_pb2.CreateContainerResponse:
        """CreateContainer; an empty answer if the plugin did not subscribe."""
        response = nri_pb2.CreateContainerResponse()
        if EventMask.CREATE_CONTAINER not in self.events:
            return response
        request = nri_pb2.CreateContainerRequest(pod=pod_to_message(pod), container=container_to_message(container))
        found: nri_pb2.CreateContainerResponse = await self.call("CreateContainer", request, response)
        return found

    async def update_container(
        self, pod: Pod, container: Container, resources: nri_pb2.LinuxResources | None = None
    ) -> list[nri_pb2.ContainerUpdate]:
        """UpdateContainer; returns the updates."""
        if EventMask.UPDATE_CONTAINER not in self.events:
            return []
        request = nri_pb2.UpdateContainerRequest(
            pod=pod_to_message(pod), container=container_to_message(container), linux_resources=resources
        )
        return list((await self.call("UpdateContainer", request, nri_pb2.UpdateContainerResponse())).update)

    async def update_pod_sandbox(
        self,
        pod: Pod,
        overhead: nri_pb2.LinuxResources | None = None,
        resources: nri_pb2.LinuxResources | None = None,
    ) -> None:
        """UpdatePodSandbox."""
        if EventMask.UPDATE_POD_SANDBOX in self.events:
            request = nri_pb2.UpdatePodSandboxRequest(
                pod=pod_to_message(pod), overhead_linux_resources=overhead, linux_resources=resources
            )
            await self.call("UpdatePodSandbox", request, nri_pb2.UpdatePodSandboxResponse())

    async def stop_container(self, pod: Pod, container: Container) -> list[nri_pb2.ContainerUpdate]:
        """StopContainer; returns the updates."""
        if EventMask.STOP_CONTAINER not in self.events:
            return []
        request = nri_pb2.StopContainerRequest(pod=pod_to_message(pod), container=container_to_message(container))
        return list((await self.call("StopContainer", request, nri_pb2.StopContainerResponse())).update)

    async def validate(
        self, pod: Pod, container: Container, adjust: nri_pb2.ContainerAdjustment | None = None
    ) -> str | None:
        """ValidateContainerAdjustment; the reason if the plugin rejects, None if it does not."""
        request = nri_pb2.ValidateContainerAdjustmentRequest(
            pod=pod_to_message(pod), container=container_to_message(container), adjust=adjust
        )
        response = nri_pb2.ValidateContainerAdjustmentResponse()
        found = await self.call("ValidateContainerAdjustment", request, response)
        return found.reason if found.reject else None

    async def notify(self, method: str, pod: Pod, container: Container | None = None) -> None:
        """Any other event by its method name, such as `StartContainer`: in the style of the runtime's version."""
        number = _OLD_STYLE_EVENTS.get(method)
        mask = EventMask[_snake(method)]
        if mask not in self.events:
            return
        message: Any
        if self._runtime.old_style and number is not None:
            message = nri_pb2.StateChangeEvent(event=nri_pb2.Event.Name(number), pod=pod_to_message(pod))
            if container is not None:
                message.container.CopyFrom(container_to_message(container))
            await self.call("StateChange", message, nri_pb2.Empty())
            return
        message = getattr(nri_pb2, f"{method}Request")(pod=pod_to_message(pod))
        if container is not None:
            message.container.CopyFrom(container_to_message(container))
        await self.call(method, message, getattr(nri_pb2, f"{method}Response")())

    async def call(self, method: str, request: Any, response: Any) -> Any:
        """Any call of the Plugin service; late answers end the connection, as with real runtimes."""
        try:
            answer = await self.client.call(
                PLUGIN_SERVICE_NAME,
                method,
                request.SerializeToString(),
                timeout_s=self._runtime.request_timeout_s,
            )
        except TimeoutError:
            # Configure and Synchronize are not requests that the policy is about.
            kept = self.policy.keep_connected and method not in ("Configure", "Synchronize")
            if not self._runtime.patient and not kept:
                self.close()
            raise
        response.ParseFromString(answer)
        return response

    def close(self) -> None:
        """Close the connection."""
        self._trunk.close()

    async def wait_closed(self) -> None:
        """Wait until the plugin has gone."""
        await self._trunk.wait_closed()

    async def _register(self, call: Call) -> bytes:
        request = nri_pb2.RegisterPluginRequest.FromString(call.head.payload)
        self.name, self.index = request.plugin_name, request.plugin_idx
        if self._runtime.refuse is not None:
            raise RpcError(Code.UNKNOWN, self._runtime.refuse)
        self._registered.set()
        return nri_pb2.Empty().SerializeToString()

    async def _update_containers(self, call: Call) -> bytes:
        request = nri_pb2.UpdateContainersRequest.FromString(call.head.payload)
        failed = self._runtime.on_update(list(request.update))
        return nri_pb2.UpdateContainersResponse(failed=failed).SerializeToString()

    def _lost(self, done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            return
        error = done.result()
        lost = error if isinstance(error, ConnectionLost) else ConnectionLost(str(error))
        self.client.lose(lost)
        self._server.lose(lost)


class FakeRuntime:
    """Listens on a socket and takes plugins, one at a time, as containerd does."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "containerd",
        version: str = "v2.3.0",
        nri_version: str = "v0.12.5",
        old_style: bool = False,
        pods: Sequence[Pod] = (),
        containers: Sequence[Container] = (),
        registration_timeout_s: float = 5.0,
        request_timeout_s: float = 2.0,
        refuse: str | None = None,
        patient: bool = False,
        on_update: OnUpdate = lambda updates: (),
    ) -> None:
        """How the runtime behaves.

        Args:
            old_style: send events through StateChange, as before NRI v0.12.
            refuse: the text with which registrations are refused.
            patient: keep a connection open after a late answer, as NRI up to v0.6.1 does for Synchronize.
            on_update: takes the updates of UpdateContainers and returns those that fail.
        """
        self.path = Path(path)
        self.name, self.version, self.nri_version = name, version, nri_version
        self.old_style = old_style
        self.pods, self.containers = pods, containers
        self.registration_timeout_s, self.request_timeout_s = registration_timeout_s, request_timeout_s
        self.refuse = refuse
        self.patient = patient
        self.on_update = on_update
        self.failures: list[BaseException] = []
        """Plugins that did not get through registration, configuration or synchronization."""
        self._queue: asyncio.Queue[PluginConnection] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._plugins: list[PluginConnection] = []

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Listen on a new socket at the path, as a runtime does when it starts."""
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(self.path))
        listener.listen(16)
        self._task = asyncio.ensure_future(self._accept(listener))

    async def stop(self) -> None:
        """Close all connections and the socket; the path stays, as after a crash."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for plugin in self._plugins:
            plugin.close()
        self._plugins.clear()

    async def connected(self, timeout_s: float = 10.0) -> PluginConnection:
        """The next plugin that is registered, configured and synchronized."""
        async with asyncio.timeout(timeout_s):
            return await self._queue.get()

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
                plugin = PluginConnection(self)
                self._plugins.append(plugin)
                try:
                    await plugin.start(sock)
                except (NriError, TimeoutError) as error:
                    self.failures.append(error)
                    if (
                        self.refuse is None and not self.patient
                    ):  # a refused plugin finds its connection open, as with real runtimes
                        plugin.close()
                    continue
                self._queue.put_nowait(plugin)


def synchronize_requests(
    pods: Sequence[Pod], containers: Sequence[Container], parts: int
) -> list[nri_pb2.SynchronizeRequest]:
    """SynchronizeRequests for what there is, in `parts` messages."""
    pod_share, container_share = -(-len(pods) // parts) or 1, -(-len(containers) // parts) or 1
    return [
        nri_pb2.SynchronizeRequest(
            pods=[pod_to_message(pod) for pod in pods[part * pod_share : (part + 1) * pod_share]],
            containers=[
                container_to_message(container)
                for container in containers[part * container_share : (part + 1) * container_share]
            ],
            more=part < parts - 1,
        )
        for part in range(parts)
    ]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version)[:3])


def _snake(method: str) -> str:
    return "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in method).lstrip("_")
