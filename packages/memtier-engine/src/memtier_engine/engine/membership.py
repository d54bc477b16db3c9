"""Processes that a target means in, address spaces to work on out: who shares one, and who may observe it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from loguru import logger

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.mm import AddressSpaces, MmGroup
from memtier_engine.hostfs.observers import Claim, Holder, Observers
from memtier_engine.model import ProcessId
from memtier_engine.pages.space import AddressSpace, Spaces

PIDS_NAMED = 5


class Membership:
    """One per engine."""

    def __init__(self, host: Host, spaces: Spaces, note: Callable[[str], None], *, observers: Observers | None) -> None:
        """Set up.

        Args:
            host: the machine.
            spaces: what is to be kept up to date.
            note: told who observes some of them already, once a process.
            observers: where claims are made; None: this engine blinds nobody, so it needs none.
        """
        self._groups = AddressSpaces(host)
        self._spaces = spaces
        self._note = note
        self._observers = observers
        self._claims: dict[ProcessId, Claim] = {}
        self._held: dict[ProcessId, Holder] = {}
        self._told: set[ProcessId] = set()

    def follow(self, processes: Collection[ProcessId]) -> list[AddressSpace]:
        """From now on these are to be worked on. Returns the spaces that are gone.

        One that somebody else observes is left out, and asked for again at each call: its observer may end.
        """
        self._held = {}
        groups = list(self._ours(self._groups.groups(processes)))
        self._tell()
        _, gone = self._spaces.follow(group.processes for group in groups)
        here = {process for group in groups for process in group.processes}
        for process in self._claims.keys() - here:
            self._claims.pop(process).release()
        for group in groups:
            space = self._spaces.get(group.processes[0])
            if space is not None:
                space.layout = group.layout
        return gone

    def close(self) -> None:
        """Others may observe them. Safe to call twice."""
        for claim in self._claims.values():
            claim.release()
        self._claims.clear()
        if self._observers is not None:
            self._observers.close()

    def _ours(self, groups: list[MmGroup]) -> Iterator[MmGroup]:
        for group in groups:
            holder = self._claim(group)
            if holder is None:
                yield group
                continue
            for process in group.processes:
                claim = self._claims.pop(process, None)
                if claim is not None:
                    claim.release()
            self._held[holder.process] = holder

    def _tell(self) -> None:
        """A line per observer, not per process: a whole cgroup may have one already."""
        new: dict[str, list[Holder]] = {}
        for process, holder in self._held.items():
            if process not in self._told:
                new.setdefault(holder.observer, []).append(holder)
        for observer, holders in new.items():
            said, left = str(holders[0]), "it is left alone"
            if len(holders) > 1:
                pids = ", ".join(str(pid) for pid in sorted(holder.process.pid for holder in holders)[:PIDS_NAMED])
                more = ", ..." if len(holders) > PIDS_NAMED else ""
                said = f"{len(holders)} processes ({pids}{more}) are observed already by {observer}"
                left = "they are left alone"
            self._note(f"{said}: {left}, since two observers blind each other")
        if free := self._told - self._held.keys():
            ours = sum(process in self._claims for process in free)
            if ours:
                logger.info("{} of the processes that had another observer are observed from now on", ours)
        self._told = set(self._held)

    def _claim(self, group: MmGroup) -> Holder | None:
        """None: all of it is ours."""
        if self._observers is None:
            return None
        for process in group.processes:
            claim = self._claims.get(process)
            if claim is not None and claim.layout == group.layout:
                continue
            if claim is not None:  # it has executed a program since, and may share that one's memory
                self._claims.pop(process).release()
            taken = self._observers.claim(process, layout=group.layout)
            if isinstance(taken, Holder):
                return taken
            self._claims[process] = taken
        return None
