"""NUMA nodes: which are there, how much memory they have, how far apart they are, and whose a frame is."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, U64

_NODES = "sys/devices/system/node"
_MEMORY_LINE = re.compile(r"^Node \d+ ([^:\n]+):\s+(\d+)( kB)?$", re.M)
_ZONE = re.compile(r"^Node (\d+), zone +(\S+)$(.*?)(?=^Node |\Z)", re.M | re.S)
_MEMORY_BLOCK = re.compile(r"memory(\d+)")
UNKNOWN_NODE = -1
"""In an array of nodes, a frame that belongs to none."""


def parse_id_list(text: str) -> tuple[int, ...]:
    """A kernel list of numbers: "0-2,5" is (0, 1, 2, 5)."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def online_nodes(host: Host) -> tuple[int, ...]:
    """The nodes that are online; (0,) on a kernel without CONFIG_NUMA."""
    path = host.path(_NODES, "online")
    return parse_id_list(host.read_text(path)) if path.exists() else (0,)


def memory_nodes(host: Host) -> tuple[int, ...]:
    """The nodes that have memory."""
    path = host.path(_NODES, "has_memory")
    return parse_id_list(host.read_text(path)) if path.exists() else online_nodes(host)


def node_cpus(host: Host, node: int) -> frozenset[int]:
    """The CPUs of a node; none if it has none, or is not there."""
    path = host.path(_NODES, f"node{node}", "cpulist")
    return frozenset(parse_id_list(host.read_text(path))) if path.exists() else frozenset()


@contextmanager
def near(cpus: Collection[int]) -> Iterator[None]:
    """Run the calling thread on these CPUs meanwhile, as far as it may run there; where it may not, as it was."""
    before = os.sched_getaffinity(0)
    wanted = before.intersection(cpus)
    if not wanted or wanted == before:
        yield
        return
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        with suppress(OSError):  # its cpuset was changed meanwhile: the kernel has seen to it
            os.sched_setaffinity(0, before)


def node_meminfo(host: Host, node: int) -> dict[str, int]:
    """MemTotal, MemFree, ... of a node in bytes.

    Raises:
        KernelCallError: ENOENT: no such node.
    """
    text = host.read_text(host.path(_NODES, f"node{node}", "meminfo"))
    return {name: int(value) * (1024 if unit else 1) for name, value, unit in _MEMORY_LINE.findall(text)}


def node_distances(host: Host) -> dict[int, dict[int, int]]:
    """Distance from each online node to each, as the firmware says: 10 is "the same node"."""
    nodes = online_nodes(host)
    distances = {}
    for node in nodes:
        path = host.path(_NODES, f"node{node}", "distance")
        if path.exists():
            values = map(int, host.read_text(path).split())
            distances[node] = dict(zip(nodes, values, strict=False))
        else:
            distances[node] = {other: 10 if other == node else 20 for other in nodes}
    return distances


@dataclass(frozen=True, slots=True)
class FrameNodes:
    """Which node the machine's frames are on: ranges [r], ascending, disjoint."""

    first_pfns: U64
    end_pfns: U64
    nodes: NDArray[np.int32]

    def of(self, pfns: U64) -> NDArray[np.int32]:
        """int32[n]: the node of each frame, `UNKNOWN_NODE` outside the ranges."""
        if len(self.nodes) == 0:
            return np.full(len(pfns), UNKNOWN_NODE, np.int32)
        at = np.searchsorted(self.first_pfns, pfns, side="right") - 1
        found = (at >= 0) & (pfns < self.end_pfns[np.maximum(at, 0)])
        return np.where(found, self.nodes[np.maximum(at, 0)], np.int32(UNKNOWN_NODE)).astype(np.int32)


def frame_nodes(host: Host) -> FrameNodes:
    """The table of frames: from memory blocks where the kernel has them, else from /proc/zoneinfo.

    Zones are spans with holes and on some machines overlap; blocks (CONFIG_MEMORY_HOTPLUG) are exact.
    """
    ranges = _block_ranges(host) or _zone_ranges(host)
    ranges.sort()
    merged: list[tuple[int, int, int]] = []
    for first, end, node in ranges:
        if merged and merged[-1][1] == first and merged[-1][2] == node:
            merged[-1] = (merged[-1][0], end, node)
        else:
            merged.append((first, end, node))
    columns = np.array(merged, np.uint64).reshape(-1, 3)
    return FrameNodes(columns[:, 0].copy(), columns[:, 1].copy(), columns[:, 2].astype(np.int32))


def _block_ranges(host: Host) -> list[tuple[int, int, int]]:
    size = host.path("sys/devices/system/memory/block_size_bytes")
    if not size.exists():
        return []
    frames = int(host.read_text(size), 16) // PAGE_BYTES
    ranges = []
    for node in online_nodes(host):
        for name in os.listdir(host.path(_NODES, f"node{node}")):
            if found := _MEMORY_BLOCK.fullmatch(name):
                first = int(found[1]) * frames
                ranges.append((first, first + frames, node))
    return ranges


def _zone_ranges(host: Host) -> list[tuple[int, int, int]]:
    path = host.path("proc", "zoneinfo")
    if not path.exists():
        return []
    ranges = []
    for node, _zone, body in _ZONE.findall(host.read_text(path)):
        spanned = re.search(r"^ +spanned +(\d+)$", body, re.M)
        first = re.search(r"^ +start_pfn: +(\d+)$", body, re.M)
        if spanned and first and int(spanned[1]):
            ranges.append((int(first[1]), int(first[1]) + int(spanned[1]), int(node)))
    return ranges
