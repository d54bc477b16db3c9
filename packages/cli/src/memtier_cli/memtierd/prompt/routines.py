"""Command `routines`: commands that run at intervals, or by how much was paged out."""

from __future__ import annotations

from typing import Protocol

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt import configs
from memtier_cli.memtierd.prompt.command import Command, Console
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.routine_part import Owner, RoutinePart
from memtier_engine.config.routines import ROUTINES

_NONE = "no routines, create one with -create NAME"


class RoutinesNeeds(Console, Owner, Protocol):
    """What `routines` needs of a prompt."""

    routines: list[RoutinePart]
    routine_index: int


def _routines(prompt: RoutinesNeeds, flags: Parsed) -> None:
    if flags.boolean("ls"):
        prompt.say_all(sorted(ROUTINES))
    if "create" in flags.texts:
        prompt.routines.append(RoutinePart(prompt, flags.text("create")))
        prompt.routine_index = len(prompt.routines) - 1
        prompt.say(f"routine {prompt.routine_index} created, started using it")
    if not configs.there(prompt.routines or None, flags, _NONE):
        return
    if "use" in flags.texts:
        wanted, last = flags.integer("use", 0), len(prompt.routines) - 1
        if not 0 <= wanted <= last:
            raise CommandError(f"invalid routine {wanted}, the last one is {last}")
        prompt.routine_index = wanted
    routine = prompt.routines[prompt.routine_index]
    configs.configure_as_told(routine, flags)
    configs.start_as_told(routine, flags)
    if flags.boolean("config-dump"):
        prompt.say(configs.dump("routine", routine.name, routine.config_text))
    if flags.boolean("stop"):
        routine.stop()
        prompt.say(f"routine {prompt.routine_index} stopped")
    if flags.boolean("dump"):
        prompt.say(routine.dump())


ROUTINES_COMMAND = Command(
    "routines",
    _routines,
    (
        *configs.part_flags("routines", "a routine"),
        Flag("use", "work with the routine of this number", "int", "0"),
        Flag("start", "start it"),
        Flag("stop", "stop it"),
        Flag("dump", "print its state"),
    ),
)
