"""What paging out really brought: RAM that is free now, and what the pages take where they are.

On a disk or a swap file, MADV_PAGEOUT starts the writing and returns; the pages stay in the swap cache, charged to
their cgroup, until somebody reclaims there (see `hostfs.swapkind`). In a v2 cgroup that somebody is us: once they are
written, as much is asked of `memory.reclaim` as is in the swap cache because of us. Written pages are moved to the end
of the inactive list from which reclaim takes (mm/vmscan.c, folio_rotate_reclaimable()), so it takes them and not
others; what it took is measured each time, and where it was others' memory it is left alone for longer and longer.
"""

from __future__ import annotations

import errno
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from memtier_engine.errors import KernelCallError, ProcessGone, Unavailable
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.numa import memory_nodes, near, node_cpus
from memtier_engine.hostfs.proc import meminfo
from memtier_engine.hostfs.swapkind import Swap, SwapKind, frees_at_once, read_swap_kinds, zswap_is_on
from memtier_engine.model import ProcessId

LOOK_S = 10.0
"""Swap areas come and go seldom."""
RECLAIM_S = 0.2
"""Between two requests to a cgroup; doubles while they bring nothing."""
RECLAIM_S_MAX = 60.0
STEP_BYTES, STEP_BYTES_LEAST = 1 << 20, 256 << 10
"""Of one request. The kernel shrinks all of a cgroup's lists in proportion to what it is asked for: of 8 MiB asked in
one piece up to 7 were memory of others that nobody had decided on, of 1 MiB at a time none, with MGLRU and without."""
LEFT_BYTES_PER_CPU, LEFT_BYTES_MOST = 128 << 10, 1 << 20
"""The last bit is left where it is: each CPU keeps up to 31 written pages in a batch before it moves them to the end of
the list (mm/swap.c, lru_move_tail), and asking for those brings others. More memory going out pushes them on."""
SLICE_S = 0.03
"""Steps are asked one after the other for so long."""
OTHERS_SHARE = 0.125
"""Of a step, so much may be others' memory before it is left alone for longer."""
_ON_NODE = re.compile(r"N(\d+)=(\d+)")
_ANONYMOUS_ONLY = ("swappiness=max", "swappiness=200", "")
"""Arguments of memory.reclaim by which no page of a file is taken: Linux 6.16, 6.9, before."""


@dataclass(slots=True)
class Held:
    """What is written and takes up RAM all the same, in one cgroup or (without v2) on the machine. Arithmetic only."""

    others: int
    """In the swap cache before us, or since."""
    ours: int = 0
    written: int = 0
    """All that ever went there."""

    def moved(self, moved_bytes: int, swap_cached: int) -> int:
        """So much more was paged out, so much is in the swap cache now. Returns what was freed since the last time."""
        self.others = min(self.others, swap_cached)
        before = self.ours + moved_bytes
        self.written += moved_bytes
        self.ours = min(before, swap_cached - self.others)
        return before - self.ours


@dataclass(slots=True)
class _Turn:
    """When something may be asked for next."""

    due_s: float = 0.0
    pause_s: float = RECLAIM_S

    def done(self, now_s: float, *, well: bool) -> None:
        """It was asked for just now."""
        self.pause_s = RECLAIM_S if well else min(RECLAIM_S_MAX, 2 * self.pause_s)
        self.due_s = now_s + self.pause_s


@dataclass(slots=True)
class _Place:
    held: Held
    cgroup: Cgroup | None  # None: the machine
    turn: _Turn = field(default_factory=_Turn)
    nodes: dict[int, _Turn] = field(default_factory=dict)
    quiet_until_s: float = -math.inf
    """Nothing can be asked before, unless more goes out."""

    @property
    def due_s(self) -> float:
        """When to look at it next."""
        return max(self.turn.due_s, self.quiet_until_s)


@dataclass(frozen=True, slots=True)
class Effect:
    """Of one batch."""

    freed_bytes: int | None
    stored_bytes: int | None


