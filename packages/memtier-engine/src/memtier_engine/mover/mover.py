"""Tasks in, outcomes out: small batches under a token bucket, promotions first, the processes in turn."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memtier_engine.errors import ConfigError, KernelCallError, ProcessGone
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.privileges import MOVERS, named
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId, Spans
from memtier_engine.mover.backends import IOVECS_MAX, BatchResult, ProcessHandle, move
from memtier_engine.mover.bucket import MIB, TokenBucket

BATCH_BYTES_MAX = 64 * MIB
BATCH_BYTES_LEAST = MIB
CALL_TARGET_S = 0.02
"""A call holds the target's mmap lock for reading; batches shrink until a call is about this short."""
BREATH_S = 0.005
"""The least pause between two calls."""
RETRIES_MAX = 5
BY_HAND = "by hand"
"""Reason of a task that a person asked for: no later decision makes it stale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverConfig:
    """The `mover:` section of a policy."""

    interval_ms: int = 10
    """Pause between batches (`intervalms`)."""
    bandwidth_mib_per_s: float | None = 100
    """Ceiling on moved memory (`bandwidth`). None: no ceiling."""

    def __post_init__(self) -> None:
        if self.interval_ms <= 0:
            raise ConfigError(
                f"value {self.interval_ms}", key_path="mover.intervalms", hint="use 1 or more; default 10"
            )
        if self.bandwidth_mib_per_s is not None and self.bandwidth_mib_per_s <= 0:
            raise ConfigError(
                f"value {self.bandwidth_mib_per_s}",
                key_path="mover.bandwidth",
                hint="use MiB/s above 0; default 100",
            )


@dataclass(slots=True)
class _Pending:
    task: MoveTask
    left: Spans
    tries: int = 0


Backend = Callable[[ProcessHandle, Spans, int], BatchResult]


class Mover:
    """A fair queue of move tasks under one token bucket. Not thread-safe: one engine owns it."""

    def __init__(self, config: MoverConfig, host: Host, *, now_s: float, backend: Backend = move) -> None:
        self.config = config
        self._host = host
        self._backend = backend
        self._bucket = TokenBucket(
            config.bandwidth_mib_per_s,
            least_bytes=PAGE_BYTES,
            now_s=now_s,
            interval_s=config.interval_ms / 1000,
        )
        self.paused = False
        """While it is set nothing is moved and everything stays pending."""
        self._queue: deque[_Pending] = deque()
        self._handles: dict[ProcessId, ProcessHandle] = {}
        self._batch_bytes = 2 * MIB

    @property
    def pending_bytes(self) -> int:
        """What is asked for and not yet tried."""
        return sum(pending.left.total_bytes for pending in self._queue)

    def replace(self, tasks: Sequence[MoveTask]) -> None:
        """Forget what is pending, but for tasks by hand, and take these: a fresh decision makes an older one stale."""
        by_hand = [pending for pending in self._queue if pending.task.reason == BY_HAND]
        promotions = [task for task in tasks if task.reason == "active"]
        others = [task for task in tasks if task.reason != "active"]
        decided = (_Pending(task, task.spans) for task in (*promotions, *others) if len(task.spans))
        self._queue = deque((*by_hand, *decided))

    def add(self, task: MoveTask) -> None:
        """Append one task."""
        if len(task.spans):
            self._queue.append(_Pending(task, task.spans))

    def retain(self, wanted: Callable[[MoveTask], bool]) -> None:
        """Forget pending tasks that are not `wanted` any more; those by hand stay."""
        if self._queue:
            self._queue = deque(
                pending for pending in self._queue if pending.task.reason == BY_HAND or wanted(pending.task)
            )

    def tasks(self) -> list[tuple[MoveTask, Spans]]:
        """What is pending, the next one first: (the whole task, what is left of it)."""
        return [(pending.task, pending.left) for pending in self._queue]

    def remove(self, index: int) -> bool:
        """Forget the task at `index` of `tasks()`; False if there is none."""
        if not 0 <= index < len(self._queue):
            return False
        del self._queue[index]
        return True

    def configure(self, config: MoverConfig, *, now_s: float) -> None:
        """Another pace from now on; what is pending stays."""
        self.config = config
        self._bucket = TokenBucket(
            config.bandwidth_mib_per_s,
            least_bytes=PAGE_BYTES,
            now_s=now_s,
            interval_s=config.interval_ms / 1000,
        )

    def allowed_bytes(self, now_s: float) -> int | None:
        """What somebody who moves memory by other means may move now under this mover's ceiling; None: no ceiling."""
        return 0 if self.paused else self._bucket.available_bytes(now_s)

    def charge(self, moved_bytes: int) -> None:
        """So much was moved by other means."""
        self._bucket.charge(moved_bytes)

    def drop(self, process: ProcessId) -> None:
        """The process is no longer ours: forget its tasks and close what is open for it."""
        self._queue = deque(pending for pending in self._queue if pending.task.process != process)
        handle = self._handles.pop(process, None)
        if handle is not None:
            handle.close()

    @property
    def has_work(self) -> bool:
        """Whether anything is pending."""
        return bool(self._queue)

    def pump(self, now_s: float) -> list[MoveOutcome]:
        """Move what the bucket allows now, at most one batch."""
        return self._pump(now_s, None)

    def _pump(self, now_s: float, limit_bytes: int | None) -> list[MoveOutcome]:
        """`limit_bytes`: what somebody else allows; None: no limit of that kind."""
        if not self._queue or self.paused:
            return []
        allowed = self._bucket.available_bytes(now_s)
        budget = self._batch_bytes if allowed is None else min(allowed, self._batch_bytes)
        budget = budget if limit_bytes is None else min(budget, limit_bytes)
        if budget < PAGE_BYTES:
            return []
        pending = self._queue.popleft()
        process, node = pending.task.process, pending.task.to_node
        part, rest = take(pending.left, budget)
        began_s = time.monotonic()
        error: str | None = None
        result = BatchResult()
        try:
            result = self._backend(self._handle(process), part, node)
            error = result.error
        except ProcessGone:
            self.drop(process)
            return [MoveOutcome(process, Spans.empty(), node, 0, 0, 0.0, error="process exited")]
        except KernelCallError as failure:
            rest = Spans.empty()  # no part of this task can fare better
            error = str(named(self._host, failure, MOVERS["page-out" if node == SWAP_NODE else "move-pages"]))
        seconds = time.monotonic() - began_s
        self._bucket.charge(result.moved_bytes)
        self._adapt(part.total_bytes, seconds)
        if len(result.busy) and pending.tries < RETRIES_MAX:
            self._queue.append(_Pending(pending.task, result.busy, pending.tries + 1))
        if len(rest) and not result.full:
            # To the back: a huge task takes turns with small ones. Promotions keep their place.
            add = self._queue.appendleft if pending.task.reason == "active" else self._queue.append
            add(_Pending(pending.task, rest, pending.tries))
        later = result.stuck if result.full else result.busy
        outcome = MoveOutcome(
            process,
            part,
            node,
            part.total_bytes,
            result.moved_bytes,
            seconds,
            result.stuck,
            error,
            result.page_errors,
            later,
            result.there_bytes,
        )
        return [outcome]

    def wait_s(self) -> float | None:
        """Seconds until `pump` can do something; None: nothing is pending, or it is paused."""
        if not self._queue or self.paused:
            return None
        interval_s = self.config.interval_ms / 1000
        rate = self._bucket.rate_bytes_per_s
        if rate is None:
            return interval_s
        share = max(PAGE_BYTES, int(rate * interval_s))
        if share <= self._batch_bytes:
            return max(interval_s, self._bucket.wait_s(share))
        # A long interval's share is more than one short call may move: it takes several.
        return max(BREATH_S, self._bucket.wait_s(self._batch_bytes))

    def budget_bytes(self, seconds: float) -> int | None:
        """The most that can be moved in `seconds`; None: no limit."""
        rate = self._bucket.rate_bytes_per_s
        return None if rate is None else max(PAGE_BYTES, int(rate * (seconds + 0.1)))

    def release(self) -> None:
        """Close what is open for processes that have no task."""
        wanted = {pending.task.process for pending in self._queue}
        for process in self._handles.keys() - wanted:
            self._handles.pop(process).close()

    def close(self) -> None:
        """Drop all tasks and close all handles. Safe to call twice."""
        self._queue.clear()
        for handle in self._handles.values():
            handle.close()
        self._handles.clear()

    def _handle(self, process: ProcessId) -> ProcessHandle:
        handle = self._handles.get(process)
        if handle is None:
            handle = self._handles[process] = ProcessHandle(self._host, process)
        return handle

    def _adapt(self, batch_bytes: int, seconds: float) -> None:
        if seconds > CALL_TARGET_S and batch_bytes >= self._batch_bytes // 2:
            self._batch_bytes = max(BATCH_BYTES_LEAST, self._batch_bytes // 2)
        elif seconds < CALL_TARGET_S / 2 and batch_bytes >= self._batch_bytes:
            self._batch_bytes = min(BATCH_BYTES_MAX, self._batch_bytes * 2)


def take(spans: Spans, budget_bytes: int) -> tuple[Spans, Spans]:
    """(first part, rest): at least a page, at most `budget_bytes` in at most `IOVECS_MAX` spans."""
    lengths = spans.ends - spans.starts
    total = np.cumsum(lengths[:IOVECS_MAX])
    budget = np.uint64(max(PAGE_BYTES, budget_bytes // PAGE_BYTES * PAGE_BYTES))
    count = int(np.searchsorted(total, budget, side="right"))
    starts, ends = spans.starts[:count], spans.ends[:count]
    if count == len(total):
        return Spans(starts, ends), Spans(spans.starts[count:], spans.ends[count:])
    used = total[count - 1] if count else np.uint64(0)
    if budget == used:
        return Spans(starts, ends), Spans(spans.starts[count:], spans.ends[count:])
    cut = spans.starts[count] + (budget - used)
    rest = spans.starts[count:].copy()
    rest[0] = cut
    first = Spans(np.append(starts, spans.starts[count]), np.append(ends, cut))
    return first, Spans(rest, spans.ends[count:])
