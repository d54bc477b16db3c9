"""A fixed list of pids. Each means the process that had it first, not a later one of the same number."""

from __future__ import annotations

from collections.abc import Iterable

from loguru import logger

from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import identify, why_not

_NAMED_MOST = 5


class PidsTarget:
    """The processes of a list of pids, as long as they live."""

    def __init__(self, host: Host, pids: Iterable[int]) -> None:
        """A pid that nobody has yet is looked for at every poll until somebody has it."""
        self._host = host
        self._pids = frozenset(pids)
        self._first: dict[int, ProcessId] = {}
        self._told = False

    def poll(self) -> frozenset[ProcessId]:
        """Those that are alive. The first time it warns of those that are not."""
        found = frozenset(
            process
            for process in identify(self._host, self._pids)
            if self._first.setdefault(process.pid, process) == process
        )
        if not self._told:
            self._told = True
            missing = self.missing()
            if missing:
                more = f", and {len(missing) - _NAMED_MOST} more" if len(missing) > _NAMED_MOST else ""
                logger.warning("{}{}", ", ".join(list(missing.values())[:_NAMED_MOST]), more)
        return found

    def missing(self) -> dict[int, str]:
        """By pid, why it means no process now: it was never there, has exited, is the kernel's or this program's."""
        said: dict[int, str] = {}
        for pid in sorted(self._pids):
            first = self._first.get(pid)
            reason = why_not(self._host, pid)
            if first is not None and first not in identify(self._host, [pid]):
                said[pid] = f"process {pid} exited"
            elif reason is not None:
                said[pid] = reason
        return said
