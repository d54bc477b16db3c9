"""A folder dressed as a machine: the kernel files a test names, read through `Host(folder)`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES

PF_KTHREAD = 0x00200000
CGROUP2_MOUNT = "cgroup2 {} cgroup2 rw,nosuid,nodev,noexec,relatime 0 0\n"


class HostFolder:
    """Builds the folder. Everything returns what the test needs to point at it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = Host(root)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def process(
        self,
        pid: int,
        *,
        start_ticks: int = 100,
        name: str = "work",
        state: str = "S",
        flags: int = 0,
        maps: str = "",
    ) -> None:
        """/proc/PID with stat and maps."""
        before = f"{pid} ({name}) {state} 1 {pid} {pid} 0 -1 {flags} 0 0 0 0 250 50 0 0 20 0 1 0"
        self.write(f"proc/{pid}/stat", f"{before} {start_ticks} 4096 100 18446744073709551615\n")
        self.write(f"proc/{pid}/maps", maps)

    def pagemap(self, pid: int, words: dict[int, int]) -> None:
        """/proc/PID/pagemap with some words, by address; a sparse file."""
        path = self.write(f"proc/{pid}/pagemap", b"")
        with path.open("r+b") as file:
            for address, word in words.items():
                file.seek(address // PAGE_BYTES * 8)
                file.write(np.uint64(word).tobytes())

    def cgroup2(self, mount: str = "/sys/fs/cgroup", *, controllers: str = "cpu memory") -> Path:
        """A mounted cgroup v2 root."""
        self.write("proc/self/mounts", "proc /proc proc rw 0 0\n" + CGROUP2_MOUNT.format(mount))
        self.write(f"{mount.lstrip('/')}/cgroup.controllers", controllers + "\n")
        return self.cgroup(mount)

    def cgroup(self, path: str, pids: Iterable[int] = (), **files: str) -> Path:
        """A cgroup directory; files by name with `_` for the dot: memory_current="5"."""
        directory = path.lstrip("/")
        self.write(f"{directory}/cgroup.procs", "".join(f"{pid}\n" for pid in pids))
        for name, content in files.items():
            self.write(f"{directory}/{name.replace('_', '.', 1)}", content)
        return self.root / directory
