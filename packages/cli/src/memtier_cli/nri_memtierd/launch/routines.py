"""The routines of an engine in this process: those that write the table of accessed memory, in the engine's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memtier_cli.accessed import AccessedDump
from memtier_engine.config.routines import RoutineSpec
from memtier_engine.engine.loop import Engine
from memtier_engine.errors import ConfigError
from memtier_engine.stats.recorder import Statistics

_COMMAND = ("policy", "-dump", "accessed")


class EngineRoutines:
    """Runs the routines of one engine when they are due. Call `run_due` after each scan, in the engine's thread."""

    def __init__(self, specs: Sequence[RoutineSpec], write: Callable[[str], None], *, now_s: float) -> None:
        """`write` gets each command's output. Raises ConfigError as `check_routines`."""
        check_routines(specs)
        self._dumper = dumper = _Dumper(write)
        # Not a method of ours: what refers to us in a circle would wait for the garbage collector, with its engine.
        self._routines = [spec.build(Statistics(), now_s=now_s, run_words=dumper.run, write=write) for spec in specs]

    def run_due(self, engine: Engine, now_s: float) -> None:
        """Write the output of those whose interval is over."""
        self._dumper.engine = engine
        try:
            for routine in self._routines:
                routine.advance(now_s)
        finally:
            self._dumper.engine = None


class _Dumper:
    """Runs the one command that there is, on the engine that it has for the moment."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.engine: Engine | None = None
        self._write = write

    def run(self, command: Sequence[str]) -> int:
        assert self.engine is not None
        self._write(_dump_of(command).text(self.engine))
        return 0


def check_routines(specs: Sequence[RoutineSpec]) -> None:
    """Raise ConfigError for a routine whose command cannot be run here: it needs the whole prompt, or is wrong."""
    for spec in specs:
        if spec.config is None:
            continue
        if spec.config.pageout_command or spec.config.interval_command_runner != "memtier":
            raise ConfigError(
                "only `intervalcommandrunner: memtier` is supported here",
                key_path="routines",
                hint="engines in one process run no programs, whatever allows them",
            )
        _dump_of(spec.config.interval_command)


def _dump_of(command: Sequence[str]) -> AccessedDump:
    if tuple(command[:3]) != _COMMAND or len(command) > 5:
        raise ConfigError(
            f"{' '.join(command)!r} is not supported here",
            key_path="intervalcommand",
            hint='use ["policy", "-dump", "accessed", "0,1m,30m,0"]',
        )
    return AccessedDump.of(command[3:])
