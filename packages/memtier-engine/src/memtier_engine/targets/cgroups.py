"""The processes of cgroups and all cgroups below them, as they come and go."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loguru import logger

from memtier_engine.errors import KernelCallError, Unavailable
from memtier_engine.hostfs.cgroup import Cgroup, check_cgroup_name, find_cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import identify


class CgroupsTarget:
    """The union of some cgroups' processes. A cgroup may be absent at first, vanish and come back."""

    def __init__(self, host: Host, paths: Iterable[str | Path]) -> None:
        """`paths`: as a person names cgroups (`hostfs.cgroup.find_cgroup`).

        Raises:
            ConfigError: a name with `..` in it.
        """
        self._host = host
        self._names = tuple(dict.fromkeys(str(path) for path in paths))
        for name in self._names:
            check_cgroup_name(name)
        self._found: dict[str, Path] = {}  # those that were there at the last poll
        self._silent: set[str] = set()  # names already complained about
        self._partly: set[str] = set()  # and those of which a part cannot be read

    def poll(self) -> frozenset[ProcessId]:
        """All processes in the cgroups and below. One that cannot be read never costs the others theirs."""
        pids: set[int] = set()
        for name in self._names:
            try:
                cgroup = Cgroup(self._directory(name), self._host)
                if cgroup.exists():
                    self._found[name] = cgroup.path
                    below: list[KernelCallError] = []
                    pids |= cgroup.pids(trouble=below.append)
                    self._silent.discard(name)
                    self._tell_of(name, below)
                else:
                    self._found.pop(name, None)
                    self._complain(name, "does not exist")
            except (KernelCallError, Unavailable) as error:
                self._complain(name, f"cannot be read: {error}")
        return identify(self._host, pids)

    def run_time_us(self) -> int | None:
        """CPU time of all that ever ran in the cgroups, from `cpu.stat`. None: one of them is not there."""
        total_us = 0
        try:
            for directory in self.directories():
                used_us = Cgroup(directory, self._host).stat("cpu.stat").get("usage_usec")
                if used_us is None:
                    return None
                total_us += used_us
        except KernelCallError:
            return None
        return total_us

    def directories(self) -> tuple[Path, ...]:
        """Where the cgroups are, whether they exist yet or not; empty without a cgroup v2 tree."""
        try:
            return tuple(self._directory(name) for name in self._names)
        except Unavailable:
            return ()

    def _directory(self, name: str) -> Path:
        return self._found.get(name) or find_cgroup(self._host, name)

    def _tell_of(self, name: str, below: list[KernelCallError]) -> None:
        """One line about all the directories below that cannot be read, until all can."""
        if not below:
            self._partly.discard(name)
        elif name not in self._partly:
            self._partly.add(name)
            more = f" and {len(below) - 1} more" if len(below) > 1 else ""
            logger.warning("cgroup {}: {}{}; the processes in there are left out, the others not", name, below[0], more)

    def _complain(self, name: str, what: str) -> None:
        """Once, until it has been there again."""
        if name not in self._silent:
            self._silent.add(name)
            logger.warning("cgroup {}: {}; its processes are left out until it appears", name, what)
