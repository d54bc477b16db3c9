"""One typed function per kernel call. Each makes exactly one call, holds no state and releases the GIL.

Every function raises `KernelCallError` (`ProcessGone` for ESRCH, `AccessDenied` for EPERM and EACCES) with
the kernel's errno; none retries, splits or interprets: that is the caller's business.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_ulong, c_void_p

import numpy as np
from numpy.typing import NDArray

from memtier_engine.abi import structs
from memtier_engine.abi.constants import KCMP_VM, MPOL_MF_MOVE, UFFD_API, UIO_MAXIOV
from memtier_engine.abi.numbers import syscall_number
from memtier_engine.errors import KernelCallError
from memtier_engine.model import U64

NOT_TRIED = -(1 << 31)
"""Status of a page that move_pages did not come to (it stops at some errors). No errno is this large."""

# CDLL (unlike PyDLL) releases the GIL; use_errno keeps errno per thread. The prototype is set once, here.
_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = c_long
_ioctl = _libc.ioctl
_ioctl.restype = c_int
_ioctl.argtypes = [c_int, c_ulong, c_void_p]


def _failed(what: str) -> KernelCallError:
    return KernelCallError.from_errno(what, ctypes.get_errno())


def pidfd_open(pid: int, flags: int = 0) -> int:
    """A close-on-exec file descriptor for process `pid`; the caller closes it. Linux 5.3."""
    fd = _syscall(c_long(syscall_number("pidfd_open")), c_long(pid), c_ulong(flags))
    if fd < 0:
        raise _failed(f"pidfd_open(pid={pid})")
    return int(fd)


def pidfd_send_signal(pidfd: int, sig: int) -> None:
    """Send signal `sig` to the process behind `pidfd`; 0 only asks whether it lives. Linux 5.1."""
    number = syscall_number("pidfd_send_signal")
    if _syscall(c_long(number), c_long(pidfd), c_long(sig), c_void_p(None), c_ulong(0)) < 0:
        raise _failed(f"pidfd_send_signal(pidfd={pidfd}, sig={sig})")


def process_madvise(pidfd: int, starts: U64, lengths: U64, advice: int) -> int:
    """Advise the kernel on spans of another process's memory. Linux 5.10.

    Args:
        pidfd: from `pidfd_open`.
        starts: uint64[n], n at most `UIO_MAXIOV`: page-aligned addresses.
        lengths: uint64[n]: bytes.
        advice: one of `Madvise`; MADV_PAGEOUT needs CAP_SYS_NICE and ptrace read access.
    Returns:
        Bytes advised, from the first span on: less than the sum when the kernel stopped in between.
    Raises:
        ValueError: more than `UIO_MAXIOV` spans, or columns of different length.
    """
    if len(starts) > UIO_MAXIOV:
        raise ValueError(f"process_madvise takes at most {UIO_MAXIOV} spans a call, got {len(starts)}")
    iovecs = np.empty((len(starts), 2), dtype=np.uint64)
    if len(starts) != len(lengths):
        raise ValueError(f"{len(starts)} starts but {len(lengths)} lengths")
    iovecs[:, 0] = starts
    iovecs[:, 1] = lengths
    advised = _syscall(
        c_long(syscall_number("process_madvise")),
        c_long(pidfd),
        c_void_p(iovecs.ctypes.data),
        c_ulong(len(iovecs)),
        c_long(advice),
        c_ulong(0),
    )
    if advised < 0:
        raise _failed(f"process_madvise(pidfd={pidfd}, spans={len(iovecs)}, advice={advice})")
    return int(advised)


def kcmp_vm(one: int, other: int) -> int:
    """How the address spaces of two tasks stand in an order of the kernel's: 0 the same, 1 less, 2 greater. Linux 3.5.

    The order stays while both live. A task without an address space (a zombie) compares equal to another such.

    Args:
        one: a process or thread of the caller's pid namespace, which it may read as by ptrace(2).
        other: another one.
    """
    answer = _syscall(
        c_long(syscall_number("kcmp")), c_long(one), c_long(other), c_long(KCMP_VM), c_ulong(0), c_ulong(0)
    )
    if answer < 0:
        raise _failed(f"kcmp({one}, {other}, KCMP_VM)")
    return int(answer)


def process_madvise_rows(pidfd: int, iovecs: U64, first: int, last: int, advice: int) -> int:
    """As `process_madvise`, for the rows [first, last) of uint64[n, 2] (start, length), in C order, without a copy.

    For callers that make thousands of small calls: 4 us of Python each, where the above takes 12.
    """
    if last - first > UIO_MAXIOV:
        raise ValueError(f"process_madvise takes at most {UIO_MAXIOV} spans a call, got {last - first}")
    advised = _syscall(
        c_long(syscall_number("process_madvise")),
        c_long(pidfd),
        c_void_p(iovecs.ctypes.data + 16 * first),
        c_ulong(last - first),
        c_long(advice),
        c_ulong(0),
    )
    if advised < 0:
        raise _failed(f"process_madvise(pidfd={pidfd}, spans={last - first}, advice={advice})")
    return int(advised)


def move_pages(pid: int, addresses: U64, node: int | None, *, flags: int = MPOL_MF_MOVE) -> NDArray[np.int32]:
    """Move pages of `pid` to NUMA node `node`, or (None) ask where they are. Linux 2.6.18.

    Args:
        pid: the process; 0 is the caller.
        addresses: uint64[n], page aligned.
        node: destination; None moves nothing.
        flags: MPOL_MF_MOVE or MPOL_MF_MOVE_ALL; ignored for a query.
    Returns:
        int32[n]: node the page is on, -errno (-ENOENT: not in memory), or `NOT_TRIED`.
    """
    pages = np.ascontiguousarray(addresses, dtype=np.uint64)
    status = np.full(len(pages), NOT_TRIED, dtype=np.int32)
    nodes = None if node is None else np.full(len(pages), node, dtype=np.int32)
    rc = _syscall(
        c_long(syscall_number("move_pages")),
        c_long(pid),
        c_ulong(len(pages)),
        c_void_p(pages.ctypes.data),
        c_void_p(None if nodes is None else nodes.ctypes.data),
        c_void_p(status.ctypes.data),
        c_long(0 if nodes is None else int(flags)),
    )
    if rc < 0:
        raise _failed(f"move_pages(pid={pid}, pages={len(pages)}, node={node})")
    return status


def pagemap_scan(
    fd: int,
    start: int,
    end: int,
    *,
    category_mask: int = 0,
    category_anyof_mask: int = 0,
    category_inverted: int = 0,
    return_mask: int = 0,
    vec: U64 | None = None,
    max_pages: int = 0,
    flags: int = 0,
) -> tuple[int, int]:
    """Find runs of pages by category in [start, end) of the process of pagemap `fd`. Linux 6.7.

    Args:
        fd: an open /proc/PID/pagemap.
        start: first address, page aligned.
        end: address after the last.
        category_mask: categories (`PageIs`) a page must all have.
        category_anyof_mask: categories of which a page must have one, if not 0.
        category_inverted: categories that count as present when absent.
        return_mask: categories to report; neighbours with the same ones become one run.
        vec: uint64[k, 3], C order, filled with rows (start, end, categories); None: count nothing.
        max_pages: stop after so many matching pages; 0: no limit.
        flags: `PmScan`; PM_SCAN_WP_MATCHING write-protects what matched.
    Returns:
        Rows filled, and the address to go on at (`end` when the walk came that far).
    """
    if vec is not None and (vec.ndim != 2 or vec.shape[1] != 3 or vec.dtype != np.uint64):
        raise ValueError(f"vec must be uint64[k, 3], is {vec.dtype}{list(vec.shape)}")
    if vec is not None and not vec.flags.c_contiguous:
        raise ValueError("vec must be in C order")
    arg = structs.PmScanArg(
        size=ctypes.sizeof(structs.PmScanArg),
        flags=int(flags),
        start=start,
        end=end,
        vec=0 if vec is None else vec.ctypes.data,
        vec_len=0 if vec is None else len(vec),
        max_pages=max_pages,
        category_inverted=int(category_inverted),
        category_mask=int(category_mask),
        category_anyof_mask=int(category_anyof_mask),
        return_mask=int(return_mask),
    )
    filled = _ioctl(fd, structs.PAGEMAP_SCAN, ctypes.byref(arg))
    if filled < 0:
        raise _failed(f"PAGEMAP_SCAN(fd={fd}, {start:#x}-{end:#x})")
    walk_end = int(arg.walk_end)
    if vec is not None and filled:
        # The kernel walks in steps of 512 rows (on x86_64) and reports the walk_end of the last step whose
        # buffer was full, though it went on (seen on 6.18): going on from there would report pages twice.
        finished = filled < len(vec) and not max_pages
        walk_end = end if finished else max(walk_end, int(vec[filled - 1, 1]))
    return int(filled), walk_end


def userfaultfd(flags: int) -> int:
    """A userfaultfd for the calling process's memory; the caller closes it.

    Args:
        flags: O_CLOEXEC, O_NONBLOCK, UFFD_USER_MODE_ONLY. Without the last one it needs CAP_SYS_PTRACE or
            sysctl vm.unprivileged_userfaultfd=1.
    """
    fd = _syscall(c_long(syscall_number("userfaultfd")), c_long(flags))
    if fd < 0:
        raise _failed(f"userfaultfd(flags={flags:#x})")
    return int(fd)


def uffdio_api(fd: int, features: int) -> tuple[int, int]:
    """Agree on API and features. Returns (features the kernel has, bit mask of ioctls)."""
    arg = structs.UffdioApi(api=UFFD_API, features=int(features))
    if _ioctl(fd, structs.UFFDIO_API, ctypes.byref(arg)) < 0:
        raise _failed(f"UFFDIO_API(features={int(features):#x})")
    return int(arg.features), int(arg.ioctls)


def uffdio_register(fd: int, start: int, length: int, mode: int) -> int:
    """Watch `length` bytes from `start` (page aligned). Returns the bit mask of ioctls allowed on them."""
    arg = structs.UffdioRegister(range=structs.UffdioRange(start, length), mode=mode)
    if _ioctl(fd, structs.UFFDIO_REGISTER, ctypes.byref(arg)) < 0:
        raise _failed(f"UFFDIO_REGISTER({start:#x}+{length:#x}, mode={mode})")
    return int(arg.ioctls)


def uffdio_unregister(fd: int, start: int, length: int) -> None:
    """Stop watching."""
    arg = structs.UffdioRange(start, length)
    if _ioctl(fd, structs.UFFDIO_UNREGISTER, ctypes.byref(arg)) < 0:
        raise _failed(f"UFFDIO_UNREGISTER({start:#x}+{length:#x})")


def uffdio_writeprotect(fd: int, start: int, length: int, mode: int) -> None:
    """Write-protect (mode UFFDIO_WRITEPROTECT_MODE_WP) or release (0) registered memory."""
    arg = structs.UffdioWriteprotect(range=structs.UffdioRange(start, length), mode=mode)
    if _ioctl(fd, structs.UFFDIO_WRITEPROTECT, ctypes.byref(arg)) < 0:
        raise _failed(f"UFFDIO_WRITEPROTECT({start:#x}+{length:#x}, mode={mode})")


def bpf(command: int, attributes: bytes | bytearray) -> int:
    """bpf(2): returns what the command returns (a file descriptor for those that create something).

    Args:
        command: BPF_...; source: include/uapi/linux/bpf.h.
        attributes: the part of `union bpf_attr` that the command uses; a bytearray gets what the kernel writes back.
    """
    kind = ctypes.c_char * len(attributes)
    buffer = kind.from_buffer(attributes if isinstance(attributes, bytearray) else bytearray(attributes))
    number = syscall_number("bpf")
    rc = _syscall(c_long(number), c_long(command), ctypes.byref(buffer), c_ulong(len(attributes)))
    if rc < 0:
        raise _failed(f"bpf(command={command})")
    return int(rc)


def perf_event_open(attributes: bytes, pid: int, cpu: int, flags: int) -> int:
    """A performance event's file descriptor; the caller closes it.

    Args:
        attributes: `struct perf_event_attr`, its size in bytes 4-7. Source: include/uapi/linux/perf_event.h.
        pid: process, or -1 for all (CAP_PERFMON).
        cpu: CPU, or -1 for any.
        flags: PERF_FLAG_...
    """
    number = syscall_number("perf_event_open")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    fd = _syscall(c_long(number), ctypes.byref(buffer), c_long(pid), c_long(cpu), c_long(-1), c_ulong(flags))
    if fd < 0:
        raise _failed(f"perf_event_open(pid={pid}, cpu={cpu})")
    return int(fd)
