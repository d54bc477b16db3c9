"""Commands `log`, `nop` and `q`."""

from __future__ import annotations

from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.libraries import logger
from memtier_cli.memtierd.prompt.command import Command
from memtier_cli.memtierd.prompt.errors import CommandError, Fatal
from memtier_cli.memtierd.prompt.output import Output


class LogNeeds(Protocol):
    """What `log` needs of a prompt."""

    output: Output


class QuitNeeds(Protocol):
    """What `q` needs of a prompt."""

    ended: bool


def _log(prompt: LogNeeds, flags: Parsed) -> None:
    output = prompt.output
    if flags.boolean("copy"):
        output.to_stream = output.to_log = True
    if flags.boolean("capture"):
        output.to_stream, output.to_log = False, True
    if "prefix" in flags.texts:
        if not output.to_log:
            raise CommandError("cannot set prefix, output is not copied or captured into log")
        output.prefix = flags.text("prefix")
    for flag, level in (("i", "INFO"), ("d", "DEBUG"), ("e", "ERROR")):
        if flag in flags.texts:
            logger().log(level, "{}", flags.text(flag))
    if "f" in flags.texts:
        raise Fatal(flags.text("f"))


def _nop(prompt: object, flags: Parsed) -> None:
    """Nothing."""


def _quit(prompt: QuitNeeds, flags: Parsed) -> None:
    prompt.ended = True


LOG = Command(
    "log",
    _log,
    (
        Flag("i", "write MSG as information", "string"),
        Flag("d", "write MSG as debug information", "string"),
        Flag("e", "write MSG as an error", "string"),
        Flag("f", "write MSG and end the program with status 1", "string"),
        Flag("copy", "copy the output of commands into the log from now on"),
        Flag("capture", "write the output of commands only into the log from now on"),
        Flag("prefix", "put this before each line of output in the log", "string"),
    ),
)
NOP = Command("nop", _nop, any_words=True)
QUIT = Command("q", _quit)
