"""Attaching programs to tracepoints and performance events, and reading hash maps in bulk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Iterable, Iterator

import numpy as np
from loguru import logger
from numpy.typing import NDArray

from memtier_engine.abi import syscalls
from memtier_engine.distinct import distinct_counts
from memtier_engine.errors import KernelCallError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import U64, ProcessId

# Source: include/uapi/linux/bpf.h, enum bpf_cmd.
_BPF_MAP_UPDATE_ELEM = 2
_BPF_MAP_DELETE_ELEM = 3
_BPF_RAW_TRACEPOINT_OPEN = 17
_BPF_MAP_LOOKUP_AND_DELETE_BATCH = 25

# Source: include/uapi/linux/perf_event.h.
PERF_TYPE_SOFTWARE = 1
PERF_COUNT_SW_PAGE_FAULTS = 2
PERF_COUNT_SW_PAGE_FAULTS_MAJ = 6
PERF_SAMPLE_ADDR = 1 << 3
PERF_FLAG_FD_CLOEXEC = 1 << 3
_ATTR_BYTES = 128  # PERF_ATTR_SIZE_VER7; the kernel takes smaller and larger ones
_IOC_ENABLE = 0x2400
_IOC_SET_BPF = 0x40042408
_BIT_DISABLED = 1 << 0
_BIT_EXCLUDE_KERNEL = 1 << 5
_BIT_EXCLUDE_HV = 1 << 6
_PRECISE_IP_SHIFT = 15

_ONLINE = "sys/devices/system/cpu/online"
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # include/linux/proc_ns.h, PROC_PID_INIT_INO


def need_initial_pid_namespace(host: Host) -> None:
    """Attached programs see the pids of the initial namespace: in another one, ours would name other processes.

    Raises:
        TrackerUnavailable: this process is in another one.
    """
    try:
        own = os.readlink(host.path("proc", "self", "ns", "pid"))
    except OSError:
        return  # no pid namespaces in this kernel
    if own != _INITIAL_PID_NAMESPACE:
        raise TrackerUnavailable(
            "this process is in a pid namespace of its own, and its pids are not those that BPF programs see",
            hint="run with hostPID: true, or docker run --pid=host",
        )


def attach_raw_tracepoint(name: str, program_fd: int) -> int:
    """Run the program at every hit of tracepoint `name` until the returned file descriptor is closed.

    Raises:
        KernelCallError: ENOENT if this kernel has no such tracepoint.
    """
    text = ctypes.create_string_buffer(name.encode())
    return syscalls.bpf(_BPF_RAW_TRACEPOINT_OPEN, struct.pack("<QII", ctypes.addressof(text), program_fd, 0))


def online_cpus(host: Host) -> list[int]:
    """Numbers of the CPUs that are online."""
    cpus: list[int] = []
    for part in host.read_text(host.path(_ONLINE)).strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def attach_perf_event(
    program_fd: int,
    kind: int,
    config: int,
    cpus: Iterable[int],
    *,
    period: int = 1,
    config1: int = 0,
    precise: int = 0,
    user_only: bool = False,
) -> list[int]:
    """Run the program at every `period`-th event, on each CPU, until the returned file descriptors are closed.

    Raises:
        KernelCallError: the event does not exist here, or this process may not use it. Nothing stays open.
    """
    flags = _BIT_DISABLED | precise << _PRECISE_IP_SHIFT
    if user_only:
        flags |= _BIT_EXCLUDE_KERNEL | _BIT_EXCLUDE_HV
    # type, size, config, sample_period, sample_type, read_format, flags, wakeup_events, bp_type, config1.
    head = struct.pack("<IIQQQQQIIQ", kind, _ATTR_BYTES, config, period, PERF_SAMPLE_ADDR, 0, flags, 1, 0, config1)
    fds: list[int] = []
    try:
        for cpu in cpus:
            fd = syscalls.perf_event_open(head.ljust(_ATTR_BYTES, b"\0"), -1, cpu, PERF_FLAG_FD_CLOEXEC)
            fds.append(fd)
            fcntl.ioctl(fd, _IOC_SET_BPF, program_fd)
            fcntl.ioctl(fd, _IOC_ENABLE, 0)
    except BaseException as error:
        close_all(fds)
        if isinstance(error, OSError):
            raise KernelCallError.from_errno("attach to a performance event", error.errno or errno.EINVAL) from None
        raise
    return fds


def close_all(fds: list[int]) -> None:
    """Close and forget them."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


