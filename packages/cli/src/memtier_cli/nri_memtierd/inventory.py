"""What a runtime lists when it connects -> the containers that concern us. Read after it has its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from loguru import logger

from memtier_cli.nri_memtierd.classify import SUFFIX, read_annotations
from memtier_cli.nri_memtierd.events import ContainerInfo, Listed
from nri_core import Container, ContainerState, NriError, Pod

VALUE_CHARACTERS_MOST = 1024
"""Of an annotation: longer than any class's name and any number of bytes. All of a pod may have 256 KiB."""


class Inventory:
    """The containers of one Synchronize. Its methods read the list, once, whoever of several threads comes first."""

    def __init__(self, pods: Sequence[Pod], containers: Sequence[Container]) -> None:
        """Nothing is looked at here."""
        self._pods, self._containers = pods, containers
        self._lock = threading.Lock()
        self._read: tuple[tuple[ContainerInfo, ...], frozenset[str]] | None = None

    def running(self) -> tuple[ContainerInfo, ...]:
        """Those that run, of pods that say something to us."""
        return self._found()[0]

    def listed(self, *, adopt: bool) -> Listed:
        """For the fleet."""
        running, created = self._found()
        return Listed(running, created, adopt)

    def _found(self) -> tuple[tuple[ContainerInfo, ...], frozenset[str]]:
        with self._lock:
            if self._read is None:
                self._read = self._look()
                self._pods, self._containers = (), ()
            return self._read

    def _look(self) -> tuple[tuple[ContainerInfo, ...], frozenset[str]]:
        pods: dict[str, Pod] = {}
        for pod in self._pods:
            try:
                if concerns_us(pod):
                    pods[pod.id] = pod
            except NriError as error:
                logger.warning("pod {}/{} is left out: {}", pod.namespace, pod.name, error)
        running: list[ContainerInfo] = []
        created: set[str] = set()
        for container in self._containers:
            found = pods.get(container.pod_id)
            if found is None:
                continue
            if container.state in (ContainerState.RUNNING, ContainerState.PAUSED):
                try:
                    running.append(describe(found, container))
                except NriError as error:
                    logger.bind(container=label(found, container)).warning("left out: {}", error)
            elif container.state is ContainerState.CREATED:  # StartContainer is still to come
                created.add(container.id)
        counts = len(self._pods), len(self._containers)
        logger.info("{} pods, {} containers; {} running containers of ours", *counts, len(running))
        return tuple(running), frozenset(created)


def label(pod: Pod, container: Container) -> str:
    """For people."""
    return f"{pod.namespace}/{pod.name}:{container.name}"


def concerns_us(pod: Pod) -> bool:
    """Whether a pod says anything to this plugin: of the others nothing is kept, and nothing looked at."""
    return any(SUFFIX in key for key in pod.annotations)


def _that_count(pod: Pod, container: Container) -> dict[str, str]:
    """What the pod says about this one container: of each container it is kept for as long as that runs."""
    found = read_annotations(pod.annotations, container.name)
    return {name: found.values[key][:VALUE_CHARACTERS_MOST] for key, name in found.names.items()}


def describe(pod: Pod, container: Container, *, started_now: bool = False) -> ContainerInfo:
    """What the fleet needs to know of a container."""
    return ContainerInfo(
        id=container.id,
        namespace=pod.namespace,
        pod=pod.name,
        name=container.name,
        annotations=_that_count(pod, container),
        cgroups_path=container.cgroups_path,
        pid=container.pid,
        started_at_s=time.time() if started_now else (container.started_at_ns or 0) / 1e9 or None,
    )
