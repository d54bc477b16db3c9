"""One address space and all that is known of it: who shares it, its pages, what was tried with them. No IO.

Accessed bits belong to an `mm`, not to a pid: two processes of one `mm` (clone(2) with CLONE_VM) are one address space,
read and cleared once. What is kept of it lives and dies together, in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from memtier_engine.model import Kept, ProcessId, Spans, Why
from memtier_engine.pages.ages import NOT_RESIDENT, ProcessPages

KEPT_S: Mapping[Why, float] = {
    Why.LOCKED: 60.0,
    Why.SHARED: 60.0,
    Why.FILE: 300.0,
    Why.BUSY: 10.0,
    Why.HEADLESS: 60.0,
    Why.NO_ROOM: 10.0,
}
"""After which pages that could not be paged out are tried again, at first; twice as long each time it is in vain."""
KEPT_MOST_S = 3600.0
KEPT_LESS_S: Mapping[Why, float] = {
    Why.NO_ROOM: 60.0,  # swap is turned on by a person, who then looks whether it helps
    Why.SHARED: 300.0,  # a child that saves its parent's data (redis) ends; asking costs 7 ms per GiB
}
"""The longest wait of those for which `KEPT_MOST_S` is too long."""


@dataclass(slots=True)
class Probe:
    """Whether a busy process could still look idle, see `engine.probing`."""

    waits: bool = False
    """Something went out since the last scan."""
    sure: bool = False
    """Scanned after something went out, and that after the last decision."""
    next_bytes: int | None = None
    """Size of the next probe; None: the least."""
    trial: bool = False
    """What goes out now is a probe: where that comes back, no decision was wrong."""


@dataclass(slots=True)
class _Backoff:
    wait_s: float
    until_s: float


@dataclass(slots=True)
class AddressSpace:
    """All of one `mm`."""

    process: ProcessId
    """The one by which it is reached in /proc."""
    members: frozenset[ProcessId]
    """All processes that run on it, `process` among them."""
    pages: ProcessPages
    probe: Probe = field(default_factory=Probe)
    seen: bool = False
    """Whether it was looked at: until then nothing is known of its pages."""
    stopped: bool = False
    """Whether its processes were stopped (SIGSTOP, a debugger) when it was last decided what goes out of it."""
    known_bytes: int = 0
    """Memory that it had in RAM or out when it was last looked at."""
    left_out: Spans = field(default_factory=Spans.empty)
    """Mappings that are too large and too empty to be looked at on this kernel."""
    shared_bytes: int = 0
    """In RAM, and shared with other processes of its family; see `engine.families`."""
    sharers: int = 1
    """Processes of its family that are tracked."""
    layout: bytes = b""
    """Where its program, stack and arguments are: the same for all of a family, random for others. Empty: not known."""
    shared_s: float = -math.inf
    """When it was last asked what it shares."""
    told: dict[Why, int] = field(default_factory=dict)
    """How many bytes that stay in RAM a message said last, by why."""
    told_left_out: bool = False
    _backoffs: dict[Why, _Backoff] = field(default_factory=dict)

    def keep(self, kept: Kept, now_s: float) -> None:
        """These pages were asked for and did not go."""
        if kept.why is Why.TOUCHED:
            self.pages.set_age(kept.spans, 0, only_resident=True)
        elif kept.why is Why.ABSENT:
            self.pages.set_age(kept.spans, NOT_RESIDENT, only_resident=True)
        elif kept.why is Why.HUGE:
            return  # goes with the rest of its huge page as soon as both are asked for: apart from it, it never would
        else:
            self.pages.keep(kept.spans, kept.why)
            known = self._backoffs.get(kept.why)
            if known is None:
                self._backoffs[kept.why] = _Backoff(KEPT_S[kept.why], now_s + KEPT_S[kept.why])
            elif now_s >= known.until_s:  # in vain again
                known.wait_s = min(KEPT_LESS_S.get(kept.why, KEPT_MOST_S), 2 * known.wait_s)
                known.until_s = now_s + known.wait_s

    def retry(self, now_s: float) -> None:
        """Let pages be asked for again that were kept long enough ago."""
        due = [why for why, backoff in self._backoffs.items() if now_s >= backoff.until_s]
        if due:
            self.pages.release(due)
            kept = self.pages.kept_bytes()
            for why in due:
                backoff = self._backoffs[why]
                if now_s >= backoff.until_s + backoff.wait_s and why not in kept:
                    del self._backoffs[why]  # tried again, and nothing was kept

    def kept_bytes(self) -> dict[Why, int]:
        """Memory that stays in RAM though it is idle, by why."""
        return {Why(why): amount for why, amount in self.pages.kept_bytes().items()}


class Spaces:
    """The address spaces of one engine."""

    def __init__(self, make_pages: Callable[[ProcessId], ProcessPages]) -> None:
        """`make_pages`: of a new space, reached by this process."""
        self._make_pages = make_pages
        self._by_process: dict[ProcessId, AddressSpace] = {}
        self._of_member: dict[ProcessId, AddressSpace] = {}

    @property
    def pages(self) -> dict[ProcessId, ProcessPages]:
        """Of the spaces that were looked at, by the process that each is reached by: as policies want them."""
        return {process: space.pages for process, space in self._by_process.items() if space.seen}

    @property
    def processes(self) -> frozenset[ProcessId]:
        """Those that spaces are reached by."""
        return frozenset(self._by_process)

    def __iter__(self) -> Iterator[AddressSpace]:
        return iter(list(self._by_process.values()))

    def __len__(self) -> int:
        return len(self._by_process)

    def __contains__(self, process: object) -> bool:
        """Whether `process` runs on one of them."""
        return process in self._of_member

    def get(self, process: ProcessId) -> AddressSpace | None:
        """The space that `process` runs on; None: it is not ours, or was not seen yet."""
        return self._of_member.get(process)

    def follow(self, groups: Iterable[Collection[ProcessId]]) -> tuple[list[AddressSpace], list[AddressSpace]]:
        """(spaces that there are from now on, spaces that are gone).

        `groups`: the processes of each address space. A space lives on for as long as one of its processes does; the
        one by which it is reached may change.
        """
        before, of_member = self._by_process, self._of_member
        self._by_process, self._of_member = {}, {}
        kept: set[int] = set()
        for group in groups:
            members = frozenset(group)
            space = next((of_member[member] for member in members if member in of_member), None)
            if space is None or id(space) in kept:  # two that part: the second begins anew
                process = min(members, key=lambda member: (member.start_ticks, member.pid))
                space = AddressSpace(process, members, self._make_pages(process))
            elif space.process not in members:
                space.process = min(members, key=lambda member: (member.start_ticks, member.pid))
                space.pages.process = space.process
            space.members = members
            kept.add(id(space))
            self._by_process[space.process] = space
            for member in members:
                self._of_member[member] = space
        gone = [space for space in before.values() if id(space) not in kept]
        return list(self._by_process.values()), gone

    def forget(self, space: AddressSpace) -> None:
        """It is not ours any more."""
        self._by_process.pop(space.process, None)
        for member in space.members:
            self._of_member.pop(member, None)
