"""All processes of the machine that run a program file."""

from __future__ import annotations

import os
from collections.abc import Collection

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import live_thread
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import identify


class ProcTarget:
    """Every process whose /proc/PID/exe can be read: no kernel threads, and not this process."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def poll(self) -> frozenset[ProcessId]:
        """Those that are alive now."""
        proc = self._host.path("proc")
        try:
            names = os.listdir(proc)
        except OSError as error:
            raise self._host.error(proc, error) from None
        return self.those_of([int(name) for name in names if name.isdecimal()])

    def those_of(self, pids: Collection[int]) -> frozenset[ProcessId]:
        """See `SelectiveTarget.those_of`."""
        return identify(self._host, filter(self._has_exe, pids))

    def _has_exe(self, pid: int) -> bool:
        try:
            self._host.read_proc_link(pid, "exe")
        except OSError:
            return live_thread(self._host, pid) is not None  # its first thread is over and has no program any more
        return True
