"""A container as the runtime describes it -> its cgroup directory and that directory's inode.

Never by substring: a monitor's cgroup (`crio-conmon-ID`) has the id in its name too. Never the root.
"""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from memtier_engine.errors import MemtierError

MONITOR_PREFIX = "crio-conmon-"
_SEARCH_DIRECTORIES_MAX = 200_000
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
_BETWEEN_WORDS = re.compile("[-:]")


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
    if not cgroups_path.isprintable():
        raise BadCgroupsPath(f"cgroups_path {cgroups_path[:200]!r} has characters that no runtime writes")
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


class CgroupTree:
    """Finds containers in a tree; it is walked at most once, and only if one has to be looked for by its name.

    So a new one is made for each round of looking.
    """

    def __init__(self, root: Path, proc: Path = Path("/proc")) -> None:
        """`root`: of the node's cgroup v2 tree."""
        self._root = root
        self._proc = proc
        self._real_root: Path | None = None
        self._by_last_word: dict[str, list[_Directory]] | None = None

    def find(self, *, container_id: str, cgroups_path: str, pid: int | None = None) -> ContainerCgroup:
        """Where the container's processes are: by what the runtime said, by its process, by the directory's name.

        Args:
            pid: of its first process, as the runtime numbers it; None or 0: not known.
        Raises:
            CgroupNotFound: no such directory, whatever the arguments are.
        """
        if not container_id:
            raise CgroupNotFound("the runtime gave no container id")
        tried = []
        if cgroups_path:
            try:
                path = self._root / relative_path(cgroups_path)
            except BadCgroupsPath as error:
                tried.append(str(error))
            else:
                if path != self._root and (found := self._identify(path)):
                    return found
                tried.append(f"{path} does not exist")
        if pid:
            by_process = _of_process(self._root, self._proc, pid, container_id, self)
            if by_process and (found := self._identify(by_process)):
                return found
            tried.append(f"process {pid} is not in a cgroup of this container")
        for path in self.named(container_id):
            if found := self._identify(path):
                return found
        tried.append(f"no directory of its name below {self._root}")
        raise CgroupNotFound("; ".join(tried), hint="did it exit, or is another cgroup tree mounted here?")

    def named(self, container_id: str) -> list[Path]:
        """Directories with a name that runtimes give to the cgroup of this container, from the top down."""
        if self._by_last_word is None:
            self._by_last_word = _directories(str(self._root))
        found = self._by_last_word.get(_last_word(container_id), ())
        return [Path(each.path()) for each in found if names_container(each.name, container_id)]

    def has_ended(self, pid: int | None) -> bool:
        """Whether a container's first process is seen to be gone, by which the container is. False: not known.

        Runtimes number processes as the node does: whoever does not see the node's cannot tell.
        """
        if not pid:
            return False
        try:
            sees_all = (self._proc / "self/ns/pid").stat().st_ino == _FIRST_PID_NAMESPACE
        except OSError:
            return False
        return sees_all and not (self._proc / str(pid)).exists()

    def _identify(self, path: Path) -> ContainerCgroup | None:
        try:
            if self._real_root is None:
                self._real_root = self._root.resolve()
            real = path.resolve(strict=True)
            found = real.stat()
        except (OSError, RuntimeError, ValueError):  # ValueError: what no path can hold
            return None
        inside = real.is_relative_to(self._real_root) and real != self._real_root
        return ContainerCgroup(path, found.st_ino) if inside and stat.S_ISDIR(found.st_mode) else None


def find_container_cgroup(
    root: Path,
    *,
    container_id: str,
    cgroups_path: str,
    pid: int | None = None,
    proc: Path = Path("/proc"),
) -> ContainerCgroup:
    """As `CgroupTree.find`, for a single container. Raises: CgroupNotFound."""
    return CgroupTree(root, proc).find(container_id=container_id, cgroups_path=cgroups_path, pid=pid)


def _of_process(root: Path, proc: Path, pid: int, container_id: str, tree: CgroupTree | None = None) -> Path | None:
    """The container's directory on the way to the process's cgroup.

    In a cgroup namespace, as a pod has on cgroup v2, the kernel gives that from the namespace's root: `/../../pod/ID`.
    Where that root is in the tree nobody says, so what follows the dots is looked for.
    """
    try:
        text = (proc / str(pid) / "cgroup").read_text(errors="surrogateescape")
    except OSError:
        return None
    for line in text.splitlines():
        if not line.startswith("0::/"):
            continue
        names = [name for name in line[3:].split("/") if name]
        ups = 0
        while ups < len(names) and names[ups] == "..":
            ups += 1
        below = tuple(names[ups:])
        if ".." in below:
            continue
        for depth, name in enumerate(below):
            # crun puts the processes one level below the container's cgroup.
            if not names_container(name, container_id):
                continue
            end = below[: depth + 1]
            if not ups:
                return root.joinpath(*end)
            found = (tree or CgroupTree(root, proc)).named(container_id)
            return next((path for path in found if path.parts[-len(end) :] == end), None)
    return None


class _Directory:
    """One of the tree: a path is up to 4 KiB long, so each keeps its own name only."""

    __slots__ = ("above", "name")

    def __init__(self, above: _Directory | None, name: str) -> None:
        self.above = above
        self.name = name

    def path(self) -> str:
        names, here = [self.name], self.above
        while here is not None:
            names.append(here.name)
            here = here.above
        return "/".join(reversed(names))


def _last_word(name: str) -> str:
    """What follows the last - or :, the same for an id and for each name with it that `names_container` knows."""
    return _BETWEEN_WORDS.split(name)[-1]


def _directories(root: str) -> dict[str, list[_Directory]]:
    """Those of the tree that may be a container's, from the top down, by the last word of their name without .scope.

    Whoever may make cgroups in his container gives them names that he likes: each takes its length once.
    """
    found: dict[str, list[_Directory]] = {}
    waiting, left = deque([_Directory(None, root)]), _SEARCH_DIRECTORIES_MAX
    while waiting and left > 0:
        here = waiting.popleft()
        try:
            with os.scandir(here.path()) as entries:
                names = (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
                children = [_Directory(here, name) for name in islice(names, left)]
        except OSError:
            continue  # it was removed meanwhile
        left -= len(children)
        waiting += children
        for child in children:
            if not child.name.endswith(".slice") and not child.name.startswith(MONITOR_PREFIX):
                found.setdefault(_last_word(child.name.removesuffix(".scope")), []).append(child)
    return found
