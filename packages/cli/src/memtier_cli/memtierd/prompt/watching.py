"""Command `pidwatcher`: follow processes as they come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt import configs
from memtier_cli.memtierd.prompt.command import Command, Console, OnHost
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.gotext import go_list
from memtier_cli.memtierd.prompt.output import Output
from memtier_cli.memtierd.prompt.tracker_part import AnyTracker, OwnTracker
from memtier_cli.memtierd.prompt.watcher_part import AnyWatcher, OnPids, OwnWatcher
from memtier_engine.config.parts import TARGETS
from memtier_engine.errors import MemtierError

_NONE = "no pidwatcher, create one with -create NAME [-config CONFIG]"


class PidwatcherNeeds(Console, OnHost, Protocol):
    """What `pidwatcher` needs of a prompt."""

    output: Output
    tracker: AnyTracker | None
    watcher: AnyWatcher | None


def _pidwatcher(prompt: PidwatcherNeeds, flags: Parsed) -> None:
    if flags.boolean("ls"):
        prompt.say_all(sorted(TARGETS))
    if "create" in flags.texts:
        _create(prompt, flags.text("create"))
    watcher = configs.there(prompt.watcher, flags, _NONE)
    if watcher is None:
        return
    configs.configure_and_say(prompt, "pidwatcher", watcher, flags, ("config", "config-file"))
    if flags.boolean("config-dump"):
        prompt.say(configs.dump("pidwatcher", watcher.name, watcher.config_text))
    listener = _LISTENERS.get(flags.text("listener"))
    if listener is not None:
        watcher.listen(listener(prompt))
    if flags.boolean("stop"):
        watcher.stop()
    if flags.boolean("start"):
        _working(watcher.start, "start")
    if flags.boolean("poll"):
        _working(watcher.poll, "poll")
    if flags.boolean("dump"):
        prompt.write(f"{watcher.dump()}\n\n")


def _working(work: Callable[[], None], what: str) -> None:
    try:
        work()
    except MemtierError as failure:
        raise CommandError(f"pidwatcher {what} error: {failure}") from None


def _create(prompt: PidwatcherNeeds, name: str) -> None:
    watcher = OwnWatcher(prompt.host, name)
    if isinstance(prompt.watcher, OwnWatcher):
        prompt.watcher.close()
    prompt.watcher = watcher
    prompt.say("pidwatcher created")


def _log_listener(prompt: PidwatcherNeeds) -> OnPids:
    def tell(added: list[int], removed: list[int]) -> None:
        # Not through a pipe that may be open: this comes at any time.
        for what, pids in (("AddPids", added), ("RemovePids", removed)):
            if pids:
                prompt.output.write(f"pidwatcher: {what}({go_list(pids)})\n")

    return tell


def _tracker_listener(prompt: PidwatcherNeeds) -> OnPids:
    def tell(added: list[int], removed: list[int]) -> None:
        tracker = prompt.tracker
        if isinstance(tracker, OwnTracker):
            tracker.add(added)
            tracker.remove(removed)

    return tell


_LISTENERS = {"log": _log_listener, "tracker": _tracker_listener}

PIDWATCHER = Command(
    "pidwatcher",
    _pidwatcher,
    (
        *configs.part_flags("watchers", "the watcher"),
        Flag("listener", "who is told: log (print it here) or tracker (track them)", "string"),
        Flag("start", "tell the listener now, and whenever processes come or go"),
        Flag("stop", "tell it no more"),
        Flag("poll", "look once"),
        Flag("dump", "print what it knows"),
    ),
)
