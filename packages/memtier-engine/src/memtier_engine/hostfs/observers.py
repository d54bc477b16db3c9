"""Who observes which process on this machine, so that no process has two observers that blind each other.

To see what is touched, an observer clears the accessed bits of a process. Two of them on one address space each take
what the other has yet to see, and pages in use look idle to both, also where one of them only looks (`--dry-run`).

One file for all observers, `/run/memtier/observers/by-pid`; whoever observes process N has its byte N locked. A
container takes part if it has the host's /run/memtier and its pids.

Processes with one address space may be observed by different programs, each of which knows only its own. So a byte
further up stands for where program and stack lie (`mm.MmGroup.layout`), which such processes have in common with
each other and with few others: where another program has it locked too, the kernel is asked process by process.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from memtier_engine.abi import syscalls
from memtier_engine.closing import Closing
from memtier_engine.errors import KernelCallError, MemtierError, Unavailable
from memtier_engine.hostfs.bytelocks import ByteLocks
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.mm import Compare
from memtier_engine.model import ProcessId

DIRECTORY = "run/memtier/observers"
FILE = "by-pid"
PID_END = 1 << 22
"""No pid is higher: PID_MAX_LIMIT of include/linux/threads.h."""
ASKING_S, ASKING_SHARE = 0.2, 0.02
_PROGRAM_CHARACTERS = 100
_Taken = tuple[ProcessId, int | None, int | None]
"""What cannot be had, who observes it, and through which process if not through this."""
_INTERPRETER = re.compile(r"python[0-9.]*")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who observes a process already."""

    process: ProcessId
    """The observed one."""
    pid: int | None
    """The observer's. None: it is of a pid namespace that we do not see."""
    program: str
    """Its command line, in short."""
    through: int | None = None
    """The process that shares its address space and is observed. None: it is that itself."""

    @property
    def observer(self) -> str:
        """Who it is, in words."""
        if self.pid is None:
            return "a program of another pid namespace"
        if self.pid == os.getpid():
            return "another engine of this program"
        return f"`{self.program}` (pid {self.pid})" if self.program else f"pid {self.pid}"

    def __str__(self) -> str:
        if self.through is None:
            return f"process {self.process.pid} is observed already by {self.observer}"
        return (
            f"process {self.process.pid} has the address space of process {self.through}, "
            f"which is observed already by {self.observer}"
        )


class Claim(Closing):
    """The right to observe some processes, until it is released or this program ends."""

    def __init__(self, table: _Table, owner: object, processes: tuple[ProcessId, ...], layout: bytes) -> None:
        """Not to be called; see `Observers.claim`."""
        self.owner = owner
        self.processes = processes
        self.layout = layout
        self._table = table

    def release(self) -> None:
        """Others may observe them. Safe to call twice, and after another process got one of these pids."""
        self._table.release(self)

    close = release


class Observers(Closing):
    """The machine's list of who observes what. Methods may be called from any thread."""

    def __init__(self, host: Host, *, directory: Path | None = None, compare: Compare = syscalls.kcmp_vm) -> None:
        """Open the list; `directory` is made where it is missing. None: the one of the machine, for root.

        Others cannot make theirs in it and have one for each user, where only programs of that user are seen.
        """
        self._host = host
        self._compare = compare
        self.directory = directory or _default_directory(host)
        self._table = _table_of(self.directory)
        self._claims: set[Claim] = set()

    @property
    def why_alone(self) -> str | None:
        """Why only engines of this program are seen; None: all are."""
        return self._table.why_alone

    def claim(self, *processes: ProcessId, layout: bytes = b"") -> Claim | Holder:
        """The right to observe `processes`, all of them (those of one address space): a `Claim`, or who has one.

        `layout` is their address space's (`mm.MmGroup.layout`); with it, processes that are observed elsewhere and
        share the address space are found too. What is claimed here is taken to have address spaces of its own.

        A dead process whose pid is another's by now counts as not observed if its observer is this program; another
        program has it until that notices.
        """
        taken = self._table.take(self, processes, layout, self._same)
        if isinstance(taken, Claim):
            self._claims.add(taken)
            if len(self._claims) > 2 * max(64, len(self._table.owners)):
                for claim in tuple(self._claims):  # others may claim meanwhile
                    if not self._table.has(claim):
                        claim.release()  # of a process whose pid is another's by now, the layout
                        self._claims.discard(claim)
            return taken
        process, pid, through = taken
        return Holder(process, pid, "" if pid is None else _program(pid), through)

    def _same(self, one: int, other: int) -> bool:
        """Whether two processes have one address space; False where the kernel does not tell."""
        if not self._host.own_namespace:
            return False
        try:
            # Where only a process's first thread has ended, that one has no memory, as that of any other such.
            return self._compare(one, other) == 0 and self._host.read_proc(one, "statm").split()[0] != b"0"
        except MemtierError:
            return False

    def close(self) -> None:
        """Release all claims that were made here. Safe to call twice."""
        for claim in list(self._claims):
            claim.release()
        self._claims.clear()


