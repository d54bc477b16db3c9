"""Facts about a process that skip rules ask for, from /proc."""

from __future__ import annotations

import os
import re
from itertools import islice

from memtier_engine.errors import KernelCallError
from memtier_engine.guards.skip import REALTIME_POLICIES, ProcessFacts
from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId

THREADS_AGAIN_S = 60.0
"""Threads rarely change their scheduling policy, and a process may have thousands."""
THREADS_MAX = 256
_POLICY_FIELD = 41
"""Of /proc/PID/task/TID/stat. Source: proc_pid_stat(5)."""
_LINE = re.compile(r"^(Name|VmRSS|TracerPid|CoreDumping):\s*(.*)$", re.M)


class FactsReader:
    """Reads `ProcessFacts`: one small file per process, and once a minute its threads."""

    def __init__(self, host: Host, *, realtime: bool = True) -> None:
        """`realtime`: look at threads."""
        self._host = host
        self._realtime = realtime
        self._policies: dict[ProcessId, tuple[float, int | None]] = {}

    def read(self, process: ProcessId, now_s: float) -> ProcessFacts | None:
        """None when the process is gone or cannot be read."""
        try:
            text = self._host.read_text(self._host.proc(process.pid, "status"))
        except KernelCallError:
            return None
        fields = dict(_LINE.findall(text))
        return ProcessFacts(
            name=fields.get("Name", ""),
            rss_bytes=_number(fields.get("VmRSS"), 1024),
            tracer_pid=_number(fields.get("TracerPid")),
            core_dumping=fields.get("CoreDumping", "0") == "1",
            realtime_policy=self._policy(process, now_s) if self._realtime else None,
        )

    def keep(self, processes: frozenset[ProcessId]) -> None:
        """Forget all other processes."""
        for process in self._policies.keys() - processes:
            del self._policies[process]

    def _policy(self, process: ProcessId, now_s: float) -> int | None:
        known = self._policies.get(process)
        if known is not None and 0 <= now_s - known[0] < THREADS_AGAIN_S:
            return known[1]
        policy = self._read_policy(process.pid)
        self._policies[process] = (now_s, policy)
        return policy

    def _read_policy(self, pid: int) -> int | None:
        folder = self._host.proc(pid, "task")
        try:
            with os.scandir(folder) as entries:
                threads = [entry.name for entry in islice(entries, THREADS_MAX)]
        except OSError:
            return None
        for thread in threads:
            try:
                stat = self._host.read_bytes(folder / thread / "stat")
                # The name, in parentheses, may itself hold any byte: count from the last one.
                policy = int(stat.rpartition(b")")[2].split()[_POLICY_FIELD - 3])
            except (KernelCallError, ValueError, IndexError):
                continue
            if policy in REALTIME_POLICIES:
                return policy
        return None


def _number(text: str | None, unit: int = 1) -> int | None:
    found = re.match(r"\d+", text or "")
    return int(found[0]) * unit if found else None
