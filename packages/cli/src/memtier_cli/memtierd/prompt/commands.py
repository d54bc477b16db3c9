"""All commands of the prompt by name: what `help`, completion and the documents list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from memtier_cli import libraries
from memtier_cli.memtierd.prompt.command import Command, Console

if TYPE_CHECKING:
    from memtier_cli.flags import Parsed
    from memtier_cli.memtierd.prompt.needs import AllNeeds

HELP: Mapping[str, str] = {
    "arange": "select address ranges of a process",
    "help": "print this list",
    "log": "write to the log, or send the output of commands there",
    "mover": "move the selected pages to a node, steer the mover",
    "nop": "do nothing",
    "pages": "select pages of a process, show pages and frames",
    "pidwatcher": "follow processes as they come and go",
    "policy": "create, configure, start and look into the policy",
    "q": "end this session",
    "routines": "run commands at intervals or by pageouts",
    "stats": "print statistics",
    "swap": "page processes out or in, show what is swapped out",
    "time": "print the time, measure it, let it pass",
    "tracker": "see which memory of processes is touched",
}


def help_text() -> str:
    """What `help` prints."""
    lines = ["Available commands:"]
    lines += [f"        {name:<12} {text}" for name, text in sorted(HELP.items())]
    lines += [
        "Syntax:",
        "        COMMAND -h                  flags of a command",
        "        COMMAND [FLAGS]             run it",
        "        COMMAND [FLAGS] | SHELLCMD  run it, its output into a shell command",
    ]
    return "\n".join(lines) + "\n"


def _help(prompt: Console, flags: Parsed) -> None:
    prompt.write(help_text())


def _light(name: str) -> Command[AllNeeds] | None:
    """A command that needs nothing of the engine."""
    from memtier_cli.memtierd.prompt import basic, stopwatch

    match name:
        case "help":
            return Command("help", _help, any_words=True)
        case "log":
            return basic.LOG
        case "nop":
            return basic.NOP
        case "q":
            return basic.QUIT
        case "time":
            return stopwatch.TIME
    return None


def _load(name: str) -> Command[AllNeeds]:
    """A command of the engine. Its module is imported now: together they take longer than a short session."""
    libraries.ready()
    match name:
        case "arange":
            from memtier_cli.memtierd.prompt.memory import ARANGE

            return ARANGE
        case "mover":
            from memtier_cli.memtierd.prompt.moving import MOVER

            return MOVER
        case "pages":
            from memtier_cli.memtierd.prompt.pages import PAGES

            return PAGES
        case "pidwatcher":
            from memtier_cli.memtierd.prompt.watching import PIDWATCHER

            return PIDWATCHER
        case "policy":
            from memtier_cli.memtierd.prompt.policies import POLICY

            return POLICY
        case "routines":
            from memtier_cli.memtierd.prompt.routines import ROUTINES_COMMAND

            return ROUTINES_COMMAND
        case "stats":
            from memtier_cli.memtierd.prompt.statistics import STATS

            return STATS
        case "swap":
            from memtier_cli.memtierd.prompt.swapping import SWAP

            return SWAP
        case "tracker":
            from memtier_cli.memtierd.prompt.tracking import TRACKER

            return TRACKER
    raise KeyError(name)


class _Commands(Mapping[str, "Command[AllNeeds]"]):
    """Names without importing anything; a command with its module."""

    def __getitem__(self, name: str) -> Command[AllNeeds]:
        if name not in HELP:
            raise KeyError(name)
        return _light(name) or _load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(HELP)

    def __len__(self) -> int:
        return len(HELP)


COMMANDS: Mapping[str, Command[AllNeeds]] = _Commands()
