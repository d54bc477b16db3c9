"""Text files of /proc: clear_refs, smaps, status, times, swaps, meminfo. Sizes in bytes; absent is None."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import live_thread, parse_mappings, read_stat_fields
from memtier_engine.model import U64, Bools

CLEAR_REFS_REFERENCED = 1
"""Clear the accessed bits of all mapped pages."""
CLEAR_REFS_SOFT_DIRTY = 4
"""Clear the soft-dirty bits; EINVAL on new kernels without CONFIG_MEM_SOFT_DIRTY, silent on old ones."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_KIB = 1024
_UTIME_FIELD = 14
_SIZE_LINE = re.compile(r"^([^:\n]+):\s+(\d+)( kB)?$", re.M)
_VM_FLAGS = re.compile(rb"^VmFlags: ?(.*)$", re.M)


def clear_refs(host: Host, pid: int, what: int) -> None:
    """Write `what` (CLEAR_REFS_...) to /proc/PID/clear_refs. The kernel walks all page tables of the process.

    Raises:
        ProcessGone: it exited.
        AccessDenied: not the owner, without CAP_DAC_OVERRIDE.
    """
    # Of a process whose first thread has ended, PID/clear_refs takes everything and does nothing.
    host.write(_of_memory(host, pid, live_thread(host, pid), "clear_refs"), str(what))


def _of_memory(host: Host, pid: int, thread: int | None, name: str) -> Path:
    """Where a file about the memory of `pid` is; `thread`: see `maps.live_thread`."""
    return host.proc(pid, name) if thread is None else host.proc(pid, "task", str(thread), name)


@dataclass(frozen=True, slots=True)
class SmapsTable:
    """/proc/PID/smaps as columns [n], one row per mapping, ascending."""

    starts: U64
    ends: U64
    rss_bytes: U64
    referenced_bytes: U64
    """Pages whose accessed bit is set, or that the kernel itself marked as referenced."""
    swap_bytes: U64
    anonymous_bytes: U64
    locked: Bools  # mlock: cannot be paged out
    hugetlb: Bools  # pages of hugetlbfs: cannot be paged out
    names: tuple[str, ...]
    shared_bytes: U64
    """Pages that other mappings, of other processes mostly, map too."""

    def __len__(self) -> int:
        return len(self.starts)


def parse_smaps(text: bytes) -> SmapsTable:
    """Columns of the text of /proc/PID/smaps; a field the kernel does not print reads as 0."""
    mappings = parse_mappings(text)

    def column(name: bytes) -> U64:
        found = re.findall(rb"^" + name + rb": +(\d+) kB$", text, re.M)
        if len(found) != len(mappings):
            return np.zeros(len(mappings), np.uint64)
        return np.array(found, dtype=bytes).astype(np.uint64) * np.uint64(_KIB)

    flags = [set(line.split()) for line in _VM_FLAGS.findall(text)]
    if len(flags) != len(mappings):
        flags = [set() for _ in range(len(mappings))]
    return SmapsTable(
        starts=mappings.starts,
        ends=mappings.ends,
        rss_bytes=column(b"Rss"),
        referenced_bytes=column(b"Referenced"),
        swap_bytes=column(b"Swap"),
        anonymous_bytes=column(b"Anonymous"),
        locked=np.array([b"lo" in words for words in flags], np.bool_),
        hugetlb=np.array([b"ht" in words for words in flags], np.bool_),
        names=mappings.names,
        shared_bytes=column(b"Shared_Clean") + column(b"Shared_Dirty"),
    )


def read_smaps(host: Host, pid: int) -> SmapsTable:
    """/proc/PID/smaps: the kernel walks all page tables, so this costs about as much as reading pagemap.

    Raises:
        ProcessGone: the process exited.
    """
    text = host.read_proc(pid, "smaps")
    if not text and (thread := live_thread(host, pid)) is not None:
        text = host.read_proc(pid, f"task/{thread}/smaps")
    return parse_smaps(text)


