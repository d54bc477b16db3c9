"""The `routines` of a configuration file, decoded: what is to be run beside the policy, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from memtier_engine.config_reader import Section

INTERVAL_MAX_MS = 24 * 3600 * 1000
RUNNERS = ("memtier",)
_NOT_YET = ("pageoutmb", "pageoutcommand", "pageoutcommandrunner", "timestamp", "timestampafter")


@dataclass(frozen=True, slots=True)
class RoutineSpec:
    """A `statactions` routine: a command every interval."""

    interval_ms: int
    command: tuple[str, ...]
    """Words of a command of ours; never run by a shell nor as a program."""


def decode_routines(root: Section) -> tuple[RoutineSpec, ...]:
    """The list under `routines`; empty if there is none.

    Raises:
        ConfigError: a key or value that is not understood.
    """
    return tuple(_statactions(block) for block in root.sections("routines"))


def _statactions(block: Section) -> RoutineSpec:
    block.allow("name", "config")
    block.choice("name", ("statactions",))
    section = block.config()
    if section is None:
        raise block.error("config", "is missing", "text in YAML, as `config: |` and indented lines")
    section.allow("intervalms", "intervalcommand", "intervalcommandrunner", *_NOT_YET)
    for key in _NOT_YET:
        if section.has(key):
            raise section.error(key, "is not supported yet", "leave it out")
    interval_ms = section.integer("intervalms", None, least=1, most=INTERVAL_MAX_MS)
    if interval_ms is None:
        raise section.error("intervalms", "is missing", f"a number from 1 to {INTERVAL_MAX_MS}")
    command = section.texts("intervalcommand")
    if not command:
        raise section.error("intervalcommand", "is missing or empty", "a list of words")
    if section.text("intervalcommandrunner", "exec") not in RUNNERS:
        raise section.error(
            "intervalcommandrunner",
            f"{section.text('intervalcommandrunner', 'exec')!r} runs programs, which is not supported",
            "use memtier",
        )
    if command[:3] != ("policy", "-dump", "accessed") or len(command) > 5:
        raise section.error(
            "intervalcommand",
            f"{' '.join(command)!r} is not supported",
            'use ["policy", "-dump", "accessed", "0,1m,30m,0"]',
        )
    return RoutineSpec(interval_ms, command)
