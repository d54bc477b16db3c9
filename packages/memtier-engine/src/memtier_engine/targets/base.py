"""What a target is, and from pids to identities of processes that have memory of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol, runtime_checkable

from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import has_exited, read_stat_fields
from memtier_engine.model import ProcessId, Spans

PF_KTHREAD = 0x00200000
"""Source: include/linux/sched.h; field 9 of /proc/PID/stat."""
_FLAGS_FIELD = 9
_START_TICKS_FIELD = 22


class Target(Protocol):
    """A set of processes that changes over time."""

    def poll(self) -> frozenset[ProcessId]:
        """The processes it means now; never a kernel thread, a zombie or this process itself."""


@runtime_checkable
class RestrictingTarget(Protocol):
    """A target that means only some of the memory of its processes."""

    def restrict(self, process: ProcessId, mapped: Spans) -> Spans:
        """The parts of `mapped` that are meant."""


@runtime_checkable
class SelectiveTarget(Protocol):
    """A target that can look at some processes without looking at all."""

    def those_of(self, pids: Collection[int]) -> frozenset[ProcessId]:
        """Those of `pids` that `poll` would name now."""


@runtime_checkable
class TellingTarget(Protocol):
    """A target that tells when its processes change."""

    def poll(self) -> frozenset[ProcessId]:
        """See `Target.poll`."""

    def listen(self, on_change: Callable[[], None]) -> None:
        """Call this at every change from now on, from a thread of the target's."""

    def close(self) -> None:
        """Tell no more. Safe to call twice."""


@runtime_checkable
class _Wrapper(Protocol):
    @property
    def source(self) -> Target: ...


def innermost(target: Target) -> Target:
    """The target that others (by events, at intervals) ask."""
    while isinstance(target, _Wrapper):
        target = target.source
    return target


def identify(host: Host, pids: Iterable[int]) -> frozenset[ProcessId]:
    """Identities of those of `pids` that are alive, user processes, and not this one.

    One small file is read per process. One that cannot be read (hidepid) is left out like one that exited.
    """
    own = host.own_pid
    found = set()
    for pid in pids:
        if pid == own:
            continue
        try:
            fields = read_stat_fields(host, pid)
        except KernelCallError:
            continue
        if has_exited(fields) or int(fields[_FLAGS_FIELD - 3]) & PF_KTHREAD:
            continue
        found.add(ProcessId(pid, int(fields[_START_TICKS_FIELD - 3])))
    return frozenset(found)


def why_not(host: Host, pid: int) -> str | None:
    """Why `identify` leaves `pid` out, in words; None: it does not."""
    if pid == host.own_pid:
        return f"process {pid} is this program itself"
    try:
        fields = read_stat_fields(host, pid)
    except ProcessGone:
        return f"there is no process {pid}"
    except KernelCallError as failure:
        return f"process {pid} cannot be seen: {failure}"
    if has_exited(fields):
        return f"process {pid} exited, and its parent has not waited for it"
    if int(fields[_FLAGS_FIELD - 3]) & PF_KTHREAD:
        return f"process {pid} is a thread of the kernel: it has no memory of its own"
    return None
