"""A control group as a directory: its processes, values and pressure. Identified by inode, not by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from memtier_engine.errors import ConfigError, KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.psi import Pressure, read_pressure

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
    if name.startswith("/") and (as_given / "cgroup.procs").exists():
        return as_given
    root = host.cgroup2_root
    parts = Path(name).parts
    for mount in (Path("/", *root.relative_to(host.root).parts), Path("/sys/fs/cgroup")):
        if Path(name).is_relative_to(mount):
            return root.joinpath(*Path(name).relative_to(mount).parts)
    return root.joinpath(*parts[1:]) if name.startswith("/") else root / name


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

    def directories(self) -> Iterator[Path]:
        """This directory and all below it; those that vanish during the walk are left out."""
        stack = [self.path]
        while stack:
            directory = stack.pop()
            try:
                with os.scandir(directory) as entries:
                    stack.extend(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
            except OSError as error:
                if error.errno in _GONE:
                    continue
                raise self.host.error(directory, error) from None
            yield directory

    def pids(self, *, recursive: bool = True) -> frozenset[int]:
        """The processes in it and (recursive) below it. Empty when the directory is not there.

        A process of another pid namespace that we cannot see reads as 0 and is left out.
        """
        found: set[int] = set()
        for directory in self.directories() if recursive else (self.path,):
            try:
                found.update(map(int, self.host.read_bytes(directory / "cgroup.procs").split()))
            except KernelCallError as error:
                # EOPNOTSUPP: a threaded cgroup; its processes are listed by its domain, above it.
                if error.errno not in (*_GONE, errno.EOPNOTSUPP):
                    raise
        found.discard(0)
        return frozenset(found)

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
