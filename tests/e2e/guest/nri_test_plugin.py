"""A plugin for the scenarios with containerd: notes all it hears as JSON lines and adjusts what asks for it.

python3 nri_test_plugin.py RECORDS

A pod's annotations steer it: `swap-max.test` is the memory.swap.max of its containers, `delay.test` how many seconds
CreateContainer takes. SIGUSR1 asks the runtime for memory.high = 40000000 for every container of the last Synchronize.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from nri_core import Adjustment, Container, Plugin, Pod, Runtime, Stub, Update

HIGH_BYTES = "40000000"


class Recording(Plugin):
    """Handles the whole life of a container."""

    name, index = "recording", "40"

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._known: list[str] = []

    def note(self, what: str, **values: object) -> None:
        print(json.dumps({"what": what, "at_s": time.monotonic(), **values}), file=self._out, flush=True)

    async def configure(self, config: str, runtime: Runtime) -> None:
        self.note("configure", runtime=runtime.name, version=runtime.version)

    async def synchronize(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        self._known = [container.id for container in containers]
        states = {container.id: container.state.name for container in containers}
        self.note("synchronize", pods=sorted(pod.id for pod in pods), containers=states)

    async def disconnected(self, error: BaseException | None) -> None:
        self.note("disconnected", error=str(error))

    def late(self, method: str, seconds: float) -> None:
        self.note("late", method=method)

    async def run_pod_sandbox(self, pod: Pod) -> None:
        self.note("RunPodSandbox", pod=pod.id)

    async def stop_pod_sandbox(self, pod: Pod) -> None:
        self.note("StopPodSandbox", pod=pod.id)

    async def remove_pod_sandbox(self, pod: Pod) -> None:
        self.note("RemovePodSandbox", pod=pod.id)

    async def create_container(self, pod: Pod, container: Container) -> Adjustment | None:
        self.note("CreateContainer", container=container.id, pod=pod.id, cgroups_path=container.cgroups_path)
        await asyncio.sleep(float(pod.annotations.get("delay.test", "0")))
        swap_max = pod.annotations.get("swap-max.test")
        return Adjustment().unified("memory.swap.max", swap_max) if swap_max else None

    async def post_create_container(self, pod: Pod, container: Container) -> None:
        self.note("PostCreateContainer", container=container.id)

    async def start_container(self, pod: Pod, container: Container) -> None:
        self.note("StartContainer", container=container.id)

    async def post_start_container(self, pod: Pod, container: Container) -> None:
        self.note("PostStartContainer", container=container.id)

    async def stop_container(self, pod: Pod, container: Container) -> None:
        self.note("StopContainer", container=container.id)

    async def remove_container(self, pod: Pod, container: Container) -> None:
        self.note("RemoveContainer", container=container.id)

    async def update_known(self) -> None:
        assert self.stub is not None
        updates = [Update(each).unified("memory.high", HIGH_BYTES) for each in self._known]
        failed = await self.stub.update_containers(updates)
        self.note("updated", failed=[update.container_id for update in failed])


async def main() -> None:
    with open(sys.argv[1], "a") as out:  # noqa: ASYNC230 - before anything is served
        plugin = Recording(out)
        stub = Stub(plugin)
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[None]] = []
        loop.add_signal_handler(signal.SIGTERM, stub.stop)
        loop.add_signal_handler(signal.SIGUSR1, lambda: tasks.append(loop.create_task(plugin.update_known())))
        await stub.run()


if __name__ == "__main__":
    asyncio.run(main())
