"""The demo's stage: a cgroup of its own with the workload in it, and what the kernel says of its memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memtier_engine.errors import KernelCallError, MemtierError, Unavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id, read_mappings, read_stat_fields
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.hostfs.proc import read_swaps
from memtier_engine.model import PAGE_BYTES, Spans, Tracker

_MAJFLT_FIELD = 12


@dataclass(frozen=True, slots=True)
class Memory:
    """The workload's memory at one moment, by its own pagemap."""

    hot_bytes: int
    cold_bytes: int
    hot_out_bytes: int
    cold_out_bytes: int
    refault_bytes: int
    """Read back from swap since the start, at most: what the workload's major faults may have brought in, and never
    more than the machine has read from swap."""


class Workload:
    """The running workload."""

    def __init__(self, process: subprocess.Popen[str], cgroup: Path) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise MemtierError(f"the demo's workload ended with status {process.wait()} before it was ready")
        where = json.loads(line)
        self.pid = process.pid
        self.cgroup = cgroup
        self.hot = _spans(where["hot"])
        self.cold = _spans(where["cold"])
        self.round_s: float = where["round_s"]
        """Time from one touch of a hot page to the next, on a machine with nothing else to do."""
        self._major_faults = self._read_major_faults()
        self._swapped_in = _swapped_in_pages()
        self._bytes_per_fault = PAGE_BYTES * readahead_pages(Host())

    def memory(self) -> Memory:
        """What is in RAM and what is out, now."""
        with Pagemap(Host(), self.pid) as pagemap:
            hot_out = pagemap.swapped_bytes(self.hot.starts, self.hot.ends)
            cold_out = pagemap.swapped_bytes(self.cold.starts, self.cold.ends)
        faults = self._read_major_faults() - self._major_faults
        swapped_in = (_swapped_in_pages() - self._swapped_in) * PAGE_BYTES
        refaults = min(faults * self._bytes_per_fault, swapped_in)
        return Memory(self.hot.total_bytes, self.cold.total_bytes, hot_out, cold_out, refaults)

    def _read_major_faults(self) -> int:
        return int(read_stat_fields(Host(), self.pid)[_MAJFLT_FIELD - 3])


def _swapped_in_pages() -> int:
    host = Host()
    found = re.search(r"^pswpin (\d+)$", host.read_text(host.path("proc/vmstat")), re.M)
    return int(found[1]) if found else 0


def scan_seconds(tracker: Tracker, load: Workload) -> float:
    """How long the tracker takes for one look at the workload here, in the best of some scans.

    The first is dearer, and on a machine that has just unpacked our own packages others may wait for its disk.
    """
    host = Host()
    process = process_id(host, load.pid)
    spans = read_mappings(host, load.pid).tierable()
    tracker.watch(frozenset({process}))
    seconds = float("inf")
    for _ in range(4):
        began_s = time.monotonic()
        for _chunk in tracker.scan(process, spans):
            pass
        seconds = min(seconds, time.monotonic() - began_s)
    return seconds


def readahead_pages(host: Host) -> int:
    """The most pages that one fault reads from swap: 1 from zram, else 2**vm.page-cluster.

    Source: mm/memory.c do_swap_page(): no readahead from SWP_SYNCHRONOUS_IO devices.
    """
    if all(Path(area.path).name.startswith("zram") for area in read_swaps(host)):
        return 1
    return int(2 ** host.read_int(host.path("proc/sys/vm/page-cluster")))


def _spans(ranges: list[tuple[int, int]]) -> Spans:
    array = np.array(sorted(ranges), np.uint64)
    return Spans(array[:, 0].copy(), array[:, 1].copy())


@contextmanager
def own_cgroup() -> Iterator[Path]:
    """A new cgroup, removed at the end with whatever is in it.

    Raises:
        Unavailable: no cgroup2 tree is mounted, or we may not make one in it.
    """
    path = Host().cgroup2_root / f"memtier-demo-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        raise Unavailable(f"cannot make the cgroup {path}: {error.strerror}", hint="run as root") from None
    try:
        yield path
    finally:
        for _ in range(250):
            with suppress(OSError):
                (path / "cgroup.kill").write_text("1")
            with suppress(OSError):
                path.rmdir()
                break
            time.sleep(0.02)  # the kernel reaps in its own time


@contextmanager
def workload(cgroup: Path, hot_mib: int, cold_mib: int, layout: str) -> Iterator[Workload]:
    """The workload in `cgroup`, ready and touching its memory; killed at the end."""
    arguments = [str(hot_mib), str(cold_mib), layout]
    command = [sys.executable, "-m", "memtier_cli.memtier.demo_scene.workload", *arguments]
    # A session of its own: Ctrl-C in the terminal ends the demo, and the demo ends the workload.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        try:
            (cgroup / "cgroup.procs").write_text(str(process.pid))
        except OSError as error:
            raise KernelCallError.from_errno(f"write {cgroup}/cgroup.procs", error.errno or 0) from None
        yield Workload(process, cgroup)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
