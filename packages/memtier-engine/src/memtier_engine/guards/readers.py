"""Where guards get their readings: the pressure, swap and cgroup files of the kernel. The only IO of the guards.

A reader may be asked as often as one likes: files are read again only after `READ_EVERY_S`. Kernel triggers are
polled at each call, which costs a system call.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loguru import logger

from memtier_engine.errors import KernelCallError, MemtierError
from memtier_engine.guards.base import MIB, Reading, Thresholds
from memtier_engine.guards.config import COMPRESSION_LEAST_BYTES, GuardsConfig
from memtier_engine.guards.sources import DIRECT, ShortageMeter, SwapWrites
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import SwapArea, meminfo, read_swaps
from memtier_engine.hostfs.psi import PressureLine, PsiTrigger, read_pressure
from memtier_engine.model import PAGE_BYTES

READ_EVERY_S = 0.5
"""The kernel itself renews its 10-second averages every 2 s; totals are exact whenever they are read."""
TRIGGER_WINDOWS_US = (1_000_000, 2_000_000)
"""Tried in turn: below 2 s needs CAP_SYS_RESOURCE (Linux 6.5 and newer)."""
RECENT_S = 0.9
"""Stalls are summed up over at least this long to say that the threshold is passed right now."""
IN_RAM = "all swap is in RAM (zram)"
NO_SWAP = "no swap area is in use"
_SECTOR_BYTES = 512
_WRITE_SECTORS_FIELD = 6
"""Of /sys/class/block/DEV/stat. Source: Documentation/block/stat.rst; sectors of 512 bytes whatever the device."""


class PressureReader:
    """One .pressure file: its 10-second average, and a faster sign that the threshold was passed."""

    def __init__(self, host: Host, path: Path, limits: Thresholds | None, *, trigger: bool) -> None:
        """`trigger`: also let the kernel watch; without, and where it refuses, totals are compared."""
        self._host = host
        self._path = path
        self._limits = limits
        self._wants_trigger = trigger and limits is not None and limits.at_once > 0
        self._trigger: PsiTrigger | None = None
        self._inode: int | None = None
        self._base: tuple[float, int] | None = None  # (time, total_us)
        self._fired_s: float | None = None
        self._trusted_from_s = 0.0

    @property
    def has_trigger(self) -> bool:
        """Whether the kernel watches for us."""
        return self._trigger is not None

    def poll(self, now_s: float) -> bool:
        """Whether the trigger fired since the last call."""
        if self._trigger is None or not self._trigger.wait(0) or now_s < self._trusted_from_s:
            return False
        self._fired_s = now_s
        return True

    def read(self, now_s: float) -> Reading:
        """Read the file."""
        if self._limits is None:
            return Reading(missing="switched off")
        try:
            self._follow_inode(now_s)
            pressure = read_pressure(self._host, self._path)
        except (KernelCallError, ValueError) as error:
            return Reading(missing=str(error))
        name = self._host.kernel_file(self._path)
        if pressure is None:
            return Reading(missing=f"{name}: no pressure information (CONFIG_PSI, psi=1)")
        if self._recent_percent(pressure.some, now_s) >= self._limits.at_once:
            self._fired_s = now_s
        return Reading(pressure.some.avg10_percent, fired_s=self._fired_s, note=name)

    def fired(self, reading: Reading) -> Reading:
        """`reading` with what `poll` has seen since."""
        return Reading(reading.value, reading.missing, self._fired_s, reading.note)

    def close(self) -> None:
        """Remove the trigger. Safe to call twice."""
        if self._trigger is not None:
            self._trigger.close()
            self._trigger = None
        self._wants_trigger = False

    def _follow_inode(self, now_s: float) -> None:
        """A cgroup that was removed and made anew under the same name needs a new trigger and new totals."""
        inode: int | None = None
        is_kernel_file = False
        try:
            found = self._path.stat()
            inode, is_kernel_file = found.st_ino, found.st_size == 0  # a copy of one has a size, and takes no trigger
        except OSError:
            pass
        if inode == self._inode:
            return
        self._inode, self._base, self._fired_s = inode, None, None
        if self._trigger is not None:
            self._trigger.close()
            self._trigger = None
        if is_kernel_file and self._wants_trigger:
            self._trigger = self._register()
            # In its first window a trigger counts stalls from before it was there (seen on 6.18); the totals do not.
            self._trusted_from_s = now_s + TRIGGER_WINDOWS_US[-1] / 1e6

    def _register(self) -> PsiTrigger | None:
        assert self._limits is not None
        failure = ""  # the text: an exception kept in a variable of its own frame is a cycle that keeps the engine
        for window_us in TRIGGER_WINDOWS_US:
            stall_us = max(1, int(window_us * self._limits.at_once / 100))
            try:
                return PsiTrigger(self._host, self._path, stall_us=stall_us, window_us=window_us)
            except KernelCallError as error:
                failure = str(error)
        logger.debug("no pressure trigger, totals are compared instead: {}", failure)
        return None

    def _recent_percent(self, line: PressureLine, now_s: float) -> float:
        """Share of the time since the last look, if that was long enough ago to tell."""
        base = self._base
        if base is None or now_s < base[0] or line.total_us < base[1]:
            self._base = (now_s, line.total_us)
            return 0.0
        passed_s = now_s - base[0]
        if passed_s < RECENT_S:
            return 0.0
        self._base = (now_s, line.total_us)
        return (line.total_us - base[1]) / (passed_s * 1e6) * 100


class NodeReader:
    """Readings of the whole node, shared by its engines. Methods may be called from any thread."""

    def __init__(self, host: Host, config: GuardsConfig) -> None:
        """`config`: where triggers fire; engines with other thresholds still see the averages."""
        self._host = host
        self._lock = threading.Lock()
        folder = host.path("proc", "pressure")
        self._memory = PressureReader(host, folder / "memory", config.memory_psi_node, trigger=True)
        self._io = PressureReader(host, folder / "io", config.io_psi_node, trigger=True)
        self._shortage = ShortageMeter()
        self._writes: dict[tuple[str, ...], SwapWrites] = {}
        """By the areas that are on disk: another one begins anew."""
        self._read_s: float | None = None
        self._readings: dict[str, Reading] = {}

    def read(self, now_s: float) -> Mapping[str, Reading]:
        """Readings by guard name; raises nothing, what cannot be read is `missing`."""
        with self._lock:
            fired = self._memory.poll(now_s) | self._io.poll(now_s)
            if self._read_s is None or not 0 <= now_s - self._read_s < READ_EVERY_S:
                self._read_s = now_s
                self._readings = self._all(now_s)
            elif fired:
                for name, source in (("psi-memory-node", self._memory), ("psi-io-node", self._io)):
                    self._readings[name] = source.fired(self._readings[name])
                self._excuse(self._readings, now_s)
            return dict(self._readings)

    def close(self) -> None:
        """Remove the triggers. Safe to call twice."""
        with self._lock:
            self._memory.close()
            self._io.close()

    def _all(self, now_s: float) -> dict[str, Reading]:
        readings = {"psi-memory-node": self._memory.read(now_s), "psi-io-node": self._io.read(now_s)}
        self._excuse(readings, now_s)
        try:
            areas = read_swaps(self._host)
        except (MemtierError, ValueError) as error:
            areas = []
            missing = str(error)
        else:
            missing = NO_SWAP
        if not areas:
            self._writes.clear()
            return readings | dict.fromkeys(("swap-fill", "swap-writes", "compression"), Reading(missing=missing))
        size = sum(area.size_bytes for area in areas)
        used = sum(area.used_bytes for area in areas)
        readings["swap-fill"] = Reading(100 * used / size if size else None, missing="swap areas of size 0")
        readings["swap-writes"] = self._swap_writes(areas, now_s)
        readings["compression"] = self._compression(areas)
        return readings

    def _excuse(self, readings: dict[str, Reading], now_s: float) -> None:
        """Stalls are the node's only while the node itself is short."""
        try:
            excuse = self._shortage.excuse(self._vmstat(*DIRECT), meminfo(self._host), now_s)
        except (KernelCallError, ValueError):
            return
        readings["psi-memory-node"] = replace(readings["psi-memory-node"], excuse=excuse)

    def _vmstat(self, *beginnings: str) -> dict[str, int]:
        """The counters whose names begin so; of 190, which take 0.1 ms, few are of use."""
        lines = self._host.read_text(self._host.path("proc/vmstat")).splitlines()
        return {
            name: int(value)
            for name, _, value in (line.partition(" ") for line in lines if line.startswith(beginnings))
        }

    def _swap_writes(self, areas: Sequence[SwapArea], now_s: float) -> Reading:
        disks = {area.path: self._disk_bytes(area) for area in areas if self._on_disk(area)}
        if not disks:
            self._writes.clear()
            return Reading(missing=IN_RAM)
        files = any(area.kind != "partition" for area in areas)
        known = {path: total for path, total in disks.items() if total is not None}
        all_swap: int | None = None
        if files:
            try:
                all_swap = self._vmstat("pswpout")["pswpout"] * PAGE_BYTES
            except (KernelCallError, ValueError, KeyError):
                pass
        if not known and all_swap is None:
            return Reading(missing=f"nothing counts what is written to {', '.join(disks)}")
        devices = {area.path: self._block_bytes(area) or 0 for area in areas if area.kind == "partition"}
        names = tuple(sorted(disks))
        if names not in self._writes:
            self._writes = {names: SwapWrites()}
        written = self._writes[names].add(known, devices, all_swap, now_s, self._uptime_s())
        return Reading(float(written), note="last 24 h, " + ", ".join(disks))

    def _uptime_s(self) -> float | None:
        """Since when the kernel's counters count. None: not known."""
        try:
            return float(self._host.read_text(self._host.path("proc/uptime")).split()[0])
        except (KernelCallError, ValueError, IndexError):
            return None

    def _on_disk(self, area: SwapArea) -> bool:
        """Whether what is written to it wears out a disk: zram does only with a backing device."""
        if not is_zram(area):
            return True
        try:
            path = self._host.path("sys/block", Path(area.path).name, "backing_dev")
            return self._host.read_text(path).strip() not in ("", "none")
        except KernelCallError:  # CONFIG_ZRAM_WRITEBACK is off
            return False

    def _disk_bytes(self, area: SwapArea) -> int | None:
        """Bytes ever written to the disk of a swap area that has a counter of its own. None: it has none."""
        if not is_zram(area):
            return self._block_bytes(area) if area.kind == "partition" else None
        try:
            # bd_count bd_reads bd_writes, in units of 4 KiB. Source: admin-guide/blockdev/zram.rst
            text = self._host.read_text(self._host.path("sys/block", Path(area.path).name, "bd_stat"))
            return int(text.split()[2]) * 4096
        except (KernelCallError, ValueError, IndexError):
            return None

    def _block_bytes(self, area: SwapArea) -> int | None:
        """Bytes ever written to a block device."""
        try:
            path = self._host.path("sys/class/block", Path(area.path).name, "stat")
            return int(self._host.read_text(path).split()[_WRITE_SECTORS_FIELD]) * _SECTOR_BYTES
        except (KernelCallError, ValueError, IndexError):
            return None

    def _compression(self, areas: Sequence[SwapArea]) -> Reading:
        found: list[tuple[str, int, int]] = []  # name, original and stored bytes
        try:
            for area in filter(is_zram, areas):
                path = self._host.path("sys/block", Path(area.path).name, "mm_stat")
                fields = self._host.read_text(path).split()
                # orig_data_size compr_data_size mem_used_total ... Source: admin-guide/blockdev/zram.rst
                found.append((Path(area.path).name, int(fields[0]), int(fields[2])))
            memory = meminfo(self._host)
        except (KernelCallError, ValueError, IndexError) as error:
            return Reading(missing=str(error))
        if memory.get("Zswapped"):  # Linux 5.19 and newer
            found.append(("zswap", memory["Zswapped"], memory.get("Zswap", 0)))
        if not found:
            return Reading(missing="neither zram nor zswap is in use")
        telling = [each for each in found if each[1] >= COMPRESSION_LEAST_BYTES and each[2]]
        if not telling:
            inside = ", ".join(f"{original / MIB:.3g} MiB in {name}" for name, original, _ in found)
            return Reading(missing=f"{inside}: too little to tell")
        # What compresses well in one must not hide what does not in another.
        name, original, stored = min(telling, key=lambda each: each[1] / each[2])
        return Reading(original / stored, note=name)


