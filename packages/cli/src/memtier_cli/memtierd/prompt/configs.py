"""Configurations as the prompt takes and shows them: text in, one line of JSON with the reference's names out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from memtier_cli.flags import Flag, Parsed
from memtier_cli.memtierd.prompt.command import Console
from memtier_cli.memtierd.prompt.errors import CommandError
from memtier_cli.memtierd.prompt.gotext import go_json
from memtier_engine.config.keys import COMPONENTS, Key, Kind
from memtier_engine.config.reader import Place, Section, compose
from memtier_engine.errors import ConfigError, MemtierError
from memtier_engine.model import SWAP_NODE
from memtier_engine.mover.mover import MoverConfig

_FILE_BYTES_MAX = 16 << 20
_SECTIONS = {"mover": "mover", "heatmap": "heatmap", "not": "filter", "and": "filter", "or": "filter"}
_WORK_UNCONFIGURED = ("pidwatcher.proc", "tracker.finder", "tracker.idlepage", "tracker.softdirty")
"""Of the reference's parts those that have a configuration before they were given one."""
_BLOCKS = {"trackers": "tracker", "forecasters": "forecaster", "source": "pidwatcher"}


@dataclass(frozen=True, slots=True)
class Block:
    """A `name` and `config` block as it was written."""

    name: str
    text: str


def read_config_file(path: str) -> str:
    """The text of a file named in a command. Raises CommandError."""
    try:
        data = Path(path).read_bytes()[:_FILE_BYTES_MAX]
    except OSError as failure:
        raise CommandError(f'reading file "{path}" failed: {failure.strerror}') from None
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CommandError(f'reading file "{path}" failed: no UTF-8 text') from None


class Configurable(Protocol):
    """What commands configure."""

    def configure(self, text: str, file: str | None = None) -> None:
        """Take a configuration. Raises MemtierError."""


class Part(Configurable, Protocol):
    """What commands configure and start."""

    def start(self) -> None:
        """Begin to work. Raises MemtierError."""


T = TypeVar("T")


def part_flags(several: str, one: str) -> tuple[Flag, ...]:
    """The flags of every command that works with parts that are listed, created and configured by name."""
    return (
        Flag("ls", f"list the {several} that can be created"),
        Flag("create", f"create {one} of this name", "string"),
        Flag("config", "configure it with this text", "string"),
        Flag("config-file", "configure it with the text of a file", "string"),
        Flag("config-dump", "print its configuration"),
    )


def there(part: T | None, flags: Parsed, otherwise: str) -> T | None:
    """The part to work with. None: there is none, and `-ls` needs none. Raises CommandError `otherwise`."""
    if part is None and not flags.boolean("ls"):
        raise CommandError(otherwise)
    return part


def configure_as_told(part: Configurable, flags: Parsed) -> None:
    """Do what `-config-file` and `-config` say. Raises CommandError."""
    try:
        for text, file in _given(flags, ("config-file", "config")):
            part.configure(text, file)
    except MemtierError as failure:
        raise CommandError(f"config failed: {failure}") from None


def configure_and_say(
    console: Console, kind: str, part: Configurable, flags: Parsed, order: Sequence[str] = ("config-file", "config")
) -> None:
    """The same for parts whose commands say that it is done. Raises CommandError."""
    for text, file in _given(flags, order):
        try:
            part.configure(text, file)
        except MemtierError as failure:
            raise CommandError(f"{kind} configuration error: {failure}") from None
        console.say(f"{kind} configured successfully" + ("" if file is None else f' from "{file}"'))


