"""The processes of another target that pass a filter, asked again at every poll.

A process that grows past a threshold, or executes another program, is found at the next poll.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import live_thread
from memtier_engine.hostfs.proc import read_status, smaps_rollup
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import SelectiveTarget, Target

_DELETED = " (deleted)"
_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFilter:
    """All criteria that are given must hold; without any, every process passes."""

    exe_regexp: re.Pattern[str] | None = None
    """Searched in the path of the program (`procexeregexp`; see `targets.regexp.compile_re2`)."""
    min_vm_size_kib: int = 0
    """VmSize of /proc/PID/status (`minvmsizekb`). 0: any."""
    min_vm_rss_kib: int = 0
    """VmRSS (`minvmrsskb`)."""
    min_private_dirty_kib: int = 0
    """Private_Dirty of all mappings (`minprivatedirtykb`): the kernel walks all page tables for it."""
    and_filters: tuple[ProcessFilter, ...] = ()
    or_filters: tuple[ProcessFilter, ...] = ()
    """If not empty, one of them at least."""
    not_filter: ProcessFilter | None = None

    def passes(self, host: Host, pid: int) -> bool:
        """Whether process `pid` passes now; cheap criteria first. What cannot be read does not match."""
        if self.exe_regexp is not None and not self.exe_regexp.search(_exe(host, pid)):
            return False
        if (self.min_vm_size_kib or self.min_vm_rss_kib) and not self._is_large(host, pid):
            return False
        if self.min_private_dirty_kib and _private_dirty(host, pid) < self.min_private_dirty_kib * _KIB:
            return False
        return (
            all(each.passes(host, pid) for each in self.and_filters)
            and (not self.or_filters or any(each.passes(host, pid) for each in self.or_filters))
            and (self.not_filter is None or not self.not_filter.passes(host, pid))
        )

    def _is_large(self, host: Host, pid: int) -> bool:
        try:
            status = read_status(host, pid)
        except KernelCallError:
            return False
        size, rss = status.vm_size or 0, status.vm_rss or 0
        return size >= self.min_vm_size_kib * _KIB and rss >= self.min_vm_rss_kib * _KIB


class FilterTarget:
    """The processes of `source` that pass any of the filters; without filters none does."""

    def __init__(self, host: Host, source: Target, filters: Sequence[ProcessFilter]) -> None:
        self._host = host
        self._source = source
        self._filters = tuple(filters)

    def poll(self) -> frozenset[ProcessId]:
        """Those that pass now."""
        return self._passing(self._source.poll())

    def those_of(self, pids: Collection[int]) -> frozenset[ProcessId]:
        """See `SelectiveTarget.those_of`."""
        if isinstance(self._source, SelectiveTarget):
            return self._passing(self._source.those_of(pids))
        return self._passing(process for process in self._source.poll() if process.pid in pids)

    def _passing(self, processes: Iterable[ProcessId]) -> frozenset[ProcessId]:
        return frozenset(
            process for process in processes if any(each.passes(self._host, process.pid) for each in self._filters)
        )


def _exe(host: Host, pid: int) -> str:
    """The program's path as its process sees it; also of a program that was replaced since it was started."""
    try:
        return host.read_proc_link(pid, "exe").removesuffix(_DELETED)
    except OSError:
        pass
    thread = live_thread(host, pid)
    try:
        return host.read_proc_link(pid, f"task/{thread}/exe").removesuffix(_DELETED) if thread else ""
    except OSError:
        return ""


def _private_dirty(host: Host, pid: int) -> int:
    try:
        return smaps_rollup(host, pid).get("Private_Dirty", 0)
    except KernelCallError:
        return 0
