"""Program `memtierd`: the reference daemon's flags and configuration files.

Exit status: 0 normal end, 1 a configuration or start error (one line, nothing was started), 2 wrong usage.
SIGTERM and SIGINT end it cleanly with 0; what is swapped out stays so.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TextIO

from memtier_cli.compat.goflags import Flag, HelpWanted, Parsed, UsageError, parse, usage

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


def main() -> None:
    """Entry point of `memtierd`."""
    program = Path(sys.argv[0]).name
    try:
        flags = parse(FLAGS, sys.argv[1:])
    except HelpWanted:
        print(usage(program, FLAGS), file=sys.stderr)
        sys.exit(0)
    except UsageError as error:
        print(f"{error}\n{usage(program, FLAGS)}", file=sys.stderr)
        sys.exit(2)
    if flags.boolean("version"):
        number = version("memtier-cli")
        print(f"{program} version information:\n  - version: {number}\n  - build:   memtier-cli {number}")
        sys.exit(0)
    # The reference's own launcher passes an empty -c along with -config: that asks for nothing.
    for name in _PROMPT_FLAGS:
        if flags.boolean(name) or flags.text(name):
            _fail(f"-{name}: the command prompt is not supported yet; use -config FILE, or `memtier run`")
    if not flags.text("config"):
        _fail("nothing to do; give -config FILE")
    sys.exit(_serve(flags))


def _serve(flags: Parsed) -> int:
    from loguru import logger

    from memtier_cli.logs import configure
    from memtier_cli.signals import stop_on_signals
    from memtier_engine.config import load
    from memtier_engine.errors import MemtierError

    destination = flags.text("l")
    try:
        configure(debug=flags.boolean("debug"), sink=_sink(destination))
        engine = load(flags.text("config")).build()
    except MemtierError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"-l {destination}: {error.strerror}")
    logger.info("tracker {}, policy {}", engine.tracker.name, engine.policy.name)
    with stop_on_signals() as stop:
        for report in engine.run(stop=stop):
            logger.debug(
                "{} processes, {} MiB resident, {} MiB paged out, {} MiB refaulted, scan {:.0f} ms",
                report.processes,
                report.resident_bytes >> 20,
                report.paged_out_bytes >> 20,
                report.refault_bytes_total >> 20,
                report.scan_seconds * 1000,
            )
    return 0


def _sink(destination: str) -> TextIO:
    if destination in ("", "stderr"):
        return sys.stderr
    if destination in ("-", "stdout"):
        return sys.stdout
    return Path(destination).open("a")


def _fail(message: str) -> NoReturn:
    print(f"memtierd: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
