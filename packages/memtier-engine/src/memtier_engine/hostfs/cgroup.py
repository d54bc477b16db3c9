"""A control group as a directory: its processes, values and pressure. Identified by inode, not by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memtier_engine.errors import ConfigError, KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.psi import Pressure, read_pressure

PATH_BYTES_MOST = 4000
"""PATH_MAX is 4096, with the name of a file in it."""
Trouble = Callable[[KernelCallError], None]
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LEVELS_OPEN = 16
_LIST_BYTES = 1 << 16
_SHOWN_LEVELS = 8
_GONE = (errno.ENOENT, errno.ENODEV, errno.ENOTDIR)
"""What files of a removed cgroup answer: by name ENOENT, through an open file descriptor ENODEV."""


def check_cgroup_name(name: str) -> None:
    """Raise `ConfigError` for a name that could lead out of the tree."""
    if ".." in Path(name).parts:
        raise ConfigError(f"cgroup {name!r} has a '..' in it", hint="name it by its full path")


def find_cgroup(host: Host, name: str) -> Path:
    """The directory of a cgroup that a person named.

    `name` is a path as on the machine (/sys/fs/cgroup/x) or relative to the cgroup v2 root (/x, x). In hybrid
    mode /sys/fs/cgroup/x also finds /sys/fs/cgroup/unified/x. The path need not exist yet.

    Raises:
        ConfigError: `name` has a `..` in it: names can come from people who may not see the whole tree.
        Unavailable: no cgroup v2 is mounted.
    """
    check_cgroup_name(name)
    as_given = host.path(name)
    if name.startswith("/") and os.path.exists(as_given / "cgroup.procs"):  # Path.exists raises for lack of rights
        return as_given
    root = host.cgroup2_root
    parts = Path(name).parts
    for mount in (Path("/", *root.relative_to(host.root).parts), Path("/sys/fs/cgroup")):
        if Path(name).is_relative_to(mount):
            return root.joinpath(*Path(name).relative_to(mount).parts)
    return root.joinpath(*parts[1:]) if name.startswith("/") else root / name


@dataclass(slots=True)
class _Level:
    """A directory of a walk: itself, and the names of those in it that are still to be visited."""

    fd: int
    names: list[str] = field(default_factory=list)
    inode: int = 0

    def list(self) -> None:
        """Raises OSError."""
        found = os.fstat(self.fd)
        self.inode = found.st_ino
        # In cgroupfs a directory has two links and one for each directory in it, so most need not be listed: there are
        # 60 files in it. Source: fs/kernfs/inode.c, kernfs_refresh_inode. Some file systems do not count: 1.
        if found.st_nlink != 2:
            with os.scandir(self.fd) as entries:
                self.names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]

    def reopen(self, below: int) -> None:
        """From an open directory in it. Raises OSError."""
        self.fd = os.open("..", _OPEN_DIRECTORY, dir_fd=below)
        if os.fstat(self.fd).st_ino != self.inode:  # cgroups cannot be moved; others can
            self.close()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _numbers(directory: int, name: str) -> list[int] | None:
    """What the list `name` of an open cgroup says; empty when it is removed, None when it has none: it is threaded.

    Raises OSError.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            parts = []
            while part := os.read(fd, _LIST_BYTES):
                parts.append(part)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _GONE:
            return []
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise
    return list(map(int, b"".join(parts).split()))


