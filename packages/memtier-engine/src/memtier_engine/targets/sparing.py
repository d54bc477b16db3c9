"""The processes of another target without those that a machine is lost by: init, logins, the container runtime."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loguru import logger

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import Target

SPARED = frozenset(
    {
        "systemd",
        *("sshd", "sshd-session"),
        *("kubelet", "k3s", "k3s-server", "k3s-agent", "k0s", "rke2"),
        *("containerd", "containerd-shim", "dockerd", "crio", "conmon", "runc", "crun"),
        *("memtier", "memtierd", "nri-memtierd"),
    }
)
"""Names of programs, as far as the kernel keeps them (/proc/PID/comm): 15 bytes."""
_INIT_PID = 1


class SparingTarget:
    """Those of `source` that are none of these, unless they are in one of the cgroups `named` itself, not below it."""

    def __init__(self, host: Host, source: Target, *, named: Iterable[Path] = ()) -> None:
        """`named`: directories. Of what is in them directly somebody must have thought who named them."""
        self.source = source
        self.spared: frozenset[str] = frozenset()
        """Names of programs that were left out at the last poll."""
        self._host = host
        self._named = tuple(named)
        self._told: set[str] = set()

    def poll(self) -> frozenset[ProcessId]:
        """Those that are left. A name is read each time: a process may execute another program."""
        found = self.source.poll()
        names = {process: name for process in found if (name := self._spared_name(process.pid)) is not None}
        if names:
            meant = self._pids_meant()
            names = {process: name for process, name in names.items() if process.pid not in meant}
        self.spared = frozenset(names.values())
        if new := self.spared - self._told:
            self._told |= new
            logger.info("left alone, as nobody named them: {}", ", ".join(sorted(new)))
        return found - names.keys()

    def _spared_name(self, pid: int) -> str | None:
        try:
            name = self._host.read_proc(pid, "comm").decode(errors="replace").strip()
        except KernelCallError:
            return None
        return name if name in SPARED or pid == _INIT_PID else None

    def _pids_meant(self) -> frozenset[int]:
        pids: set[int] = set()
        for directory in self._named:
            try:
                pids |= Cgroup(directory, self._host).pids(recursive=False)
            except KernelCallError:
                continue  # it is removed, or may not be read
        return frozenset(pids)
