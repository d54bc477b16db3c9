"""Bytes in, memory reclaimed: a cgroup is asked to give up so much, and the kernel chooses the pages.

For cgroups where nobody should look at single pages (the way of Transparent Memory Offloading). The kernel takes
what its own LRU holds for oldest, page cache included, and respects memory.min and memory.low.

Source: Documentation/admin-guide/cgroup-v2.rst, memory.reclaim (Linux 5.19; `swappiness=` since 6.10).
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path

from memtier_engine.errors import KernelCallError, Unavailable
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES
from memtier_engine.mover.bucket import MIB, TokenBucket
from memtier_engine.mover.mover import CALL_TARGET_S, MoverConfig

BATCH_BYTES_MAX = 64 * MIB
BATCH_BYTES_MIN = 256 * 1024
DRY_CALLS_MAX = 3
"""Calls in a row without any effect after which the rest of a request is given up."""


@dataclass(frozen=True, slots=True)
class ReclaimOutcome:
    """What one call did."""

    requested_bytes: int
    reclaimed_bytes: int
    """By which memory.current fell; more was reclaimed if the cgroup allocated meanwhile."""
    swapped_bytes: int | None
    """By which memory.swap.current grew; None: the kernel does not count it."""
    seconds: float
    error: str | None = None
    """Why less was reclaimed than requested."""


class CgroupReclaimer:
    """Reclaims from one cgroup in short calls under a token bucket. One thread at a time."""

    def __init__(
        self, cgroup: Path, config: MoverConfig, host: Host, *, now_s: float, swappiness: int | None = None
    ) -> None:
        """Set up with nothing to do.

        Args:
            cgroup: its directory.
            config: pause between calls, and ceiling.
            host: the machine.
            now_s: the time.
            swappiness: 0 (page cache only) to 200 (anonymous memory only); None: the cgroup's own.
        Raises:
            Unavailable: the cgroup has no memory.reclaim.
        """
        self.config = config
        self.wanted_bytes = 0
        """What is still to be reclaimed."""
        self._cgroup = Cgroup(cgroup, host)
        self._swappiness = swappiness
        if not (cgroup / "memory.reclaim").exists():
            raise Unavailable(
                f"{host.kernel_file(cgroup)} has no memory.reclaim",
                hint="it needs Linux 5.19, cgroup v2 and the memory controller enabled for this cgroup",
            )
        self._bucket = TokenBucket(
            config.bandwidth_mib_per_s, least_bytes=PAGE_BYTES, now_s=now_s, interval_s=config.interval_ms / 1000
        )
        self._batch_bytes = 2 * MIB
        self._dry_calls = 0

    def replace(self, wanted_bytes: int) -> None:
        """Forget what is pending; reclaim so much."""
        self.wanted_bytes = max(0, wanted_bytes)
        self._dry_calls = 0

    def pump(self, now_s: float, limit_bytes: int | None = None) -> ReclaimOutcome | None:
        """One call, if something is pending and the bucket allows it.

        `limit_bytes`: what somebody else allows; None: no limit of that kind.
        """
        allowed = self._bucket.available_bytes(now_s)
        size = min(self.wanted_bytes, self._batch_bytes)
        size = size if allowed is None else min(size, allowed)
        size = size if limit_bytes is None else min(size, limit_bytes)
        size -= size % PAGE_BYTES
        if size <= 0:
            if self.wanted_bytes < PAGE_BYTES:
                self.wanted_bytes = 0
            return None
        outcome = self._reclaim(size)
        self._bucket.charge(outcome.reclaimed_bytes)
        self.wanted_bytes -= min(self.wanted_bytes, outcome.reclaimed_bytes)
        self._dry_calls = 0 if outcome.reclaimed_bytes else self._dry_calls + 1
        if self._dry_calls >= DRY_CALLS_MAX:
            self.wanted_bytes = 0
        self._adapt(size, outcome.seconds)
        return outcome

    def wait_s(self) -> float | None:
        """Seconds until `pump` can do something; None: nothing is pending."""
        if not self.wanted_bytes:
            return None
        return max(self.config.interval_ms / 1000, self._bucket.wait_s(PAGE_BYTES))

    def _reclaim(self, size: int) -> ReclaimOutcome:
        before, swap_before = self._read("memory.current"), self._read("memory.swap.current")
        options = "" if self._swappiness is None else f" swappiness={self._swappiness}"
        error: str | None = None
        began_s = time.monotonic()
        try:
            self._cgroup.write("memory.reclaim", f"{size}{options}")
        except KernelCallError as failure:
            # EAGAIN: less than asked for could be reclaimed. ENOENT, ENODEV: the cgroup is gone.
            if failure.errno not in (errno.EAGAIN, errno.EINTR, errno.ENOENT, errno.ENODEV):
                raise
            error = str(failure)
        seconds = time.monotonic() - began_s
        after, swap_after = self._read("memory.current"), self._read("memory.swap.current")
        return ReclaimOutcome(
            requested_bytes=size,
            reclaimed_bytes=0 if before is None or after is None else max(0, before - after),
            swapped_bytes=None if swap_before is None or swap_after is None else max(0, swap_after - swap_before),
            seconds=seconds,
            error=error,
        )

    def _read(self, name: str) -> int | None:
        return self._cgroup.read_int(name)

    def _adapt(self, size: int, seconds: float) -> None:
        if seconds > CALL_TARGET_S:
            self._batch_bytes = max(BATCH_BYTES_MIN, self._batch_bytes // 2)
        elif seconds < CALL_TARGET_S / 2 and size >= self._batch_bytes:
            self._batch_bytes = min(BATCH_BYTES_MAX, self._batch_bytes * 2)
