"""A fixed list of pids. Each means the process that had it first, not a later one of the same number."""

from __future__ import annotations

from collections.abc import Iterable

from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import identify


class PidsTarget:
    """The processes of a list of pids, as long as they live."""

    def __init__(self, host: Host, pids: Iterable[int]) -> None:
        """A pid that nobody has yet is looked for at every poll until somebody has it."""
        self._host = host
        self._pids = frozenset(pids)
        self._first: dict[int, ProcessId] = {}

    def poll(self) -> frozenset[ProcessId]:
        """Those that are alive."""
        return frozenset(
            process
            for process in identify(self._host, self._pids)
            if self._first.setdefault(process.pid, process) == process
        )