class Effects:
    """One per mover. Every number is a difference around our own batches; None where the kernel does not tell."""

    def __init__(self, host: Host, *, cpus: int | None = None) -> None:
        """`cpus`: of the machine; None: as many as it says."""
        self._host = host
        self.are_ours: Callable[[frozenset[int]], bool] = lambda pids: True
        """Whether all these processes, those of a cgroup, are the engine's: only then the cgroup is asked to reclaim,
        for the kernel takes the idle memory of whoever is in it."""
        self._kinds: list[SwapKind] = []
        self._zswap = False
        self.at_once = True
        """Whether what goes out is free at once, as with zram; as of the last `begin`."""
        self._zrams: list[str] = []
        """Where each zram device that is swap tells what it holds."""
        self._is_told = True
        """Whether all swap that is RAM tells what it holds."""
        self._looked_s: float | None = None
        self._now_s = 0.0
        self._places: dict[Path | None, _Place] = {}
        self._of: dict[ProcessId, Path | None] = {}
        self._argument: str | None = None
        self._cpus: dict[int, frozenset[int]] = {}  # by node
        self._stored_before: int | None = None
        self._left_bytes = min(LEFT_BYTES_MOST, LEFT_BYTES_PER_CPU * (cpus or os.cpu_count() or 1))

    @property
    def not_yet_freed_bytes(self) -> int:
        """Written to swap because of us, and in RAM all the same."""
        return sum(place.held.ours for place in self._places.values())

    def look(self) -> int:
        """`not_yet_freed_bytes`, after a look at what the kernel has freed where nobody can be asked to."""
        place = self._places.get(None)
        if place is not None and place.held.ours:
            place.held.moved(0, self._swap_cached(place) or 0)
        return self.not_yet_freed_bytes

    def begin(self, files: ProcessFiles, now_s: float) -> None:
        """Before a batch of this process."""
        self._now_s = now_s
        if self._looked_s is None or not 0 <= now_s - self._looked_s < LOOK_S:
            self._looked_s = now_s
            self._kinds, self._zswap = read_swap_kinds(self._host), zswap_is_on(self._host)
            self.at_once = frees_at_once(self._kinds, self._zswap)
            if not self.at_once:
                self._cpus = {node: node_cpus(self._host, node) for node in memory_nodes(self._host)}
            zrams = [kind.device for kind in self._kinds if kind.kind is Swap.ZRAM]
            self._zrams = [str(self._host.path("sys/block", device, "mm_stat")) for device in zrams]
            self._is_told = all(kind.kind is not Swap.MEMORY for kind in self._kinds)
        self._stored_before = self._stored()
        if not self.at_once:
            self._place(files)

    def end(self, files: ProcessFiles, moved_bytes: int) -> Effect:
        """After the batch, of which so much went out."""
        stored = self._stored()
        taken = None if stored is None or self._stored_before is None else max(0, stored - self._stored_before)
        if self.at_once:
            return Effect(moved_bytes, taken)
        place = self._place(files)
        if moved_bytes:
            place.quiet_until_s = -math.inf
        cached = self._swap_cached(place)
        return Effect(None if cached is None else place.held.moved(moved_bytes, cached), taken)

    def forget(self, process: ProcessId) -> None:
        """It is no longer ours; what it left in the swap cache still is."""
        key = self._of.pop(process, None)
        if key in self._places and not self._places[key].held.ours and key not in self._of.values():
            del self._places[key]

    def wait_s(self) -> float | None:
        """Seconds until `free` can do something; None: there is nothing to do."""
        due = [place.due_s for place in self._places.values() if self._can_be_asked(place)]
        return max(0.0, min(due) - self._now_s) if due else None

    def free(self, now_s: float) -> int:
        """Ask for what is written and still charged, where it is time to. Returns what was freed."""
        self._now_s = now_s
        freed = 0
        for key, place in list(self._places.items()):
            if place.cgroup is None or not self._can_be_asked(place) or now_s < place.due_s:
                continue
            try:
                brought = self._reclaim(place, place.cgroup, now_s)
            except KernelCallError as failure:
                if failure.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
                brought = None
            if brought is None:
                del self._places[key]  # the cgroup is gone, or does not let us
                continue
            freed += brought
        return freed

    def _can_be_asked(self, place: _Place) -> bool:
        return place.cgroup is not None and place.held.ours >= self._left_bytes + STEP_BYTES_LEAST

    def _reclaim(self, place: _Place, cgroup: Cgroup, now_s: float) -> int | None:
        """What was freed since the last time; None: nothing can be asked of this cgroup."""
        freed, end_s = 0, time.monotonic() + SLICE_S
        are_ours: bool | None = None
        place.turn.due_s = now_s + place.turn.pause_s
        while True:
            before = cgroup.stat()
            if "swapcached" not in before:
                return None
            freed += place.held.moved(0, before["swapcached"])
            written = place.held.ours - before.get("file_writeback", 0) - self._left_bytes
            nodes = self._full_nodes(cgroup, before["swapcached"])
            due = [node for node in nodes if now_s >= place.nodes.setdefault(node, _Turn()).due_s]
            if not due:
                place.quiet_until_s = min((place.nodes[node].due_s for node in nodes), default=now_s + RECLAIM_S_MAX)
                return freed
            node = max(due, key=nodes.__getitem__)
            wanted = min(written, STEP_BYTES, nodes[node] - self._left_bytes)
            if wanted < STEP_BYTES_LEAST:
                return freed
            if are_ours is None:
                are_ours = self.are_ours(frozenset(cgroup.pids()))
                place.turn.done(now_s, well=are_ours)
            if not are_ours:
                return freed
            swap_before = cgroup.read_int("memory.swap.current") or 0
            with near(self._cpus.get(node, ())):
                if not self._ask(cgroup, wanted):
                    return None
            after = cgroup.stat()
            brought = place.held.moved(0, after.get("swapcached", 0))
            freed += brought
            others = max(0, (cgroup.read_int("memory.swap.current") or 0) - swap_before)
            others += max(0, before.get("file", 0) - after.get("file", 0))
            well = brought >= wanted // 8 and others <= wanted * OTHERS_SHARE
            if not well:
                place.nodes[node].done(now_s, well=False)
            elif place.nodes[node].pause_s > RECLAIM_S:
                place.nodes[node] = _Turn()
            if time.monotonic() >= end_s:
                return freed

    def _full_nodes(self, cgroup: Cgroup, swap_cached: int) -> dict[int, int]:
        """Bytes of the swap cache by node, of those that have enough of it to be asked for."""
        found = {0: swap_cached}
        if len(self._cpus) > 1:
            lines = (cgroup.read_text("memory.numa_stat") or "").splitlines()
            line = next((line for line in lines if line.startswith("swapcached ")), None)
            if line is not None:
                found = {int(node): int(size) for node, size in _ON_NODE.findall(line)}
        return {node: size for node, size in found.items() if size >= self._left_bytes + STEP_BYTES_LEAST}

    def _ask(self, cgroup: Cgroup, wanted: int) -> bool:
        """False: this kernel or these rights have no memory.reclaim."""
        arguments = _ANONYMOUS_ONLY if self._argument is None else (self._argument,)
        for argument in arguments:
            try:
                cgroup.write("memory.reclaim", f"{wanted} {argument}".strip())
            except KernelCallError as failure:
                if failure.errno == errno.EINVAL:
                    continue
                if failure.errno not in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                    return False
            self._argument = argument
            return True
        return False

    def _place(self, files: ProcessFiles) -> _Place:
        if files.process not in self._of:
            self._of[files.process] = memory_cgroup(self._host, files)
        key = self._of[files.process]
        place = self._places.get(key)
        if place is None:
            place = _Place(Held(0), None if key is None else Cgroup(key, self._host))
            place.held.others = self._swap_cached(place) or 0
            self._places[key] = place
        return place

    def _swap_cached(self, place: _Place) -> int | None:
        if place.cgroup is None:
            return meminfo(self._host).get("SwapCached")
        return place.cgroup.stat().get("swapcached")

    def _stored(self) -> int | None:
        """What all pages in swap take in RAM: 0 on a disk."""
        if not self._is_told:
            return None
        try:
            total = meminfo(self._host)["Zswap"] if self._zswap else 0
            for path in self._zrams:
                total += int(_read(path).split()[1])  # compr_data_size; Documentation/admin-guide/blockdev/zram.rst
        except (KernelCallError, OSError, KeyError, ValueError, IndexError):
            return None
        return total


def _read(path: str) -> bytes:
    """A file of one line. Twice for each batch: a fifth of what `Host.read_text` takes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def memory_cgroup(host: Host, files: ProcessFiles) -> Path | None:
    """The v2 cgroup that this process's memory is charged to, if one can be asked to reclaim; never the root.

    Raises:
        ProcessGone: it exited.
    """
    try:
        root = host.cgroup2_root
        lines = files.read("cgroup").decode("utf-8", "surrogateescape").splitlines()
    except ProcessGone:
        raise
    except (Unavailable, KernelCallError):
        return None
    own = PurePosixPath(next((line[3:] for line in lines if line.startswith("0::")), "/"))
    if ".." in own.parts:  # outside of our cgroup namespace
        return None
    for path in (own, *own.parents):
        found = root.joinpath(*path.parts[1:])
        if len(path.parts) > 1 and os.access(found / "memory.current", os.R_OK):
            return found if os.access(found / "memory.reclaim", os.W_OK) else None
    return None
