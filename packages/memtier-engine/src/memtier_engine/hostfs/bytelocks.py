"""A file whose bytes are locked one by one, as a list that programs keep together: the kernel forgets who has ended.

fcntl(2), F_SETLK: a lock belongs to a program, not to a descriptor. So it takes one descriptor, however many bytes; the
kernel says who holds one; and it lets go when the holder ends, by SIGKILL too. Whoever closes the file anywhere in a
program loses all of that program's locks, so it stays open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from memtier_engine.closing import Closing
from memtier_engine.errors import Unavailable

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock with 64-bit off_t: type, whence, start, length, pid
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class ByteLocks(Closing):
    """The locks of this program in one file. One thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open it, in a directory that only this user can write to; what is missing of the last two is made.

        Raises:
            Unavailable: it cannot be made, or is not safe.
        """
        self._path = path
        self._fd = _open_file(path)

    def take(self, byte: int) -> int | None:
        """Lock a byte. None: it is ours now; else the pid of who has it, 0 if it cannot be seen from here."""
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                return None
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    return None  # no locks to be had (ENOLCK): better observed by two than not at all
            found = self._other(byte, byte + 1)
            if found is not None:  # else it was released meanwhile
                return found[2]

    def share(self, byte: int) -> bool:
        """Lock a byte that others may have locked likewise. Whether any has."""
        with contextlib.suppress(OSError):  # no locks to be had
            fcntl.lockf(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, byte)
        return self._other(byte, byte + 1) is not None

    def others(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(byte, pid of who has it, 0 if it cannot be seen) of all in [first, end) that other programs have locked."""
        left = [(first, end)]
        while left:
            first, end = left.pop()
            found = self._other(first, end) if first < end else None
            if found is None:
                continue
            # The kernel names any that conflicts, not the first; neighbours of one holder are one lock.
            start, stop, holder = max(first, found[0]), min(end, found[1]), found[2]
            left += [(first, start), (stop, end)]
            for byte in range(start, stop):
                yield byte, holder

    def release(self, byte: int) -> None:
        """Unlock a byte."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, byte)

    def close(self) -> None:
        """Unlock all. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def reopened(self) -> bool:
        """If somebody removed the file, others lock a new one: so do we. Whether that is so: then no byte is locked."""
        try:
            now, ours = os.stat(self._path), os.fstat(self._fd)
            if (now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino):
                return False
        except FileNotFoundError:
            pass
        except OSError:
            return False
        try:
            fd = _open_file(self._path)
        except Unavailable:
            return False
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        return True

    def _other(self, first: int, end: int) -> tuple[int, int, int] | None:
        """One lock of another program in [first, end): (first byte, end, pid of the holder, 0 if it cannot be seen)."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, end - first, 0)
        kind, _, start, length, holder = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        if kind == fcntl.F_UNLCK:
            return None
        return start, start + length if length else end, int(max(holder, 0))


def _open_file(path: Path) -> int:
    directory = what = path.parent
    try:
        existing = directory
        missing: list[str] = []
        while len(missing) < 2 and existing != existing.parent:
            missing.insert(0, existing.name)
            existing = existing.parent
        fd = os.open(existing, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in missing:
                what = existing = existing / name
                try:
                    os.mkdir(name, 0o700, dir_fd=fd)
                except FileExistsError:
                    pass
                below = os.open(name, _OPEN_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
                _check(fd, what)
            what = path
            file = os.open(path.name, _OPEN_FILE, 0o600, dir_fd=fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise Unavailable(
            f"{what}: {os.strerror(error.errno or errno.EIO)}: other observers cannot be seen",
            hint="see that no process is tracked twice",
        ) from None
    try:
        _check(file, what)
    except BaseException:
        os.close(file)
        raise
    return file


def _check(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & _WRITABLE_BY_OTHERS:
        raise Unavailable(
            f"{path} is user {found.st_uid}'s, mode {stat.S_IMODE(found.st_mode):o}: other observers cannot be seen",
            hint=f"remove it; it has to be user {os.geteuid()}'s, and written to by nobody else",
        )