def _sizes(text: str) -> dict[str, int]:
    """`Name:   123 kB` lines; with "kB" in bytes, without as they are."""
    return {name: int(value) * (_KIB if unit else 1) for name, value, unit in _SIZE_LINE.findall(text)}


def smaps_rollup(host: Host, pid: int) -> dict[str, int]:
    """Sums over all mappings in bytes: Rss, Pss, Referenced, Anonymous, Swap, ... Empty for a kernel thread.

    Raises:
        ProcessGone: the process exited.
    """
    try:
        text = host.read_proc(pid, "smaps_rollup")
    except ProcessGone:
        thread = live_thread(host, pid)
        if thread is None:
            raise
        text = host.read_proc(pid, f"task/{thread}/smaps_rollup")
    return _sizes(text.decode("utf-8", "surrogateescape"))


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """Sizes from /proc/PID/status in bytes; None for a kernel thread or a zombie."""

    name: str
    vm_size: int | None
    vm_rss: int | None
    vm_swap: int | None
    rss_shmem: int | None = None
    """Of `vm_rss`, what is shared memory: MAP_SHARED without a file, memfd, tmpfs, SysV. Since Linux 4.5."""


def read_status(host: Host, pid: int) -> ProcessStatus:
    """/proc/PID/status. VmRSS may lag by some pages per CPU.

    Raises:
        ProcessGone: the process exited.
    """
    text = host.read_proc(pid, "status")
    sizes = text
    if b"\nVmSize:" not in text and (thread := live_thread(host, pid)) is not None:
        sizes = host.read_proc(pid, f"task/{thread}/status")
    name = text.partition(b"\n")[0].partition(b"\t")[2].decode("utf-8", "surrogateescape")
    vm_size, vm_rss, vm_swap, rss_shmem = (_size(sizes, line) for line in (b"VmSize", b"VmRSS", b"VmSwap", b"RssShmem"))
    return ProcessStatus(name, vm_size, vm_rss, vm_swap, rss_shmem)


def _size(text: bytes, name: bytes) -> int | None:
    """The line `name` of /proc/PID/status in bytes. Its lines before are escaped, so that no name can forge one."""
    _, found, rest = text.partition(b"\n" + name + b":")
    return int(rest[: rest.index(b"kB")]) * _KIB if found else None


def effective_capabilities(host: Host) -> int | None:
    """CapEff of this process as a bit mask (`Capability`); None if it cannot be read."""
    try:
        status = host.read_text(host.path("proc", "self", "status"))
    except KernelCallError:
        return None
    found = re.search(r"^CapEff:\s+([0-9a-f]+)$", status, re.M)
    return int(found[1], 16) if found else None


def cpu_seconds(host: Host, pid: int) -> float:
    """User and system time that `pid` has used, in seconds.

    Raises:
        ProcessGone: it exited.
    """
    fields = read_stat_fields(host, pid)
    first = _UTIME_FIELD - 3
    return (int(fields[first]) + int(fields[first + 1])) / _TICKS_PER_S


@dataclass(frozen=True, slots=True)
class SwapArea:
    """One line of /proc/swaps."""

    path: str
    kind: str  # "partition" or "file"
    size_bytes: int
    used_bytes: int
    priority: int

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return self.size_bytes - self.used_bytes


def read_swaps(host: Host) -> list[SwapArea]:
    """The swap areas in use: none without swap, or without CONFIG_SWAP."""
    path = host.path("proc", "swaps")
    if not path.exists():
        return []
    areas = []
    for line in host.read_text(path).splitlines()[1:]:
        name, kind, size_kib, used_kib, priority = line.rsplit(maxsplit=4)
        areas.append(SwapArea(name.strip(), kind, int(size_kib) * _KIB, int(used_kib) * _KIB, int(priority)))
    return areas


def meminfo(host: Host) -> dict[str, int]:
    """/proc/meminfo in bytes (HugePages_ counts as they are)."""
    return _sizes(host.read_text(host.path("proc", "meminfo")))
