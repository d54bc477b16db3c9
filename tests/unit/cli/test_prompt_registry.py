"""The commands and flags that scripts may use: all of the reference's, and a table that documents can be made from."""

from __future__ import annotations

import pytest

from memtier_cli.flags import usage
from memtier_cli.memtierd.program import FLAGS
from memtier_cli.memtierd.prompt.command import Command
from memtier_cli.memtierd.prompt.commands import COMMANDS, HELP
from memtier_cli.memtierd.prompt.needs import AllNeeds

REFERENCE = {
    "arange": "-pid int, -split-length uint, -min-length uint, -ls",
    "help": "",
    "log": "-i string, -d string, -e string, -f string, -copy, -capture, -prefix string",
    "mover": "-config string, -config-dump, -pages-to int, -start, -stop, -pause, -continue, -tasks, -remove-task int, "
    "-wait",
    "nop": "",
    "pages": "-pid int, -attrs string, -ranges string, -node int, -pr int, -pm int, -pk int, -pi int, -si int",
    "pidwatcher": "-ls, -create string, -config string, -config-file string, -config-dump, -listener string, -stop, "
    "-start, -poll, -dump",
    "policy": "-ls, -create string, -config-file string, -config string, -start, -config-dump, -stop, -dump",
    "q": "",
    "routines": "-ls, -create string, -use int, -config-file string, -config string, -start, -config-dump, -stop, "
    "-dump",
    "stats": "-t string, -f string, -lm int, -le int, -dump",
    "swap": "-pid int, -pids string, -pid-cgroups string, -ranges string, -in, -out, -mover, -status, -vaddrs",
    "time": "-now, -start string, -elapsed string, -stop string, -sleep float",
    "tracker": "-ls, -create string, -config-file string, -config string, -stop, -start string, -config-dump, "
    "-counters, -heat, -reset, -dump",
}


def test_the_commands_are_those_of_the_reference() -> None:
    assert set(COMMANDS) == set(REFERENCE)
    assert all(COMMANDS[name].name == name for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_every_flag_of_the_reference_is_there_and_has_a_help_text(command: Command[AllNeeds]) -> None:
    found = {f"-{flag.name}" + (f" {flag.value_name}" if flag.value_name else "") for flag in command.flags}
    assert found == set(filter(None, REFERENCE[command.name].split(", ")))
    assert HELP[command.name]
    assert all(flag.help for flag in command.flags)


def test_the_programs_flags_are_those_of_the_reference_and_one_of_ours() -> None:
    assert {flag.name for flag in FLAGS} == {
        *("prompt", "config", "c", "f", "echo", "debug", "l", "version"),
        "allow-programs",
    }


def test_usage_is_laid_out_as_go_does() -> None:
    """A short switch has its text on its own line; numbers that are not 0 show their default."""
    lines = usage("swap", COMMANDS["swap"].flags).splitlines()
    assert lines[:3] == ["Usage of swap:", "  -in", "    \tbring back what is swapped out"]
    assert "  -pid int" in lines
    assert "    \tthis process (default -1)" in lines
    assert '    \tformat of the tables: txt or csv (default "txt")' in usage("stats", COMMANDS["stats"].flags)


def test_the_help_of_stats_names_the_tables_that_are_ours_too() -> None:
    assert "move_pages_errors, memory_scans, swap_ins" in usage("stats", COMMANDS["stats"].flags)
