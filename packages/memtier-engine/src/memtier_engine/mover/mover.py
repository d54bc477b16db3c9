"""Tasks in, outcomes out: small batches under a token bucket, promotions first, the processes in turn.

What cannot move costs neither allowance nor a turn: a pump goes on through the tasks until about a batch really moved
or its slice of time is over, so that locked or shared memory in front never holds up what is behind it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from memtier_engine.errors import ConfigError, KernelCallError, ProcessGone
from memtier_engine.hostfs.handles import OpenProcesses
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.privileges import MOVERS, named
from memtier_engine.hostfs.swapkind import no_room
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, MoveOutcome, MoveTask, ProcessId, Spans, Why
from memtier_engine.mover import edge
from memtier_engine.mover.backends import (
    IOVECS_MAX,
    BatchResult,
    Look,
    ProcessHandle,
    move_to_node,
    page_out,
    read_words,
)
from memtier_engine.mover.bucket import MIB, TokenBucket
from memtier_engine.mover.edge import HUGE_BYTES
from memtier_engine.mover.effects import Effect, Effects
from memtier_engine.mover.refusals import Refusals

BATCH_BYTES_MAX = 8 * MIB
"""A larger one costs no less CPU time per page, and a guard that closes has to wait for it."""
BATCH_BYTES_LEAST = HUGE_BYTES
"""A part of a huge page would split it."""
FIRST_BYTES = 2 * MIB
"""The first batch after a decision where the tracker cannot tell what was touched since. It doubles with each one that
stays out, and what comes back at once ends it."""
WINDOW_BYTES_MAX = 64 * MIB
"""Most that is read to find a batch's worth of pages that can go: 0.5 ms."""
WINDOW_SPANS_MAX = 4096
CALL_TARGET_S = 0.02
"""A call holds the target's mmap lock for reading; batches shrink until a call is about this short."""
SLICE_S = 0.02
"""A pump that finds nothing to move goes on for so long."""
AWAKE_SHARE = 0.5
"""If this part of a batch was touched since the decision, the process is awake: the rest of its task is dropped."""
SAMPLE_PAGES = 256
"""Of the rest, so many are looked at to be sure of that."""
BACK_SHARE = 0.25
"""The same if this part of the batch before is back in RAM."""
GATHER_BYTES, GATHER_S = BATCH_BYTES_MAX, 0.08
"""Allowance is gathered until it is so much, or for so long, if a call for it is short enough: a batch costs 0.1 ms of
our own beside the kernel's time, several times that where other programs have used the CPU and its caches meanwhile."""
BREATH_S = 0.005
"""The least pause between two calls."""
BEHIND_S = 0.00005
"""The same where as much is allowed as a call may move, and the last one moved as much: it took longer than its share
of time. Who else wants the target's mmap lock has queued up and gets it before the next call."""
RETRIES_MAX = 5
BY_HAND = "by hand"
"""Reason of a task that a person asked for: no later decision makes it stale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoverConfig:
    """The `mover:` section of a policy."""

    interval_ms: int = 10
    """Pause between batches (`intervalms`); shorter while it is behind its bandwidth."""
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
    moved_bytes: int = 0


@dataclass(slots=True)
class _Follow:
    """What the mover knows of a process while it pages it out."""

    refusals: Refusals = field(default_factory=Refusals)
    most_bytes: int = FIRST_BYTES
    """The next batch, as long as nobody looks."""
    window_bytes: int = 0
    """To read for it; grows while nothing of it can go."""
    looks: bool = False
    """Whether somebody could tell at the batch before what was touched since the decision."""
    last_out: Spans = field(default_factory=Spans.empty)
    """What went out in the batch before, in this decision, where nobody looks."""


Backend = Callable[[ProcessHandle, Spans, int], BatchResult]


def open_processes(host: Host) -> OpenProcesses:
    """Room for the open files of the processes that movers work on; one for all movers of a node."""
    return OpenProcesses(host, opening=lambda host, process: ProcessHandle(host, process))


class Mover:
    """A fair queue of move tasks under one token bucket. Not thread-safe: one engine owns it."""

    def __init__(
        self,
        config: MoverConfig,
        host: Host,
        *,
        now_s: float,
        backend: Backend | None = None,
        files: OpenProcesses | None = None,
    ) -> None:
        """A mover.

        Args:
            config: how fast.
            host: the machine.
            now_s: the time.
            backend: moves a batch; None: the kernel, with a look at each page before and after.
            files: open files of processes, shared with others; None: its own.
        """
        self.config = config
        self._host = host
        self._backend = backend
        self.look: Look | None = None
        """What was touched since the decision, as the tracker tells it; see `LookingTracker`. None: nobody can."""
        self._bucket = TokenBucket(
            config.bandwidth_mib_per_s,
            least_bytes=PAGE_BYTES,
            now_s=now_s,
            interval_s=max(config.interval_ms / 1000, GATHER_S),
        )
        self.paused = False
        """While it is set nothing is moved and everything stays pending."""
        self._queue: deque[_Pending] = deque()
        self._own_files = files is None
        self._files = open_processes(host) if files is None else files
        self._follows: dict[ProcessId, _Follow] = {}
        self.effects = Effects(host)
        """What paging out brought."""
        self._batch_bytes = 2 * MIB
        self._pumped_bytes = 0
        """What the last pump moved."""

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
        for follow in self._follows.values():
            follow.most_bytes, follow.last_out = FIRST_BYTES, Spans.empty()

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
            interval_s=max(config.interval_ms / 1000, GATHER_S),
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
        self._follows.pop(process, None)
        self.effects.forget(process)
        self._files.drop(process)

    @property
    def has_work(self) -> bool:
        """Whether anything is pending."""
        return bool(self._queue)

    @property
    def next_bytes(self) -> int:
        """The next batch is at least so large, if all of it can go: what is not cut."""
        if not self._queue or self._backend is not None:
            return PAGE_BYTES
        left = self._queue[0].left
        longest = int((left.ends[:IOVECS_MAX] - left.starts[:IOVECS_MAX]).max())
        return min(HUGE_BYTES, max(PAGE_BYTES, longest))

    def pump(self, now_s: float) -> list[MoveOutcome]:
        """Move what the bucket allows now, at most about one batch; what stays where it is does not count."""
        self.effects.free(now_s)
        return self._pump(now_s, None)

    def _pump(self, now_s: float, limit_bytes: int | None) -> list[MoveOutcome]:
        """`limit_bytes`: what somebody else allows; None: no limit of that kind."""
        self._pumped_bytes = 0
        if not self._queue or self.paused:
            return []
        allowed = self._bucket.available_bytes(now_s)
        budget = self._batch_bytes if allowed is None else min(allowed, self._batch_bytes)
        budget = budget if limit_bytes is None else min(budget, limit_bytes)
        outcomes: list[MoveOutcome] = []
        later: list[_Pending] = []
        enough = budget // 8
        end_s = time.monotonic() + SLICE_S
        while self._queue and budget >= max(PAGE_BYTES, enough):
            outcome = self._batch(self._queue.popleft(), budget, later, now_s)
            outcomes.append(outcome)
            budget -= outcome.moved_bytes
            self._pumped_bytes += outcome.moved_bytes
            if time.monotonic() >= end_s:
                break
        self._queue.extend(later)
        return outcomes

    def _batch(self, pending: _Pending, budget: int, later: list[_Pending], now_s: float) -> MoveOutcome:
        """Move a part of a task; its rest goes back into the queue, or into `later` what another pump goes on with."""
        process, node = pending.task.process, pending.task.to_node
        if pending.task.most_bytes is not None:
            budget = min(budget, max(PAGE_BYTES, pending.task.most_bytes - pending.moved_bytes))
        began_s = time.monotonic()
        result, effect, error = BatchResult(), Effect(None, None), None
        swaps = node == SWAP_NODE and self._backend is None
        try:
            self._follows.setdefault(process, _Follow())
            with self._files.of(process) as handle:
                if swaps:
                    self.effects.begin(handle, now_s)
                part, rest, wait, result = self._move(handle, pending, budget)
                effect = self.effects.end(handle, result.moved_bytes) if swaps else Effect(None, None)
                if swaps and not result.moved_bytes and any(kept.why is Why.BUSY for kept in result.kept):
                    rest = self._without_room(rest, later, result)
            error = result.error
        except ProcessGone:
            self.drop(process)
            later[:] = [each for each in later if each.task.process != process]
            return MoveOutcome(process, Spans.empty(), node, 0, 0, 0.0, error="process exited")
        except KernelCallError as failure:
            part, _ = take(pending.left, budget)
            rest, wait = Spans.empty(), False  # no part of this task can fare better
            error = str(named(self._host, failure, MOVERS["page-out" if node == SWAP_NODE else "move-pages"]))
        self._bucket.charge(result.moved_bytes)
        done_bytes = pending.moved_bytes + result.moved_bytes
        if pending.task.most_bytes is not None and done_bytes >= pending.task.most_bytes:
            rest, result.busy = Spans.empty(), Spans.empty()
        asked = part.total_bytes if result.asked_bytes is None else result.asked_bytes
        self._adapt(asked, time.monotonic() - began_s if result.call_s is None else result.call_s)
        if len(result.busy) and pending.tries < RETRIES_MAX:
            later.append(_Pending(pending.task, result.busy, pending.tries + 1, done_bytes))
        if len(rest) and not result.full:
            # To the back: a huge task takes turns with small ones. Promotions keep their place.
            turn = self._queue.appendleft if pending.task.reason == "active" else self._queue.append
            add = later.append if wait else turn
            add(_Pending(pending.task, rest, pending.tries, done_bytes))
        return MoveOutcome(
            process,
            part,
            node,
            part.total_bytes,
            result.moved_bytes,
            time.monotonic() - began_s,
            result.stuck,
            error,
            result.page_errors,
            result.stuck if result.full else result.busy,
            result.there_bytes,
            result.kept,
            effect.freed_bytes,
            effect.stored_bytes,
        )

    def _move(self, handle: ProcessHandle, pending: _Pending, budget: int) -> tuple[Spans, Spans, bool, BatchResult]:
        """(what was dealt with, the rest of the task, whether the rest is for another pump, what became of it)."""
        task = pending.task
        look = None if task.reason in (BY_HAND, "active") else self.look
        if self._backend is not None:
            part, rest = take(pending.left, budget)
            return part, rest, False, self._backend(handle, part, task.to_node)
        if task.to_node != SWAP_NODE:
            part, rest = take_whole(pending.left, budget)
            result = move_to_node(handle, part, task.to_node, look=look)
            if self._is_awake(task.process, rest, look, result):
                rest = Spans.empty()
            return part, rest, False, result
        return self._page_out(handle, pending, budget, look)

    def _without_room(self, rest: Spans, later: list[_Pending], result: BatchResult) -> Spans:
        """Nothing of a batch went out, and the kernel does not say why. Returns the rest of its task.

        MADV_PAGEOUT says nothing where there is no slot for a page (mm/vmscan.c, shrink_folio_list(): where
        folio_alloc_swap() fails, the folio is activated). Asking for the others too would only cost CPU time.
        """
        if not no_room(self._host):
            return rest
        result.kept, result.busy = edge.for_want_of_room(result.kept), Spans.empty()
        self.retain(lambda task: task.to_node != SWAP_NODE)
        later[:] = [each for each in later if each.task.to_node != SWAP_NODE]
        return Spans.empty()

    def _page_out(
        self, handle: ProcessHandle, pending: _Pending, budget: int, look: Look | None
    ) -> tuple[Spans, Spans, bool, BatchResult]:
        process, by_hand = handle.process, pending.task.reason == BY_HAND
        follow = self._follows[process]
        if not by_hand and _came_back(handle, follow.last_out):
            self._forget_decision(process)
            return Spans.empty(), Spans.empty(), False, BatchResult()
        limit = budget if by_hand or follow.looks else min(budget, follow.most_bytes)
        window, _ = take_whole(pending.left, max(limit, follow.window_bytes), most=WINDOW_SPANS_MAX)
        result = page_out(
            handle,
            window,
            limit_bytes=limit,
            refusals=follow.refusals,
            look=look,
            keep_huge=not by_hand,
            probe=pending.task.most_bytes is not None,
            piecewise=not self.effects.at_once,
        )
        part, rest = take(pending.left, result.tried_bytes or PAGE_BYTES, most=WINDOW_SPANS_MAX)
        follow.window_bytes = _next_window(part.total_bytes, result.moved_bytes, limit)
        if by_hand or not result.moved_bytes:
            wait = False
        else:
            wait = not follow.looks and not result.looked
            follow.looks = result.looked
            follow.most_bytes = min(BATCH_BYTES_MAX, 2 * follow.most_bytes)
            follow.last_out = Spans.empty() if result.looked else edge.went(part, result.kept)
        if self._is_awake(process, rest, look, result):
            rest = Spans.empty()
        return part, rest, wait, result

    def _is_awake(self, process: ProcessId, rest: Spans, look: Look | None, result: BatchResult) -> bool:
        """Whether so much is in use since the decision that nothing of it holds; then it is forgotten."""
        if look is None or result.touched_share < AWAKE_SHARE:
            return False
        sample = edge.sample(rest, SAMPLE_PAGES)
        touched = look(process, sample) if len(sample) else None
        if touched is None or np.count_nonzero(touched) < AWAKE_SHARE * len(touched):
            return False
        self._forget_decision(process)
        return True

    def _forget_decision(self, process: ProcessId) -> None:
        self._queue = deque(
            pending
            for pending in self._queue
            if pending.task.process != process or pending.task.reason in (BY_HAND, "active")
        )

    def wait_s(self) -> float | None:
        """Seconds until `pump` can do something; None: nothing is pending, or it is paused."""
        if self.paused:
            return None
        if not self._queue:
            return self.effects.wait_s()
        interval_s = self.config.interval_ms / 1000
        rate = self._bucket.rate_bytes_per_s
        if rate is None:
            return interval_s
        share = max(PAGE_BYTES, int(rate * interval_s), int(min(GATHER_BYTES, rate * GATHER_S)))
        batch = min(share, self._batch_bytes)
        due_s = self._bucket.wait_s(batch)
        if not due_s and self._pumped_bytes >= batch // 2:
            return BEHIND_S
        # A long interval's share is more than one short call may move: it takes several.
        return max(interval_s if batch == share else BREATH_S, due_s)

    def budget_bytes(self, seconds: float) -> int | None:
        """The most that can be moved in `seconds`; None: no limit."""
        rate = self._bucket.rate_bytes_per_s
        return None if rate is None else max(PAGE_BYTES, int(rate * (seconds + 0.1)))

    def release(self) -> None:
        """Close what is open for processes that have no task."""
        wanted = {pending.task.process for pending in self._queue}
        for process in self._follows.keys() - wanted:
            del self._follows[process]
            self.effects.forget(process)
            self._files.drop(process)

    def close(self) -> None:
        """Drop all tasks and close all that is open. Safe to call twice."""
        self._queue.clear()
        for process in self._follows:
            self._files.drop(process)
        self._follows.clear()
        if self._own_files:
            self._files.close()

    def _adapt(self, batch_bytes: int, seconds: float) -> None:
        if seconds > CALL_TARGET_S and batch_bytes >= self._batch_bytes // 2:
            self._batch_bytes = max(BATCH_BYTES_LEAST, self._batch_bytes // 2)
        elif seconds < CALL_TARGET_S / 2 and batch_bytes >= self._batch_bytes:
            self._batch_bytes = min(BATCH_BYTES_MAX, self._batch_bytes * 2)


def _came_back(handle: ProcessHandle, spans: Spans) -> bool:
    """Whether a good part of what has just gone out is in RAM again."""
    if not len(spans):
        return False
    back = edge.is_present(read_words(handle.pagemap, spans))
    return bool(np.count_nonzero(back) >= BACK_SHARE * len(back))


def _next_window(tried_bytes: int, moved_bytes: int, limit_bytes: int) -> int:
    """How much to look at for the next `limit_bytes`, by how much of it could go this time."""
    if not moved_bytes:
        return min(WINDOW_BYTES_MAX, 4 * max(tried_bytes, limit_bytes))
    return min(WINDOW_BYTES_MAX, int(1.25 * limit_bytes * tried_bytes / moved_bytes))


def take_whole(spans: Spans, budget_bytes: int, most: int = IOVECS_MAX) -> tuple[Spans, Spans]:
    """As `take`, but the cut is never inside 2 MiB that the spans cover as a whole: there may be a huge page."""
    part, rest = take(spans, budget_bytes, most)
    if not len(rest) or int(rest.starts[0]) != int(part.ends[-1]):
        return part, rest
    cut = int(part.ends[-1])
    block = cut // HUGE_BYTES * HUGE_BYTES
    if block == cut or int(part.starts[-1]) > block or int(rest.ends[0]) < block + HUGE_BYTES:
        return part, rest
    return take(spans, part.total_bytes + block + HUGE_BYTES - cut, most)


def take(spans: Spans, budget_bytes: int, most: int = IOVECS_MAX) -> tuple[Spans, Spans]:
    """(first part, rest): at least a page, at most `budget_bytes` in at most `most` spans."""
    cut_at = max(PAGE_BYTES, budget_bytes // PAGE_BYTES * PAGE_BYTES) + int(spans.starts[0]) if len(spans) else 0
    if len(spans) and cut_at < int(spans.ends[0]):  # as it mostly is: a part of the first one
        cut = np.array([cut_at], np.uint64)
        starts = cut if len(spans) == 1 else np.concatenate((cut, spans.starts[1:]))
        return Spans(spans.starts[:1], cut), Spans(starts, spans.ends)
    lengths = spans.ends - spans.starts
    total = np.cumsum(lengths[:most])
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