class Cgroup:
    """One cgroup directory (v2; of v1 hierarchies only the processes are the same).

    A value that is not there is None: a controller that is not enabled, an older kernel, a directory removed.
    """

    def __init__(self, path: Path, host: Host | None = None) -> None:
        """`path`: the directory, as `find_cgroup` gives it. It may not exist yet."""
        self.path = path
        self.host = host or Host()

    def __repr__(self) -> str:
        return f"Cgroup({self.host.kernel_file(self.path)})"

    @property
    def inode(self) -> int | None:
        """The directory's inode: the cgroup's identity until it is removed. None: no such directory."""
        try:
            return self.path.stat().st_ino
        except OSError:
            return None

    def exists(self) -> bool:
        """Whether the directory is there now."""
        return self.inode is not None

    def directories(self, trouble: Trouble | None = None) -> Iterator[Path]:
        """This directory and all below it; those that vanish during the walk are left out.

        Those whose path is too long to be used (`PATH_BYTES_MOST`) are left out too; `pids` sees them.

        Args:
            trouble: called for each that cannot be used, the others are listed all the same. None: one that cannot be
                opened is an error.
        """
        bytes_left = PATH_BYTES_MOST - len(os.fsencode(self.path))
        for _, below in self._walk(trouble):
            short = len(below) < PATH_BYTES_MOST // 2
            if short and sum(len(os.fsencode(name)) + 1 for name in below) <= bytes_left:
                yield self.path.joinpath(*below)
            elif trouble is not None:
                trouble(self._failure(below, OSError(errno.ENAMETOOLONG, "")))

    def pids(self, *, recursive: bool = True, trouble: Trouble | None = None) -> frozenset[int]:
        """The processes in it and (recursive) below it. Empty when the directory is not there.

        A process of another pid namespace that we cannot see reads as 0 and is left out. A threaded cgroup does not
        list its processes; of one that was asked for itself, recursively, these are those that have a thread in it.

        Args:
            recursive: False: only what its own list says.
            trouble: called for each directory below that cannot be read, the others are read all the same. None: the
                first one is an error.
        """
        if not recursive:
            try:
                return frozenset(map(int, self.host.read_bytes(self.path / "cgroup.procs").split())) - {0}
            except KernelCallError as error:
                if error.errno in (*_GONE, errno.EOPNOTSUPP):
                    return frozenset()
                raise
        found: set[int] = set()
        threads: set[int] | None = None
        for directory, below in self._walk(trouble):
            try:
                listed = _numbers(directory, "cgroup.procs")
                if listed is not None:
                    found.update(listed)
                # Of a threaded cgroup below another one the processes are in the list of its domain.
                elif not below or threads is not None:
                    threads = (threads or set()).union(_numbers(directory, "cgroup.threads") or ())
            except OSError as error:
                failure = self._failure([*below, "cgroup.procs"], error, "read")
                if trouble is None or not below:
                    raise failure from None
                trouble(failure)
        if threads:
            found |= self._processes_of(threads - {0})
        found.discard(0)
        return frozenset(found)

    def _processes_of(self, threads: set[int]) -> set[int]:
        """The processes that have these threads: two reads for a process, however many threads it has."""
        found: set[int] = set()
        left = set(threads)
        while left:
            thread = left.pop()
            try:
                status = self.host.read_proc(thread, "status")
                process = int(status.partition(b"\nTgid:")[2].split(maxsplit=1)[0])
                left.difference_update(map(int, os.listdir(self.host.proc(process, "task"))))
            except (KernelCallError, OSError, IndexError):
                continue  # it ended
            found.add(process)
        return found

    def _walk(self, trouble: Trouble | None) -> Iterator[tuple[int, list[str]]]:
        """(open directory, names that lead to it) of this one and all below it, valid until the next is asked for.

        Paths may be longer than the kernel takes (PATH_MAX), so each directory is opened from its parent, and beyond
        some levels the parent from it again: a few files are open and the effort is linear, however deep it goes.
        """
        levels: list[_Level] = []
        below: list[str] = []
        name, parent = str(self.path), None
        try:
            while True:
                try:
                    level = _Level(os.open(name, _OPEN_DIRECTORY, dir_fd=parent))
                    levels.append(level)
                    if len(levels) > _LEVELS_OPEN:
                        levels[-2].close()
                    level.list()
                    yield level.fd, below
                except OSError as error:
                    if error.errno not in _GONE:
                        if trouble is None or not below:
                            raise self._failure(below, error) from None
                        trouble(self._failure(below, error))
                del below[max(0, len(levels) - 1) :]  # what could not be opened is no level
                while levels and not levels[-1].names:
                    done = levels.pop()
                    del below[-1:]
                    if levels and levels[-1].fd < 0:
                        try:
                            levels[-1].reopen(done.fd)
                        except OSError as error:
                            if levels[-1].names and trouble is not None:
                                trouble(self._failure(below, error))
                            levels[-1].names.clear()
                    done.close()
                if not levels:
                    return
                name, parent = levels[-1].names.pop(), levels[-1].fd
                below.append(name)
        finally:
            for level in levels:
                level.close()

    def _failure(self, below: list[str], error: OSError, action: str = "open") -> KernelCallError:
        path = self.host.kernel_file(self.path.joinpath(*below[:_SHOWN_LEVELS]))
        more = f"/... ({len(below)} levels below)" if len(below) > _SHOWN_LEVELS else ""
        return KernelCallError.from_errno(f"{action} {path}{more}", error.errno or errno.EIO)

    def read_text(self, name: str) -> str | None:
        """The content of file `name`; None when it is not there."""
        try:
            return self.host.read_text(self.path / name)
        except KernelCallError as error:
            if error.errno in _GONE:
                return None
            raise

    def read_int(self, name: str) -> int | None:
        """The number in file `name` ("memory.current"): None when it is absent or says "max" (no limit)."""
        text = self.read_text(name)
        if text is None or text.strip() == "max":
            return None
        try:
            return int(text)
        except ValueError:
            where = self.host.kernel_file(self.path / name)
            raise KernelCallError(f"read {where}: {text[:40]!r} is no number", errno.EINVAL) from None

    def write(self, name: str, value: str | int) -> None:
        """Write `value` to file `name`.

        Raises:
            KernelCallError: EAGAIN of memory.reclaim: reclaimed less than asked for.
        """
        self.host.write(self.path / name, str(value))

    def stat(self, name: str = "memory.stat") -> dict[str, int]:
        """A flat keyed file ("memory.stat", "cgroup.events") as a dictionary; empty when it is absent."""
        text = self.read_text(name) or ""
        pairs = (line.split() for line in text.splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].lstrip("-").isdigit()}

    def controllers(self) -> frozenset[str]:
        """The controllers enabled in it."""
        return frozenset((self.read_text("cgroup.controllers") or "").split())

    def pressure(self, resource: str = "memory") -> Pressure | None:
        """PSI of "memory", "io" or "cpu"; None without it."""
        return read_pressure(self.host, self.path / f"{resource}.pressure")
