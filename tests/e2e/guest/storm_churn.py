"""Pods and containers that come and go during the storm, as a kubelet would have it: a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from random import Random

from nri_node import CLASS, SLEEP, CriError, Pod
from storm_node import Configs, Runtime

from vm.guest import cri_pb2 as cri

PODS_MOST = 7
CONTAINERS_MOST = 14
KINDS: dict[str, dict[str, str]] = {
    # annotations of a pod
    "swap": {CLASS: "swap"},
    "track": {CLASS: "track"},
    "plain": {CLASS: "plain"},
    "bare": {CLASS: "bare"},
    "mixed": {CLASS: "swap", f"{CLASS}/c1": "track", f"{CLASS}/container.c2": ""},
    "none": {},
    "gold": {CLASS: "gold"},  # no such class
}
NAMES = ("c0", "c1", "c2", "c3")
COMMANDS = (
    SLEEP,
    ("sh", "-c", "dd if=/dev/zero bs=16M count=1 | sleep 100000"),
    ("sh", "-c", "while true; do sleep 1; done"),
    ("sh", "-c", "sleep 20"),
    ("true",),
)


class Churn:
    """Makes and removes them until it is closed. Failures that are not meant are in `complaints`."""

    def __init__(self, runtime: Runtime, configs: Configs, rng: Random) -> None:
        self.complaints: list[str] = []
        self.done: Counter[str] = Counter()
        self._runtime, self._configs, self._rng = runtime, configs, rng
        self._pods: dict[str, Pod] = {}
        self._containers: dict[str, tuple[str, str]] = {}
        """Container id -> pod, name: all that may exist."""
        self._attempt = self._number = 0
        self._go, self._idle, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Go on."""
        self._go.set()

    def pause(self) -> None:
        """Stop, and wait until the call that goes on is over."""
        self._go.clear()
        if not self._idle.wait(150):
            self.complaints.append("a call of the runtime did not return within 150 s")

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._go.set()
        self._thread.join(150)

    def forget_all(self) -> None:
        """All pods were removed."""
        self._pods.clear()
        self._containers.clear()

    def _work(self) -> None:
        while not self._ended.is_set():
            self._idle.set()
            self._go.wait()
            self._idle.clear()
            if not self._go.is_set() or self._ended.is_set():
                continue
            if self._runtime.epoch % 2 == 0:
                time.sleep(0.5)
                continue
            self._step()
            time.sleep(self._rng.uniform(0, 0.5))
        self._idle.set()

    def _step(self) -> None:
        chance = self._rng.random()
        many, full = len(self._containers) > CONTAINERS_MOST // 2, len(self._containers) >= CONTAINERS_MOST
        if len(self._pods) < 4 or (chance < 0.12 and len(self._pods) < PODS_MOST):
            self._try("pod", self._make_pod)
        elif chance < 0.06:
            self._try("pod removed", self._remove_pod)
        elif chance < 0.16 and self._containers:
            self._try("resized", self._resize)
        elif not full and (not many or chance < 0.6):
            self._try("container", self._make_container)
        elif self._containers:
            self._try("container removed", self._remove_container)

    def _try(self, what: str, call: Callable[[], None]) -> None:
        epoch = self._runtime.epoch
        try:
            call()
            self.done[what] += 1
        except CriError as error:
            text = str(error)
            if epoch != self._runtime.epoch or epoch % 2 == 0:
                self.done["lost with the runtime"] += 1
            elif any(f"class '{name}'" in text and "configur" in text for name in ("gold", *self._configs.lacking)):
                self.done["refused"] += 1
            elif "NRI" in text or "plugin" in text:
                self.complaints.append(f"{what}: {text[:300]}")
            else:  # the runtime's own, such as a shim that was killed with its container
                self.done[f"{what}: {text.rpartition('rpc error: ')[2][-80:]}"] += 1

    def _make_pod(self) -> None:
        self._number += 1
        kind = self._rng.choices(list(KINDS), (3, 3, 2, 1, 3, 1, 1))[0]
        name = f"{kind}-{self._number}"
        self._pods[name] = Pod(self._runtime, name, KINDS[kind])

    def _remove_pod(self) -> None:
        name = self._rng.choice(list(self._pods))
        self._pods.pop(name).remove()
        self._containers = {each: where for each, where in self._containers.items() if where[0] != name}

    def _make_container(self) -> None:
        pod = self._rng.choice(list(self._pods))
        name = self._rng.choice(NAMES)
        same = [each for each, where in self._containers.items() if where == (pod, name)]
        command = self._rng.choices(COMMANDS, (4, 3, 4, 1, 1))[0]
        if same and self._rng.random() < 0.5:  # else two of one name for a while
            for each in same:
                self._runtime.call("StopContainer", cri.StopContainerRequest(container_id=each, timeout=0))
        self._attempt += 1
        container = self._pods[pod].create(name, command, attempt=self._attempt)
        self._containers[container] = (pod, name)
        self._pods[pod].start(container)

    def _remove_container(self) -> None:
        container = self._rng.choice(list(self._containers))
        pod, _ = self._containers.pop(container)
        with contextlib.suppress(KeyError):
            self._pods[pod].end(container)

    def _resize(self) -> None:
        container = self._rng.choice([*self._containers])
        if not self._containers[container][0].startswith(("swap", "track")):
            return
        linux = cri.LinuxContainerResources(
            memory_limit_in_bytes=self._rng.choice((64, 128)) << 20, unified={"memory.swap.max": "0"}
        )
        request = cri.UpdateContainerResourcesRequest(container_id=container, linux=linux)
        self._runtime.call("UpdateContainerResources", request)
