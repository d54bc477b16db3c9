"""What a plugin asks for: an Adjustment of the container being created, Updates of others. Built by chaining.

Every method gives a new object. A key set twice keeps the last value, for the runtime takes a second claim for a
conflict, even with oneself. A removal and a setting of one key together mean "replace, whoever set it".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from nri_core.api.model import Mount
from nri_core.errors import LocalProtocolError
from nri_core.pb import nri_pb2

REMOVE = "-"
"""A key with this in front is one to remove."""

V = TypeVar("V")


def _checked(key: str, what: str) -> str:
    if not key or key.startswith(REMOVE):
        raise LocalProtocolError(
            f"{what} {key!r}: a key must not be empty or begin with '-'", hint="use the remove_... method"
        )
    return key


@dataclass(frozen=True, slots=True)
class Resources:
    """cgroup limits; what is None is left alone."""

    unified: Mapping[str, str] = field(default_factory=dict)
    memory_limit_bytes: int | None = None
    cpu_shares: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    pids_limit: int | None = None

    def write(self, message: nri_pb2.LinuxResources) -> None:
        """Put what is set into `message`."""
        message.unified.update(self.unified)
        for value, target in (
            (self.memory_limit_bytes, lambda: message.memory.limit),
            (self.cpu_shares, lambda: message.cpu.shares),
            (self.cpu_quota_us, lambda: message.cpu.quota),
            (self.cpu_period_us, lambda: message.cpu.period),
        ):
            if value is not None:
                optional = target()
                optional.SetInParent()  # 0 is a value, not an absence
                optional.value = value
        if self.cpuset_cpus is not None:
            message.cpu.cpus = self.cpuset_cpus
        if self.cpuset_mems is not None:
            message.cpu.mems = self.cpuset_mems
        if self.pids_limit is not None:
            message.pids.limit = self.pids_limit


@dataclass(frozen=True, slots=True)
class Adjustment:
    """Changes of the container that is being created."""

    set_annotations: Mapping[str, str] = field(default_factory=dict)
    removed_annotations: frozenset[str] = frozenset()
    set_mounts: tuple[Mount, ...] = ()
    removed_mounts: frozenset[str] = frozenset()
    set_env: Mapping[str, str] = field(default_factory=dict)
    removed_env: frozenset[str] = frozenset()
    args: tuple[str, ...] | None = None
    resources: Resources = field(default_factory=Resources)
    oom_score_adj: int | None = None
    cgroups_path: str | None = None

    def annotation(self, key: str, value: str) -> Adjustment:
        """Set an annotation of the OCI container (not of the Kubernetes object)."""
        return replace(self, set_annotations={**self.set_annotations, _checked(key, "annotation"): value})

    def remove_annotation(self, key: str) -> Adjustment:
        """Remove an annotation, or with `annotation` after it replace another plugin's."""
        removed = self.removed_annotations | {_checked(key, "annotation")}
        return replace(self, set_annotations=_without(self.set_annotations, key), removed_annotations=removed)

    def mount(self, mount: Mount) -> Adjustment:
        """Add a mount, or replace the one of the same destination that was added before."""
        _checked(mount.destination, "mount")
        others = tuple(other for other in self.set_mounts if other.destination != mount.destination)
        return replace(self, set_mounts=(*others, mount))

    def remove_mount(self, destination: str) -> Adjustment:
        """Remove a mount, or with `mount` after it replace another plugin's."""
        removed = self.removed_mounts | {_checked(destination, "mount")}
        others = tuple(other for other in self.set_mounts if other.destination != destination)
        return replace(self, set_mounts=others, removed_mounts=removed)

    def env(self, name: str, value: str) -> Adjustment:
        """Set an environment variable."""
        return replace(self, set_env={**self.set_env, _checked(name, "env"): value})

    def remove_env(self, name: str) -> Adjustment:
        """Withdraw what an earlier plugin set; runtimes keep a variable of the pod's own."""
        removed = self.removed_env | {_checked(name, "env")}
        return replace(self, set_env=_without(self.set_env, name), removed_env=removed)

    def command(self, *args: str) -> Adjustment:
        """Replace the command line, also one that another plugin set."""
        if not args:
            raise LocalProtocolError("command: give at least one word")
        return replace(self, args=args)

    def unified(self, key: str, value: str) -> Adjustment:
        """Set a cgroup v2 file, such as `memory.swap.max` to `max`. There is no removal of these."""
        values = {**self.resources.unified, _checked(key, "unified"): value}
        return replace(self, resources=replace(self.resources, unified=values))

    def limits(self, resources: Resources) -> Adjustment:
        """Set limits; `unified` entries set before are kept."""
        merged = {**self.resources.unified, **resources.unified}
        return replace(self, resources=replace(resources, unified=merged))

    def oom(self, score_adj: int) -> Adjustment:
        """Set oom_score_adj."""
        return replace(self, oom_score_adj=score_adj)

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self != Adjustment()

    def to_message(self) -> nri_pb2.ContainerAdjustment:
        """The message, removals first."""
        message = nri_pb2.ContainerAdjustment()
        message.annotations.update({REMOVE + key: "" for key in sorted(self.removed_annotations)})
        message.annotations.update(self.set_annotations)
        for destination in sorted(self.removed_mounts):
            message.mounts.add(destination=REMOVE + destination)
        for mount in self.set_mounts:
            message.mounts.add(
                destination=mount.destination, source=mount.source, type=mount.type, options=mount.options
            )
        for name in sorted(self.removed_env):
            message.env.add(key=REMOVE + name)
        for name, value in self.set_env.items():
            message.env.add(key=name, value=value)
        if self.args is not None:
            message.args.extend(("", *self.args))  # an empty first word: replace whoever set it
        if self.resources != Resources():
            self.resources.write(message.linux.resources)
        if self.oom_score_adj is not None:
            message.linux.oom_score_adj.SetInParent()
            message.linux.oom_score_adj.value = self.oom_score_adj
        if self.cgroups_path is not None:
            message.linux.cgroups_path = self.cgroups_path
        return message


@dataclass(frozen=True, slots=True)
class Update:
    """Changes of the resources of an existing container."""

    container_id: str
    resources: Resources = field(default_factory=Resources)
    ignore_failure: bool = False

    def unified(self, key: str, value: str) -> Update:
        """Set a cgroup v2 file."""
        values = {**self.resources.unified, _checked(key, "unified"): value}
        return replace(self, resources=replace(self.resources, unified=values))

    def limits(self, resources: Resources) -> Update:
        """Set limits; `unified` entries set before are kept."""
        merged = {**self.resources.unified, **resources.unified}
        return replace(self, resources=replace(resources, unified=merged))

    def to_message(self) -> nri_pb2.ContainerUpdate:
        """The message."""
        message = nri_pb2.ContainerUpdate(container_id=self.container_id, ignore_failure=self.ignore_failure)
        self.resources.write(message.linux.resources)
        return message


def update_from_message(message: nri_pb2.ContainerUpdate) -> Update:
    """The record of a message; limits that `Resources` has no field for are left out."""
    found = message.linux.resources
    memory_limit = found.memory.limit.value if found.memory.HasField("limit") else None
    return Update(
        message.container_id,
        Resources(unified=dict(found.unified), memory_limit_bytes=memory_limit),
        message.ignore_failure,
    )


def _without(mapping: Mapping[str, V], key: str) -> dict[str, V]:
    return {name: value for name, value in mapping.items() if name != key}
