"""Routine `statactions`: a command at every interval, and one each time so much has been paged out.

Commands are programs, or lines of the prompt. Programs are only run where whoever starts us allowed it: a
configuration file alone does not get to run anything.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loguru import logger

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES
from memtier_engine.routines.gotime import Moment, stamp
from memtier_engine.stats.recorder import Statistics

if TYPE_CHECKING:
    import subprocess

RUNNERS = ("", "exec", "memtier", "memtier-prompt")
_MIB = 1 << 20

RunWords = Callable[[Sequence[str]], int]
"""Runs a command of the prompt given as words; returns its status."""
RunLine = Callable[[str], int]
"""Runs a line of the prompt, pipes and all; returns its status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatActionsConfig:
    """The keys of the reference's `statactions` routine, with units in their names."""

    interval_ms: int
    """Time between ticks (`intervalms`)."""
    interval_command: tuple[str, ...] = ()
    """Run at every tick."""
    interval_command_runner: str = ""
    pageout_mib: int = 0
    """Step of paged out memory (`pageoutmb`); 0: every tick is one."""
    pageout_command: tuple[str, ...] = ()
    """Run at the first tick after a step."""
    pageout_command_runner: str = ""
    timestamp: str = ""
    """Printed before each command; see `gotime.stamp`."""
    timestamp_after: str = ""
    """Printed after each command."""

    def __post_init__(self) -> None:
        if self.interval_ms <= 0:
            raise ConfigError(f"value {self.interval_ms}", key_path="intervalms", hint="use 1 or more")
        if self.pageout_mib < 0:
            raise ConfigError(f"value {self.pageout_mib}", key_path="pageoutmb", hint="use 0 or more")
        if not self.interval_command and not self.pageout_command:
            raise ConfigError(
                "is missing", key_path="intervalcommand", hint="set intervalcommand, pageoutcommand or both"
            )
        for key, runner, command in (
            ("intervalcommandrunner", self.interval_command_runner, self.interval_command),
            ("pageoutcommandrunner", self.pageout_command_runner, self.pageout_command),
        ):
            if runner not in RUNNERS:
                raise ConfigError(f"{runner!r} is not known", key_path=key, hint="exec, memtier or memtier-prompt")
            if runner == "memtier-prompt" and command and len(command) != 1:
                raise ConfigError(
                    f"memtier-prompt takes one line, not {len(command)} words", key_path=key, hint="or use memtier"
                )

    def runs_programs(self) -> bool:
        """Whether a command of it is a program."""
        return any(
            command and runner in ("", "exec")
            for command, runner in (
                (self.interval_command, self.interval_command_runner),
                (self.pageout_command, self.pageout_command_runner),
            )
        )


class StatActions:
    """Ticks; see the module."""

    name = "statactions"

    def __init__(
        self,
        config: StatActionsConfig,
        statistics: Statistics,
        *,
        now_s: float,
        run_words: RunWords | None = None,
        run_line: RunLine | None = None,
        allow_programs: bool = False,
        switch: str = "allow_programs=True",
        unix_ns: Callable[[], int] = time.time_ns,
        write: Callable[[str], object] | None = None,
    ) -> None:
        """The first tick is one interval after `now_s`.

        Args:
            config: what to run.
            statistics: says how much was paged out, and counts our events.
            now_s: now.
            run_words, run_line: the prompt; None: there is none.
            allow_programs: whether the runner `exec` may run.
            switch: how a person allows it, for the error.
            unix_ns: the time of day.
            write: where timestamps go; None: standard output.
        Raises:
            ConfigError: it would run programs and may not, or needs a prompt and has none.
        """
        if config.runs_programs() and not allow_programs:
            raise ConfigError(
                "runs programs, which is switched off", key_path="intervalcommandrunner", hint=f"allow it: {switch}"
            )
        for runner, found in (("memtier", run_words), ("memtier-prompt", run_line)):
            if runner in (config.interval_command_runner, config.pageout_command_runner) and found is None:
                raise ConfigError(f"{runner} needs a prompt, and there is none", key_path="intervalcommandrunner")
        self.config = config
        self._statistics = statistics
        self._run_words, self._run_line = run_words, run_line
        self._unix_ns = unix_ns
        self._write = write or _write_stdout
        self._started_s = now_s
        self._due_s = now_s + config.interval_ms / 1000
        self._counted_pages = statistics.paged_out_pages_total
        self._child_lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def advance(self, now_s: float) -> float:
        """See `Routine.advance`. Ticks that were missed are not made up for."""
        if now_s < self._due_s or self._closed:
            return self._due_s
        self._tick(now_s)
        interval_s = self.config.interval_ms / 1000
        missed = max(0, int((now_s - self._due_s) / interval_s))
        self._due_s += (missed + 1) * interval_s
        return self._due_s

    def close(self) -> None:
        """End the program that is running, if any."""
        self._closed = True
        with self._child_lock:
            if self._child is not None:
                self._child.kill()

    def _tick(self, now_s: float) -> None:
        config = self.config
        self._statistics.event("RoutineStatActions.tick")
        pages = self._statistics.paged_out_pages_total
        if config.interval_command:
            self._run("IntervalCommand", config.interval_command, config.interval_command_runner, now_s)
            self._statistics.event("RoutineStatActions.IntervalCommand")
        if config.pageout_command and (pages - self._counted_pages) * PAGE_BYTES // _MIB >= config.pageout_mib:
            self._counted_pages = pages
            self._statistics.event("RoutineStatActions.PageOutCommand")
            self._run("PageOutCommand", config.pageout_command, config.pageout_command_runner, now_s)

    def _run(self, what: str, command: tuple[str, ...], runner: str, now_s: float) -> None:
        running_ns = int((now_s - self._started_s) * 1e9)
        for text, work in ((self.config.timestamp, True), (self.config.timestamp_after, False)):
            if text:
                self._write(stamp(text, Moment.here(self._unix_ns()), running_ns))
            if work:
                try:
                    self._run_command(command, runner)
                except Exception as failure:  # the prompt's commands may raise anything
                    logger.error("routines statactions {}: {}", what.lower(), failure)

    def _run_command(self, command: tuple[str, ...], runner: str) -> None:
        prefix = "RoutineStatActions.command"
        if runner == "memtier":
            assert self._run_words is not None
            status = self._run_words(command)
            self._statistics.event(f"{prefix}.memtier: {command[0]}... status: {status}")
        elif runner == "memtier-prompt":
            assert self._run_line is not None
            status = self._run_line(command[0])
            self._statistics.event(f'{prefix}.memtier-prompt: "{command[0]}" status: {status}')
        else:
            self._statistics.event(f"{prefix}.exec: {command[0]}... status: {self._run_program(command)}")

    def _run_program(self, command: tuple[str, ...]) -> str:
        """How it ended and what went wrong, as the reference names events: each may be `<nil>`."""
        import subprocess

        try:
            with self._child_lock:
                if self._closed:
                    return "<nil> error: stopped"
                self._child = subprocess.Popen(
                    list(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
        except OSError as failure:
            logger.error("routines statactions: {}: {}", command[0], failure.strerror)
            return f"<nil> error: {str(failure.strerror).lower()}"
        status = self._child.wait()
        with self._child_lock:
            self._child = None
        ended = f"exit status {status}" if status >= 0 else f"signal: {signal.strsignal(-status) or -status}".lower()
        return f"{ended} error: {ended if status else '<nil>'}"


def _write_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
