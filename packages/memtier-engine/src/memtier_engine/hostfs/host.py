"""Where the kernel's files are, and reading them with the engine's errors.

`Host()` is this machine; `Host(Path("/host"))` is one whose file systems are mounted below a folder, and in
tests a folder dressed as one.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from memtier_engine.errors import KernelCallError, ProcessGone, Unavailable
from memtier_engine.hostfs.longlines import gathered

_READ_BYTES = 1 << 18
_TEXT_BYTES = 1 << 12
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Host:
    """A machine's kernel files below `root`."""

    root: Path = Path("/")

    def path(self, *names: str) -> Path:
        """The path of a file below the root: `path("proc", "1", "maps")`."""
        return self.root.joinpath(*(name.lstrip("/") for name in names))

    def proc(self, pid: int, *names: str) -> Path:
        """The path of a file of process `pid`."""
        return self.path("proc", str(pid), *names)

    def kernel_file(self, path: Path) -> str:
        """`path` as a person on that machine would write it, for messages."""
        try:
            return "/" + str(path.relative_to(self.root))
        except ValueError:
            return str(path)

    @cached_property
    def cgroup2_root(self) -> Path:
        """Where cgroup v2 is mounted: /sys/fs/cgroup, in hybrid mode /sys/fs/cgroup/unified, or elsewhere.

        Raises:
            Unavailable: no cgroup2 mount.
        """
        for mount in self.mounts("cgroup2"):
            candidates = [self.path(mount)]
            if Path(mount).is_relative_to(self.root):  # our own mount table, the host's files below a folder
                candidates.insert(0, Path(mount))
            for candidate in candidates:
                if (candidate / "cgroup.procs").exists():
                    return candidate
        for known in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
            if (self.path(known) / "cgroup.controllers").exists():
                return self.path(known)
        raise Unavailable(
            f"no cgroup v2 hierarchy is mounted ({self.kernel_file(self.path('proc/self/mounts'))})",
            hint="mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1",
        )

    def mounts(self, fs_type: str) -> list[str]:
        """Mount points of file systems of type `fs_type`, in mount order."""
        try:
            text = self.read_text(self.path("proc", "self", "mounts"))
        except KernelCallError:
            return []
        found = []
        for line in text.splitlines():
            fields = line.split(" ")
            if len(fields) > 2 and fields[2] == fs_type:
                # Blanks and backslashes are written as octal. Source: fs/proc_namespace.c, mangle().
                found.append(_OCTAL.sub(lambda match: chr(int(match.group(1), 8)), fields[1]))
        return found

    def error(self, path: Path, error: OSError, action: str = "read") -> KernelCallError:
        """The engine's error for an OSError at `path`. ENOENT at /proc/PID or below is `ProcessGone`."""
        number = error.errno or errno.EIO
        what = f"{action} {self.kernel_file(path)}"
        if number == errno.ENOENT and self._pid_of(path) is not None:
            pid = self._pid_of(path)
            if not self.path("proc", str(pid)).exists():
                return ProcessGone(f"{what}: process {pid} exited", number)
        return KernelCallError.from_errno(what, number)

    def _pid_of(self, path: Path) -> int | None:
        try:
            names = path.relative_to(self.root).parts
        except ValueError:
            return None
        return int(names[1]) if len(names) > 1 and names[0] == "proc" and names[1].isdecimal() else None

    @property
    def own_pid(self) -> int:
        """The pid of this process as this machine's /proc numbers it."""
        try:
            return int(os.readlink(self.path("proc", "self")))
        except (OSError, ValueError):  # a dressed folder
            return os.getpid()

    @cached_property
    def own_namespace(self) -> bool:
        """Whether its /proc numbers processes as our system calls do: no container with the /proc of its host."""
        return self.own_pid == os.getpid()

    def open(self, path: Path, flags: int = os.O_RDONLY) -> int:
        """A close-on-exec file descriptor, which the caller closes; errors as `read_bytes`."""
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise self.error(path, error, "open") from None

    def read_bytes(self, path: Path) -> bytes:
        """The whole file.

        Raises:
            ProcessGone: the process of a file below /proc/PID exited.
            AccessDenied, KernelCallError: what the kernel said.
        """
        fd = self.open(path)
        try:
            parts = []
            while part := os.read(fd, _READ_BYTES):
                parts.append(part)
            return b"".join(parts)
        except OSError as error:
            raise self.error(path, error) from None
        finally:
            os.close(fd)

    def read_proc(self, pid: int, name: str) -> bytes:
        """As `read_bytes` of /proc/PID/`name`, at a third of its price: for what is read of many processes.

        A process can make some of them very long: see `longlines`.
        """
        # No Path objects (5 us), and no more at a time than the kernel gives: its text files are made in a buffer of
        # one page, however much is asked for. Source: fs/seq_file.c, seq_read_iter.
        try:
            fd = os.open(f"{self._prefix}/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self.error(self.proc(pid, name), error, "open") from None
        try:
            first = os.read(fd, _TEXT_BYTES)
            part = os.read(fd, _TEXT_BYTES) if first else first
            if not part:
                return first
            parts = chain((first, part), iter(lambda: os.read(fd, _TEXT_BYTES), b""))
            return gathered(parts, f"/proc/{pid}/{name}")
        except OSError as error:
            raise self.error(self.proc(pid, name), error) from None
        finally:
            os.close(fd)

    def read_proc_link(self, pid: int, name: str) -> str:
        """Where /proc/PID/`name` ("exe") points to. Raises OSError."""
        return os.readlink(f"{self._prefix}/proc/{pid}/{name}")

    @cached_property
    def _prefix(self) -> str:
        return str(self.root).rstrip("/")

    def read_text(self, path: Path) -> str:
        """The whole file as text; bytes that are not UTF-8 become surrogates."""
        return self.read_bytes(path).decode("utf-8", "surrogateescape")

    def read_int(self, path: Path) -> int:
        """The number in the file.

        Raises:
            KernelCallError: also (EINVAL) when it holds no number.
        """
        text = self.read_text(path).strip()
        try:
            return int(text, 0) if text.startswith("0x") else int(text)
        except ValueError:
            where = self.kernel_file(path)
            raise KernelCallError(f"read {where}: {text[:40]!r} is no number", errno.EINVAL) from None

    def write(self, path: Path, text: str) -> None:
        """Write `text` in one write(2), as kernel files want it; never creates the file."""
        fd = self.open(path, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        except OSError as error:
            raise self.error(path, error, f"write {text.strip()[:40]!r} to") from None
        finally:
            os.close(fd)
