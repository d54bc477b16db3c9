"""What kind of swap this machine has, which decides when a page that is paged out stops taking up RAM.

A page goes to swap by way of the swap cache. A device that is done with a write when it was asked for it (zram, other
memory: SWP_SYNCHRONOUS_IO) gives the page free at once, and so does zswap, which takes it before any device. On a disk
or a file the write ends later: MADV_PAGEOUT leaves the page in the swap cache, charged to its cgroup, until somebody
reclaims there.

Source: mm/swapfile.c, swapon(): bdev_synchronous(); mm/vmscan.c, pageout() and shrink_folio_list().
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import SwapArea, read_swaps

_SYNCHRONOUS = re.compile(r"(zram|ram|pmem)\d")
"""Names of block devices with BLK_FEAT_SYNCHRONOUS, of which sysfs does not tell."""
_FULL_BYTES = 1 << 20
"""CPUs hold on to clusters of 2 MiB of their own, so full areas have some pages left that others do not get."""


class Swap(StrEnum):
    """Where pages go."""

    ZRAM = "zram"
    MEMORY = "memory"
    """A device that is memory, uncompressed: brd, pmem."""
    DISK = "disk"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class SwapKind:
    """One swap area."""

    area: SwapArea
    kind: Swap

    @property
    def device(self) -> str:
        """Name of the block device or file."""
        return PurePath(self.area.path).name

    @property
    def synchronous(self) -> bool:
        """Whether the page is free when the call returns that pages it out."""
        return self.kind in (Swap.ZRAM, Swap.MEMORY)


def kind_of(area: SwapArea) -> Swap:
    """By what /proc/swaps says of it."""
    if area.kind == "file":
        return Swap.FILE
    name = PurePath(area.path).name
    if not _SYNCHRONOUS.match(name):
        return Swap.DISK
    return Swap.ZRAM if name.startswith("zram") else Swap.MEMORY


def read_swap_kinds(host: Host) -> list[SwapKind]:
    """All areas in use, the one that is filled first in front."""
    areas = sorted(read_swaps(host), key=lambda area: -area.priority)
    return [SwapKind(area, kind_of(area)) for area in areas]


def zswap_is_on(host: Host) -> bool:
    """Whether zswap takes pages before they get to a device."""
    try:
        return host.read_text(host.path("sys/module/zswap/parameters/enabled")).strip() == "Y"
    except KernelCallError:
        return False


def frees_at_once(kinds: list[SwapKind], zswap: bool) -> bool:
    """Whether what is paged out is free when the call returns, as far as areas with room are concerned."""
    return zswap or all(kind.synchronous for kind in kinds if kind.area.free_bytes > 0)


def no_room(host: Host) -> bool:
    """Whether no swap is on, or all of it is full. False where the kernel does not tell."""
    try:
        free_bytes = sum(area.free_bytes for area in read_swaps(host))
        return host.path("proc/swaps").exists() and free_bytes < _FULL_BYTES
    except (KernelCallError, ValueError):
        return False


def in_words(host: Host) -> str:
    """The kinds of swap and what follows, for a person; "" without swap."""
    kinds, zswap = read_swap_kinds(host), zswap_is_on(host)
    if not kinds:
        return ""
    found = ", ".join(dict.fromkeys(kind.kind.value for kind in kinds))
    how = "frees at once" if frees_at_once(kinds, zswap) else "frees when written and reclaimed (cgroup v2 only)"
    return f"{'zswap before ' if zswap else ''}{found}: {how}"
