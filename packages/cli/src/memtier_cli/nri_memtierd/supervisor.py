"""One answer to "is it well": heartbeats of all that has to go on, the connection, steps that are stuck, containers.

A thread of its own looks every second, so that nothing it watches can keep it from looking, and writes one status:
a file in the run directory for probes and people, a line and watchdog messages for systemd, an object for tests.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loguru import logger

from memtier_cli.nri_memtierd.health import boot_s
from memtier_cli.nri_memtierd.notify import notify
from memtier_cli.nri_memtierd.rundir import RunDirectory
from memtier_engine.errors import MemtierError

LOOK_S = 1.0
WRITE_S = 5.0
"""Time between writes of an unchanged status."""
LOST_S = 60.0
"""A connection that was lost is expected back so soon, as runtimes restart: until then the program counts as ready."""
LATE_STEP_S = 1.0
STUCK_STEP_S = 30.0
STUCK_TOLD_FROM = 32
"""With so many steps stuck the node has another problem. It is told and no more: others' engines go on, a fresh start
helps no step that waits in the kernel, and no tenant shall be able to have this program started anew."""
NAMED_MOST = 1000

Steps = Callable[[], Iterable[tuple[Mapping[str, str], float]]]


class Heartbeat:
    """One thing that has to go on. Called by it, from any thread, with what it is about to do."""

    def __init__(self, name: str, limit_s: float, now_s: Callable[[], float]) -> None:
        self.name = name
        self.limit_s = limit_s
        self.doing = ""
        self.last_s = now_s()
        self._now_s = now_s

    def __call__(self, doing: str = "") -> None:
        """A sign of life."""
        self.last_s, self.doing = self._now_s(), doing

    def age_s(self) -> float:
        """Since the last beat."""
        return self._now_s() - self.last_s


@dataclass
class Connection:
    """To the runtime, as the plugin tells."""

    now_s: Callable[[], float] = time.monotonic
    state: str = "connecting"
    """connecting: never there yet; connected; retrying: lost."""
    since_s: float = 0.0
    runtime: str = ""
    why: str = ""
    """The last thing that went wrong."""

    def __post_init__(self) -> None:
        self.since_s = self.now_s()

    def connected(self) -> None:
        """The runtime has synchronized."""
        self.state, self.since_s, self.why = "connected", self.now_s(), ""

    def lost(self, why: str) -> None:
        """It ended, or could not be made."""
        if why:
            self.why = why
        if self.state == "connected":
            self.state, self.since_s = "retrying", self.now_s()

    def is_ready(self) -> bool:
        """Whether pods that start now are, or soon will be, seen."""
        return self.state == "connected" or (self.state == "retrying" and self.now_s() - self.since_s < LOST_S)

    def __str__(self) -> str:
        if self.state == "connected":
            return f"connected to {self.runtime}" if self.runtime else "connected"
        return f"{self.state}: {self.why or 'no answer yet'}"


@dataclass(frozen=True)
class Status:
    """One look."""

    healthy: bool
    """All heartbeats are fresh: there is no need to end the program."""
    ready: bool
    """And the runtime is there."""
    problems: tuple[str, ...]
    make_details: Callable[[], Mapping[str, Any]] = dict

    @cached_property
    def details(self) -> Mapping[str, Any]:
        """All there is to say; made when it is asked for, as a node may have thousands of containers."""
        return self.make_details()

    def text(self) -> str:
        """As the file has it."""
        found = {"healthy": self.healthy, "ready": self.ready, "problems": list(self.problems), **self.details}
        return json.dumps(found, indent=1) + "\n"


class Supervisor:
    """Looks after all parts. `look` may be called from any thread; `start` makes it look by itself."""

    def __init__(
        self,
        run_directory: RunDirectory,
        *,
        now_s: Callable[[], float] = time.monotonic,
        steps: Steps = lambda: (),
        containers: Callable[[], list[dict[str, object]]] = list,
        lines_lost: Callable[[], int] = lambda: 0,
        fatal: Callable[[str], object] = lambda why: None,
    ) -> None:
        """Set up.

        Args:
            run_directory: where the status file goes.
            now_s: the time.
            steps: what the engines' threads are in now: loguru's context of the engine, and for how long.
            containers: each with what it has.
            lines_lost: of the log.
            fatal: called once if a thread without which nothing goes on is dead.
        """
        self.connection = Connection(now_s)
        self._run_directory = run_directory
        self._now_s = now_s
        self._steps = steps
        self._containers = containers
        self._lines_lost = lines_lost
        self._fatal = fatal
        self._parts: list[Heartbeat] = []
        self._alive: dict[str, Callable[[], bool]] = {}
        self._ended = threading.Event()
        self._written_s = -WRITE_S
        self._told: tuple[str, ...] = ()
        self._last: tuple[object, ...] = ()
        self._listener = _LastWarning(self.connection)
        self._thread = threading.Thread(target=self._work, name="supervisor", daemon=True)

    def part(self, name: str, limit_s: float) -> Heartbeat:
        """A heartbeat that has to come at least every `limit_s`."""
        self._parts.append(Heartbeat(name, limit_s, self._now_s))
        return self._parts[-1]

    def needs(self, name: str, alive: Callable[[], bool]) -> None:
        """A thread that ends only with the program: if it does not live, `fatal` is called."""
        self._alive[name] = alive

    def start(self) -> None:
        """Begin to look."""
        logging.getLogger("nri_core").addHandler(self._listener)
        notify("READY=1")
        self._thread.start()

    def stop(self) -> None:
        """The program ends: silence is no fault any more."""
        self._ended.set()
        logging.getLogger("nri_core").removeHandler(self._listener)
        notify("STOPPING=1")
        self._thread.join(LOOK_S)

    def look(self) -> Status:
        """How it is now."""
        problems = [f"{name} has died" for name, alive in self._alive.items() if not alive()]
        for part in self._parts:
            if (age_s := part.age_s()) > part.limit_s:
                doing = f" ({part.doing})" if part.doing else ""
                problems.append(f"{part.name}{doing}: no sign of life for {age_s:.0f} s")
        late: list[dict[str, Any]] = [
            {**context, "seconds": round(seconds, 1)} for context, seconds in self._steps() if seconds > LATE_STEP_S
        ]
        healthy = not problems
        stuck = sum(step["seconds"] > STUCK_STEP_S for step in late)
        if stuck >= STUCK_TOLD_FROM:
            problems.append(f"many engines are in steps that do not return: {stuck}")
        if not self.connection.is_ready():
            problems.append(str(self.connection))
        return Status(healthy, healthy and self.connection.is_ready(), tuple(problems), lambda: self._details(late))

    def _details(self, late: list[dict[str, Any]]) -> dict[str, Any]:
        containers = self._containers()
        others = [each for each in containers if each.get("engine") != "running"]
        return {
            "boot_s": boot_s(),
            "connection": str(self.connection),
            "connection_s": round(self._now_s() - self.connection.since_s),
            "parts": {
                part.name: {"beat_s_ago": round(part.age_s(), 1), "limit_s": part.limit_s, "doing": part.doing}
                for part in self._parts
            },
            "steps": late,
            "engines": len(containers) - len(others),
            "containers": [*others, *(each for each in containers if each.get("engine") == "running")][:NAMED_MOST],
            "log_lines_lost": self._lines_lost(),
        }

    def _work(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self._turn(self.look())
            except Exception:
                logger.exception("supervising failed")

    def _turn(self, status: Status) -> None:
        if status.healthy:
            notify(f"WATCHDOG=1\nSTATUS={self.connection}")
        else:
            notify(f"STATUS={'; '.join(status.problems)}")
        self._tell(status)
        now_s = self._now_s()
        signature = (status.healthy, status.ready, self.connection.state)
        if signature != self._last or now_s - self._written_s >= WRITE_S:
            self._last, self._written_s = signature, now_s
            try:
                self._run_directory.write_status(status.text())
            except MemtierError as error:
                logger.debug("{}", error)
        if any(not alive() for alive in self._alive.values()) and not self._ended.is_set():
            self._fatal("; ".join(status.problems))
            self._alive.clear()

    def _tell(self, status: Status) -> None:
        """Each problem of ours once, and its end; of the connection nri_core tells."""
        own = str(self.connection)
        names = tuple(problem for problem in status.problems if problem != own)
        kinds = tuple(name.partition(":")[0].partition(" (")[0] for name in names)
        for name, kind in zip(names, kinds, strict=True):
            if kind not in self._told:
                logger.error("{}", name)
        for kind in self._told:
            if kind not in kinds:
                logger.info("{}: it goes on", kind)
        self._told = kinds


class _LastWarning(logging.Handler):
    """Why there is no connection: nri_core says so in its log."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        if self._connection.state != "connected":
            self._connection.why = record.getMessage()
