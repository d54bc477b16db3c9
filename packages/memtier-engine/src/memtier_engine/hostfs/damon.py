"""DAMON's sysfs files: taking a kdamond that nobody uses, telling it what to watch, reading what it saw.

Source: Documentation/admin-guide/mm/damon/usage.rst. Results are read by "tried regions": a scheme with action
`stat` that every region fits. There is one scheme per process, which a filter ties to that process, since tried
regions do not say whose they are.

Kdamonds are shared with everybody on the machine. We only take one that is off and has no context; we only
raise their number when it is 0 (the kernel drops all kdamonds when it is written), and only then lower it again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from memtier_engine.errors import ConfigError, KernelCallError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import U64, Spans

KDAMONDS = "sys/kernel/mm/damon/admin/kdamonds"
_U32_MAX, _U64_MAX = (1 << 32) - 1, (1 << 64) - 1
_BUSY_TRIES, _BUSY_PAUSE_S = 100, 0.02
_Result = TypeVar("_Result")
_TARGET_AREAS = 3
"""The kernel watches each process as this many areas, between the largest holes of its address space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DamonAttributes:
    """How a kdamond looks; see the kernel's documentation for what each costs."""

    sample_us: int
    aggregation_us: int
    update_us: int
    regions_min: int
    regions_max: int


@dataclass(frozen=True, slots=True)
class DamonRegions:
    """What a kdamond knows of one process: regions [n], ascending."""

    starts: U64
    ends: U64  # exclusive
    accesses: NDArray[np.int64]  # samples of the last aggregation in which the region was found accessed
    ages: NDArray[np.int64]  # aggregations since its accesses changed

    def __len__(self) -> int:
        return len(self.starts)


