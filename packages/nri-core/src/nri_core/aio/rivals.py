"""Plugins that know nothing of our claims, such as those written in Go: found among the processes of the node.

Only what can be seen is found: with the host's processes (hostPID in a pod) and its sockets (hostNetwork), as root.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import struct
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

PROC = Path("/proc")
LOOK_S = 10.0
"""A node can have ten thousand processes, 30 us each."""

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_SHOW_VFS, _SHOW_PEER = 2, 4
_VFS, _PEER = 1, 2  # attributes, linux/unix_diag.h
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_QUERY = struct.Struct("=BBHIIIII")  # unix_diag_req: family, protocol, states, inode, show, cookie
_SOCKET = struct.Struct("=BBBBIII")  # unix_diag_msg: family, type, state, inode, cookie
_ATTRIBUTE = struct.Struct("=HH")
_WAIT_S = 1.0
_READ_BYTES = 1 << 16
log = logging.getLogger("nri_core")
_WORDS_BYTES = 8 << 10
"""Two paths at most matter. A process can make its command line terabytes long, by prctl(PR_SET_MM_MAP)."""
_ENVIRONMENT_BYTES = 8 << 20
"""execve(2) takes 6 MiB at most. Source: fs/exec.c, _STK_LIM / 4 * 3."""


class RivalLook:
    """Looks for rivals beside the event loop. A process can keep who reads its command line waiting for ever.

    It lies in the process's own memory, which may be mapped from a file system that it serves itself (FUSE).
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    async def find(
        self, socket_path: str | os.PathLike[str], programs: Collection[str], *, timeout_s: float = LOOK_S
    ) -> str | None:
        """As `find_rival`; None, and a warning, if that takes too long, and for as long as it has not returned."""
        if not programs:
            return None
        loop = asyncio.get_running_loop()
        found: asyncio.Future[str | None] = loop.create_future()

        def tell(rival: str | None, error: BaseException | None) -> None:
            if not found.done():  # cancelled, or waited for too long
                if error is not None:
                    found.set_exception(error)
                else:
                    found.set_result(rival)

        def look() -> None:
            rival, error = None, None
            try:
                rival = find_rival(socket_path, programs)
            except BaseException as failure:
                error = failure
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, rival, error)

        if self._thread is None or not self._thread.is_alive():
            # Of its own, as nobody waits for it at the end.
            self._thread = threading.Thread(target=look, name="nri-rivals", daemon=True)
            self._thread.start()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    return await found
        log.warning("other plugins of this kind are not looked for: a process keeps us from reading what it is called")
        return None


def find_rival(socket_path: str | os.PathLike[str], programs: Collection[str]) -> str | None:
    """`NAME, process PID` of a process called one of `programs` (or NN-NAME) that is connected to the socket.

    One that a runtime launched itself counts too: it has the variable NRI_PLUGIN_SOCKET. Any process can call itself so
    and have that, so it must also be one that a runtime can have launched: see `_is_of_the_node`.
    """
    if not programs:
        return None
    inodes: frozenset[int] | None = None
    for pid, words in _processes():
        if pid == os.getpid() or (name := _called(words, programs)) is None:
            continue
        if _is_of_the_node(pid) and b"NRI_PLUGIN_SOCKET=" in _read(PROC / str(pid) / "environ", _ENVIRONMENT_BYTES):
            return f"{name}, process {pid}, launched by the runtime,"
        if inodes is None:
            inodes = connected(socket_path)
        if inodes & _sockets_of(pid):
            return f"{name}, process {pid},"
    return None


def _is_of_the_node(pid: int) -> bool:
    """Whether it is root's, and in the mount namespace of the first process or in ours, as what a runtime launches is.

    What is in another container has a mount namespace of its own, also where it is root's. Not asked is who owns
    /proc/PID: that is root for each process that cannot be traced.
    """
    try:
        uids = (PROC / str(pid) / "status").read_bytes().partition(b"\nUid:")[2].split(maxsplit=4)[:4]
    except OSError:
        return False
    own = _mounts_of(pid)
    return uids == [b"0"] * 4 and own is not None and own in (_mounts_of(1), _mounts_of("self"))


def _mounts_of(pid: int | str) -> str | None:
    try:
        return os.readlink(PROC / str(pid) / "ns/mnt")
    except OSError:
        return None


def connected(socket_path: str | os.PathLike[str]) -> frozenset[int]:
    """Inodes of the sockets that are connected to a listening unix socket; empty where the kernel does not tell.

    The accepted ends have the path of the listening one; what they are connected to are the plugins' ends.
    Source: sock_diag(7); needs CONFIG_UNIX_DIAG.
    """
    try:
        there = os.stat(socket_path)
    except OSError:
        return frozenset()
    device = os.major(there.st_dev) << 20 | os.minor(there.st_dev)  # as within the kernel
    wanted = struct.pack("=II", there.st_ino & 0xFFFFFFFF, device)
    found = set()
    with contextlib.suppress(OSError):
        for attributes in _unix_sockets():
            peer = attributes.get(_PEER)
            if peer is not None and attributes.get(_VFS) == wanted:
                found.add(int.from_bytes(peer, "little" if struct.pack("=H", 1)[0] else "big"))
    return frozenset(found)


def _unix_sockets() -> Iterator[dict[int, bytes]]:
    query = _QUERY.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_VFS | _SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as asked:
        asked.settimeout(_WAIT_S)
        asked.send(_HEADER.pack(_HEADER.size + len(query), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + query)
        while True:
            data = asked.recv(1 << 16)
            at = 0
            while at + _HEADER.size <= len(data):
                length, kind, *_ = _HEADER.unpack_from(data, at)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE) or length < _HEADER.size:
                    return
                yield _attributes(data[at + _HEADER.size + _SOCKET.size : at + length])
                at += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _processes() -> Iterator[tuple[int, list[str]]]:
    """(pid, words of its command line) of each process that can be seen."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(PROC):
            if entry.name.isdecimal():
                text = _read(PROC / entry.name / "cmdline", _WORDS_BYTES)
                yield int(entry.name), os.fsdecode(text).rstrip("\0").split("\0")


def _called(words: list[str], programs: Collection[str]) -> str | None:
    """Which of `programs` a command line is: its first word, or the second after an interpreter."""
    for word in words[:2]:
        name = Path(word).name
        if re.sub(r"^[0-9]{2}-", "", name) in programs:
            return name
    return None


def _sockets_of(pid: int) -> frozenset[int]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(PROC / str(pid) / "fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    found.add(int(target[8:-1]))
    return frozenset(found)


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            parts = []
            while most > 0 and (part := file.read(min(most, _READ_BYTES))):
                parts.append(part)
                most -= len(part)
            return b"".join(parts)
    except OSError:
        return b""
