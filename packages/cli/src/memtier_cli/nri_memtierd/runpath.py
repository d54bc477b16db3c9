"""Which path may be a run directory, and making the directories above it where others can write.

A directory of the system is refused by its name, empty or not: a marker and containers' directories in it would be
litter, and what programs expect there is not ours to mix with. The Helm chart refuses the same for `outputDir`.

Raises RunDirError and, from the file system, OSError.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from memtier_engine.errors import MemtierError

SYSTEM_DIRECTORIES = frozenset(
    (
        "/",
        "/dev/shm",
        "/home",
        "/media",
        "/mnt",
        "/opt",
        "/root",
        "/run",
        "/run/lock",
        "/run/memtier",
        "/run/nri",
        "/srv",
        "/tmp",
        "/var",
        "/var/cache",
        "/var/lib",
        "/var/lock",
        "/var/log",
        "/var/run",
        "/var/run/lock",
        "/var/run/memtier",
        "/var/run/nri",
        "/var/spool",
        "/var/tmp",
    )
)
"""Themselves refused; what is below them is not."""
SYSTEM_TREES = (
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/sbin",
    "/sys",
    "/usr",
)
"""Refused with all that is below them, but for what is in /dev/shm."""
_HINT = "give a directory for the plugin, like /var/log/nri-memtierd"


class RunDirError(MemtierError):
    """A name, a file or a directory that is not safe to use, or that the file system refuses."""


def checked_path(path: Path) -> Path:
    """The absolute form of `path`, without `..`. Raises: RunDirError: it is the system's."""
    absolute = Path("/" + os.path.abspath(path).lstrip("/"))  # POSIX keeps two slashes at the beginning
    if str(absolute) in SYSTEM_DIRECTORIES:
        raise RunDirError(f"run directory {path} is a directory of the system", hint=_HINT)
    if not absolute.is_relative_to("/dev/shm"):
        for tree in SYSTEM_TREES:
            if absolute.is_relative_to(tree):
                raise RunDirError(f"run directory {path} is in {tree}, which is the system's", hint=_HINT)
    return absolute


def make_parents(path: Path) -> None:
    """Make the directories above `path` that are not there, mode 0755.

    Where everyone can write, such as in /tmp, somebody may have put a link or a directory of his own in our way: what
    is there must be root's or ours.

    Raises:
        RunDirError: it is another user's.
    """
    for parent in reversed(path.parents[:-1]):
        try:
            parent.mkdir(mode=0o755)
        except OSError:
            if not os.path.lexists(parent):
                raise
        owner = parent.lstat().st_uid
        if owner not in (0, os.geteuid()) and parent.parent.stat().st_mode & stat.S_IWOTH:
            raise RunDirError(
                f"run directory {path}: {parent} belongs to user {owner}, in a directory where everyone can write",
                hint="remove it, or choose another with -run-dir",
            )
