"""Sessions of the prompt: a line in, its command run, its text out. Errors of commands never end a session."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from memtier_cli.flags import HelpWanted, Parsed, UsageError, parse, usage
from memtier_cli.libraries import logger
from memtier_cli.memtierd.prompt.commands import COMMANDS
from memtier_cli.memtierd.prompt.errors import CommandError, Fatal
from memtier_cli.memtierd.prompt.lines import Lines, LineTooLong
from memtier_cli.memtierd.prompt.words import QuotingError, split_pipe, split_words

if TYPE_CHECKING:
    from memtier_cli.memtierd.prompt.command import Command
    from memtier_cli.memtierd.prompt.needs import AllNeeds
    from memtier_cli.memtierd.prompt.pipes import Redirected

    class Prompted(AllNeeds, Redirected, Protocol):
        """A prompt: what commands need, and output that a pipe can take."""


PROMPT = "memtierd> "
OK, UNKNOWN_COMMAND, NO_PIPE, NO_PIPE_PROCESS, BAD_QUOTING = range(5)
"""Statuses of a line. A command that failed has OK all the same, as in the reference."""


def run_session(prompt: Prompted, lines: Lines, *, echo: bool = False) -> None:
    """Run lines until they end or one says `q`.

    Args:
        prompt: keeps what the commands select and create, also for later sessions.
        lines: where they come from.
        echo: print each line before it is run.
    """
    prompt.ended = False
    while not prompt.ended:
        try:
            line = lines.read(PROMPT, prompt.output)
            if line is None:
                prompt.say("quit: EOF")
                break
            if echo:
                prompt.say(line)
            run_line(prompt, line)
        except LineTooLong as failure:
            prompt.say(str(failure))
        except KeyboardInterrupt:
            if not lines.interactive:
                raise
            prompt.output.banner("\n")  # Ctrl-C drops the line, or ends the command, and not the session
    prompt.say("quit.")


def run_line(prompt: Prompted, line: str) -> int:
    """Run a line, with its pipe. Returns its status."""
    command, shell = split_pipe(line)
    try:
        words = split_words(command)
    except QuotingError as failure:
        prompt.say(f'error in command "{command}": {failure}')
        return BAD_QUOTING
    if not shell:
        return run_words(prompt, words)
    if not prompt.trusted:
        prompt.say("a pipe runs programs, which commands of a configuration file may not (allow it: -allow-programs)")
        return NO_PIPE
    from memtier_cli.memtierd.prompt.pipes import PipeFailed, shell_pipe

    try:
        with shell_pipe(prompt, shell):
            return run_words(prompt, words)
    except PipeFailed as failure:
        prompt.say(str(failure))
        return NO_PIPE_PROCESS


def run_words(prompt: Prompted, words: Sequence[str]) -> int:
    """Run a command given as words. Returns its status."""
    if not words:
        return OK
    command = COMMANDS.get(words[0])
    if command is None:
        prompt.say(f'unknown command "{words[0]}"')
        return UNKNOWN_COMMAND
    _run(prompt, command, words[1:])
    return OK


def _run(prompt: Prompted, command: Command[AllNeeds], arguments: Sequence[str]) -> None:
    try:
        command.run(prompt, Parsed() if command.any_words else parse(command.flags, arguments))
    except HelpWanted:
        print(usage(command.name, command.flags), file=sys.stderr, flush=True)
    except UsageError as failure:
        print(f"{failure}\n{usage(command.name, command.flags)}", file=sys.stderr, flush=True)
    except CommandError as failure:
        prompt.say(str(failure))
    except Fatal:
        raise
    except Exception as failure:
        from memtier_engine.errors import MemtierError

        if isinstance(failure, (MemtierError, OSError)):
            prompt.say(f"{command.name} error: {failure}")
            return
        # A defect in one command must not end the daemon.
        logger().opt(exception=failure).error("command {} failed", command.name)
        prompt.say(f"{command.name} failed: {failure!r}")
