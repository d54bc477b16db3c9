"""The `routines` of a configuration file, decoded: what is to be run beside the policy, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memtier_engine.config.parts import required_config
from memtier_engine.config.reader import Section
from memtier_engine.errors import ConfigError
from memtier_engine.routines.base import Routine
from memtier_engine.routines.statactions import RunLine, RunWords, StatActions, StatActionsConfig
from memtier_engine.routines.stub import StubRoutine
from memtier_engine.stats.recorder import Statistics

ALLOW_PROGRAMS = "memtierd -allow-programs, or `allowprograms: true` at the top of the file"
"""How a person lets routines run programs."""
NOT_ALLOWED = "or put `allowprograms: true` at the top of the file: without either, a file runs no programs"
"""The hint of the error where a person has not."""
ROUTINES = ("statactions", "stub")
_PAIRS = (("intervalcommand", "intervalcommandrunner"), ("pageoutcommand", "pageoutcommandrunner"))


@dataclass(frozen=True, slots=True)
class RoutineSpec:
    """One routine."""

    name: str
    config: StatActionsConfig | None = None
    """None: the stub."""
    programs_allowed: bool = False
    """Whether its commands may be programs."""

    def build(
        self,
        statistics: Statistics,
        *,
        now_s: float,
        run_words: RunWords | None = None,
        run_line: RunLine | None = None,
        write: Callable[[str], object] | None = None,
    ) -> Routine:
        """The routine; for the arguments see `StatActions`.

        Raises:
            ConfigError: it needs a prompt, and there is none.
        """
        if self.config is None:
            return StubRoutine()
        return StatActions(
            self.config,
            statistics,
            now_s=now_s,
            run_words=run_words,
            run_line=run_line,
            allow_programs=self.programs_allowed,
            switch=ALLOW_PROGRAMS,
            write=write,
        )


def decode_routines(root: Section, *, allow_programs: bool = False) -> tuple[RoutineSpec, ...]:
    """The list under `routines`; empty if there is none.

    Raises:
        ConfigError: a key or value that is not understood, or a program that may not be run.
    """
    return tuple(decode_routine(block, allow_programs=allow_programs) for block in root.sections("routines"))


def decode_routine(block: Section, *, allow_programs: bool = False) -> RoutineSpec:
    """One `name` and `config` block. Raises ConfigError as `decode_routines`."""
    name = block.choice("name", ROUTINES)
    if name == "stub":
        block.use("block")
        return RoutineSpec("stub")
    section = required_config(block, "routine.statactions")
    commands = {key: section.texts(key) for key, _ in _PAIRS}
    runners = {runner: section.text(runner) for _, runner in _PAIRS}
    for key, runner in _PAIRS:
        command = commands[key]
        if command and not command[0].strip():
            raise section.error(key, "begins with an empty word", "a list: the command and its arguments")
        if command and runners[runner] in ("", "exec") and not allow_programs:
            raise section.error(
                key, f"start memtierd with -allow-programs: this runs the program {command[0]!r}", NOT_ALLOWED
            )
    try:
        config = StatActionsConfig(
            interval_ms=section.integer("intervalms"),
            interval_command=commands["intervalcommand"],
            interval_command_runner=runners["intervalcommandrunner"],
            pageout_mib=section.integer("pageoutmb"),
            pageout_command=commands["pageoutcommand"],
            pageout_command_runner=runners["pageoutcommandrunner"],
            timestamp=section.text("timestamp"),
            timestamp_after=section.text("timestampafter"),
        )
    except ConfigError as failure:
        raise section.located(failure) from None
    return RoutineSpec("statactions", config, programs_allowed=allow_programs)
