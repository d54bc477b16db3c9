"""/proc/PID/maps into columns, and which of the mappings hold memory that can be tiered."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

import numpy as np

from memtier_engine.errors import KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.model import U64, Bools, ProcessId, Spans

_LINE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ [0-9a-f]+:[0-9a-f]+ ([0-9]+) *(.*)$", re.M)
_START_TICKS_FIELD = 22
_CODE_FIELD, _STACK_FIELD = 26, 28


@dataclass(frozen=True, slots=True)
class Mappings:
    """The mappings [n] of a process, ascending."""

    starts: U64
    ends: U64  # exclusive
    readable: Bools
    writable: Bools
    shared: Bools
    inodes: U64  # 0: no file
    names: tuple[str, ...]  # path, [heap], [anon:NAME], ... or ""

    def __len__(self) -> int:
        return len(self.starts)

    def tierable(self) -> Spans:
        """The spans of mappings whose pages can be paged out or moved on their owner's account.

        In: private anonymous memory ([heap], [stack], [anon:NAME], no name) and private writable mappings of
        files. Out: shared mappings, what the kernel maps itself ([vdso], [vvar], [vsyscall], [uprobes]),
        device memory and huge pages of hugetlbfs (not on any LRU list), and memory that can be neither read
        nor written: reservations and guard pages, which would cost metadata and never hold data in use.
        """
        anonymous = self.inodes == 0
        keep = ~self.shared & (self.readable | self.writable) & (anonymous | self.writable)
        if keep.any():
            keep &= np.fromiter(map(_name_is_tierable, self.names), np.bool_, len(self.names))
        return Spans(self.starts[keep], self.ends[keep])


def _name_is_tierable(name: str) -> bool:
    if not name:
        return True
    if name[0] == "[":
        return name in ("[heap]", "[stack]") or name.startswith(("[anon:", "[stack:"))
    if name.startswith("/dev/"):
        return name.startswith(("/dev/shm/", "/dev/zero"))
    return not name.startswith("/anon_hugepage")


def parse_mappings(text: bytes) -> Mappings:
    """Columns of the text of /proc/PID/maps (or of the header lines of smaps)."""
    rows = _LINE.findall(text)
    if not rows:
        none = np.zeros(0, np.uint64)
        no = np.zeros(0, np.bool_)
        return Mappings(none, none, no, no, no, none, ())
    starts, ends, modes, inodes, names = zip(*rows, strict=True)
    flags = np.frombuffer(b"".join(modes), np.uint8).reshape(-1, 4)
    return Mappings(
        starts=np.array([int(start, 16) for start in starts], np.uint64),
        ends=np.array([int(end, 16) for end in ends], np.uint64),
        readable=flags[:, 0] == ord("r"),
        writable=flags[:, 1] == ord("w"),
        shared=flags[:, 3] == ord("s"),
        inodes=np.array([int(inode) for inode in inodes], np.uint64),
        names=tuple(name.decode("utf-8", "surrogateescape") for name in names),
    )


def read_mappings(host: Host, pid: int) -> Mappings:
    """The mappings of `pid`: none for a kernel thread or a zombie.

    Raises:
        ProcessGone: it exited.
        AccessDenied: needs the same user, or CAP_SYS_PTRACE.
    """
    return parse_mappings(host.read_bytes(host.proc(pid, "maps")))


def read_stat_fields(host: Host, pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the third (state) on: the second may hold blanks and parentheses.

    Raises:
        ProcessGone: it exited.
    """
    return _fields_of(host.read_bytes(host.proc(pid, "stat")), pid)


def _fields_of(text: bytes, pid: int) -> list[bytes]:
    _, found, rest = text.rpartition(b")")
    if not found:
        raise KernelCallError(f"read /proc/{pid}/stat: not in the kernel's format", errno.EINVAL)
    return rest.split()


def read_start_ticks(host: Host, pid: int) -> int:
    """When `pid` started, in clock ticks since boot.

    Raises:
        ProcessGone: it exited, or is a zombie that only waits for its parent.
    """
    return start_ticks_of(host.read_bytes(host.proc(pid, "stat")), pid)


def start_ticks_of(stat: bytes, pid: int) -> int:
    """As `read_start_ticks`, from the text of /proc/PID/stat."""
    fields = _fields_of(stat, pid)
    if fields[0] in (b"Z", b"X"):
        raise ProcessGone(f"process {pid} exited", errno.ESRCH)
    return int(fields[_START_TICKS_FIELD - 3])


Layout = tuple[int, int]
"""(address of the code, address of the stack) of a process."""
NO_LAYOUT: Layout = (0, 0)
"""Not to be seen, for lack of rights."""


def layout_of(stat: bytes, pid: int) -> Layout:
    """Where code and stack are, from the text of /proc/PID/stat."""
    fields = _fields_of(stat, pid)
    if len(fields) <= _STACK_FIELD - 3:
        return NO_LAYOUT
    return int(fields[_CODE_FIELD - 3]), int(fields[_STACK_FIELD - 3])


def process_id(host: Host, pid: int) -> ProcessId:
    """The identity of the process that has `pid` now.

    Raises:
        ProcessGone: nobody has.
    """
    return ProcessId(pid, read_start_ticks(host, pid))