class CgroupReader:
    """Readings of an engine's own cgroups: the worst of them counts."""

    def __init__(self, host: Host, paths: Sequence[Path], config: GuardsConfig) -> None:
        """`paths`: directories, which may come and go; without any there are no readings."""
        self._cgroups = [Cgroup(path, host) for path in paths]
        self._pressure = [
            (name, [PressureReader(host, path / file, limits, trigger=file == "memory.pressure") for path in paths])
            for name, file, limits in (
                ("psi-memory-cgroup", "memory.pressure", config.memory_psi_cgroup),
                ("psi-io-cgroup", "io.pressure", config.io_psi_cgroup),
            )
        ]
        self._read_s: float | None = None
        self._readings: dict[str, Reading] = {}

    def read(self, now_s: float) -> Mapping[str, Reading]:
        """See `NodeReader.read`."""
        fired = False
        for _, sources in self._pressure:
            for source in sources:
                fired |= source.poll(now_s)
        if fired or self._read_s is None or not 0 <= now_s - self._read_s < READ_EVERY_S:
            self._read_s = now_s
            self._readings = {
                name: _worst([source.read(now_s) for source in sources]) for name, sources in self._pressure
            }
            self._readings["protection"] = self._headroom()
        return self._readings

    def close(self) -> None:
        """Remove the triggers. Safe to call twice."""
        for _, sources in self._pressure:
            for source in sources:
                source.close()

    def _headroom(self) -> Reading:
        """Bytes above what memory.min and memory.low guarantee, in the cgroup that has the least."""
        if not self._cgroups:
            return _NO_CGROUP
        least: Reading | None = None
        for cgroup in self._cgroups:
            try:
                current = cgroup.read_int("memory.current")
                protected = max(_limit(cgroup, "memory.min", current), _limit(cgroup, "memory.low", current))
            except KernelCallError as error:
                return Reading(missing=str(error))
            if current is None or not protected:
                continue
            if least is None or least.value is None or current - protected < least.value:
                least = Reading(float(current - protected), note=cgroup.host.kernel_file(cgroup.path))
        return least or Reading(missing="no memory.min or memory.low is set")


_NO_CGROUP = Reading(missing="the engine's target is no cgroup")


def is_zram(area: SwapArea) -> bool:
    """Whether a swap area is RAM."""
    return Path(area.path).name.startswith("zram")


def _limit(cgroup: Cgroup, name: str, current: int | None) -> int:
    """A protection in bytes: 0 without, all there is with "max"."""
    text = (cgroup.read_text(name) or "0").strip()
    return (current or 0) if text == "max" else int(text)


def _worst(readings: Sequence[Reading]) -> Reading:
    if not readings:
        return _NO_CGROUP
    fired = [reading.fired_s for reading in readings if reading.fired_s is not None]
    known = [reading for reading in readings if reading.value is not None]
    worst = max(known, key=lambda reading: reading.value or 0.0) if known else readings[0]
    return Reading(worst.value, worst.missing, max(fired) if fired else None, worst.note)
