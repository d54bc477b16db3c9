"""Pages of interest: another program says in files which memory of which processes may be moved.

`DIR/PID.vab` holds pairs of little-endian 64-bit addresses, start and end (exclusive). Who writes them holds an
exclusive flock of `DIR/lock` meanwhile, for example `flock -x -o DIR/lock CMD`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import numpy as np
from loguru import logger

from memtier_engine.distinct import among, distinct
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, U64, ProcessId, Spans
from memtier_engine.targets.base import identify

FILE_BYTES_MAX = 64 << 20
"""4 million ranges; a larger file is ignored."""
_SUFFIX = ".vab"
_PAIR_BYTES = 16


class PagesOfInterestTarget:
    """The processes that have a file, limited to the ranges in it. A target with `restrict`."""

    def __init__(self, host: Host, directory: str | Path) -> None:
        """Raises ConfigError if `directory` is none."""
        self._host = host
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise ConfigError(
                f"{self._directory} is no directory", key_path="pagesofinterestdir", hint="make it before the start"
            )
        self._ranges: dict[ProcessId, Spans] = {}
        self._files: dict[int, tuple[bytes, Spans]] = {}
        """By pid: what its file said, and the ranges in it."""
        self._restricted: dict[ProcessId, tuple[Spans, Spans, Spans]] = {}
        """What was asked last: ranges, mapped, and the answer."""

    def poll(self) -> frozenset[ProcessId]:
        """Read all files; while somebody is writing them, what was there last time."""
        lock = self._locked()
        if lock is None:
            return frozenset(self._ranges)
        try:
            found = self._read_all()
        finally:
            os.close(lock)
        processes = {process.pid: process for process in identify(self._host, found)}
        self._ranges = {processes[pid]: spans for pid, spans in found.items() if pid in processes}
        for gone in self._restricted.keys() - self._ranges.keys():
            del self._restricted[gone]
        return frozenset(self._ranges)

    def restrict(self, process: ProcessId, mapped: Spans) -> Spans:
        """The parts of `mapped` that are of interest; for the same `mapped`, the same object while its file says so."""
        ranges = self._ranges.get(process)
        if ranges is None:
            return Spans.empty()
        known = self._restricted.get(process)
        if known is None or known[0] is not ranges or known[1] is not mapped:
            known = self._restricted[process] = (ranges, mapped, intersection(ranges, mapped))
        return known[2]

    def _locked(self) -> int | None:
        """The open lock file, or None while a writer has it."""
        path = self._directory / "lock"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise self._host.error(path, error, "open") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
                return None
            raise self._host.error(path, error, "lock") from None
        return fd

    def _read_all(self) -> dict[int, Spans]:
        found: dict[int, tuple[bytes, Spans]] = {}
        try:
            names = os.listdir(self._directory)
        except OSError as error:
            raise self._host.error(self._directory, error, "list") from None
        directory = str(self._directory)
        for name in names:
            pid = name.removesuffix(_SUFFIX)
            if name.endswith(_SUFFIX) and pid.isdecimal() and len(pid) < 10:
                data = self._read(f"{directory}/{name}")
                if data is not None:
                    known = self._files.get(int(pid))
                    unchanged = known is not None and known[0] == data
                    found[int(pid)] = known if known is not None and unchanged else (data, parse_ranges(data))
        self._files = found
        return {pid: spans for pid, (_, spans) in found.items()}

    def _read(self, path: str) -> bytes | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None  # removed meanwhile, or a link
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size % _PAIR_BYTES or status.st_size > FILE_BYTES_MAX:
                logger.warning("{}: not pairs of 64-bit addresses, ignored", path)
                return None
            data = os.read(fd, status.st_size)
            return data if len(data) == status.st_size else None
        except OSError:
            return None
        finally:
            os.close(fd)


def parse_ranges(data: bytes) -> Spans:
    """Pairs of addresses as ascending, disjoint spans of whole pages; pairs that end before they start are left out."""
    pairs = np.frombuffer(data, "<u8").reshape(-1, 2)
    pairs = pairs[pairs[:, 1] > pairs[:, 0]]
    shift = np.uint64(PAGE_SHIFT)
    starts: U64 = (pairs[:, 0] >> shift) << shift
    pages = (pairs[:, 1] - pairs[:, 0]) >> shift
    limit = np.uint64((1 << 63) - PAGE_BYTES)
    ends = np.minimum(starts + np.minimum(pages << shift, limit), limit)
    return union(starts[starts < ends], ends[starts < ends])


def union(starts: U64, ends: U64) -> Spans:
    """Ranges in any order as ascending, disjoint spans; those that touch or overlap are joined."""
    if not len(starts):
        return Spans.empty()
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.concatenate(([True], starts[1:] > reach[:-1]))
    return Spans(starts[first], reach[np.concatenate((first[1:], [True]))])


def intersection(one: Spans, two: Spans) -> Spans:
    """The parts in both."""
    if not len(one) or not len(two):
        return Spans.empty()
    points = distinct(np.concatenate((one.starts, one.ends, two.starts, two.ends)))
    starts, ends = points[:-1], points[1:]
    inside = np.ones(len(starts), np.bool_)
    for spans in (one, two):
        at = np.searchsorted(spans.starts, starts, side="right") - 1
        inside &= (at >= 0) & (starts < spans.ends[np.maximum(at, 0)])
    # Borders of `two` stay borders: a scan's chunks must lie in one mapping each.
    keep = np.flatnonzero(inside)
    if not len(keep):
        return Spans.empty()
    breaks = (ends[keep[:-1]] != starts[keep[1:]]) | among(starts[keep[1:]], two.starts)
    first = np.concatenate(([True], breaks))
    return Spans(starts[keep][first], ends[keep][np.concatenate((breaks, [True]))])
