"""The memory of a process that a command is asked to look at."""

from __future__ import annotations

from memtier_cli.memtierd.prompt.command import Console
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.ranges import RangeError, parse_ranges, restrict
from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.hostfs.occupied import occupied
from memtier_engine.model import ProcessId, Spans


def memory_of(host: Host, pid: int) -> tuple[ProcessId, Spans]:
    """The process and the mappings that hold memory of its own. Raises CommandError."""
    try:
        return process_id(host, pid), occupied(host, pid)
    except KernelCallError as failure:
        raise CommandError(f"error reading address ranges of process {pid}: {failure}") from None


def asked_for(console: Console, spans: Spans, ranges: str) -> Spans:
    """The part of `spans` that lies in the ranges, which is told; all of it without any. Raises CommandError."""
    if ranges:
        try:
            spans = restrict(spans, parse_ranges(ranges))
        except RangeError as failure:
            raise CommandError(str(failure)) from None
        console.say(f"using {len(spans)} address ranges")
    if not len(spans):
        raise CommandError("no address ranges from which to find pages")
    return spans
