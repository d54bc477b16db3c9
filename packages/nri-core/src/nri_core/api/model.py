"""Pods and containers as frozen records. What plugins rarely need is in `raw`, the message itself.

Records of the runtime are converted where they are looked at: of thousands of containers that a Synchronize lists, a
plugin needs the names of all and the environment of none. Converting everything took 70 us each, this takes 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from nri_core.errors import RemoteProtocolError
from nri_core.pb import heads_pb2, nri_pb2
from nri_core.wire import M, decoded, weight

MAX_CONVERTED_PARTS = 1 << 20
"""Of one Synchronize: labels, words, mounts and so on that a plugin looks at; 5 000 containers have 400 000."""
MAX_RAW_WEIGHT = 512 << 20
"""Of the messages that it looks at with `raw`, in bytes; those of 5 000 containers weigh 120 MiB."""


class ContainerState(IntEnum):
    """Life of a container; in CreateContainer it is UNKNOWN."""

    UNKNOWN = 0
    CREATED = 1
    PAUSED = 2
    RUNNING = 3
    STOPPED = 4


_STATES = {int(state): state for state in ContainerState}


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


class Allowance:
    """How much of one Synchronize may still be converted."""

    __slots__ = ("parts", "weight")

    def __init__(self, parts: int = MAX_CONVERTED_PARTS, weight: int = MAX_RAW_WEIGHT) -> None:
        self.parts = parts
        self.weight = weight

    def take(self, *, parts: int = 0, weight: int = 0) -> None:
        """Account for what is converted. Raises: RemoteProtocolError, if it is too much."""
        if parts > self.parts or weight > self.weight:
            raise RemoteProtocolError(
                f"pods and containers of one Synchronize have more than {MAX_CONVERTED_PARTS} parts, "
                f"or more than {MAX_RAW_WEIGHT} bytes as messages"
            )
        self.parts -= parts
        self.weight -= weight


_Origin = tuple[bytes, Allowance]
"""What a record of a Synchronize is converted from."""


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
    _origin: _Origin | None = field(default=None, init=False, compare=False, repr=False)

    if not TYPE_CHECKING:  # a type checker would take any attribute for an existing one

        def __getattr__(self, name: str) -> Any:
            return _converted(self, name, _POD, nri_pb2.PodSandbox)


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
    started_at_ns: int | None = field(default=None, kw_only=True)
    """Since the epoch; None if it has not started, or the runtime does not tell (NRI v0.10)."""
    _origin: _Origin | None = field(default=None, init=False, compare=False, repr=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return _converted(self, name, _CONTAINER, nri_pb2.Container)


Conversion = Callable[[Any], Any]

_POD: dict[str, Conversion] = {
    "id": lambda message: message.id,
    "name": lambda message: message.name,
    "namespace": lambda message: message.namespace,
    "uid": lambda message: message.uid,
    "labels": lambda message: dict(message.labels),
    "annotations": lambda message: dict(message.annotations),
    "runtime_handler": lambda message: message.runtime_handler,
    "cgroup_parent": lambda message: message.linux.cgroup_parent,
    "cgroups_path": lambda message: message.linux.cgroups_path,
    "pid": lambda message: message.pid or None,
    "ips": lambda message: tuple(message.ips),
}
_CONTAINER: dict[str, Conversion] = {
    "id": lambda message: message.id,
    "pod_id": lambda message: message.pod_sandbox_id,
    "name": lambda message: message.name,
    "state": lambda message: _STATES.get(int(message.state), ContainerState.UNKNOWN),
    "labels": lambda message: dict(message.labels),
    "annotations": lambda message: dict(message.annotations),
    "args": lambda message: tuple(message.args),
    "env": lambda message: tuple(message.env),
    "mounts": lambda message: tuple(
        Mount(mount.destination, mount.source, mount.type, tuple(mount.options)) for mount in message.mounts
    ),
    "cgroups_path": lambda message: message.linux.cgroups_path,
    "unified": lambda message: dict(message.linux.resources.unified),
    "memory_limit_bytes": lambda message: _memory_limit(message.linux.resources.memory),
    "pid": lambda message: message.pid or None,
    "started_at_ns": lambda message: message.started_at or None,
}
_IN_HEAD: dict[str, Conversion] = {
    "cgroups_path": lambda head: head.linux.cgroups_path,
    "pid": _CONTAINER["pid"],
    "started_at_ns": _CONTAINER["started_at_ns"],
}
"""What is asked for together, of each container that a plugin takes care of."""
_set: Callable[[object, str, object], None] = object.__setattr__


def _converted(record: Any, name: str, conversions: Mapping[str, Conversion], kind: Callable[[], Any]) -> Any:
    """The value of an attribute that is looked at for the first time; Python asks here for unset slots only."""
    if name == "raw":
        data, allowance = record._origin
        allowance.take(weight=weight(data))
        value = _whole(kind(), data)
    elif name in _IN_HEAD and kind is nri_pb2.Container and record._origin is not None:
        head = _whole(heads_pb2.ContainerHead(), record._origin[0])
        for each, convert in _IN_HEAD.items():
            _set(record, each, convert(head))
        return _IN_HEAD[name](head)
    elif name in conversions:
        origin = record._origin
        message = record.raw if origin is None else _whole(kind(), origin[0])
        value = conversions[name](message)
        if origin is not None and isinstance(value, dict | tuple):
            options = sum(len(mount.options) for mount in value) if name == "mounts" else 0
            origin[1].take(parts=len(value) + options)
    else:
        raise AttributeError(f"{type(record).__name__!r} object has no attribute {name!r}")
    _set(record, name, value)
    return value


def _whole(message: M, data: bytes) -> M:
    try:
        return decoded(message, data)
    except ValueError as error:
        name = message.DESCRIPTOR.name.removesuffix("Head")
        raise RemoteProtocolError(f"a {name} of Synchronize cannot be decoded: {error}") from None


def _memory_limit(memory: nri_pb2.LinuxMemory) -> int | None:
    return memory.limit.value if memory.HasField("limit") else None


def pod_from_message(message: nri_pb2.PodSandbox) -> Pod:
    """The record of a message."""
    record = object.__new__(Pod)
    _set(record, "raw", message)
    _set(record, "_origin", None)
    return record


def container_from_message(message: nri_pb2.Container) -> Container:
    """The record of a message; a state this library does not know is UNKNOWN."""
    record = object.__new__(Container)
    _set(record, "raw", message)
    _set(record, "_origin", None)
    return record


def pod_from_bytes(data: bytes, allowance: Allowance) -> Pod:
    """The record of an encoded message, which is kept as it is: its memory is that of `data`.

    Raises:
        ValueError: it is no PodSandbox. Looking at an attribute whose part of `data` is malformed raises
            RemoteProtocolError.
    """
    head = decoded(heads_pb2.PodHead(), data)
    record = object.__new__(Pod)
    _set(record, "_origin", (data, allowance))
    _set(record, "id", head.id)
    _set(record, "name", head.name)
    _set(record, "namespace", head.namespace)
    return record


def container_from_bytes(data: bytes, allowance: Allowance) -> Container:
    """As `pod_from_bytes`, of a Container."""
    head = decoded(heads_pb2.ContainerHead(), data)
    record = object.__new__(Container)
    _set(record, "_origin", (data, allowance))
    _set(record, "id", head.id)
    _set(record, "pod_id", head.pod_sandbox_id)
    _set(record, "name", head.name)
    _set(record, "state", _STATES.get(head.state, ContainerState.UNKNOWN))
    return record


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
        started_at=container.started_at_ns or 0,
    )
    for mount in container.mounts:
        message.mounts.add(destination=mount.destination, source=mount.source, type=mount.type, options=mount.options)
    if container.cgroups_path:
        message.linux.cgroups_path = container.cgroups_path
    message.linux.resources.unified.update(container.unified)
    if container.memory_limit_bytes is not None:
        message.linux.resources.memory.limit.value = container.memory_limit_bytes
    return message