def _given(flags: Parsed, order: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(text, the file it is from) of the configurations that are given."""
    for flag in order:
        if flag in flags.texts:
            text = flags.text(flag)
            yield (read_config_file(text), text) if flag == "config-file" else (text, None)


def start_as_told(part: Part, flags: Parsed) -> None:
    """Do what `-start` says. Raises CommandError."""
    if flags.boolean("start"):
        try:
            part.start()
        except MemtierError as failure:
            raise CommandError(f"start failed: {failure}") from None


def file_blocks(path: str) -> tuple[Block, list[Block]]:
    """(the policy, the routines) of a configuration file, as it was written. Raises CommandError, ConfigError."""
    place = Place(path, 1)
    root = compose(read_config_file(path), place, "")
    section = Section(root, "", place) if root is not None else None
    if section is None:
        raise ConfigError("is empty", file=path)
    return _written(section.section("policy"), "policy"), [
        _written(each, "routine") for each in section.sections("routines")
    ]


def _written(block: Section | None, key: str) -> Block:
    found = _block(block, key)
    return Block(found["Name"], found["Config"])


def decode_mover(text: str) -> MoverConfig:
    """The configuration of a mover; keys that are left out have their defaults. Raises ConfigError."""
    section = section_of("mover", text)
    return MoverConfig(interval_ms=section.integer("intervalms"), bandwidth_mib_per_s=section.integer("bandwidth"))


def section_of(component: str, text: str) -> Section:
    """Configuration text, taken for a component of `config_keys`.

    Raises:
        ConfigError: it is no text that the component takes.
    """
    place = Place(None, 1)
    root = compose(yaml.safe_dump({"config": text}), place, "")
    assert root is not None
    section = Section(root, "", place).config()
    if section is None:
        raise ConfigError("is empty", key_path="config")
    return section.use(component)


def dump(kind: str, name: str, text: str | None) -> str:
    """A component's configuration as one line of JSON; empty for one that was never configured, or a stub's.

    Args:
        kind: "policy", "tracker", "pidwatcher" or "routine".
        name: of the component.
        text: as it was given; None or empty: not at all, which leaves some components their defaults.
    """
    component = f"{kind}.{name}"
    if component not in COMPONENTS or not (text or component in _WORK_UNCONFIGURED):
        return ""
    return go_json(_mapping(section_of(component, text or "{}"), component))


def part_text(policy: str, text: str | None, key: str) -> str | None:
    """The configuration text of the tracker or pid watcher in that of a policy; None: it has none.

    Args:
        policy: its name.
        text: as it was given to the policy.
        key: "tracker" or "pidwatcher".
    """
    component = f"policy.{policy}"
    if not text or not has_part(policy, key):
        return None
    return _block(section_of(component, text).section(key), key)["Config"] or None


def has_part(policy: str, key: str) -> bool:
    """Whether a policy of this name works with a "tracker", or a "pidwatcher"."""
    return any(each.name == key for each in COMPONENTS.get(f"policy.{policy}", ()))


def _mapping(section: Section | None, component: str) -> dict[str, Any]:
    """Every key of the reference in its order, missing ones with their defaults, then those of ours that are set."""
    if section is None:
        section = section_of(component, "{}")
    section.use(component)
    keys = COMPONENTS[component]
    found = {key.go: _value(section, key, component) for key in keys if key.go}
    return found | {key.name: _value(section, key, component) for key in keys if not key.go and section.has(key.name)}


def _value(section: Section, key: Key, component: str) -> Any:
    name = key.name
    match key.kind:
        case Kind.INTEGER:
            return (section.integer_or_none(name) if section.has(name) or not key.required else None) or 0
        case Kind.NUMBER:
            return (section.number_or_none(name) if section.has(name) or not key.required else None) or 0
        case Kind.TEXT:
            return section.text(name) or key.default or ""
        case Kind.FLAG:
            return section.flag_or_none(name)
        case Kind.INTEGERS:
            if name == "ratiotargets":  # nothing, and an empty list, mean swap
                return list(section.integers(name)) or [SWAP_NODE]
            return list(section.integers(name)) if section.has(name) else None
        case Kind.TEXTS:
            return list(section.texts(name)) if section.has(name) else None
        case Kind.BLOCK:
            if name == "forecaster" and not section.has(name):
                return None
            block = _block(section.section(name), name)
            if component == "policy.ratio" and name == "tracker" and not block["Name"]:
                return {"Name": "idlepage", "Config": dump("tracker", "idlepage", None)}
            return block
        case Kind.BLOCKS:
            return [_block(each, name) for each in section.sections(name)] if section.has(name) else None
        case Kind.SECTION:
            if name not in _SECTIONS or (name == "not" and not section.has(name)):
                return None
            return _mapping(section.section(name), _SECTIONS[name])
        case Kind.SECTIONS:
            found = [_mapping(each, _SECTIONS.get(name, "filter")) for each in section.sections(name)]
            return found if section.has(name) else None
        case Kind.GONE:
            return [] if section.has(name) else None  # only an empty list passes
        case Kind.TABLE:
            table = section.section(name)
            if table is None:
                return None
            numbered = sorted((_number(key), key) for key in tuple(table.keys()))
            return {number: _entry(table, key, name) for number, key in numbered}
    return None


def _number(key: str) -> str:
    """A key of a table in decimal; as it is if it is no number."""
    try:
        return str(int(key, 0))
    except ValueError:
        return key


def _entry(table: Section, key: str, name: str) -> Any:
    if name == "numasize":
        return table.text(key)
    return list(table.integers(key, least=-1, most=1 << 20))


def _block(block: Section | None, key: str) -> dict[str, str]:
    """A `name` and `config` block. Of a tracker the text is its configuration in JSON, of others as it was given."""
    if block is None:
        return {"Name": "", "Config": ""}
    name, text = block.text("name"), block.text_or_none("config")
    if text is None and block.has("config"):  # a plain mapping, which only ours may be
        inner = block.config()
        component = f"{_BLOCKS.get(key, key)}.{name}"
        text = go_json(_mapping(inner, component)) if component in COMPONENTS else ""
    elif key == "tracker":
        text = dump("tracker", name, text)
    return {"Name": name, "Config": text or ""}
