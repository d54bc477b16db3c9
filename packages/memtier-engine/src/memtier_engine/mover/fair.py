"""One ceiling for all movers of a node, shared out by deficit round robin: who wants to move gets equal parts.

A member is owed bytes (its deficit): each round adds the same part of what the node's bucket allows to every
member that wants to move; what is really moved is taken off, also below zero. What a member does not use within
`HUNGRY_S` goes back to the others. Time is an argument.
"""

from __future__ import annotations

import threading

from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, MoveOutcome
from memtier_engine.mover.bucket import TokenBucket
from memtier_engine.mover.mover import Mover, MoverConfig

HUNGRY_S = 1.0
"""A member that has not asked for so long wants nothing."""
ROUND_S = 0.005
"""The least time between two rounds: with many members each one costs some microseconds."""
HOARD_S = 0.5
"""A member is owed at most what it gets in this time: after a slow call it catches up with no more."""


class FairBudget:
    """The node's ceiling. Methods may be called from any thread."""

    def __init__(self, bandwidth_mib_per_s: float | None, *, now_s: float) -> None:
        """`bandwidth_mib_per_s`: of all members together; None: no ceiling."""
        self._lock = threading.Lock()
        self._members: dict[Share, None] = {}
        self._round_s = now_s
        self._bucket = TokenBucket(bandwidth_mib_per_s, least_bytes=PAGE_BYTES, now_s=now_s)
        self._free = 0.0

    def set_bandwidth(self, bandwidth_mib_per_s: float | None, *, now_s: float) -> None:
        """Another ceiling from now on; what is owed stays owed."""
        with self._lock:
            self._bucket = TokenBucket(bandwidth_mib_per_s, least_bytes=PAGE_BYTES, now_s=now_s)
            self._free = 0.0

    def join(self) -> Share:
        """A new member, owed nothing."""
        share = Share(self)
        with self._lock:
            self._members[share] = None
        return share

    def leave(self, share: Share) -> None:
        """What it is owed goes to the others. Safe to call twice."""
        with self._lock:
            if share in self._members:
                del self._members[share]
                self._free += max(0.0, share.owed)

    def allowed(self, share: Share, now_s: float, wanted_bytes: int = PAGE_BYTES) -> int | None:
        """Bytes that `share` may move now; None: any number. Asking says that it wants to move.

        `wanted_bytes`: less is of no use, so nothing is allowed until it is owed as much. A batch is 2 MiB where there
        may be huge pages: were a page's worth enough to begin, all members together would be far above the ceiling.
        """
        with self._lock:
            if self._bucket.rate_bytes_per_s is None:
                return None
            newly = share.asked_s is None or now_s - share.asked_s > HUNGRY_S
            share.asked_s = now_s
            share.wanted = float(wanted_bytes)
            if newly or not 0 <= now_s - self._round_s < ROUND_S:
                self._round(now_s)
            return int(share.owed) if share.owed >= wanted_bytes else 0

    def charge(self, share: Share, moved_bytes: int) -> None:
        """`share` moved so much."""
        with self._lock:
            if self._bucket.rate_bytes_per_s is not None:
                share.owed -= moved_bytes

    def wait_s(self, share: Share, wanted_bytes: int) -> float:
        """Seconds until `share` may be owed `wanted_bytes`, if the others go on as now."""
        with self._lock:
            rate = self._bucket.rate_bytes_per_s
            if rate is None:
                return 0.0
            hungry = max(1, sum(member.asked_s is not None for member in self._members))
            return max(0.0, (wanted_bytes - share.owed) * hungry / rate)

    def _round(self, now_s: float) -> None:
        self._round_s = now_s
        gained = self._bucket.available_bytes(now_s) or 0
        self._bucket.charge(gained)
        free = self._free + gained
        hungry: list[Share] = []
        for member in self._members:
            if member.asked_s is not None and not 0 <= now_s - member.asked_s <= HUNGRY_S:
                member.asked_s = None
            if member.asked_s is not None:
                hungry.append(member)
            elif member.owed > 0:
                free += member.owed
                member.owed = 0.0
        rate = self._bucket.rate_bytes_per_s or 0.0
        least = max(2.0 * PAGE_BYTES, HOARD_S * rate / max(1, len(hungry)))
        room = {member: max(least, 2 * member.wanted) - member.owed for member in hungry}
        # What one cannot take is for the rest: the fullest first, so that one pass is enough.
        hungry.sort(key=room.__getitem__)
        for left, member in zip(range(len(hungry), 0, -1), hungry, strict=True):
            part = max(0.0, min(free / left, room[member]))
            member.owed += part
            free -= part
        # Unclaimed allowance is kept no longer than the bucket itself would keep it.
        self._free = min(free, self._bucket.depth_bytes)


class Share:
    """A member of a `FairBudget`."""

    __slots__ = ("asked_s", "budget", "owed", "wanted")

    def __init__(self, budget: FairBudget) -> None:
        self.budget = budget
        self.owed = 0.0
        """Bytes it may move; below zero: moved too much."""
        self.asked_s: float | None = None
        """When it last wanted to move; None: not lately."""
        self.wanted = 0.0
        """Bytes that it can do something with."""


class FairMover(Mover):
    """A mover under its own ceiling and its part of the node's."""

    def __init__(
        self,
        config: MoverConfig,
        host: Host,
        *,
        budget: FairBudget,
        now_s: float,
        files: OpenProcesses | None = None,
    ) -> None:
        """`budget` and `files`: the node's, shared with the other movers."""
        super().__init__(config, host, now_s=now_s, files=files)
        self._budget = budget
        self._share = budget.join()

    def pump(self, now_s: float) -> list[MoveOutcome]:
        """See `Mover.pump`."""
        self.effects.free(now_s)
        if not self.has_work or self.paused:
            return []
        allowed = self._budget.allowed(self._share, now_s, self.next_bytes)
        outcomes = self._pump(now_s, allowed)
        self._budget.charge(self._share, sum(outcome.moved_bytes for outcome in outcomes))
        return outcomes

    def allowed_bytes(self, now_s: float) -> int | None:
        """See `Mover.allowed_bytes`: its own ceiling and its part of the node's."""
        own = super().allowed_bytes(now_s)
        if own == 0:
            return 0
        share = self._budget.allowed(self._share, now_s)
        return own if share is None else share if own is None else min(own, share)

    def charge(self, moved_bytes: int) -> None:
        """See `Mover.charge`."""
        super().charge(moved_bytes)
        self._budget.charge(self._share, moved_bytes)

    def wait_s(self) -> float | None:
        """See `Mover.wait_s`."""
        own_s = super().wait_s()
        if own_s is None or not self.has_work:
            return own_s
        return max(own_s, self._budget.wait_s(self._share, self.next_bytes))

    def close(self) -> None:
        """See `Mover.close`; leaves the budget."""
        super().close()
        self._budget.leave(self._share)
