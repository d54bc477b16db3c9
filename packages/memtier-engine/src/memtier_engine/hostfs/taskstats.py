"""Taskstats: how long a process has waited for pages from swap, as the kernel's delay accounting counts it.

Generic netlink, spoken here: a question takes some 15 us. pyroute2 has it too, but takes 1 ms for a question, 27 MiB
and 0.4 to 1.5 s to import, and reads the version of the record that one series of kernels had.

What is counted is the reading of a page from swap by the one who faults, since Linux 5.18. That is all of the wait
with swap in RAM; of swap on a disk it is what starting the read took. Pages found in the swap cache are not in it.

Source: include/uapi/linux/taskstats.h, genetlink.h; Documentation/accounting/taskstats.rst, delay-accounting.rst.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from memtier_engine.errors import KernelCallError, ProcessGone, Unavailable
from memtier_engine.hostfs.host import Host

NETLINK_GENERIC = 16
NLM_F_REQUEST = 1
NLMSG_ERROR = 2
GENL_ID_CTRL = 0x10
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2
TASKSTATS_CMD_GET = 1
TASKSTATS_CMD_ATTR_TGID = 2
TASKSTATS_TYPE_STATS = 3
TASKSTATS_TYPE_AGGR_TGID = 5
NLA_TYPE_MASK = 0x3FFF
ANSWER_S = 2.0

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_GENERIC = struct.Struct("=BBH")  # struct genlmsghdr
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr
_VERSION = struct.Struct("=H")
_DELAY = struct.Struct("=QQ")  # swapin_count, swapin_delay_total
_SWITCH = "proc/sys/kernel/task_delayacct"

SWAP_IN_AT = {15: 80}
SWAP_IN_ELSE_AT = 48
"""Bytes before `swapin_count`. Version 15 (Linux 6.14) put maximum and minimum behind each total; version 16 moved
these to the end, so that everything is again where it was before."""


@dataclass(frozen=True, slots=True)
class SwapInDelay:
    """Of one process since it started, all its threads together."""

    count: int
    """Pages that it read from swap."""
    seconds: float
    """That it waited for them."""


def decode_swap_in(record: bytes) -> SwapInDelay:
    """The delay in a struct taskstats of any version.

    Raises:
        ValueError: too short to have it.
    """
    if len(record) < _VERSION.size:
        raise ValueError(f"a taskstats record of {len(record)} bytes")
    (version,) = _VERSION.unpack_from(record)
    at = SWAP_IN_AT.get(version, SWAP_IN_ELSE_AT)
    if len(record) < at + _DELAY.size:
        raise ValueError(f"a taskstats record of version {version} with {len(record)} bytes")
    count, nanoseconds = _DELAY.unpack_from(record, at)
    return SwapInDelay(count, nanoseconds / 1e9)


class TaskStats:
    """Asks the kernel about processes. One thread at a time."""

    def __init__(self, host: Host) -> None:
        """Open the socket and find the family.

        Raises:
            Unavailable: no taskstats, delay accounting is off, or no CAP_NET_ADMIN; the hint says what to do.
        """
        self._sequence = 0
        switch = host.path(_SWITCH)
        try:
            on = host.read_int(switch)
        except KernelCallError as error:
            raise Unavailable(
                f"swap-in delays: {error.message}", hint="a kernel with CONFIG_TASK_DELAY_ACCT=y, Linux 5.14 or newer"
            ) from None
        if not on:
            raise Unavailable(
                f"swap-in delays: {host.kernel_file(switch)} is 0",
                hint="sysctl kernel.task_delayacct=1, or boot with delayacct",
            )
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_GENERIC)
            self._socket.bind((0, 0))
            self._socket.settimeout(ANSWER_S)
        except OSError as error:
            raise Unavailable(f"swap-in delays: generic netlink: {error.strerror}") from None
        try:
            self._family = self._find_family()
            self.swap_in(os.getpid())
        except KernelCallError as error:
            self._socket.close()
            raise Unavailable(
                f"swap-in delays: {error.message}",
                hint="a kernel with CONFIG_TASKSTATS=y, CAP_NET_ADMIN, and the host's network namespace",
            ) from None

    def swap_in(self, pid: int) -> SwapInDelay:
        """The delay of process `pid`.

        Raises:
            ProcessGone: there is none.
            KernelCallError: the kernel refused.
        """
        question = struct.pack("=HHI", 8, TASKSTATS_CMD_ATTR_TGID, pid)
        answer = self._ask(self._family, TASKSTATS_CMD_GET, question, f"taskstats of process {pid}")
        for kind, body in _attributes(answer):
            if kind == TASKSTATS_TYPE_AGGR_TGID:
                for inner, record in _attributes(body):
                    if inner == TASKSTATS_TYPE_STATS:
                        return decode_swap_in(record)
        raise KernelCallError(f"taskstats of process {pid}: the answer has no record", errno.EPROTO)

    def close(self) -> None:
        """Close the socket. Safe to call twice."""
        self._socket.close()

    def _find_family(self) -> int:
        name = b"TASKSTATS\0"
        question = _ATTRIBUTE.pack(4 + len(name), CTRL_ATTR_FAMILY_NAME) + name + bytes(-len(name) % 4)
        for kind, body in _attributes(self._ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, question, "find taskstats")):
            if kind == CTRL_ATTR_FAMILY_ID:
                return int(struct.unpack_from("=H", body)[0])
        raise KernelCallError("find taskstats: the answer has no family", errno.EPROTO)

    def _ask(self, family: int, command: int, question: bytes, what: str) -> bytes:
        """The attributes of the answer."""
        self._sequence += 1
        size = _HEADER.size + _GENERIC.size + len(question)
        message = _HEADER.pack(size, family, NLM_F_REQUEST, self._sequence, 0) + _GENERIC.pack(command, 1, 0) + question
        try:
            self._socket.sendto(message, (0, 0))
            while True:
                data, sender = self._socket.recvfrom(1 << 16)
                if sender[0] == 0 and len(data) >= _HEADER.size:
                    length, kind, _, sequence, _ = _HEADER.unpack_from(data)
                    if sequence == self._sequence:  # else it answers a question that nobody waits for any more
                        break
        except TimeoutError:
            raise KernelCallError(f"{what}: no answer", errno.ETIMEDOUT) from None
        except OSError as error:
            raise KernelCallError.from_errno(what, error.errno or errno.EIO) from None
        if kind == NLMSG_ERROR:
            (number,) = struct.unpack_from("=i", data, _HEADER.size)
            if -number == errno.ESRCH:
                raise ProcessGone(f"{what}: it exited", errno.ESRCH)
            raise KernelCallError.from_errno(what, -number)
        return data[_HEADER.size + _GENERIC.size : length]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each attribute."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & NLA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
