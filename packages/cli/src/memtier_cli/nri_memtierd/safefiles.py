"""Files relative to a directory's file descriptor: no symbolic link is followed, files come into being as a whole.

All raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_NOFOLLOW | os.O_CLOEXEC


def plain(file: int) -> os.stat_result:
    """What it is. Raises: OSError: no plain file."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    return found


def directories(fd: int, *names: str) -> list[str]:
    """Names of the real directories in a directory below `fd`; those that vanish are left out."""
    opened = [os.dup(fd)]
    try:
        for name in names:
            opened.append(os.open(name, DIRECTORY, dir_fd=opened[-1]))
        with os.scandir(opened[-1]) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    finally:
        for each in opened:
            os.close(each)


def remove_files(fd: int, names: frozenset[str]) -> None:
    """Remove files of these names; what is there and no file stays."""
    for name in names.intersection(os.listdir(fd)):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=fd)


def is_private(fd: int) -> bool:
    """Whether it is our user's and nobody else can write to it."""
    found = os.fstat(fd)
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def replace_file(fd: int, name: str, content: str | bytes, mode: int) -> None:
    """Make or replace a file as a whole."""
    temporary = f"{name}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=fd)
    make_file(fd, temporary, content, mode)
    os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)


def make_file(fd: int, name: str, content: str | bytes, mode: int) -> None:
    """A new file as a whole, or none."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE, mode, dir_fd=fd)
    try:
        os.fchmod(file, mode)  # whatever the umask is
        write_all(file, content.encode() if isinstance(content, str) else content)
    except BaseException:
        os.unlink(name, dir_fd=fd)
        raise
    finally:
        os.close(file)


def cut(fd: int, name: str, bytes_max: int) -> None:
    """Leave the end of a file that is too long."""
    try:
        file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | FILE, dir_fd=fd)
    except FileNotFoundError:
        return
    try:
        size = plain(file).st_size
        end = os.pread(file, bytes_max, size - bytes_max) if size > bytes_max else b""
    finally:
        os.close(file)
    if size > bytes_max:
        os.unlink(name, dir_fd=fd)  # first: there may be no room for both
        make_file(fd, name, end, 0o600)


def write_all(file: int, data: bytes) -> None:
    """Write, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