class _Allowance:
    """Bounds the time that goes into asking who shares an address space: anybody may have thousands that look alike.

    `ASKING_S` at once, and `ASKING_SHARE` of a CPU from then on. What is not asked counts as not shared: whoever makes
    it so is the one whose memory two observers may then misjudge.
    """

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._last_s = -math.inf

    def within(self, questions: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Those of `questions` that there is time for."""
        began_s = time.monotonic()
        self._spent_s = max(0.0, self._spent_s - (began_s - self._last_s) * ASKING_SHARE)
        left_s = ASKING_S - self._spent_s
        try:
            for question in questions:
                if time.monotonic() - began_s >= left_s:
                    break
                yield question
        finally:
            self._last_s = time.monotonic()
            self._spent_s += self._last_s - began_s


class _Table:
    """The lock file, open once in this program: whoever closes it anywhere in the program loses all its locks."""

    def __init__(self, directory: Path) -> None:
        self.why_alone: str | None = None
        self.owners: dict[int, tuple[ProcessId, Claim]] = {}
        self._layouts: dict[bytes, dict[object, set[Claim]]] = {}  # by owner
        self._asking = _Allowance()
        self._directory = directory
        self._lock = threading.Lock()
        self._file: ByteLocks | None = None
        self.open()

    def open(self) -> None:
        """If it could not be opened yet."""
        with self._lock:
            if self._file is None:
                try:
                    self._file, self.why_alone = ByteLocks(self._directory / FILE), None
                    self._lock_what_is_held(self._file)
                except Unavailable as failure:
                    if self.why_alone != str(failure):
                        logger.warning("{}", failure)
                    self.why_alone = str(failure)

    def take(
        self, owner: Observers, processes: tuple[ProcessId, ...], layout: bytes, same: Callable[[int, int], bool]
    ) -> Claim | _Taken:
        with self._lock:
            self._look_whether_it_is_there()
            for process in processes:
                owned = self.owners.get(process.pid)
                # Another start time: the process that was claimed is no more, and we have the lock already.
                if owned is not None and owned[0] == process:
                    return process, os.getpid(), None
            claim = Claim(self, owner, processes, layout)
            locked: list[int] = []
            for process in processes:
                if process.pid in self.owners:
                    continue
                holder = None if self._file is None else self._file.take(process.pid)
                if holder is not None:
                    self._unlock(locked)
                    return process, holder or None, None
                locked.append(process.pid)
            found = self._elsewhere(claim, same) if layout and processes else None
            if found is not None:
                self._unlock(locked)
                return found
            self.owners.update((process.pid, (process, claim)) for process in processes)
            return claim

    def release(self, claim: Claim) -> None:
        with self._lock:
            for process in claim.processes:
                owned = self.owners.get(process.pid)
                if owned is not None and owned[1] is claim:
                    del self.owners[process.pid]
                    self._unlock([process.pid])
            self._forget_layout(claim)

    def _elsewhere(self, claim: Claim, same: Callable[[int, int], bool]) -> _Taken | None:
        """Whether its address space is observed through another process. None: no; then its layout is locked."""
        first, found = claim.processes[0], None
        alike = self._layouts.setdefault(claim.layout, {})
        asked = (
            (os.getpid(), process.pid)
            for owner, claims in alike.items()
            if owner is not claim.owner
            for other in claims
            for process in other.processes
            if self.owners.get(process.pid, (None, None))[1] is other
        )
        by_others: Iterator[tuple[int, int]] = iter(())
        if self._file is not None and self._file.share(_byte_of(claim.layout)):
            by_others = ((holder, pid) for pid, holder in self._file.others(0, PID_END))
        for holder, pid in self._asking.within(itertools.chain(asked, by_others)):
            if same(first.pid, pid):
                found = first, holder or None, pid
                break
        if found is None:
            alike.setdefault(claim.owner, set()).add(claim)
        self._forget_layout(claim, unless_held=True)
        return found

    def _forget_layout(self, claim: Claim, *, unless_held: bool = False) -> None:
        alike = self._layouts.get(claim.layout)
        if alike is None:
            return
        own = alike.get(claim.owner, set())
        if not unless_held:
            own.discard(claim)
        if not own:
            alike.pop(claim.owner, None)
        if not alike:
            del self._layouts[claim.layout]
            if self._file is not None:
                self._file.release(_byte_of(claim.layout))

    def has(self, claim: Claim) -> bool:
        """Whether any of it is still held."""
        held = (self.owners.get(process.pid) for process in claim.processes)
        return any(owned is not None and owned[1] is claim for owned in held)

    def after_fork(self) -> None:
        """In the child of a fork, which has none of its parent's locks."""
        self._lock = threading.Lock()
        self.owners.clear()
        self._layouts.clear()

    def _unlock(self, pids: Sequence[int]) -> None:
        if self._file is not None:
            for pid in pids:
                self._file.release(pid)

    def _look_whether_it_is_there(self) -> None:
        if self._file is not None and self._file.reopened():
            self._lock_what_is_held(self._file)

    def _lock_what_is_held(self, file: ByteLocks) -> None:
        for pid in self.owners:
            file.take(pid)
        for layout in self._layouts:
            file.share(_byte_of(layout))


def _byte_of(layout: bytes) -> int:
    """The byte that stands for a layout. Two may have one: then the kernel is asked more often than needed."""
    return PID_END + zlib.crc32(layout)


_tables: dict[Path, _Table] = {}
_tables_lock = threading.Lock()


def _after_fork() -> None:
    global _tables_lock
    _tables_lock = threading.Lock()
    for table in _tables.values():
        table.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _table_of(directory: Path) -> _Table:
    """The table of `directory`: one in a program, which stays open as long as the program runs."""
    # The two last names are ours and must be no links; what is above them is the system's.
    where = directory.parent.parent.resolve() / directory.parent.name / directory.name
    with _tables_lock:
        table = _tables.get(where)
        if table is None:
            table = _tables[where] = _Table(where)
    table.open()
    return table


def _default_directory(host: Host) -> Path:
    user = os.geteuid()
    if user == 0:
        return host.path(DIRECTORY)
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime, "memtier", "observers")
    import tempfile  # with random and three compressions

    return Path(tempfile.gettempdir(), f"memtier-{user}", "observers")


def _program(pid: int) -> str:
    """The command line of a process of our own pid namespace, in short and printable."""
    try:
        words = Host().read_proc(pid, "cmdline").decode("utf-8", "replace").rstrip("\0").split("\0")
    except KernelCallError:
        return ""
    return program_words(words)


def program_words(words: Sequence[str]) -> str:
    """A command line in short and printable: as it was typed, without directories and the interpreter of a script."""
    if len(words) > 1 and _INTERPRETER.fullmatch(os.path.basename(words[0])) and words[1].startswith("/"):
        words = words[1:]
    text = " ".join([os.path.basename(words[0]), *words[1:]]).strip()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _PROGRAM_CHARACTERS else text[: _PROGRAM_CHARACTERS - 3] + "..."
