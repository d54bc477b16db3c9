"""What the fleet asks of whoever makes engines, and of the engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from memtier_cli.nri_memtierd.config import PluginConfig
from memtier_cli.nri_memtierd.container_cgroup import ContainerCgroup
from memtier_cli.nri_memtierd.rundir import ContainerDirectory, RunDirectory


@dataclass(frozen=True, slots=True)
class Job:
    """What an engine is to do."""

    label: str
    """NAMESPACE/POD:CONTAINER, for people."""
    text: str
    """The memtierd configuration, variables replaced."""
    cgroup: ContainerCgroup
    files: ContainerDirectory


class RunningEngine(Protocol):
    """An engine at work."""

    def ended(self) -> str | None:
        """Why it ended by itself; None while it works."""

    def stop(self) -> None:
        """Begin to stop it, without waiting. Nothing is written to its files afterwards by us."""

    def tend(self) -> None:
        """Bound the files it writes to."""


@runtime_checkable
class MayStick(Protocol):
    """An engine whose step may never return, as the kernel keeps it."""

    def stuck(self) -> bool:
        """Whether such a step still holds a thread: another engine for the same container would get stuck too."""


@runtime_checkable
class Stepping(Protocol):
    """A launcher whose engines' steps are taken by threads of this process."""

    def steps(self) -> list[tuple[Mapping[str, str], float]]:
        """Those that go on now: loguru's context of the engine, and for how many seconds."""


class Launcher(Protocol):
    """Makes engines."""

    def clean(self, run_directory: RunDirectory) -> None:
        """End the engines that an earlier run of the program left."""

    def configure(self, config: PluginConfig) -> None:
        """What holds for all engines together."""

    def launch(self, job: Job) -> RunningEngine:
        """Start an engine. Raises: MemtierError."""

    def tend(self) -> bool:
        """Finish what was stopped, as far as it has ended; True if it wants to be called again soon."""

    def close(self, timeout_s: float) -> None:
        """Wait for what was stopped; after the time limit, by force."""
