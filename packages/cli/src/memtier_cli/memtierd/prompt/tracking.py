"""Command `tracker`: which memory of some processes is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt import configs
from memtier_cli.memtierd.prompt.command import Command, Console, Machine
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.ranges import range_text
from memtier_cli.memtierd.prompt.tracker_part import AnyTracker, OwnTracker
from memtier_engine.config.parts import TRACKERS
from memtier_engine.errors import MemtierError
from memtier_engine.model import ProcessId, Spans
from memtier_engine.pages.regions import Counters

_NONE = "no tracker, create one with -create NAME [-config CONFIG]"
_RAW_USAGE = "Usage: dump raw <start|new|stop>"


class TrackerNeeds(Console, Machine, Protocol):
    """What `tracker` needs of a prompt."""

    tracker: AnyTracker | None


def _tracker(prompt: TrackerNeeds, flags: Parsed) -> None:
    if flags.boolean("ls"):
        prompt.say_all(sorted(TRACKERS))
    if "create" in flags.texts:
        _create(prompt, flags.text("create"))
    tracker = configs.there(prompt.tracker, flags, _NONE)
    if tracker is None:
        return
    configs.configure_and_say(prompt, "tracker", tracker, flags)
    if flags.boolean("stop"):
        tracker.stop()
    if "start" in flags.texts:
        pids = [_pid(text) for text in flags.text("start").split(",")]
        try:
            tracker.start(pids)
        except MemtierError as failure:
            raise CommandError(f"start failed: {failure}") from None
        prompt.say("tracker started")
    if flags.boolean("config-dump"):
        prompt.say(configs.dump("tracker", tracker.name, tracker.config_text))
    if flags.boolean("counters"):
        _counters(prompt, tracker)
    if flags.boolean("heat"):
        for counters in tracker.tables().values():
            prompt.say_all(heat_lines(counters))
    if flags.boolean("reset"):
        tracker.reset()
        prompt.say("tracker counters reset")
    if flags.boolean("dump"):
        prompt.write(_dump(tracker, flags.rest) + "\n")


def _pid(text: str) -> int:
    """A pid in decimal. Raises CommandError."""
    if not text.strip().isdecimal() or len(text) > 9:
        raise CommandError(f'invalid pid: "{text}"')
    return int(text)


def _create(prompt: TrackerNeeds, name: str) -> None:
    tracker = OwnTracker(prompt, name)
    if isinstance(prompt.tracker, OwnTracker):
        prompt.tracker.close()
    prompt.tracker = tracker
    prompt.say("tracker created")


def _counters(prompt: Console, tracker: AnyTracker) -> None:
    if tracker.name == "stub":
        raise CommandError("cannot get tracker counters")
    lines = counter_lines(tracker.tables())
    prompt.say_all(lines or ["no counter entries"])


def counter_lines(tables: Mapping[ProcessId, Counters]) -> list[str]:
    """One line per record, the least accessed first."""
    if not tables:
        return []
    pids = np.repeat([process.pid for process in tables], [len(counters) for counters in tables.values()])
    columns = [np.concatenate([getattr(each, name) for each in tables.values()]) for name in _COLUMNS]
    starts, ends, accesses, writes = columns
    order = np.lexsort((starts, pids, writes, accesses))
    rows = (column[order].tolist() for column in (pids, starts, ends, accesses, writes))
    return list(map(counter_text, *rows))


_COLUMNS = ("starts", "ends", "accesses", "writes")


def counter_text(pid: int, start: int, end: int, accesses: int, writes: int) -> str:
    """A record as the reference prints it. Reads are not told from writes by any tracker: 0."""
    return f"a={accesses} r=0 w={writes} AddrRanges{{pid={pid} ranges={range_text(start, end)}}}"


def heat_lines(counters: Counters) -> list[str]:
    """Ranges and their accesses; neighbours with the same number are one range."""
    if not len(counters):
        return []
    heat = counters.accesses + counters.writes
    apart = (counters.starts[1:] != counters.ends[:-1]) | (heat[1:] != heat[:-1])
    first, last = np.concatenate(([True], apart)), np.concatenate((apart, [True]))
    rows = zip(counters.starts[first].tolist(), counters.ends[last].tolist(), heat[first].tolist(), strict=True)
    return [f"{range_text(start, end)} {value}" for start, end, value in rows]


def _dump(tracker: AnyTracker, words: Sequence[str]) -> str:
    """What `-dump WORDS` prints, an empty line at its end."""
    if tracker.name == "stub":
        return ""
    if tracker.name == "multi":
        if words[:1] != ["regions"]:
            return _raw(tracker, words)
        return "".join(f"tracker {index}:\n{regions_text(ranges)}" for index, ranges in tracker.finders())
    if tracker.name == "finder":
        if words[:1] != ["regions"]:
            return "Usage: dump regions\n"
        return "".join(regions_text(ranges) for _, ranges in tracker.finders())
    return _raw(tracker, words)


def _raw(tracker: AnyTracker, words: Sequence[str]) -> str:
    if not words:
        return "Usage: dump raw PARAMS\n"
    if words[0] != "raw":
        return ""
    if len(words) < 2:
        return f"{_RAW_USAGE}\n"
    if words[1] == "start":
        tracker.raw.start()
        return "raw access events recording started\n"
    if words[1] == "stop":
        tracker.raw.stop()
        return "raw access events recording stopped\n"
    if words[1] == "new":
        return tracker.raw.fetch() or "error: not recording\n"
    return f'invalid raw parameter: "{words[1]}"\n'


def regions_text(ranges: Mapping[ProcessId, Spans]) -> str:
    """What a finder's `-dump regions` prints: Go's view of a map of ranges."""
    shown = []
    for process in sorted(ranges):
        spans = ranges[process]
        listed = ",".join(map(range_text, spans.starts.tolist(), spans.ends.tolist()))
        shown.append(f"{process.pid}:AddrRanges{{pid={process.pid} ranges={listed}}}")
    return f"map[{' '.join(shown)}]\n"


TRACKER = Command(
    "tracker",
    _tracker,
    (
        *configs.part_flags("trackers", "the tracker"),
        Flag("start", "track these pids, separated by commas, and no others", "string"),
        Flag("stop", "stop tracking; counters stay"),
        Flag("counters", "print what was counted, the least accessed first"),
        Flag("heat", "print accesses per address range"),
        Flag("reset", "count from 0 again"),
        Flag("dump", "raw start: record every scan; raw new: print the records since; raw stop; regions (finder)"),
    ),
)
