"""What a plugin asks for: an Adjustment of the container being created, Updates of others. Built by chaining.

Every method gives a new object. A key set twice keeps the last value, for the runtime takes a second claim for a
conflict, even with oneself. A removal and a setting of one key together mean "replace, whoever set it"; a removal
after a setting withdraws the setting. A key of the wire that begins with `-` is a removal, hence no key may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from nri_core.api.model import Mount
from nri_core.api.resources import Resources, checked, resources_from_message
from nri_core.errors import LocalProtocolError
from nri_core.pb import nri_pb2

REMOVE = "-"
"""A key with this in front is one to remove."""

V = TypeVar("V")


def _checked(key: str, what: str) -> str:
    if not checked(key, str, f"{what}: a key") or key.startswith(REMOVE):
        raise LocalProtocolError(
            f"{what} {key!r}: a key must not be empty or begin with '-'", hint="use the remove_... method"
        )
    return key


def _pair(key: str, value: str, what: str) -> dict[str, str]:
    return {_checked(key, what): checked(value, str, f"{what} {key!r}")}


@dataclass(frozen=True, slots=True)
class Device:
    """A device node to make in the container."""

    path: str
    type: str
    """`c` or `b`, as mknod has it; `p` for a pipe."""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    uid: int | None = None
    gid: int | None = None


@dataclass(frozen=True, slots=True)
class Rlimit:
    """One resource limit of processes."""

    type: str
    """Such as `RLIMIT_NOFILE`."""
    soft: int
    hard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """Changes of the container that is being created."""

    set_annotations: Mapping[str, str] = field(default_factory=dict)
    removed_annotations: frozenset[str] = frozenset()
    set_mounts: Mapping[str, Mount] = field(default_factory=dict)
    removed_mounts: frozenset[str] = frozenset()
    set_env: Mapping[str, str] = field(default_factory=dict)
    removed_env: frozenset[str] = frozenset()
    set_devices: Mapping[str, Device] = field(default_factory=dict)
    removed_devices: frozenset[str] = frozenset()
    set_sysctls: Mapping[str, str] = field(default_factory=dict)
    removed_sysctls: frozenset[str] = frozenset()
    set_namespaces: Mapping[str, str] = field(default_factory=dict)
    removed_namespaces: frozenset[str] = frozenset()
    set_net_devices: Mapping[str, str] = field(default_factory=dict)
    removed_net_devices: frozenset[str] = frozenset()
    rlimits: Mapping[str, Rlimit] = field(default_factory=dict)
    cdi_devices: tuple[str, ...] = ()
    args: tuple[str, ...] | None = None
    resources: Resources = field(default_factory=Resources)
    oom_score_adj: int | None = None
    cgroups_path: str | None = None
    extra: bytes = b""
    """An encoded ContainerAdjustment that is merged in last: see `merge`."""

    def annotation(self, key: str, value: str) -> Adjustment:
        """Set an annotation of the OCI container (not of the Kubernetes object)."""
        return replace(self, set_annotations={**self.set_annotations, **_pair(key, value, "annotation")})

    def remove_annotation(self, key: str) -> Adjustment:
        """Remove an annotation."""
        removed = self.removed_annotations | {_checked(key, "annotation")}
        return replace(self, set_annotations=_without(self.set_annotations, key), removed_annotations=removed)

    def mount(self, mount: Mount) -> Adjustment:
        """Add a mount."""
        _checked(mount.destination, "mount")
        others = _without(self.set_mounts, mount.destination)
        return replace(self, set_mounts={**others, mount.destination: mount})

    def remove_mount(self, destination: str) -> Adjustment:
        """Remove a mount."""
        removed = self.removed_mounts | {_checked(destination, "mount")}
        return replace(self, set_mounts=_without(self.set_mounts, destination), removed_mounts=removed)

    def env(self, name: str, value: str) -> Adjustment:
        """Set an environment variable."""
        return replace(self, set_env={**self.set_env, **_pair(name, value, "env")})

    def remove_env(self, name: str) -> Adjustment:
        """Withdraw what an earlier plugin set; runtimes keep a variable of the pod's own."""
        removed = self.removed_env | {_checked(name, "env")}
        return replace(self, set_env=_without(self.set_env, name), removed_env=removed)

    def device(self, device: Device) -> Adjustment:
        """Add a device node."""
        return replace(self, set_devices={**self.set_devices, _checked(device.path, "device"): device})

    def remove_device(self, path: str) -> Adjustment:
        """Withdraw what an earlier plugin added; runtimes keep a device of the pod's own."""
        removed = self.removed_devices | {_checked(path, "device")}
        return replace(self, set_devices=_without(self.set_devices, path), removed_devices=removed)

    def sysctl(self, key: str, value: str) -> Adjustment:
        """Set a sysctl of the container's namespaces (NRI v0.11)."""
        return replace(self, set_sysctls={**self.set_sysctls, **_pair(key, value, "sysctl")})

    def remove_sysctl(self, key: str) -> Adjustment:
        """Remove a sysctl (NRI v0.11)."""
        removed = self.removed_sysctls | {_checked(key, "sysctl")}
        return replace(self, set_sysctls=_without(self.set_sysctls, key), removed_sysctls=removed)

    def namespace(self, type_: str, path: str = "") -> Adjustment:
        """Give the container a new namespace of this type, or the one at `path` (NRI v0.10)."""
        return replace(self, set_namespaces={**self.set_namespaces, **_pair(type_, path, "namespace")})

    def remove_namespace(self, type_: str) -> Adjustment:
        """Remove a namespace: the container shares the host's (NRI v0.10)."""
        removed = self.removed_namespaces | {_checked(type_, "namespace")}
        return replace(self, set_namespaces=_without(self.set_namespaces, type_), removed_namespaces=removed)

    def net_device(self, host_name: str, name: str = "") -> Adjustment:
        """Move a network device of the host into the container, as `name` (NRI v0.11)."""
        return replace(self, set_net_devices={**self.set_net_devices, **_pair(host_name, name, "net device")})

    def remove_net_device(self, host_name: str) -> Adjustment:
        """Remove a network device (NRI v0.11)."""
        removed = self.removed_net_devices | {_checked(host_name, "net device")}
        return replace(self, set_net_devices=_without(self.set_net_devices, host_name), removed_net_devices=removed)

    def rlimit(self, rlimit: Rlimit) -> Adjustment:
        """Set a resource limit of processes (NRI v0.4)."""
        return replace(self, rlimits={**self.rlimits, _checked(rlimit.type, "rlimit"): rlimit})

    def cdi_device(self, name: str) -> Adjustment:
        """Inject a CDI device by its qualified name (NRI v0.7)."""
        _checked(name, "CDI device")
        return self if name in self.cdi_devices else replace(self, cdi_devices=(*self.cdi_devices, name))

    def command(self, *args: str) -> Adjustment:
        """Replace the command line, also one that another plugin set (NRI v0.10)."""
        if not args:
            raise LocalProtocolError("command: give at least one word")
        return replace(self, args=args)

    def unified(self, key: str, value: str) -> Adjustment:
        """Set a cgroup v2 file, such as `memory.swap.max` to `max`. There is no removal of these."""
        return self.limits(Resources(unified={_checked(key, "unified"): value}))

    def limits(self, resources: Resources) -> Adjustment:
        """Set limits; those set before that are not set here are kept."""
        return replace(self, resources=self.resources.merged(resources))

    def oom(self, score_adj: int) -> Adjustment:
        """Set oom_score_adj (NRI v0.7)."""
        return replace(self, oom_score_adj=checked(score_adj, int, "oom_score_adj"))

    def merge(self, message: nri_pb2.ContainerAdjustment) -> Adjustment:
        """What has no method here: hooks, seccomp, scheduler, I/O priority, RDT, memory policy."""
        return replace(self, extra=self.extra + message.SerializeToString())

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self != Adjustment()

    def to_message(self) -> nri_pb2.ContainerAdjustment:
        """The message, removals first."""
        message = nri_pb2.ContainerAdjustment()
        message.annotations.update(_marked(self.removed_annotations))
        message.annotations.update(self.set_annotations)
        for key in _marked(self.removed_mounts):
            message.mounts.add(destination=key)
        for mount in self.set_mounts.values():
            message.mounts.add(
                destination=mount.destination, source=mount.source, type=mount.type, options=mount.options
            )
        for key in _marked(self.removed_env):
            message.env.add(key=key)
        for name, value in self.set_env.items():
            message.env.add(key=name, value=value)
        if self.args is not None:
            message.args.extend(("", *self.args))  # an empty first word: replace whoever set it
        for rlimit in self.rlimits.values():
            message.rlimits.add(type=rlimit.type, soft=rlimit.soft, hard=rlimit.hard)
        for name in self.cdi_devices:
            message.CDI_devices.add(name=name)
        linux = nri_pb2.LinuxContainerAdjustment()
        self._write_linux(linux)
        if linux.ByteSize():
            message.linux.CopyFrom(linux)
        message.MergeFromString(self.extra)
        return message

    def _write_linux(self, linux: nri_pb2.LinuxContainerAdjustment) -> None:
        for key in _marked(self.removed_devices):
            linux.devices.add(path=key)
        for device in self.set_devices.values():
            made = linux.devices.add(path=device.path, type=device.type, major=device.major, minor=device.minor)
            for value, optional in (
                (device.file_mode, made.file_mode),
                (device.uid, made.uid),
                (device.gid, made.gid),
            ):
                if value is not None:
                    optional.SetInParent()
                    optional.value = value
        linux.sysctl.update(_marked(self.removed_sysctls))
        linux.sysctl.update(self.set_sysctls)
        for key in _marked(self.removed_namespaces):
            linux.namespaces.add(type=key)
        for type_, path in self.set_namespaces.items():
            linux.namespaces.add(type=type_, path=path)
        for key in _marked(self.removed_net_devices):
            linux.net_devices[key].SetInParent()
        for key, name in self.set_net_devices.items():
            linux.net_devices[key].name = name
        if self.resources != Resources():
            self.resources.write(linux.resources)
        if self.oom_score_adj is not None:
            linux.oom_score_adj.SetInParent()
            linux.oom_score_adj.value = self.oom_score_adj
        if self.cgroups_path is not None:
            linux.cgroups_path = self.cgroups_path


