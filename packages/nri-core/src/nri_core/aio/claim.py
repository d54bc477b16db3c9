"""One plugin of a kind per socket: a claim that other processes of the node see.

Runtimes take two plugins of the same name, and two of any names that adjust the same things; every container that both
adjust then fails. A plugin claims its index and name, and its `exclusive` kind whatever it is called.

A claim is a lock on one byte, at an offset made of the socket's name and of what is claimed; the kernel drops it with
its last holder. Nobody but root may be able to take it, or any user could keep the plugin out:

- Runtimes make the socket's directory for root alone (0700). Then the lock is on the directory itself, which needs no
  right to write, also through a read-only mount, and leaves nothing behind. Directories can be locked for reading only,
  which several may do: hence a look before and a look after.
- In a directory that others can read (kubelet's DirectoryOrCreate makes it 0755), the lock is on a file in it that
  only root can open. Where it cannot be made, as through a read-only mount, and is not there, there is no claim, and
  a warning.

Open-file-description locks: Linux 3.15.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import random
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nri_core.errors import PluginAlreadyRunning

log = logging.getLogger("nri_core")

LOCK_FILE = ".nri-plugins.lock"
"""In a socket's directory that is not root's alone; empty, and it stays."""

HINT = "stop the other one: what both adjust fails"
_HINT = "stop the other one, or give this one another name or index"
_FLOCK = struct.Struct("hhqqixxxx")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_TRIES = 8
_PAUSE_S = 0.02


class Claim:
    """What a plugin claims at a socket."""

    def __init__(
        self, socket_path: str | os.PathLike[str], index: str, name: str, exclusive: str | None = None
    ) -> None:
        """Nothing is claimed before `take`. `exclusive`: a kind of which one may be connected, whatever its name."""
        self._path = Path(socket_path)
        self._claimed = {f"{index}-{name}": (f"plugin {index}-{name}", _HINT)}
        if exclusive is not None:
            # No index-name begins with NUL.
            self._claimed[f"\0{exclusive}"] = (f"another {exclusive} plugin, whatever its index and name,", HINT)
        self._directory: int | None = None
        self._file: int | None = None
        self._locked = False
        self._warned = False

    def take(self) -> None:
        """Take the claim, or keep it: the directory may be another one since, as after a restart of the runtime.

        Where there is no directory yet, there is no claim: connecting will say what is wrong with the path.

        Raises:
            PluginAlreadyRunning: another connection holds it, in this process or another.
        """
        if self._held():
            return
        for left in reversed(range(_TRIES)):
            self.release()
            taken = self._try()
            if taken is None:
                return
            if left == 0:
                self.release()
                words, hint = taken
                raise PluginAlreadyRunning(f"{words} is already connected to {self._path}", hint=hint)
            # Two that start together can see each other, and both step back: not for the same time.
            time.sleep(_PAUSE_S * random.random())

    def release(self) -> None:
        """Let go of it. Safe to call twice."""
        for descriptor in (self._directory, self._file):
            if descriptor is not None:
                os.close(descriptor)
        self._directory = self._file = None
        self._locked = False

    def _held(self) -> bool:
        if self._directory is None or not self._locked:
            return False
        try:
            same = os.path.samestat(os.fstat(self._directory), os.stat(self._path.parent))
        except OSError:
            return True  # gone for a moment: what we hold is all there is
        return same and (self._file is None or os.fstat(self._file).st_nlink > 0)

    def _try(self) -> tuple[str, str] | None:
        """What another holds, and what to do, in words; None: the claim is ours, or there is none to be had."""
        try:
            self._directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        found = os.fstat(self._directory)
        if _ours_alone(found, readers=stat.S_IRGRP | stat.S_IROTH):
            return self._lock(lambda offset: _lock_for_reading(self._directory, offset))
        try:
            self._file = _lock_file(self._directory)
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "no claim on %s: others than root can read %s, and no file of root's can be made in it (%s); "
                    "nothing keeps out a second plugin",
                    self._path,
                    self._path.parent,
                    error.strerror or error,
                )
            return None
        if fcntl.fcntl(self._file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return self._lock(lambda offset: _lock_for_reading(self._file, offset))
        return self._lock(lambda offset: _set_lock(self._file, fcntl.F_WRLCK, offset))

    def _lock(self, lock: Callable[[int], bool]) -> tuple[str, str] | None:
        for key, words in self._claimed.items():
            digest = hashlib.blake2b(f"{self._path.name}\0{key}".encode(), digest_size=7).digest()
            if not lock(int.from_bytes(digest, "big")):
                return words
        self._locked = True
        return None


@contextmanager
def claim(socket_path: str | os.PathLike[str], index: str, name: str, exclusive: str | None = None) -> Iterator[None]:
    """Hold a claim for a while. Raises: PluginAlreadyRunning."""
    held = Claim(socket_path, index, name, exclusive)
    held.take()
    try:
        yield
    finally:
        held.release()


def _ours_alone(found: os.stat_result, *, readers: int) -> bool:
    """Whether only root and ourselves can open it."""
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & readers


def _lock_file(directory: int | None) -> int:
    """The lock file, opened. Raises: OSError, also if it is not root's."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(LOCK_FILE, os.O_RDWR | os.O_CREAT | flags, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        # Through a read-only mount: another plugin may have made it where it can be written.
        descriptor = os.open(LOCK_FILE, os.O_RDONLY | flags, dir_fd=directory)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or not _ours_alone(found, readers=0o077):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, f"{LOCK_FILE} is another user's")
    return descriptor


def _lock_for_reading(descriptor: int | None, offset: int) -> bool:
    """Lock a byte of what cannot be locked for writing, if nobody else has it."""
    return _free(descriptor, offset) and _take(descriptor, offset) and _free(descriptor, offset)


def _free(descriptor: int | None, offset: int) -> bool:
    """Whether nobody else holds the byte. Asking for a write lock needs no right to write; taking it would."""
    assert descriptor is not None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    except OSError as error:
        log.debug("cannot ask for a lock on a directory: %s", error)
        return True
    kind: int = _FLOCK.unpack(found)[0]
    return kind == fcntl.F_UNLCK


def _take(descriptor: int | None, offset: int) -> bool:
    return _set_lock(descriptor, fcntl.F_RDLCK, offset)


def _set_lock(descriptor: int | None, kind: int, offset: int) -> bool:
    """Lock a byte; True also where nothing can be locked, for then nothing can be checked."""
    assert descriptor is not None
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        log.debug("cannot lock: %s", error)
    return True
