"""All commands of the prompt by name: what `help`, completion and the documents list."""

from __future__ import annotations

from collections.abc import Mapping

from memtier_cli.flags import Parsed
from memtier_cli.memtierd.prompt.basic import LOG, NOP, QUIT
from memtier_cli.memtierd.prompt.memory import ARANGE
from memtier_cli.memtierd.prompt.moving import MOVER
from memtier_cli.memtierd.prompt.pages import PAGES
from memtier_cli.memtierd.prompt.policies import POLICY
from memtier_cli.memtierd.prompt.routines import ROUTINES_COMMAND
from memtier_cli.memtierd.prompt.state import Command, Prompt
from memtier_cli.memtierd.prompt.statistics import STATS
from memtier_cli.memtierd.prompt.stopwatch import TIME
from memtier_cli.memtierd.prompt.swapping import SWAP
from memtier_cli.memtierd.prompt.tracking import TRACKER
from memtier_cli.memtierd.prompt.watching import PIDWATCHER


def help_text() -> str:
    """What `help` prints."""
    lines = ["Available commands:"]
    lines += [f"        {name:<12} {command.help}" for name, command in sorted(COMMANDS.items())]
    lines += [
        "Syntax:",
        "        COMMAND -h                  flags of a command",
        "        COMMAND [FLAGS]             run it",
        "        COMMAND [FLAGS] | SHELLCMD  run it, its output into a shell command",
    ]
    return "\n".join(lines) + "\n"


def _help(prompt: Prompt, flags: Parsed) -> None:
    prompt.write(help_text())


COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        ARANGE,
        Command("help", "print this list", _help),
        LOG,
        MOVER,
        NOP,
        PAGES,
        PIDWATCHER,
        POLICY,
        QUIT,
        ROUTINES_COMMAND,
        STATS,
        SWAP,
        TIME,
        TRACKER,
    )
}
