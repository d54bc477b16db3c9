"""Program `memtierd`: the reference daemon's flags and configuration files.

Exit status: 0 normal end, 1 a configuration or start error (one line, nothing was started), 2 wrong usage.
SIGTERM and SIGINT end it cleanly with 0; what is swapped out stays so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from memtier_cli.compat.front import read_flags
from memtier_cli.compat.goflags import Flag, Parsed

FLAGS = (
    Flag("config", "load the policy from a FILE", "FILE"),
    Flag("debug", "write debug messages to the log"),
    Flag("l", "log to FILE; stderr (also when empty), stdout or -, or a file that is appended to", "FILE"),
    Flag("version", "print the version and exit"),
    Flag("prompt", "read commands from standard input"),
    Flag("c", "run the commands in STRING", "STRING"),
    Flag("f", "run the commands in FILE", "FILE"),
    Flag("echo", "print each command before it runs"),
)
_PROMPT_FLAGS = ("prompt", "c", "f", "echo")


def main() -> int:
    """Entry point of `memtierd`; returns the exit status."""
    program = Path(sys.argv[0]).name
    flags = read_flags(program, FLAGS)
    if isinstance(flags, int):
        return flags
    from memtier_engine.errors import MemtierError

    try:
        return _serve(flags)
    except MemtierError as error:
        print(f"memtierd: {error}", file=sys.stderr)
        return 1


def _serve(flags: Parsed) -> int:
    from loguru import logger

    from memtier_cli.logs import configure
    from memtier_cli.signals import stop_on_signals
    from memtier_cli.statactions import StatActions
    from memtier_engine.config import load
    from memtier_engine.errors import MemtierError
    from memtier_engine.hostfs.host import Host
    from memtier_engine.hostfs.proc import read_swaps

    # The reference's own launcher passes an empty -c along with -config: that asks for nothing.
    for name in _PROMPT_FLAGS:
        if flags.boolean(name) or flags.text(name):
            raise MemtierError(f"-{name}: the command prompt is not supported yet; use -config FILE, or `memtier run`")
    if not flags.text("config"):
        raise MemtierError("nothing to do; give -config FILE")
    destination = flags.text("l")
    try:
        configure(debug=flags.boolean("debug"), sink=_sink(destination))
    except OSError as error:
        raise MemtierError(f"-l {destination}: {error.strerror}") from None
    with stop_on_signals() as stop:
        host = Host()
        spec = load(flags.text("config"))
        engine = spec.build(host)
        routines = StatActions(spec.routines, _print, now_s=engine.clock.now_s())
        logger.info("tracker {}, policy {}", engine.tracker.name, engine.policy.name)
        if spec.swaps and not read_swaps(host):
            logger.warning("there is no swap: nothing can be paged out until some is turned on (swapon)")
        for report in engine.run(stop=stop):
            routines.run_due(engine, report.time_s)
            logger.debug(
                "{} processes, {} MiB resident, {} MiB paged out, {} MiB refaulted, scan {:.0f} ms",
                report.processes,
                report.resident_bytes >> 20,
                report.paged_out_bytes >> 20,
                report.refault_bytes_total >> 20,
                report.scan_seconds * 1000,
            )
    return 0


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _sink(destination: str) -> TextIO:
    if destination in ("", "stderr"):
        return sys.stderr
    if destination in ("-", "stdout"):
        return sys.stdout
    return Path(destination).open("a")


if __name__ == "__main__":
    sys.exit(main())
