"""Command `time`: the time of day, stopwatches, sleep."""

from __future__ import annotations

import time
from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt.command import Command, Console
from memtier_cli.memtierd.prompt.errors import CommandError


class TimeNeeds(Console, Protocol):
    """What `time` needs of a prompt."""

    stopwatches: dict[str, float]


def _time(prompt: TimeNeeds, flags: Parsed) -> None:
    if flags.boolean("now"):
        prompt.say(f"{time.time():.6f}")
    for name in _names(flags, "start"):
        prompt.stopwatches[name] = now_s = time.time()
        prompt.say(f'stopwatch "{name}" started {now_s:.6f}')
    for name in _names(flags, "elapsed"):
        prompt.say(_elapsed(prompt, name) or f'stopwatch "{name}" not started')
    for name in _names(flags, "stop"):
        elapsed = _elapsed(prompt, name)
        prompt.say(f'stopwatch "{name}" ' + (f"stopped at {elapsed}" if elapsed else "not started"))
        prompt.stopwatches.pop(name, None)
    if "sleep" in flags.texts:
        seconds = flags.number("sleep", 0.0)
        if seconds < 0 or seconds > 1e8:
            raise CommandError(f"cannot sleep for {seconds:g} s")
        time.sleep(seconds)


def _names(flags: Parsed, flag: str) -> list[str]:
    return [name for name in flags.text(flag).split(",") if name]


def _elapsed(prompt: TimeNeeds, name: str) -> str | None:
    started_s = prompt.stopwatches.get(name)
    return None if started_s is None else f"{time.time() - started_s:.6f}"


TIME = Command(
    "time",
    _time,
    (
        Flag("now", "print the Unix time in seconds"),
        Flag("start", "start stopwatches of these names, separated by commas", "string"),
        Flag("elapsed", "print seconds since the start of a stopwatch", "string"),
        Flag("stop", "stop a stopwatch and print its seconds", "string"),
        Flag("sleep", "wait for so many seconds", "float"),
    ),
)
