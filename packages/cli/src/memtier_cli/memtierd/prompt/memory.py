"""Command `arange`: select address ranges of a process."""

from __future__ import annotations

from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt.command import Command, Console, OnHost
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.ranges import Selection, range_lines
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.occupied import occupied
from memtier_engine.model import Spans
from memtier_engine.pages.regions import cut


class ArangeNeeds(Console, OnHost, Protocol):
    """What `arange` needs of a prompt."""

    ranges: Selection | None


def _arange(prompt: ArangeNeeds, flags: Parsed) -> None:
    pid = flags.integer("pid", -1)
    if pid != -1:
        try:
            process = process_id(prompt.host, pid)
            prompt.ranges = Selection(process, occupied(prompt.host, pid))
        except MemtierError as failure:
            raise CommandError(f"error selecting aranges for pid {pid}: {failure}") from None
    if prompt.ranges is None:
        raise CommandError("no aranges selected, use -pid PID")
    process, spans = prompt.ranges.process, prompt.ranges.spans
    split = flags.integer("split-length", 0)
    if split:
        spans = Spans(*cut(spans, min(split, 1 << 50)))
    least = flags.integer("min-length", 0)
    if least:
        keep = spans.pages >= min(least, 1 << 60)
        spans = Spans(spans.starts[keep], spans.ends[keep])
    prompt.ranges = Selection(process, spans)
    if flags.boolean("ls"):
        prompt.say_all(range_lines(spans))
    prompt.say(f"selected address ranges: {len(spans)}")


ARANGE = Command(
    "arange",
    _arange,
    (
        Flag("pid", "select the ranges in which the process has memory of its own", "int", "-1"),
        Flag("split-length", "cut ranges into pieces of at most so many pages", "uint"),
        Flag("min-length", "keep ranges of at least so many pages", "uint"),
        Flag("ls", "print the ranges"),
    ),
)
