"""A token bucket in bytes that charges what was really moved. Time is an argument."""

from __future__ import annotations

MIB = 1 << 20
BURST_S = 0.1
"""Unused allowance is kept for at least this long: moving after a pause exceeds the rate by no more."""


class TokenBucket:
    """Allows `rate_bytes_per_s` in the long run. None: no limit."""

    def __init__(
        self,
        bandwidth_mib_per_s: float | None,
        *,
        least_bytes: int,
        now_s: float,
        interval_s: float = 0.0,
    ) -> None:
        """`least_bytes`: the smallest amount worth moving; the bucket holds twice that, or two intervals."""
        self.rate_bytes_per_s = None if bandwidth_mib_per_s is None else bandwidth_mib_per_s * MIB
        rate = self.rate_bytes_per_s or 0.0
        self._depth = max(rate * max(BURST_S, 2 * interval_s), 2.0 * least_bytes)
        self._tokens = 0.0
        self._at_s = now_s

    @property
    def depth_bytes(self) -> float:
        """The most it holds."""
        return self._depth

    def available_bytes(self, now_s: float) -> int | None:
        """What may be moved now; None: no limit."""
        if self.rate_bytes_per_s is None:
            return None
        gained = max(0.0, now_s - self._at_s) * self.rate_bytes_per_s  # a clock that jumps back gains nothing
        self._tokens = min(self._depth, self._tokens + gained)
        self._at_s = now_s
        return max(0, int(self._tokens))

    def charge(self, moved_bytes: int) -> None:
        """Take what was moved, also below zero: then nothing more is allowed until it is paid back."""
        if self.rate_bytes_per_s is not None:
            self._tokens -= moved_bytes

    def wait_s(self, wanted_bytes: int) -> float:
        """Seconds until `wanted_bytes` (at most the depth) are available."""
        if self.rate_bytes_per_s is None:
            return 0.0
        return max(0.0, (wanted_bytes - self._tokens) / self.rate_bytes_per_s)
