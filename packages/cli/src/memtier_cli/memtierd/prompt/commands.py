"""All commands of the prompt by name: what `help`, completion and the documents list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from memtier_cli.flags import Parsed
from memtier_cli.memtierd.prompt.basic import LOG, NOP, QUIT, LogNeeds, QuitNeeds
from memtier_cli.memtierd.prompt.command import Command, Console
from memtier_cli.memtierd.prompt.memory import ARANGE, ArangeNeeds
from memtier_cli.memtierd.prompt.moving import MOVER, MoverNeeds
from memtier_cli.memtierd.prompt.pages import PAGES, PagesNeeds
from memtier_cli.memtierd.prompt.policies import POLICY, PolicyNeeds
from memtier_cli.memtierd.prompt.routines import ROUTINES_COMMAND, RoutinesNeeds
from memtier_cli.memtierd.prompt.statistics import STATS, StatsNeeds
from memtier_cli.memtierd.prompt.stopwatch import TIME, TimeNeeds
from memtier_cli.memtierd.prompt.swapping import SWAP, SwapNeeds
from memtier_cli.memtierd.prompt.tracking import TRACKER, TrackerNeeds
from memtier_cli.memtierd.prompt.watching import PIDWATCHER, PidwatcherNeeds


class AllNeeds(
    ArangeNeeds,
    LogNeeds,
    MoverNeeds,
    PagesNeeds,
    PidwatcherNeeds,
    PolicyNeeds,
    QuitNeeds,
    RoutinesNeeds,
    StatsNeeds,
    SwapNeeds,
    TimeNeeds,
    TrackerNeeds,
    Protocol,
):
    """What a prompt has that any command runs in."""


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


def _help(prompt: Console, flags: Parsed) -> None:
    prompt.write(help_text())


COMMANDS: Mapping[str, Command[AllNeeds]] = {
    command.name: command
    for command in (
        ARANGE,
        Command("help", "print this list", _help, any_words=True),
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
