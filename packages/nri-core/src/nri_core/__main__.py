"""Program `nri-ping`: connects to a runtime as a plugin and prints what it says, as JSON lines.

Exit status: 0 ended by Ctrl-C or after --once, 1 no connection, not NRI, or refused, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence

from nri_core.aio.stub import Stub
from nri_core.aio.transport import DEFAULT_SOCKET
from nri_core.api.model import Container, Pod, Runtime
from nri_core.errors import NriError
from nri_core.plugin import Plugin


def say(**values: object) -> None:
    """One JSON line."""
    print(json.dumps(values), flush=True)


class Ping(Plugin):
    """Tells everything it hears and changes nothing."""

    def __init__(self, name: str, index: str, once: bool) -> None:
        self.name, self.index = name, index
        self._once = once

    async def configure(self, config: str, runtime: Runtime) -> None:
        """Who the runtime is."""
        say(
            runtime=runtime.name,
            version=runtime.version,
            nri_version=runtime.nri_version or None,
            request_timeout_s=runtime.request_timeout_s,
        )

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        """What there is."""
        for pod in pods:
            say(pod=pod.name, namespace=pod.namespace, id=pod.id, annotations=dict(pod.annotations))
        names = {pod.id: f"{pod.namespace}/{pod.name}" for pod in pods}
        for container in containers:
            say(
                container=container.name,
                pod=names.get(container.pod_id, container.pod_id),
                id=container.id,
                state=container.state.name,
                cgroups_path=container.cgroups_path,
            )
        say(pods=len(pods), containers=len(containers))
        if self._once and self.stub is not None:
            asyncio.get_running_loop().call_later(0.2, self.stub.stop)  # after the answer is out

    async def run_pod_sandbox(self, pod: Pod) -> None:
        """An event."""
        self._tell("RunPodSandbox", pod)

    async def stop_pod_sandbox(self, pod: Pod) -> None:
        """An event."""
        self._tell("StopPodSandbox", pod)

    async def remove_pod_sandbox(self, pod: Pod) -> None:
        """An event."""
        self._tell("RemovePodSandbox", pod)

    async def create_container(self, pod: Pod, container: Container) -> None:
        """An event."""
        self._tell("CreateContainer", pod, container)

    async def post_create_container(self, pod: Pod, container: Container) -> None:
        """An event."""
        self._tell("PostCreateContainer", pod, container)

    async def start_container(self, pod: Pod, container: Container) -> None:
        """An event."""
        self._tell("StartContainer", pod, container)

    async def post_start_container(self, pod: Pod, container: Container) -> None:
        """An event."""
        self._tell("PostStartContainer", pod, container)

    async def update_container(self, pod: Pod, container: Container, resources: object) -> None:
        """An event."""
        self._tell("UpdateContainer", pod, container)

    async def post_update_container(self, pod: Pod, container: Container) -> None:
        """An event."""
        self._tell("PostUpdateContainer", pod, container)

    async def stop_container(self, pod: Pod, container: Container) -> None:
        """An event."""
        self._tell("StopContainer", pod, container)

    async def remove_container(self, pod: Pod, container: Container) -> None:
        """An event."""
        self._tell("RemoveContainer", pod, container)

    def _tell(self, event: str, pod: Pod, container: Container | None = None) -> None:
        where = {} if container is None else {"container": container.name, "id": container.id}
        say(event=event, pod=f"{pod.namespace}/{pod.name}", **where)


async def ping(path: str, name: str, index: str, once: bool) -> None:
    """Serve one connection."""
    stub = Stub(Ping(name, index, once), socket_path=path, reconnect=False)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stub.stop)
    await stub.run()


def main() -> None:
    """Entry point of `nri-ping`."""
    parser = argparse.ArgumentParser(
        prog="nri-ping", description="Connect to a container runtime through NRI and print what it says, as JSON lines."
    )
    parser.add_argument("socket", nargs="?", default=DEFAULT_SOCKET, help=f"the runtime's socket [{DEFAULT_SOCKET}]")
    parser.add_argument("--once", action="store_true", help="end after pods and containers were listed")
    parser.add_argument("--name", default="nri-ping", help="the plugin's name [nri-ping]")
    parser.add_argument("--index", default="99", help="the plugin's index, two digits [99]")
    arguments = parser.parse_args()
    try:
        asyncio.run(ping(arguments.socket, arguments.name, arguments.index, arguments.once))
    except NriError as error:
        print(f"nri-ping: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
