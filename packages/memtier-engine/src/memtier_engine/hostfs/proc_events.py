"""The kernel's proc connector: a message when a process is forked, executes a program or exits.

Source: include/uapi/linux/cn_proc.h, connector.h; Documentation/driver-api/connector.rst. A socket filter in the
kernel lets only whole processes through: threads, and what we do not need, cost nothing. pyroute2 has this
socket too, but imports for 0.9 s and decodes some 10 000 events per second at most, without a filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

from memtier_engine.errors import KernelCallError, Unavailable

NETLINK_CONNECTOR = 11
CN_IDX_PROC = 1
CN_VAL_PROC = 1
PROC_CN_MCAST_LISTEN = 1
PROC_CN_MCAST_IGNORE = 2
PROC_EVENT_NONE = 0
PROC_EVENT_FORK = 0x1
PROC_EVENT_EXEC = 0x2
PROC_EVENT_EXIT = 0x80000000
NLMSG_DONE = 3
SO_ATTACH_FILTER = 26
RECEIVE_BUFFER_BYTES = 1 << 20
"""Some thousands of events: a storm that is longer makes the kernel drop, which is reported as `lost`."""
ANSWER_S = 1.0

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_CN_MSG = struct.Struct("=IIIIHH")  # struct cn_msg without data
_EVENT_AT = _HEADER.size + _CN_MSG.size
_EVENT = struct.Struct("=IIQIIII")  # what, cpu, timestamp, and the first four words of the event's data
_WHAT_AT = _EVENT_AT
_DATA_AT = _EVENT_AT + 16


@dataclass(frozen=True, slots=True)
class ProcEvents:
    """What happened since the last read."""

    started: frozenset[int]
    """Pids that were forked or executed a program."""
    exited: frozenset[int]
    lost: bool
    """The kernel had to drop messages: anything may have happened."""


class ProcEventSocket:
    """Listens to the processes of the whole machine."""

    def __init__(self) -> None:
        """Subscribe and wait for the kernel's consent.

        Raises:
            Unavailable: no CONFIG_PROC_EVENTS, no CAP_NET_ADMIN, or inside a pid or user namespace.
        """
        hint = "run as root in the host's pid namespace, on a kernel with CONFIG_PROC_EVENTS=y"
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_CONNECTOR)
        except OSError as error:
            raise Unavailable(f"proc connector: {error.strerror}", hint=hint) from None
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            _attach_filter(self._socket)
            self._socket.bind((0, CN_IDX_PROC))
            self._socket.setblocking(False)
            self._control(PROC_CN_MCAST_LISTEN)
            if not self._consented():
                raise Unavailable("proc connector: the kernel does not answer", hint=hint)
        except OSError as error:
            self._socket.close()
            raise Unavailable(f"proc connector: {error.strerror}", hint=hint) from None
        except Unavailable:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For select and poll."""
        return self._socket.fileno()

    def read(self) -> ProcEvents:
        """All that has happened since the last call; does not wait.

        Raises:
            KernelCallError: the socket broke.
        """
        started: set[int] = set()
        exited: set[int] = set()
        lost = False
        while True:
            try:
                data, sender = self._socket.recvfrom(4096)
            except BlockingIOError:
                return ProcEvents(frozenset(started), frozenset(exited), lost)
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    lost = True
                    continue
                raise KernelCallError.from_errno("read from the proc connector", error.errno or 0) from None
            if sender[0] != 0 or len(data) < _EVENT_AT + _EVENT.size:
                continue  # not from the kernel, or none of ours
            what, _, _, first, second, _, fourth = _EVENT.unpack_from(data, _EVENT_AT)
            if what == PROC_EVENT_FORK:
                started.add(fourth)
            elif what == PROC_EVENT_EXEC:
                started.add(second)
            elif what == PROC_EVENT_EXIT and first == second:
                exited.add(second)
                started.discard(second)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to read within `timeout_s`."""
        readable, _, _ = select.select([self._socket], [], [], timeout_s)
        return bool(readable)

    def close(self) -> None:
        """Unsubscribe. Safe to call twice."""
        if self._socket.fileno() >= 0:
            try:
                self._control(PROC_CN_MCAST_IGNORE)
            except OSError:
                pass
            self._socket.close()

    def _control(self, operation: int) -> None:
        body = _CN_MSG.pack(CN_IDX_PROC, CN_VAL_PROC, 0, 0, 4, 0) + struct.pack("=I", operation)
        header = _HEADER.pack(_HEADER.size + len(body), NLMSG_DONE, 0, 0, os.getpid())
        self._socket.sendto(header + body, (0, 0))

    def _consented(self) -> bool:
        """Whether the kernel's answer to our subscription comes, and is no error."""
        while self.wait(ANSWER_S):
            data, _ = self._socket.recvfrom(4096)
            if len(data) >= _DATA_AT + 4:
                what, _, _, failure = struct.unpack_from("=IIQI", data, _EVENT_AT)
                if what == PROC_EVENT_NONE:
                    if failure:
                        raise OSError(failure, os.strerror(failure))
                    return True
                return True  # events flow: somebody had subscribed before
        return False


def _attach_filter(sock: socket.socket) -> None:
    """Keep: answers, execs, forks of processes, exits of processes. Drop: threads and everything else.

    Classic BPF loads in network order: constants are swapped where the machine is little endian.
    """
    load, tax, jump_eq, jump_eq_x, ret = 0x20, 0x07, 0x15, 0x1D, 0x06
    keep, drop = 14, 15  # instruction numbers; a jump counts from the instruction after it
    program = [
        (load, 0, 0, _WHAT_AT),
        (jump_eq, keep - 2, 0, socket.htonl(PROC_EVENT_NONE)),
        (jump_eq, keep - 3, 0, socket.htonl(PROC_EVENT_EXEC)),
        (jump_eq, 6 - 4, 0, socket.htonl(PROC_EVENT_EXIT)),
        (jump_eq, 10 - 5, 0, socket.htonl(PROC_EVENT_FORK)),
        (ret, 0, 0, 0),
        (load, 0, 0, _DATA_AT),  # 6: exit; pid and thread group are equal for the last thread
        (tax, 0, 0, 0),
        (load, 0, 0, _DATA_AT + 4),
        (jump_eq_x, keep - 10, drop - 10, 0),
        (load, 0, 0, _DATA_AT + 8),  # 10: fork; the child's
        (tax, 0, 0, 0),
        (load, 0, 0, _DATA_AT + 12),
        (jump_eq_x, keep - 14, drop - 14, 0),
        (ret, 0, 0, 0xFFFFFFFF),
        (ret, 0, 0, 0),
    ]
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(buffer)))
