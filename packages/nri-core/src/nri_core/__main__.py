"""Program `nri-ping`: connects to a runtime as a plugin and prints what it says, as JSON lines.

Exit status: 0 ended by Ctrl-C, after --once, or when nobody reads its output any more; 1 no connection, not NRI, or
refused; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence

from nri_core.aio.stub import Stub
from nri_core.aio.transport import DEFAULT_SOCKET
from nri_core.api.model import Container, Pod, Runtime
from nri_core.api.resources import Resources
from nri_core.errors import LocalProtocolError, NriError
from nri_core.plugin import Plugin

ANSWER_S = 0.2
"""From the wish to end to the end: the answer to the call at hand must be out before."""


class Ping(Plugin):
    """Tells everything it hears and changes nothing."""

    def __init__(self, name: str, index: str, once: bool) -> None:
        self.name, self.index = name, index
        self._once = once
        self._deaf = False

    async def configure(self, config: str, runtime: Runtime) -> None:
        """Who the runtime is."""
        self._say(
            runtime=runtime.name,
            version=runtime.version,
            nri_version=runtime.nri_version or None,
            request_timeout_s=runtime.request_timeout_s,
        )

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        """What there is."""
        for pod in pods:
            self._say(pod=pod.name, namespace=pod.namespace, id=pod.id, annotations=dict(pod.annotations))
        names = {pod.id: f"{pod.namespace}/{pod.name}" for pod in pods}
        for container in containers:
            self._say(
                container=container.name,
                pod=names.get(container.pod_id, container.pod_id),
                id=container.id,
                state=container.state.name,
                cgroups_path=container.cgroups_path,
            )
        self._say(pods=len(pods), containers=len(containers))
        if self._once and self.stub is not None:
            asyncio.get_running_loop().call_later(ANSWER_S, self.stub.stop)

    async def run_pod_sandbox(self, pod: Pod) -> None:
        """An event."""
        self._tell("RunPodSandbox", pod)

    async def update_pod_sandbox(self, pod: Pod, overhead: Resources, resources: Resources) -> None:
        """An event."""
        self._tell("UpdatePodSandbox", pod)

    async def post_update_pod_sandbox(self, pod: Pod) -> None:
        """An event."""
        self._tell("PostUpdatePodSandbox", pod)

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

    async def update_container(self, pod: Pod, container: Container, resources: Resources) -> None:
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

    def _say(self, **values: object) -> None:
        """One JSON line. When nobody reads them any more (`nri-ping | head`), that is the end, not a failed pod."""
        if self._deaf:
            return
        try:
            print(json.dumps(values), flush=True)
        except BrokenPipeError:
            self._deaf = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if self.stub is not None:
                asyncio.get_running_loop().call_later(ANSWER_S, self.stub.stop)

    def _tell(self, event: str, pod: Pod, container: Container | None = None) -> None:
        where = {} if container is None else {"container": container.name, "id": container.id}
        self._say(event=event, pod=f"{pod.namespace}/{pod.name}", **where)


async def ping(path: str, name: str, index: str, once: bool, timeout_s: float) -> None:
    """Serve one connection."""
    stub = Stub(Ping(name, index, once), socket_path=path, reconnect=False, registration_timeout_s=timeout_s)
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
    parser.add_argument("--timeout", type=float, default=10, help="seconds to wait for the registration [10]")
    arguments = parser.parse_args()
    try:
        asyncio.run(ping(arguments.socket, arguments.name, arguments.index, arguments.once, arguments.timeout))
    except NriError as error:
        print(f"nri-ping: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, LocalProtocolError) else 1)


if __name__ == "__main__":
    main()
