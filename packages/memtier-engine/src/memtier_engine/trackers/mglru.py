"""Ages of a whole cgroup's pages, from the generations that the kernel's multi-generational LRU keeps anyway.

No page tables are walked and no page is named: it tells how much memory has been idle for how long, for cgroups
where tracking pages is not wanted. Needs CONFIG_LRU_GEN, and debugfs for `lru_gen`.

Source: Documentation/admin-guide/mm/multigen_lru.rst; mm/vmscan.c lru_gen_seq_show().
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import KernelCallError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES

_FILE = "sys/kernel/debug/lru_gen"
_MEMCG = re.compile(r"memcg +(\d+) (.*)")
_NODE = re.compile(r" node +(\d+)")
_GENERATION = re.compile(r" +(\d+) +(\d+) +(\d+)x? +(\d+)x?")


@dataclass(frozen=True, slots=True)
class Generations:
    """The generations of one cgroup on one NUMA node: columns [g], the oldest first."""

    memcg_id: int
    path: str
    """As the kernel names it: "/" is the root."""
    node: int
    numbers: NDArray[np.int64]
    born_s: NDArray[np.float64]
    """Seconds since each generation began."""
    anon_pages: NDArray[np.int64]
    file_pages: NDArray[np.int64]

    @property
    def idle_s(self) -> NDArray[np.float64]:
        """Seconds that the pages of each generation have been idle for at least: since the next one began."""
        return np.append(self.born_s[1:], 0.0)


@dataclass(frozen=True, slots=True)
class CgroupAges:
    """How much memory of one cgroup has been idle for how long: columns [n], the oldest first."""

    idle_s: NDArray[np.float64]
    anon_pages: NDArray[np.int64]
    file_pages: NDArray[np.int64]

    def idle_bytes(self, idle_s: float, *, files: bool = True) -> int:
        """Memory idle for at least `idle_s`, with or without page cache."""
        old = self.idle_s >= idle_s
        pages = int(self.anon_pages[old].sum()) + (int(self.file_pages[old].sum()) if files else 0)
        return pages * PAGE_BYTES


def parse_lru_gen(text: str) -> Iterator[Generations]:
    """The content of `lru_gen`.

    Raises:
        ValueError: not in the kernel's format.
    """
    memcg: tuple[int, str] | None = None
    node: int | None = None
    rows: list[tuple[int, ...]] = []

    def done() -> Iterator[Generations]:
        if memcg is not None and node is not None and rows:
            table = np.array(rows, np.int64)
            yield Generations(*memcg, node, table[:, 0], table[:, 1] / 1000, table[:, 2], table[:, 3])
        rows.clear()

    for line in text.splitlines():
        if found := _MEMCG.fullmatch(line.rstrip()):
            yield from done()
            memcg, node = (int(found[1]), found[2]), None
        elif found := _NODE.fullmatch(line.rstrip()):
            yield from done()
            node = int(found[1])
        elif found := _GENERATION.fullmatch(line.rstrip()):
            rows.append(tuple(map(int, found.groups())))
        elif line.strip():
            raise ValueError(f"lru_gen: {line[:80]!r} is no line that we know")
    yield from done()


class MglruTracker:
    """Looks at one cgroup and, when asked, begins a new generation in it."""

    name = "mglru"
    page_exact = False

    def __init__(self, host: Host, cgroup: Path, *, below: bool = False) -> None:
        """`cgroup`: its directory below the cgroup v2 root, which may come and go; `below`: and all in it.

        Raises:
            TrackerUnavailable: the kernel has no MGLRU, or debugfs is not mounted or not ours to read.
            Unavailable: there is no cgroup v2 tree.
        """
        self._host = host
        self._file = host.path(_FILE)
        try:
            enabled = host.read_int(host.path("sys/kernel/mm/lru_gen/enabled"))
        except KernelCallError as error:
            raise TrackerUnavailable(
                f"tracker mglru: {error.message}", hint="boot a kernel with CONFIG_LRU_GEN=y (Linux 6.1 and newer)"
            ) from None
        if not enabled & 1:
            raise TrackerUnavailable(
                "tracker mglru: it is built in but switched off", hint="echo y > /sys/kernel/mm/lru_gen/enabled"
            )
        try:
            host.read_bytes(self._file)
        except KernelCallError as error:
            raise TrackerUnavailable(
                f"tracker mglru: {error.message}", hint="mount -t debugfs none /sys/kernel/debug, and run as root"
            ) from None
        relative = cgroup.relative_to(host.cgroup2_root)
        self._path = "/" + "/".join(relative.parts)
        self._below = None if not below else self._path.rstrip("/") + "/"

    def generations(self) -> list[Generations]:
        """Those of the cgroup, one record per node; empty while there is no such cgroup."""
        text = self._host.read_text(self._file)
        return [found for found in parse_lru_gen(text) if self._means(found.path)]

    def _means(self, path: str) -> bool:
        return path == self._path or (self._below is not None and path.startswith(self._below))

    def ages(self) -> CgroupAges:
        """Those of all nodes together."""
        parts = self.generations()
        if not parts:
            empty = np.zeros(0, np.int64)
            return CgroupAges(np.zeros(0, np.float64), empty, empty)
        idle_s = np.concatenate([part.idle_s for part in parts])
        order = np.argsort(-idle_s, kind="stable")
        return CgroupAges(
            idle_s[order],
            np.concatenate([part.anon_pages for part in parts])[order],
            np.concatenate([part.file_pages for part in parts])[order],
        )

    def scan(self) -> int:
        """Begin a new generation on every node: the kernel looks which pages were touched since the last one.

        Returns how many nodes took it; one whose generation was changed by somebody else meanwhile does not.

        Raises:
            KernelCallError: EPERM and the like.
        """
        begun = 0
        for part in self.generations():
            # can_swap=1: also anonymous pages where there is no swap; force_scan=1: all page tables.
            command = f"+ {part.memcg_id} {part.node} {int(part.numbers[-1])} 1 1"
            try:
                self._host.write(self._file, command)
            except KernelCallError as error:
                if error.errno not in _CHANGED:
                    raise
                continue
            begun += 1
        return begun


_CHANGED = (22, 34)
"""EINVAL: the memcg is gone or the generation is not the newest any more. ERANGE: it may not be aged now."""
