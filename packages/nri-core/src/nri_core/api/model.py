"""Pods and containers as frozen records. What plugins rarely need is in `raw`, the message itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from nri_core.pb import nri_pb2


class ContainerState(IntEnum):
    """Life of a container; in CreateContainer it is UNKNOWN."""

    UNKNOWN = 0
    CREATED = 1
    PAUSED = 2
    RUNNING = 3
    STOPPED = 4


@dataclass(frozen=True, slots=True)
class Runtime:
    """Who is at the other end."""

    name: str
    """`containerd` or `cri-o`; early containerd 2.0 say `v2`."""
    version: str
    nri_version: str
    """Empty before NRI v0.12."""
    config: str
    """What the administrator wrote for a pre-launched plugin; empty for others."""
    registration_timeout_s: float
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class Mount:
    """One OCI mount."""

    destination: str
    source: str = ""
    type: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod sandbox."""

    id: str
    name: str
    namespace: str
    uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    runtime_handler: str = ""
    cgroup_parent: str = ""
    cgroups_path: str = ""
    pid: int | None = None
    ips: tuple[str, ...] = ()
    raw: nri_pb2.PodSandbox | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Container:
    """A container."""

    id: str
    pod_id: str
    name: str
    state: ContainerState = ContainerState.UNKNOWN
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    cgroups_path: str = ""
    """Where its cgroup will be, in cgroupfs or systemd (`slice:prefix:name`) form."""
    unified: Mapping[str, str] = field(default_factory=dict)
    """cgroup v2 files and values it will get."""
    memory_limit_bytes: int | None = None
    pid: int | None = None
    raw: nri_pb2.Container | None = field(default=None, compare=False, repr=False)


def pod_from_message(message: nri_pb2.PodSandbox) -> Pod:
    """The record of a message."""
    return Pod(
        id=message.id,
        name=message.name,
        namespace=message.namespace,
        uid=message.uid,
        labels=dict(message.labels),
        annotations=dict(message.annotations),
        runtime_handler=message.runtime_handler,
        cgroup_parent=message.linux.cgroup_parent,
        cgroups_path=message.linux.cgroups_path,
        pid=message.pid or None,
        ips=tuple(message.ips),
        raw=message,
    )


def container_from_message(message: nri_pb2.Container) -> Container:
    """The record of a message; a state this library does not know is UNKNOWN."""
    linux = message.linux
    memory = linux.resources.memory
    state = int(message.state)
    return Container(
        id=message.id,
        pod_id=message.pod_sandbox_id,
        name=message.name,
        state=ContainerState(state) if state in set(ContainerState) else ContainerState.UNKNOWN,
        labels=dict(message.labels),
        annotations=dict(message.annotations),
        args=tuple(message.args),
        env=tuple(message.env),
        mounts=tuple(
            Mount(mount.destination, mount.source, mount.type, tuple(mount.options)) for mount in message.mounts
        ),
        cgroups_path=linux.cgroups_path,
        unified=dict(linux.resources.unified),
        memory_limit_bytes=memory.limit.value if memory.HasField("limit") else None,
        pid=message.pid or None,
        raw=message,
    )


def pod_to_message(pod: Pod) -> nri_pb2.PodSandbox:
    """The message of a record, for tests and fake runtimes; `raw` is not looked at."""
    message = nri_pb2.PodSandbox(
        id=pod.id,
        name=pod.name,
        namespace=pod.namespace,
        uid=pod.uid,
        labels=pod.labels,
        annotations=pod.annotations,
        runtime_handler=pod.runtime_handler,
        pid=pod.pid or 0,
        ips=pod.ips,
    )
    if pod.cgroup_parent or pod.cgroups_path:
        message.linux.cgroup_parent = pod.cgroup_parent
        message.linux.cgroups_path = pod.cgroups_path
    return message


def container_to_message(container: Container) -> nri_pb2.Container:
    """The message of a record, for tests and fake runtimes; `raw` is not looked at."""
    message = nri_pb2.Container(
        id=container.id,
        pod_sandbox_id=container.pod_id,
        name=container.name,
        state=nri_pb2.ContainerState.Name(int(container.state)),
        labels=container.labels,
        annotations=container.annotations,
        args=container.args,
        env=container.env,
        pid=container.pid or 0,
    )
    for mount in container.mounts:
        message.mounts.add(destination=mount.destination, source=mount.source, type=mount.type, options=mount.options)
    if container.cgroups_path:
        message.linux.cgroups_path = container.cgroups_path
    message.linux.resources.unified.update(container.unified)
    if container.memory_limit_bytes is not None:
        message.linux.resources.memory.limit.value = container.memory_limit_bytes
    return message
