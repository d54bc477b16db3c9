"""What the plugin tells the fleet. Hooks make these and put them on a queue; nothing here does any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from memtier_cli.nri_memtierd.config import PluginConfig


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container, as far as engines are concerned."""

    id: str
    namespace: str
    pod: str
    name: str
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Of the pod; only those of our suffix."""
    cgroups_path: str = ""
    pid: int | None = None
    started_at_s: float | None = None
    """Wall-clock time. None: just now, or not known."""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.pod}:{self.name}"


@dataclass(frozen=True, slots=True)
class Started:
    """The container runs, or is about to."""

    container: ContainerInfo


@dataclass(frozen=True, slots=True)
class Stopped:
    """The container does not run any more."""

    container_id: str


@dataclass(frozen=True, slots=True)
class Listed:
    """All containers that run now, and ids of those that exist without running yet; others are gone."""

    running: tuple[ContainerInfo, ...]
    created: frozenset[str] = frozenset()
    adopt: bool = True


@dataclass(frozen=True, slots=True)
class Synchronized:
    """A list that is read when its turn comes."""

    read: Callable[[], Listed]


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """Another configuration is in force from now on."""

    config: PluginConfig


@dataclass(frozen=True, slots=True)
class Ended:
    """Stop all engines."""


Event = Started | Stopped | Listed | Synchronized | Reconfigured | Ended
