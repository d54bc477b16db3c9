"""A container as the runtime describes it -> its cgroup directory and that directory's inode.

Never by substring: a monitor's cgroup (`crio-conmon-ID`) has the id in its name too. Never the root.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from memtier_engine.errors import MemtierError

MONITOR_PREFIX = "crio-conmon-"
_SEARCH_DIRECTORIES_MAX = 200_000


class CgroupNotFound(MemtierError):
    """The container has no cgroup that we can see: it exited already, or the node's tree is not mounted."""


class BadCgroupsPath(MemtierError):
    """`linux.cgroups_path` has a form that no runtime makes."""


@dataclass(frozen=True, slots=True)
class ContainerCgroup:
    """A cgroup directory, identified until it is removed."""

    path: Path
    inode: int

    def is_there(self) -> bool:
        """Whether this very cgroup still exists; one made later under the same name is another."""
        try:
            return self.path.stat().st_ino == self.inode
        except OSError:
            return False


def relative_path(cgroups_path: str) -> PurePosixPath:
    """The directory below the cgroup root that `linux.cgroups_path` means.

    Two forms: a path (cgroupfs driver), or `SLICE:PREFIX:NAME` (systemd driver).

    Raises:
        BadCgroupsPath: it is neither, or it could lead out of the tree.
    """
    parts = cgroups_path.split(":")
    if len(parts) == 3 and "/" not in cgroups_path:
        slice_name, prefix, name = parts
        if not name or name.startswith("."):
            raise BadCgroupsPath(f"cgroups_path {cgroups_path!r} names no scope")
        unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        return expand_slice(slice_name or "system.slice") / unit
    names = [part for part in cgroups_path.split("/") if part]
    if not names or any(part in (".", "..") or "\0" in part for part in names):
        raise BadCgroupsPath(f"cgroups_path {cgroups_path!r} is not a path below the root")
    return PurePosixPath(*names)


def expand_slice(slice_name: str) -> PurePosixPath:
    """`a-b.slice` -> `a.slice/a-b.slice`; `-.slice` is the root. Source: systemd.slice(5).

    Raises:
        BadCgroupsPath: not the name of a slice.
    """
    stem = slice_name.removesuffix(".slice")
    if stem == "-" and slice_name.endswith(".slice"):
        return PurePosixPath()
    words = stem.split("-")
    if stem == slice_name or "" in words or "/" in stem or "\0" in stem:
        raise BadCgroupsPath(f"{slice_name!r} is no systemd slice", hint="like kubepods-burstable.slice")
    return PurePosixPath(*(f"{'-'.join(words[: n + 1])}.slice" for n in range(len(words))))


def names_container(directory: str, container_id: str) -> bool:
    """Whether a directory's name is one that runtimes give to the cgroup of this container."""
    if not container_id or directory.startswith(MONITOR_PREFIX):
        return False
    stem = directory.removesuffix(".scope")
    # With a colon: a runtime with the cgroupfs driver that was given a path for systemd takes it literally.
    return stem == container_id or stem.endswith((f"-{container_id}", f":{container_id}"))


def find_container_cgroup(
    root: Path,
    *,
    container_id: str,
    cgroups_path: str,
    pid: int | None = None,
    proc: Path = Path("/proc"),
) -> ContainerCgroup:
    """Where the container's processes are: by what the runtime said, by its process, by the directory's name.

    Args:
        root: of the node's cgroup v2 tree.
        pid: of its first process, as the runtime numbers it; None or 0: not known.
    Raises:
        CgroupNotFound: no such directory.
    """
    if not container_id:
        raise CgroupNotFound("the runtime gave no container id")
    tried = []
    if cgroups_path:
        try:
            path = root / relative_path(cgroups_path)
        except BadCgroupsPath as error:
            tried.append(str(error))
        else:
            if path != root and (found := _identify(root, path)):
                return found
            tried.append(f"{path} does not exist")
    if pid:
        by_process = _of_process(root, proc, pid, container_id)
        if by_process and (found := _identify(root, by_process)):
            return found
        tried.append(f"process {pid} is not in a cgroup of this container")
    for path in _search(root, container_id):
        if found := _identify(root, path):
            return found
    tried.append(f"no directory of its name below {root}")
    raise CgroupNotFound("; ".join(tried), hint="did it exit, or is another cgroup tree mounted here?")


def _identify(root: Path, path: Path) -> ContainerCgroup | None:
    try:
        real = path.resolve(strict=True)
        found = real.stat()
    except (OSError, RuntimeError):
        return None
    inside = real.is_relative_to(root.resolve()) and real != root.resolve()
    return ContainerCgroup(path, found.st_ino) if inside and stat.S_ISDIR(found.st_mode) else None


def _of_process(root: Path, proc: Path, pid: int, container_id: str) -> Path | None:
    try:
        text = (proc / str(pid) / "cgroup").read_text(errors="surrogateescape")
    except OSError:
        return None
    for line in text.splitlines():
        if not line.startswith("0::/"):
            continue
        names = [name for name in line[3:].split("/") if name]
        for depth, name in enumerate(names):
            # crun puts the processes one level below the container's cgroup.
            if ".." not in names and names_container(name, container_id):
                return root.joinpath(*names[: depth + 1])
    return None


def _search(root: Path, container_id: str) -> Iterator[Path]:
    stack, seen = [root], 0
    while stack and seen < _SEARCH_DIRECTORIES_MAX:
        directory = stack.pop()
        seen += 1
        try:
            with os.scandir(directory) as entries:
                children = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue  # it was removed meanwhile
        for child in children:
            if names_container(child.name, container_id):
                yield Path(child.path)
            else:
                stack.append(Path(child.path))
