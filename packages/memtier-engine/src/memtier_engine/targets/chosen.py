"""Processes that somebody chooses while the engine runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import identify


class ChosenTarget:
    """A set of pids that changes when told. Methods may be called from any thread."""

    def __init__(self, host: Host, pids: Iterable[int] = ()) -> None:
        """Each pid means the process that had it when it was chosen, or the first one that has it later."""
        self._host = host
        self._lock = threading.Lock()
        self._chosen: dict[int, ProcessId | None] = {}
        self.add(pids)

    def add(self, pids: Iterable[int]) -> None:
        """These too; those chosen already stay the processes they are."""
        pids = list(pids)
        alive = {process.pid: process for process in identify(self._host, pids)}
        with self._lock:
            for pid in pids:
                if self._chosen.get(pid) is None:
                    self._chosen[pid] = alive.get(pid)

    def remove(self, pids: Iterable[int]) -> None:
        """These no more."""
        with self._lock:
            for pid in pids:
                self._chosen.pop(pid, None)

    def choose(self, pids: Iterable[int]) -> None:
        """These and no others."""
        with self._lock:
            self._chosen.clear()
        self.add(pids)

    def pids(self) -> tuple[int, ...]:
        """Those chosen, alive or not."""
        with self._lock:
            return tuple(self._chosen)

    def poll(self) -> frozenset[ProcessId]:
        """Those that are alive."""
        found = set()
        with self._lock:
            for process in identify(self._host, self._chosen):
                known = self._chosen[process.pid]
                if known is None:
                    known = self._chosen[process.pid] = process
                if known == process:
                    found.add(process)
        return frozenset(found)