class _Files:
    """They are all EBUSY while the kernel does somebody's command, reading included, and that may take until the end
    of his aggregation (`damon_sysfs_lock` in mm/damon/sysfs.c). Tried for two seconds."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def read_text(self, path: Path) -> str:
        return self._patiently(lambda: self._host.read_text(path))

    def read_int(self, path: Path) -> int:
        return self._patiently(lambda: self._host.read_int(path))

    def write(self, path: Path, text: str) -> None:
        self._patiently(lambda: self._host.write(path, text))

    def _patiently(self, call: Callable[[], _Result]) -> _Result:
        for _ in range(_BUSY_TRIES - 1):
            try:
                return call()
            except KernelCallError as failure:
                if failure.errno != errno.EBUSY:
                    raise
            time.sleep(_BUSY_PAUSE_S)
        return call()


class Kdamond:
    """One kdamond that is ours until `close`."""

    def __init__(self, host: Host, *, among: Sequence[int] = (), create: int = 1) -> None:
        """Take a free one.

        Args:
            host: the machine.
            among: take one of these numbers; empty: any.
            create: how many to make if the machine has none.
        Raises:
            TrackerUnavailable: no DAMON, no rights, or all kdamonds are in use.
            ConfigError: `among` names one that does not exist.
        """
        self._host, self._files = host, _Files(host)
        self._base = host.path(KDAMONDS)
        self._made = 0
        self._lock = -1
        if not (self._base / "nr_kdamonds").exists():
            raise TrackerUnavailable(
                f"{host.kernel_file(self._base)} does not exist", hint="a kernel with CONFIG_DAMON_SYSFS=y"
            )
        try:
            count = self._files.read_int(self._base / "nr_kdamonds")
            if count == 0:
                self._files.write(self._base / "nr_kdamonds", str(create))
                count = self._made = create
            self.number = self._take(count, among)
        except KernelCallError as failure:
            raise TrackerUnavailable(f"DAMON: {failure}", hint="run as root, with /sys read-write") from None
        self._path = self._base / str(self.number)
        self._context = self._path / "contexts" / "0"
        self._pids: list[int] = []

    def _take(self, count: int, among: Sequence[int]) -> int:
        for number in among:
            if not 0 <= number < count:
                raise ConfigError(
                    f"there is no kdamond {number}", key_path="kdamondslist", hint=f"from 0 to {count - 1}"
                )
        used = []
        for number in among or range(count):
            path = self._base / str(number)
            lock = self._host.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_free(path):
                    self._files.write(path / "contexts" / "nr_contexts", "1")
                    self._lock = lock
                    return number
            except BlockingIOError:
                pass  # another of our programs is just taking it, or has it
            except KernelCallError:
                os.close(lock)
                raise
            os.close(lock)
            used.append(number)
        raise TrackerUnavailable(
            f"DAMON: kdamond{'s' if len(used) > 1 else ''} {', '.join(map(str, used))} in use by somebody else",
            hint=f"stop the other user, then write 0 to /{KDAMONDS}/nr_kdamonds; or use another tracker",
        )

    def _is_free(self, path: Path) -> bool:
        off = self._files.read_text(path / "state").strip() == "off"
        return off and self._files.read_int(path / "contexts" / "nr_contexts") == 0

    def operations(self) -> frozenset[str]:
        """What it can watch, as the kernel was built: `vaddr` processes, `paddr` physical memory."""
        return frozenset(self._files.read_text(self._context / "avail_operations").split())

    def configure(self, attributes: DamonAttributes, operations: str = "vaddr") -> None:
        """Set how to look. Raises KernelCallError: EINVAL for values that the kernel does not take."""
        self._write("operations", operations)
        intervals, regions = "monitoring_attrs/intervals", "monitoring_attrs/nr_regions"
        self._write(f"{intervals}/aggr_us", attributes.aggregation_us)
        self._write(f"{intervals}/sample_us", attributes.sample_us)
        self._write(f"{intervals}/update_us", attributes.update_us)
        # The kernel checks the pair when it starts: order does not matter.
        self._write(f"{regions}/min", attributes.regions_min)
        self._write(f"{regions}/max", attributes.regions_max)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes it is told to watch, by number of their scheme."""
        return tuple(self._pids)

    def running(self) -> bool:
        """Whether it works; the kernel ends it when all its processes are gone."""
        return self._files.read_text(self._path / "state").strip() == "on"

    def watch(self, pids: Iterable[int], known: dict[int, Spans] | None = None) -> None:
        """Watch these processes from now on. Those that stay keep what was learnt of them.

        Args:
            pids: all of them.
            known: areas that were watched so far, by pid; without them the kernel begins anew for all.
        Raises:
            KernelCallError: EINVAL when one of the processes is gone by now.
        """
        wanted = list(dict.fromkeys(pids))
        # A process keeps its number, as the kernel's targets are known by number; gaps are filled from the end.
        kept = [pid if pid in wanted else None for pid in self._pids]
        new = [pid for pid in wanted if pid not in self._pids]
        for index, pid in enumerate(kept):
            if pid is None and new:
                kept[index] = new.pop(0)
        while None in kept:
            last = kept.pop()
            if last is not None:
                kept[kept.index(None)] = last
        self._pids = [pid for pid in kept if pid is not None] + new
        if not self._pids:
            self.stop()
            return
        was_running = self.running()
        known = known if was_running and known else {}
        self._write_targets([known.get(pid, Spans.empty()) for pid in self._pids])
        for index, pid in enumerate(self._pids):
            self._write(f"targets/{index}/pid_target", pid)
        self._write_schemes(len(self._pids), by_target=True)
        self._command("commit" if was_running else "on")

    def watch_memory(self, areas: Spans) -> None:
        """With operations `paddr`, switched off: watch these physical addresses.

        Raises:
            KernelCallError: the kernel does not take them.
        """
        self._write_targets([areas])
        self._write_schemes(1, by_target=False)
        self._command("on")

    def read_memory(self) -> DamonRegions:
        """With operations `paddr`: what it knows. See `read`."""
        self._command("update_schemes_tried_regions")
        return self._regions(0)

    def read(self) -> dict[int, DamonRegions]:
        """What it knows, by pid. Waits for the end of an aggregation; four small files are read per region.

        Raises:
            KernelCallError: EINVAL when it does not run (any more).
        """
        self._command("update_schemes_tried_regions")
        return {pid: self._regions(index) for index, pid in enumerate(self._pids)}

    def stop(self) -> None:
        """Switch it off if it is on."""
        if self.running():
            try:
                self._command("off")
            except KernelCallError:  # it ended by itself
                pass

    def close(self) -> None:
        """Switch it off and leave everything as it was. Safe to call twice."""
        if self._lock < 0:
            return
        try:
            self.stop()
            self._files.write(self._path / "contexts" / "nr_contexts", "0")
            if self._made and self._all_free():
                self._files.write(self._base / "nr_kdamonds", "0")
        except KernelCallError:
            pass  # somebody else changed the number meanwhile, and with it dropped ours
        finally:
            os.close(self._lock)
            self._lock = -1

    def _all_free(self) -> bool:
        count = self._files.read_int(self._base / "nr_kdamonds")
        return count == self._made and all(self._is_free(self._base / str(number)) for number in range(count))

    def _write(self, name: str, value: str | int) -> None:
        self._files.write(self._context / name, str(value))

    def _command(self, command: str) -> None:
        self._files.write(self._path / "state", command)

    def _write_targets(self, targets: Sequence[Spans]) -> None:
        self._set_count("targets/nr_targets", len(targets))
        for index, areas in enumerate(targets):
            if self._files.read_int(self._context / f"targets/{index}/regions/nr_regions") != len(areas):
                self._write(f"targets/{index}/regions/nr_regions", len(areas))
            for number, (start, end) in enumerate(zip(areas.starts.tolist(), areas.ends.tolist(), strict=True)):
                self._write(f"targets/{index}/regions/{number}/start", start)
                self._write(f"targets/{index}/regions/{number}/end", end)

    def _write_schemes(self, count: int, *, by_target: bool) -> None:
        first = self._set_count("schemes/nr_schemes", count)
        for index in range(first, count):
            scheme = f"schemes/{index}"
            self._write(f"{scheme}/action", "stat")
            for name, most in (("sz", _U64_MAX), ("nr_accesses", _U32_MAX), ("age", _U32_MAX)):
                self._write(f"{scheme}/access_pattern/{name}/min", 0)
                self._write(f"{scheme}/access_pattern/{name}/max", most)
            if by_target:
                self._write(f"{scheme}/filters/nr_filters", 1)
                self._write(f"{scheme}/filters/0/type", "target")
                self._write(f"{scheme}/filters/0/damon_target_idx", index)
                self._write(f"{scheme}/filters/0/matching", "N")  # what is not of this target is filtered out

    def _set_count(self, name: str, count: int) -> int:
        """Write the number if it differs. Returns the first directory that is new: all are, if it was written."""
        if self._files.read_int(self._context / name) == count:
            return count
        self._write(name, count)
        return 0

    def _regions(self, index: int) -> DamonRegions:
        directory = self._context / "schemes" / str(index) / "tried_regions"
        rows = []
        for name in os.listdir(directory):
            if name.isdecimal():
                row = [_read_number(f"{directory}/{name}/{field}") for field in ("start", "end", "nr_accesses", "age")]
                rows.append(row)
        table = np.array(sorted(rows), np.uint64).reshape(-1, 4)
        counts = table[:, 2:].astype(np.int64)
        return DamonRegions(table[:, 0].copy(), table[:, 1].copy(), counts[:, 0].copy(), counts[:, 1].copy())


def _read_number(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(fd, 32))
    except ValueError:
        raise KernelCallError(f"read {path}: no number", errno.EINVAL) from None
    finally:
        os.close(fd)


def areas_of(regions: DamonRegions) -> Spans:
    """The regions as the few areas that the kernel watches."""
    return joined(Spans(regions.starts, regions.ends))


def joined(spans: Spans) -> Spans:
    """As few spans as the kernel makes of an address space: only the largest holes are left out."""
    if not len(spans):
        return spans
    gaps = spans.starts[1:] - spans.ends[:-1]
    largest = np.sort(np.argsort(gaps, kind="stable")[::-1][: _TARGET_AREAS - 1])
    cuts = largest[gaps[largest] > 0]
    return Spans(spans.starts[np.concatenate(([0], cuts + 1))], spans.ends[np.concatenate((cuts, [len(spans) - 1]))])