@dataclass(frozen=True, slots=True)
class Update:
    """Changes of the resources of an existing container."""

    container_id: str
    resources: Resources = field(default_factory=Resources)
    ignore_failure: bool = False
    """True: that the runtime cannot apply it fails nothing else."""

    def unified(self, key: str, value: str) -> Update:
        """Set a cgroup v2 file."""
        return self.limits(Resources(unified={_checked(key, "unified"): value}))

    def limits(self, resources: Resources) -> Update:
        """Set limits; those set before that are not set here are kept."""
        return replace(self, resources=self.resources.merged(resources))

    def to_message(self) -> nri_pb2.ContainerUpdate:
        """The message."""
        message = nri_pb2.ContainerUpdate(container_id=self.container_id, ignore_failure=self.ignore_failure)
        self.resources.write(message.linux.resources)
        return message


def update_from_message(message: nri_pb2.ContainerUpdate) -> Update:
    """The record of a message."""
    return Update(message.container_id, resources_from_message(message.linux.resources), message.ignore_failure)


def _without(mapping: Mapping[str, V], key: str) -> dict[str, V]:
    return {name: value for name, value in mapping.items() if name != key}


def _marked(keys: frozenset[str]) -> dict[str, str]:
    return {REMOVE + key: "" for key in sorted(keys)}
