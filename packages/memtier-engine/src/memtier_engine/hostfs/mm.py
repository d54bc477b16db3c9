"""Which processes share one address space: processes in, groups of them out.

Accessed bits belong to an `mm`, not to a process. clone(2) with CLONE_VM and without CLONE_THREAD makes a process that
has its parent's; so does vfork(2) until the child executes a program. Who tracks both of them apart clears for one what
he has yet to read for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from memtier_engine.abi import syscalls
from memtier_engine.errors import KernelCallError, MemtierError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import has_exited, leader_ended, live_thread, read_stat_fields
from memtier_engine.model import ProcessId

_CODE, _STACK_END = 26 - 3, 28 - 3
_DATA, _ENVIRONMENT_END = 45 - 3, 51 - 3
"""Fields of stat, counted from the third on. Source: proc_pid_stat(5)."""
_HIDDEN = (b"0", b"1")
"""`startcode` of a process without memory, or that we may not read. Source: fs/proc/array.c, do_task_stat."""

Compare = Callable[[int, int], int]
"""As `syscalls.kcmp_vm`."""


@dataclass(frozen=True, slots=True)
class MmGroup:
    """Processes with one address space."""

    processes: tuple[ProcessId, ...]
    """The oldest first."""
    layout: bytes
    """Where program, stack, arguments and environment lie: the same as long as the address space is; another one after
    execve(2), which makes a new one (the same again only without address space randomisation). Empty: not known."""
    certain: bool = True
    """False: the kernel does not tell; they look the same, so they are taken as one."""


@dataclass(slots=True)
class _Same:
    """Processes that were found to have one address space."""

    members: list[ProcessId]


@dataclass(slots=True)
class _Bucket:
    """Processes of one layout: forks of each other, or parts of one address space."""

    ordered: list[_Same] = field(default_factory=list)
    """As kcmp(2) orders them."""
    certain: bool = True


class AddressSpaces:
    """Finds out who shares with whom, and remembers: what was found apart never comes together. One thread at a time.

    A call reads one small file per process; what it costs beyond that is linear in the number of processes of the same
    layout, if one of them is new, and nothing if none is.
    """

    def __init__(self, host: Host, *, compare: Compare = syscalls.kcmp_vm) -> None:
        self._host = host
        self._compare = compare
        self._buckets: dict[bytes, _Bucket] = {}
        self._threads: dict[ProcessId, int] = {}
        self.why_uncertain: str | None = None
        """Why the kernel did not tell, at the last call; None: it did, or was not asked."""

    def groups(self, processes: Iterable[ProcessId]) -> list[MmGroup]:
        """All of `processes` that live, each in one group; ordered by the oldest process of each."""
        self.why_uncertain = None
        self._threads.clear()
        by_layout: dict[bytes, list[ProcessId]] = {}
        found: list[MmGroup] = []
        for process in processes:
            layout = self._layout(process)
            if layout is None:
                continue
            if layout:
                by_layout.setdefault(layout, []).append(process)
            else:
                found.append(MmGroup((process,), b""))
        before, self._buckets = self._buckets, {}
        for layout, alike in by_layout.items():
            bucket = before.get(layout)
            bucket = _Bucket([_Same(alike)]) if len(alike) == 1 else self._divided(alike, bucket or _Bucket())
            self._buckets[layout] = bucket
            found += (MmGroup(tuple(sorted(same.members, key=_age)), layout, bucket.certain) for same in bucket.ordered)
        return sorted(found, key=lambda group: _age(group.processes[0]))

    def _layout(self, process: ProcessId) -> bytes | None:
        """What `MmGroup.layout` says. None: it exited; empty: it has none, or we may not know."""
        try:
            fields = read_stat_fields(self._host, process.pid)
            if has_exited(fields):
                return None
            if leader_ended(fields):
                thread = live_thread(self._host, process.pid)
                if thread is None:
                    return None
                self._threads[process] = thread
                fields = read_stat_fields(self._host, thread)
        except ProcessGone:
            return None
        except KernelCallError:
            return b""
        if len(fields) <= _ENVIRONMENT_END or fields[_CODE] in _HIDDEN:
            return b""
        return b" ".join((*fields[_CODE : _STACK_END + 1], *fields[_DATA : _ENVIRONMENT_END + 1]))

    def _divided(self, alike: Sequence[ProcessId], known: _Bucket) -> _Bucket:
        """By address space, from how they were divided last."""
        if not known.certain:
            known = _Bucket()
        try:
            return _Bucket(self._ordered(alike, known.ordered))
        except _Refused as refused:
            self.why_uncertain = str(refused)
            return _Bucket(self._by_size(alike), certain=False)

    def _ordered(self, alike: Sequence[ProcessId], known: list[_Same]) -> list[_Same]:
        here = set(alike)
        ordered: list[_Same] = []
        placed: set[ProcessId] = set()
        for same in known:
            members = [process for process in same.members if process in here]
            # Only execve(2) takes one out of a group, and mostly changes the layout too.
            members = members[:1] + [each for each in members[1:] if not self._sign(members[0], each)]
            if members:
                ordered.append(_Same(members))
                placed.update(members)
        new = [process for process in alike if process not in placed]
        if not new:
            return ordered
        # A new one is looked for by halving, so the order must still hold. It does unless one of them executed a
        # program without a change of its layout.
        in_order: list[_Same] = []
        for same in ordered:
            if in_order and self._sign(in_order[-1].members[0], same.members[0]) >= 0:
                new += same.members
            else:
                in_order.append(same)
        for process in new:
            self._insert(in_order, process)
        return in_order

    def _insert(self, ordered: list[_Same], process: ProcessId) -> None:
        low, high = 0, len(ordered)
        while low < high:
            middle = (low + high) // 2
            sign = self._sign(process, ordered[middle].members[0])
            if not sign:
                ordered[middle].members.append(process)
                return
            if sign < 0:
                high = middle
            else:
                low = middle + 1
        ordered.insert(low, _Same([process]))

    def _sign(self, one: ProcessId, other: ProcessId) -> int:
        """-1, 0 (the same) or 1. What has exited meanwhile is as good as greater: the next call leaves it out."""
        if not self._host.own_namespace:
            raise _Refused("processes of another pid namespace: kcmp(2) goes by the numbers of our own")
        try:
            answer = self._compare(self._threads.get(one, one.pid), self._threads.get(other, other.pid))
        except ProcessGone:
            return 1
        except MemtierError as error:
            raise _Refused(str(error)) from None
        return (0, -1, 1, 1)[answer]

    def _by_size(self, alike: Sequence[ProcessId]) -> list[_Same]:
        """Without kcmp: two whose sizes differ, while neither changes, are apart. All others are taken as one."""
        first = [self._statm(process) for process in alike]
        again = [self._statm(process) for process in alike]
        # At the moment between the two rounds each size that is the same in both was what it is.
        found: dict[bytes, _Same] = {}
        for process, size, same in zip(alike, first, again, strict=True):
            key = size if size == same else b"changes"
            found.setdefault(key, _Same([])).members.append(process)
        return list(found.values())

    def _statm(self, process: ProcessId) -> bytes:
        try:
            return self._host.read_proc(self._threads.get(process, process.pid), "statm")
        except KernelCallError:
            return b""


class _Refused(Exception):
    pass


def _age(process: ProcessId) -> tuple[int, int]:
    return process.start_ticks, process.pid
