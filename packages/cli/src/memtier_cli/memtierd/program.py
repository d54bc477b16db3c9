"""Program `memtierd`: the reference daemon's flags, configuration files and command prompt.

Exit status: 0 normal end, 1 a configuration or start error (one line, nothing was started) or the prompt's
`log -f`, 2 wrong usage. SIGTERM, SIGHUP and SIGINT end it cleanly with 0; what is swapped out stays so. At a
terminal SIGINT (Ctrl-C) ends the command that is running instead.
"""

from __future__ import annotations

import errno
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from memtier_cli import libraries, standard_files
from memtier_cli.flags import Flag, Parsed
from memtier_cli.front import output_is_full, read_flags

if TYPE_CHECKING:
    from memtier_cli.memtierd.prompt.state import Prompt
    from memtier_cli.signals import SessionSignals

FLAGS = (
    Flag("config", "load policy and routines from FILE", "FILE"),
    Flag("debug", "write debug messages to the log"),
    Flag("l", "log to FILE; stderr (also when empty), stdout or -, or a file that is appended to", "FILE"),
    Flag("version", "print the version and exit"),
    Flag("prompt", "after -c and -f, read commands from standard input"),
    Flag("c", "run the commands in STRING, one per line", "STRING"),
    Flag("f", "run the commands in FILE", "FILE"),
    Flag("echo", "print each command before it runs"),
    Flag("allow-programs", "let routines of the configuration file run programs, and its commands pipe into them"),
)


def main() -> int:
    """Entry point of `memtierd`; returns the exit status."""
    standard_files.occupy()
    program = Path(sys.argv[0]).name
    flags = read_flags(program, FLAGS)
    if isinstance(flags, int):
        return flags
    from memtier_cli.memtierd.prompt.errors import CommandError, Fatal

    try:
        return _serve(flags)
    except Fatal as message:
        libraries.logger().opt(raw=True).critical("{}\n", str(message))
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone; nobody reads a complaint either
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        output_is_full("memtierd", error)
    except KeyboardInterrupt:
        return 0  # before anything was started: later, signals are heard
    except Exception as error:
        from memtier_engine.errors import MemtierError

        if not isinstance(error, (MemtierError, CommandError)):
            raise
        print(f"memtierd: {error}", file=sys.stderr)
        return 1


def _serve(flags: Parsed) -> int:
    from memtier_cli.memtierd.prompt.errors import CommandError
    from memtier_cli.memtierd.prompt.output import Output
    from memtier_cli.memtierd.prompt.state import Prompt
    from memtier_cli.signals import Ended, SessionSignals

    # The reference's own launcher passes an empty -c along with -config: that asks for nothing.
    if not (flags.text("config") or flags.text("c") or flags.text("f") or flags.boolean("prompt")):
        raise CommandError("nothing to do; give -config FILE, -c STRING, -f FILE or -prompt")
    destination = flags.text("l")
    try:
        sink = _sink(destination)
    except OSError as error:
        raise CommandError(f"-l {destination}: {error.strerror}") from None
    libraries.before_use(lambda: _prepare(flags, sink))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    prompt = Prompt(Output(sys.stdout))
    with SessionSignals() as signals:
        try:
            return _run(flags, prompt, signals)
        except Ended:
            return 0
        finally:
            prompt.close()


def _prepare(flags: Parsed, sink: TextIO) -> None:
    """For the engine, before anything of it is imported."""
    from memtier_cli.logs import configure
    from memtier_engine.hostfs.limits import raise_open_files

    configure(debug=flags.boolean("debug"), sink=sink)
    raise_open_files()


def _run(flags: Parsed, prompt: Prompt, signals: SessionSignals) -> int:
    from memtier_cli.memtierd.prompt.lines import StreamLines, TextLines, standard_input
    from memtier_cli.memtierd.prompt.session import run_session

    if flags.text("config"):
        _start(flags, prompt, signals)
    echo = flags.boolean("echo")
    if flags.text("c"):
        run_session(prompt, TextLines(flags.text("c")), echo=echo)
    if flags.text("f"):
        with _open(flags.text("f")) as file:
            run_session(prompt, StreamLines(file), echo=echo)
    if flags.boolean("prompt"):
        lines = standard_input()
        with signals.interrupting(lines.interactive):
            run_session(prompt, lines, echo=echo)
        return 0
    if prompt.policy is not None or prompt.routines:
        signals.wait()
    if signals.failure is not None:
        raise signals.failure
    return 0


def _open(path: str) -> BinaryIO:
    from memtier_cli.memtierd.prompt.errors import CommandError

    try:
        return Path(path).open("rb")
    except OSError as error:
        raise CommandError(f"-f {path}: {error.strerror}") from None


def _start(flags: Parsed, prompt: Prompt, signals: SessionSignals) -> None:
    """The policy and the routines of the configuration file. If anything is wrong, nothing is started."""
    from memtier_cli import allocator

    allocator.settle()
    libraries.ready()
    from memtier_cli.memtierd.prompt.configs import file_blocks
    from memtier_cli.memtierd.prompt.policy_part import PolicyPart
    from memtier_cli.memtierd.prompt.routine_part import RoutinePart
    from memtier_engine.config.files import load

    path = flags.text("config")
    spec = load(path, allow_programs=flags.boolean("allow-programs"))
    written, written_routines = file_blocks(path)
    asked = bool(flags.boolean("prompt") or flags.text("c") or flags.text("f") or spec.routines)
    policy = PolicyPart(prompt, written.name, spec=spec, text=written.text, on_failure=signals.fail, asked=asked)
    allocator.unmap_idle_code()
    policy.start()
    prompt.attach(policy)
    for routine, block in zip(spec.routines, written_routines, strict=True):
        part = RoutinePart(prompt, routine.name, spec=routine, text=block.text)
        prompt.routines.append(part)
        part.start()
    allocator.settle()  # what trying the tracker took
    allocator.release()


def _sink(destination: str) -> TextIO:
    if destination in ("", "stderr"):
        return sys.stderr
    if destination in ("-", "stdout"):
        return sys.stdout
    return Path(destination).open("a")


if __name__ == "__main__":
    sys.exit(main())
