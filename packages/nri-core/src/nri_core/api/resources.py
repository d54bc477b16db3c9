"""cgroup limits as a frozen record, to and from the wire's message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex, TypeVar

from nri_core.errors import LocalProtocolError
from nri_core.pb import nri_pb2

_OPTIONAL = {
    "memory_limit_bytes": ("memory", "limit"),
    "memory_reservation_bytes": ("memory", "reservation"),
    "memory_swap_bytes": ("memory", "swap"),
    "memory_swappiness": ("memory", "swappiness"),
    "cpu_shares": ("cpu", "shares"),
    "cpu_quota_us": ("cpu", "quota"),
    "cpu_period_us": ("cpu", "period"),
    "cpu_realtime_runtime_us": ("cpu", "realtime_runtime"),
    "cpu_realtime_period_us": ("cpu", "realtime_period"),
}
"""Fields that are a message around a number, so that 0 differs from absence."""


T = TypeVar("T")


def checked(value: T, kind: type, what: str) -> T:
    """`value`, if it is a `kind`. Said where the value is made: protobuf would only say "bad argument type"."""
    fits = isinstance(value, SupportsIndex) if kind is int else isinstance(value, kind)
    if not fits or isinstance(value, bool):
        raise LocalProtocolError(
            f"{what}: the value {value!r} is of type {type(value).__name__}", hint=f"give it as {kind.__name__}"
        )
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """cgroup limits; what is None is left alone."""

    unified: Mapping[str, str] = field(default_factory=dict)
    """cgroup v2 file to value; there is no removal of these."""
    memory_limit_bytes: int | None = None
    memory_reservation_bytes: int | None = None
    memory_swap_bytes: int | None = None
    """Memory and swap together. No runtime applies it at creation: use `unified` with `memory.swap.max`."""
    memory_swappiness: int | None = None
    cpu_shares: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    cpu_realtime_runtime_us: int | None = None
    cpu_realtime_period_us: int | None = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    pids_limit: int | None = None
    """-1: no limit."""
    hugepage_limits: Mapping[str, int] = field(default_factory=dict)
    """Page size, such as `2MB`, to bytes."""
    blockio_class: str | None = None
    rdt_class: str | None = None

    def __post_init__(self) -> None:
        """Raises: LocalProtocolError, for a value of a type that cannot be sent."""
        for name in (*_OPTIONAL, "pids_limit"):
            value = getattr(self, name)
            if value is not None:
                checked(value, int, name)
        for name in ("cpuset_cpus", "cpuset_mems", "blockio_class", "rdt_class"):
            value = getattr(self, name)
            if value is not None:
                checked(value, str, name)
        for key, value in self.unified.items():
            checked(value, str, f"unified {key!r}")
        for key, value in self.hugepage_limits.items():
            checked(value, int, f"hugepage limit {key!r}")

    def merged(self, other: Resources) -> Resources:
        """This, with what is set in `other` set anew."""
        changes: dict[str, Any] = {
            name: value for name in other.__dataclass_fields__ if (value := getattr(other, name)) not in (None, {})
        }
        changes["unified"] = {**self.unified, **other.unified}
        changes["hugepage_limits"] = {**self.hugepage_limits, **other.hugepage_limits}
        return replace(self, **changes)

    def write(self, message: nri_pb2.LinuxResources) -> None:
        """Put what is set into `message`."""
        message.unified.update(self.unified)
        for name, (group, leaf) in _OPTIONAL.items():
            value = getattr(self, name)
            if value is not None:
                optional = getattr(getattr(message, group), leaf)
                optional.SetInParent()  # 0 is a value, not an absence
                optional.value = value
        if self.cpuset_cpus is not None:
            message.cpu.cpus = self.cpuset_cpus
        if self.cpuset_mems is not None:
            message.cpu.mems = self.cpuset_mems
        if self.pids_limit is not None:
            message.pids.SetInParent()
            message.pids.limit = self.pids_limit
        for size, limit in self.hugepage_limits.items():
            message.hugepage_limits.add(page_size=size, limit=limit)
        for name in ("blockio_class", "rdt_class"):
            text = getattr(self, name)
            if text is not None:
                getattr(message, name).SetInParent()
                getattr(message, name).value = text


def resources_from_message(message: nri_pb2.LinuxResources) -> Resources:
    """The record of a message. Device rules and cgroup v1 leftovers (kernel memory, OOM killer) are left out."""
    found: dict[str, Any] = {
        name: getattr(getattr(message, group), leaf).value
        for name, (group, leaf) in _OPTIONAL.items()
        if getattr(message, group).HasField(leaf)
    }
    return Resources(
        unified=dict(message.unified),
        cpuset_cpus=message.cpu.cpus or None,
        cpuset_mems=message.cpu.mems or None,
        pids_limit=message.pids.limit if message.HasField("pids") else None,
        hugepage_limits={each.page_size: each.limit for each in message.hugepage_limits},
        blockio_class=message.blockio_class.value if message.HasField("blockio_class") else None,
        rdt_class=message.rdt_class.value if message.HasField("rdt_class") else None,
        **found,
    )
