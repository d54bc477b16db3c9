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
        proc = str(self._host.path("proc"))
        return identify(self._host, (pid for pid in pids if self._has_exe(proc, pid)))

    def _has_exe(self, proc: str, pid: int) -> bool:
        try:
            os.readlink(f"{proc}/{pid}/exe")
        except OSError:
            return live_thread(self._host, pid) is not None  # its first thread is over and has no program any more
        return True