def set_member(map_fd: int, key: int) -> None:
    """Put a u32 key with value 1 into a hash map. Raises KernelCallError: E2BIG if it is full."""
    pair = np.array([key, 1], np.uint32)
    at = pair.ctypes.data
    syscalls.bpf(_BPF_MAP_UPDATE_ELEM, struct.pack("<IIQQQ", map_fd, 0, at, at + 4, 0))


def drop_member(map_fd: int, key: int) -> None:
    """Take a u32 key out of a hash map; it need not be there."""
    word = np.array([key], np.uint32)
    try:
        syscalls.bpf(_BPF_MAP_DELETE_ELEM, struct.pack("<IIQQ", map_fd, 0, word.ctypes.data, 0))
    except KernelCallError as failure:
        if failure.errno != errno.ENOENT:
            raise


def follow(map_fd: int, before: frozenset[ProcessId], wanted: frozenset[ProcessId]) -> frozenset[ProcessId]:
    """Make the pids in the hash map those of `wanted`. Returns those that are in it: a full map leaves some out."""
    for process in before - wanted:
        drop_member(map_fd, process.pid)
    inside = set(before & wanted)
    for process in sorted(wanted - before):
        try:
            set_member(map_fd, process.pid)
        except KernelCallError as failure:
            if failure.errno != errno.E2BIG:
                raise
            logger.warning("only {} of {} processes are counted: the BPF map is full", len(inside), len(wanted))
            break
        inside.add(process)
    return frozenset(inside)


def rows_by_process(keys: U64, processes: Iterable[ProcessId]) -> dict[ProcessId, NDArray[np.int64]]:
    """By process the numbers of its rows in `keys` (uint64[n, 2]: number, pid), in the order of their numbers."""
    if not len(keys):
        return {}
    order = np.lexsort((keys[:, 0], keys[:, 1]))
    counts = distinct_counts(keys[order, 1])
    by_pid = {process.pid: process for process in processes}
    ends = itertools.accumulate(counts.values())
    return {
        by_pid[pid]: order[end - count : end]
        for (pid, count), end in zip(counts.items(), ends, strict=True)
        if pid in by_pid
    }


def take_all(map_fd: int, key_words: int, value_words: int, batch: int = 8192) -> tuple[U64, U64]:
    """Move everything out of a hash map of u64 columns. Linux 5.6.

    Returns:
        uint64[n, key_words], uint64[n, value_words].
    """
    keys: list[NDArray[np.uint64]] = [np.empty((0, key_words), np.uint64)]
    values: list[NDArray[np.uint64]] = [np.empty((0, value_words), np.uint64)]
    for some_keys, some_values in _batches(map_fd, key_words, value_words, batch):
        keys.append(some_keys)
        values.append(some_values)
    return np.concatenate(keys), np.concatenate(values)


def _batches(map_fd: int, key_words: int, value_words: int, batch: int) -> Iterator[tuple[U64, U64]]:
    position = np.zeros(1, np.uint64)
    at_start = True
    while True:
        keys = np.empty((batch, key_words), np.uint64)
        values = np.empty((batch, value_words), np.uint64)
        # in_batch, out_batch, keys, values, count, map_fd, elem_flags, flags.
        attributes = bytearray(
            struct.pack(
                "<QQQQIIQQ",
                0 if at_start else position.ctypes.data,
                position.ctypes.data,
                keys.ctypes.data,
                values.ctypes.data,
                batch,
                map_fd,
                0,
                0,
            )
        )
        finished = False
        try:
            syscalls.bpf(_BPF_MAP_LOOKUP_AND_DELETE_BATCH, attributes)
        except KernelCallError as failure:
            if failure.errno == errno.ENOSPC and batch < 1 << 20:  # one hash bucket holds more than fits
                batch *= 2
                continue
            if failure.errno != errno.ENOENT:  # ENOENT: that was the last of it
                raise
            finished = True
        (count,) = struct.unpack_from("<I", attributes, 32)
        if count:
            yield keys[:count], values[:count]
        if finished:
            return
        at_start = False
