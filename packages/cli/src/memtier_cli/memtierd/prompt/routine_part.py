"""Routines beside the policy: their commands run in a prompt of their own, with the policy of the whole program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from memtier_cli.memtierd.prompt.command import Counted
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.output import Output
from memtier_engine.config.files import parse_routine
from memtier_engine.config.routines import ROUTINES, RoutineSpec
from memtier_engine.routines.base import RoutineThread


class Owner(Counted, Protocol):
    """The prompt that a routine belongs to, as far as the routine asks it."""

    output: Output
    trusted: bool
    """Whether whoever gives the commands may run programs."""

    def run_words_apart(self, words: Sequence[str], *, trusted: bool) -> int:
        """Run a command in a fresh prompt that has the current policy. Returns its status."""
        ...

    def run_line_apart(self, line: str, *, trusted: bool) -> int:
        """The same for a line, pipe and all."""
        ...


class RoutinePart:
    """One routine. Its commands may run programs only if it was told so when it was configured."""

    def __init__(self, owner: Owner, name: str, *, spec: RoutineSpec | None = None, text: str | None = None) -> None:
        """Not started.

        Args:
            owner: whose statistics, output and (current) policy it uses.
            name: of the routine.
            spec: its configuration, decoded; None: not configured yet.
            text: its configuration as it was given.
        Raises:
            CommandError: no routine has that name.
        """
        if name not in ROUTINES:
            raise CommandError(f'creating routine failed: invalid routine name "{name}"')
        self.name = name
        self.spec = spec or (RoutineSpec("stub") if name == "stub" else None)
        self.config_text = text
        self._owner = owner
        self._thread: RoutineThread | None = None

    def configure(self, text: str, file: str | None = None) -> None:
        """Take a configuration. Whoever types commands may also let a routine run programs. Raises ConfigError."""
        self.spec = parse_routine(self.name, text, file=file, allow_programs=self._owner.trusted)
        self.config_text = text

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._thread is not None and self._thread.running

    def start(self) -> None:
        """Start ticking. Raises CommandError: already started, or not configured; ConfigError."""
        if self.running:
            raise CommandError("start failed: already started")
        if self.spec is None:
            raise CommandError("start failed: not configured, use -config")
        statistics = self._owner.statistics
        routine = self.spec.build(
            statistics,
            now_s=statistics.now_s(),
            run_words=self._run_words,
            run_line=self._run_line,
            write=self._owner.output.write,
        )
        self._thread = RoutineThread(routine)
        self._thread.start()

    def stop(self) -> None:
        """End it; waits for the command it is in, but not for ever."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def dump(self) -> str:
        """The reference's one line."""
        return f'routine "{self.name}": running={str(self.running).lower()}'

    def close(self) -> None:
        """Stop. Safe to call twice."""
        self.stop()

    @property
    def _trusted(self) -> bool:
        return self.spec is not None and self.spec.programs_allowed

    def _run_words(self, words: Sequence[str]) -> int:
        return self._owner.run_words_apart(words, trusted=self._trusted)

    def _run_line(self, line: str) -> int:
        return self._owner.run_line_apart(line, trusted=self._trusted)
