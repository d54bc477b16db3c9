"""Command `stats`: tables of what happened, and single calls of move_pages."""

from __future__ import annotations

from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt.command import Command, Console, Counted
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_engine.errors import ConfigError
from memtier_engine.model import MoveOutcome
from memtier_engine.stats.recorder import move_text
from memtier_engine.stats.tables import OWN_TABLES, TABLES, tables_text

_NO_MOVE = (
    "move_pages(pid=0, pagecount=0, firstpage=0 dest=0) => (return=0 on_dest=0 on_other=0 [errno:pagecount]=map[])"
)
"""A process whose calls had no page errors has this as its latest call with errors."""
_USAGE = "Usage: dump moves <start|new|stop>"


class StatsNeeds(Console, Counted, Protocol):
    """What `stats` needs of a prompt."""


def _stats(prompt: StatsNeeds, flags: Parsed) -> None:
    latest = flags.integer("lm", -1)
    with_errors = flags.integer("le", -1)
    if latest != -1:
        prompt.say(_latest(prompt, latest, with_errors=False))
    if with_errors != -1:
        prompt.say(_latest(prompt, with_errors, with_errors=True))
    if flags.boolean("dump"):
        prompt.say_all(_dump(prompt, flags.rest))
    if "t" not in flags.texts and (latest != -1 or with_errors != -1 or flags.boolean("dump")):
        return
    names = flags.text("t").split(",") if flags.text("t") else tuple(TABLES)
    try:
        prompt.write(tables_text(prompt.statistics, names, flags.text("f", "txt")))
    except ConfigError as failure:
        raise CommandError(failure.message) from None


def _latest(prompt: StatsNeeds, pid: int, *, with_errors: bool) -> str:
    with prompt.statistics.locked():
        counts = prompt.statistics.moves.get(pid)
        if counts is None:
            return "<nil>"
        found: MoveOutcome | None = counts.last_with_errors if with_errors else counts.last
    return _NO_MOVE if found is None else move_text(found)


def _dump(prompt: StatsNeeds, words: list[str]) -> list[str]:
    if len(words) != 2 or words[0] != "moves":
        return [_USAGE]
    if words[1] == "start":
        prompt.statistics.record_moves(True)
        return ["recording moves started"]
    if words[1] == "stop":
        prompt.statistics.record_moves(False)
        return ["recording moves stopped"]
    if words[1] == "new":
        moves = prompt.statistics.recorded_moves()
        return ["error: not recording"] if moves is None else list(map(move_text, moves))
    return [f'invalid dump moves parameter: "{words[1]}"']


STATS = Command(
    "stats",
    _stats,
    (
        Flag("t", f"print only these tables, separated by commas: {', '.join([*TABLES, *OWN_TABLES])}", "string"),
        Flag("f", "format of the tables: txt or csv", "string", '"txt"'),
        Flag("lm", "print the latest move_pages call of a process", "int", "-1"),
        Flag("le", "print the latest move_pages call of a process that had page errors", "int", "-1"),
        Flag("dump", "moves start: record calls; moves new: print those since the last time; moves stop"),
    ),
)
