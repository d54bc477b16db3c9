"""One plugin of an index and name per socket: a claim that other processes of the node see.

Runtimes take two plugins of the same name, and then every container that both adjust fails with a conflict of the
plugin with itself. The claim is a read lock on one byte of the socket's directory, at an offset made of socket, index
and name. A directory can be read-locked with no right to write, also through a read-only mount; nothing is left
behind, since the kernel drops the lock with its last holder. Open-file-description locks: Linux 3.15.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nri_core.errors import PluginAlreadyRunning

log = logging.getLogger("nri_core")

_FLOCK = struct.Struct("hhqqixxxx")  # struct flock of 64-bit Linux: type, whence, start, length, pid


@contextmanager
def claim(socket_path: str | os.PathLike[str], index: str, name: str) -> Iterator[None]:
    """Hold the claim. Where directories cannot be locked, there is none, and nothing is checked.

    Raises:
        PluginAlreadyRunning: another connection holds it, in this process or another.
    """
    path = Path(socket_path)
    digest = hashlib.blake2b(f"{path.name}\0{index}-{name}".encode(), digest_size=7).digest()
    offset = int.from_bytes(digest, "big")
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield  # connecting will say what is wrong with the path
        return
    try:
        if not _free(descriptor, offset) or not _take(descriptor, offset) or not _free(descriptor, offset):
            raise PluginAlreadyRunning(
                f"plugin {index}-{name} is already connected to {path}",
                hint="stop the other one, or give this one another name or index",
            )
        yield
    finally:
        os.close(descriptor)


def _free(descriptor: int, offset: int) -> bool:
    """Whether nobody else holds the byte. Asking for a write lock needs no right to write; taking it would."""
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    except OSError as error:
        log.debug("cannot ask for a lock on a directory: %s", error)
        return True
    kind: int = _FLOCK.unpack(found)[0]
    return kind == fcntl.F_UNLCK


def _take(descriptor: int, offset: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        log.debug("cannot lock a directory: %s", error)
    return True
