"""Pid watchers that the prompt works with: its own, and that of the current policy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.owned import PolicyOwned
from memtier_engine.config.files import parse_target
from memtier_engine.config.parts import TARGETS, TargetSpec
from memtier_engine.hostfs.host import Host
from memtier_engine.model import ProcessId
from memtier_engine.targets.base import Target
from memtier_engine.targets.events import EventsTarget

OnPids = Callable[[list[int], list[int]], None]
"""Gets pids that appeared and pids that vanished."""


class AnyWatcher(Protocol):
    """What the command `pidwatcher` can ask for."""

    @property
    def name(self) -> str:
        """Of the component."""

    @property
    def config_text(self) -> str | None:
        """As it was given; None: never configured."""

    def configure(self, text: str, file: str | None = None) -> None:
        """Take a configuration. Raises ConfigError, CommandError."""

    def listen(self, listener: OnPids) -> None:
        """Who is told. Raises CommandError."""

    def start(self) -> None:
        """Tell now, and whenever something changes. Raises MemtierError, CommandError."""

    def stop(self) -> None:
        """Tell no more. Raises CommandError."""

    def poll(self) -> None:
        """Look once. Raises MemtierError, CommandError."""

    def dump(self) -> str:
        """One line about it."""

    def close(self) -> None:
        """Give everything back. Safe to call twice."""


class OwnWatcher:
    """A watcher made by a command."""

    def __init__(self, host: Host, name: str) -> None:
        """Raises CommandError for a name that is none."""
        if name not in TARGETS:
            raise CommandError(f'creating pidwatcher failed: invalid pidwatcher name "{name}"')
        self.name = name
        self.config_text: str | None = None
        self._host = host
        self._spec: TargetSpec | None = TargetSpec(name) if name in ("proc", "stub") else None
        self._target: Target | None = None
        self._events: EventsTarget | None = None
        self._lock = threading.Lock()
        self._known: frozenset[ProcessId] = frozenset()
        self._listener: OnPids | None = None

    def configure(self, text: str, file: str | None = None) -> None:
        """See `AnyWatcher.configure`."""
        self._spec = parse_target(self.name, text, file=file)
        self.config_text = text
        self._target = None

    def listen(self, listener: OnPids) -> None:
        """See `AnyWatcher.listen`."""
        self._listener = listener

    def start(self) -> None:
        """See `AnyWatcher.start`."""
        if self._events is not None:
            raise CommandError("pidwatcher start error: already started")
        target, spec = self._built(), self._spec
        assert spec is not None
        self.poll()  # what is there now is told before the next command
        self._events = EventsTarget(
            target, refresh_s=spec.interval_ms / 1000, on_change=lambda added, removed: self._tell(added, removed)
        )

    def stop(self) -> None:
        """See `AnyWatcher.stop`."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def poll(self) -> None:
        """See `AnyWatcher.poll`. A pidlist tells all of its list each time, others what changed."""
        current = self._built().poll()
        with self._lock:
            if self.name == "pidlist":
                self._known = frozenset()
            added, removed = current - self._known, self._known - current
        self._tell(added, removed)

    def dump(self) -> str:
        """See `AnyWatcher.dump`."""
        if self.name == "stub":
            return ""
        name = "PidWatcher" + {"pidlist": "Pidlist"}.get(self.name, self.name.capitalize())
        pids = " ".join(f"{pid}:{{}}" for pid in _pids(self._known))
        stopped = "false" if self._events is not None else "true"
        return f"{name}{{config:{self.config_text or ''},pidsReported:map[{pids}],stop:{stopped}}}"

    def close(self) -> None:
        """See `AnyWatcher.close`."""
        self.stop()

    def _built(self) -> Target:
        if self._spec is None:
            raise CommandError(f"pidwatcher error: {self.name} is not configured, use -config")
        if self._target is None:
            self._target = self._spec.build(self._host)
        return self._target

    def _tell(self, added: frozenset[ProcessId], removed: frozenset[ProcessId]) -> None:
        # Also called from the thread that follows; what poll has told already is not told again.
        with self._lock:
            added, removed = added - self._known, removed & self._known
            self._known = (self._known | added) - removed
        if self._listener is not None and (added or removed):
            self._listener(_pids(added), _pids(removed))


def _pids(processes: Iterable[ProcessId]) -> list[int]:
    return sorted(process.pid for process in processes)


class PolicyWatcher(PolicyOwned):
    """The watcher of the current policy: it can be asked, and is steered by its policy."""

    kind = "pidwatcher"

    @property
    def name(self) -> str:
        """Of the watcher."""
        spec = self._policy.spec
        return "stub" if spec is None else spec.target.name

    def listen(self, listener: OnPids) -> None:
        """Refused."""
        raise self._refusal("which listens to it")

    def start(self) -> None:
        """Refused."""
        raise self._refusal("use policy -start")

    def poll(self) -> None:
        """Refused."""
        raise self._refusal("which polls it at each scan")

    def dump(self) -> str:
        """The processes that the policy follows now."""
        pids = " ".join(f"{pid}:{{}}" for pid in self._policy.pids())
        return f"PidWatcher{self.name.capitalize()}{{pidsReported:map[{pids}]}}"
