"""What a person asks for, checked before anything is looked at: each error says why nothing would come of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from memtier_engine.errors import KernelCallError, MemtierError
from memtier_engine.hostfs.cgroup import find_cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import read_mappings
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import why_not

_RIGHTS = "run as root, or as its user; in a container with CAP_SYS_PTRACE and the pid namespace of the process"


def check_pid(host: Host, pid: int) -> None:
    """Raise `MemtierError` for a pid that is no process with memory of its own, or one that may not be looked at."""
    reason = why_not(host, pid)
    if reason is None and (process := _process_of(host, pid)) != pid:
        reason = f"{pid} is a thread of process {process}"
    if reason is not None:
        raise MemtierError(reason, hint="list processes with: ps -e")
    if (reason := _why_unreadable(host, pid)) is not None:
        raise MemtierError(reason, hint=_RIGHTS)


def check_cgroup(host: Host, name: str, *, root_allowed: bool = False) -> Path:
    """The directory of the cgroup `name` (see `find_cgroup`).

    Raises:
        MemtierError: there is none, or it is the root of a hierarchy, with every process of the machine in it, as an
            empty variable of a script is.
    """
    directory = find_cgroup(host, name)
    if not directory.is_dir():
        raise MemtierError(f"cgroup {name!r}: no such cgroup", hint="list them with: systemd-cgls")
    real = directory.resolve()
    if not (real / "cgroup.procs").exists():
        raise MemtierError(
            f"cgroup {name!r}: {host.kernel_file(real)} is no cgroup", hint="list them with: systemd-cgls"
        )
    if not root_allowed and not (real.parent / "cgroup.procs").exists():  # also of v1, and of a container's own view
        raise MemtierError(
            f"cgroup {name!r} is the root of a hierarchy: every process of the machine is in it",
            hint="name one below it; `memtier run --all` means all",
        )
    return directory


def check_processes(host: Host, processes: Iterable[ProcessId]) -> None:
    """Raise `MemtierError` where there are none, or none may be looked at."""
    reason = None
    for process in processes:
        why = _why_unreadable(host, process.pid)
        if why is None:
            return
        reason = reason or why
    if reason is None:
        raise MemtierError("there is no process to look at")
    raise MemtierError(reason, hint=_RIGHTS)


def _why_unreadable(host: Host, pid: int) -> str | None:
    try:
        read_mappings(host, pid)
    except KernelCallError as failure:
        return f"process {pid} cannot be looked at: {failure}"
    return None


def _process_of(host: Host, pid: int) -> int:
    try:
        return int(host.read_proc(pid, "status").partition(b"\nTgid:")[2].split(maxsplit=1)[0])
    except (KernelCallError, IndexError):
        return pid
