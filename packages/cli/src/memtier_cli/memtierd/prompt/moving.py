"""Command `mover`: move the selected pages to a node, and steer the mover."""

from __future__ import annotations

import time
from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt.command import Command, Console, Counted
from memtier_cli.memtierd.prompt.configs import decode_mover
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.gotext import go_json
from memtier_cli.memtierd.prompt.ranges import Selection
from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_SHIFT, SWAP_NODE, MoveTask, Spans
from memtier_engine.mover.control import MoverControl, MoverStatus, MoverThread
from memtier_engine.mover.mover import BY_HAND

_SETTLE_S = 0.1
_WAIT_S = 0.5


class HasMover(Counted, Protocol):
    """What moves memory for a prompt."""

    @property
    def mover(self) -> MoverControl:
        """The running policy's, or the prompt's own."""


class MoverNeeds(Console, HasMover, Protocol):
    """What `mover` needs of a prompt."""

    pages: Selection | None


def _mover(prompt: MoverNeeds, flags: Parsed) -> None:
    mover = prompt.mover
    if "config" in flags.texts:
        try:
            mover.configure(decode_mover(flags.text("config")))
        except ConfigError as failure:
            raise CommandError(f"mover reconfiguration error: {failure}") from None
    if flags.boolean("config-dump"):
        prompt.say(config_text(mover))
    node = flags.integer("pages-to", -1)
    if node >= 0:
        _move_pages(prompt, mover, node)
    elif "pages-to" in flags.texts:
        prompt.say("mover error: -pages-to takes a node; to page out, use swap -out -mover")
    if flags.boolean("stop"):
        _own(mover).stop()
    if flags.boolean("start"):
        start(mover)
    if flags.boolean("pause"):
        mover.pause()
    if flags.boolean("continue"):
        mover.pause(False)
    if flags.boolean("tasks"):
        prompt.say_all([f"{index:<8} {task_text(*task)}" for index, task in enumerate(mover.tasks())])
    if "remove-task" in flags.texts and not mover.remove(flags.integer("remove-task", -1)):
        raise CommandError(f"mover error: there is no task {flags.text('remove-task')}")
    if flags.boolean("wait"):
        _wait(prompt, mover)


def _own(mover: MoverControl) -> MoverThread:
    if not isinstance(mover, MoverThread):
        raise CommandError("mover error: it belongs to the running policy, use -pause or policy -stop")
    return mover


def start(mover: MoverControl) -> None:
    """Start the prompt's own mover; a policy's runs with its policy."""
    if isinstance(mover, MoverThread):
        mover.start()


def _move_pages(prompt: MoverNeeds, mover: MoverControl, node: int) -> None:
    if prompt.pages is None:
        raise CommandError("mover error: set pages before moving")
    start(mover)
    prompt.statistics.event("mover.AddTask")
    mover.add(MoveTask(prompt.pages.process, prompt.pages.spans, node, BY_HAND))


def _wait(console: Console, mover: MoverControl) -> None:
    time.sleep(_SETTLE_S)
    wanted = (MoverStatus.PAUSED, MoverStatus.ALL_DONE)
    status = mover.wait(wanted, _WAIT_S)
    while status is MoverStatus.BUSY:  # in pieces: a signal may come
        status = mover.wait(wanted, _WAIT_S)
    if status is MoverStatus.NOT_RUNNING:
        raise CommandError("mover error: it is not running, use -start")
    console.say(f"mover wait received: {status.value}")


def config_text(mover: MoverControl) -> str:
    """Its configuration as one line of JSON."""
    bandwidth = mover.config.bandwidth_mib_per_s
    return go_json({"IntervalMs": mover.config.interval_ms, "Bandwidth": 0 if bandwidth is None else int(bandwidth)})


def task_text(task: MoveTask, left: Spans) -> str:
    """A task as the reference prints it."""
    total = task.spans.total_bytes >> PAGE_SHIFT
    done = total - (left.total_bytes >> PAGE_SHIFT)
    following = f"{int(left.starts[0]):x}" if len(left) else "N/A"
    node = "swap" if task.to_node == SWAP_NODE else f"node{task.to_node}"
    return f"MoverTask{{pid: {task.process.pid}, next: {following}, page: {done} out of {total}, dest: [{node}]}}"


MOVER = Command(
    "mover",
    _mover,
    (
        Flag("config", 'set interval and bandwidth, such as \'{"IntervalMs": 10, "Bandwidth": 100}\'', "string"),
        Flag("config-dump", "print the configuration"),
        Flag("pages-to", "move the pages selected with `pages` to this node", "int", "-1"),
        Flag("start", "start it"),
        Flag("stop", "stop it; tasks stay"),
        Flag("pause", "move nothing for now"),
        Flag("continue", "go on"),
        Flag("tasks", "print what is to be moved"),
        Flag("remove-task", "forget the task of this number", "int", "-1"),
        Flag("wait", "wait until everything is moved, or it is paused"),
    ),
)
