"""Configuration text of nri-memtierd -> `PluginConfig`, checked as a whole: also the engine templates.

Every error names file, line, key path, value and what is allowed. Keys are matched without regard to case, as
the reference does; a key that means nothing is an error here, where the reference says nothing.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memtier_engine.config.nodes import TextError, only_document
from memtier_engine.errors import ConfigError
from memtier_engine.units import Durations, Percents, Rates

CGROUP_VARIABLE = "$CGROUP2_ABS_PATH"
STATS_VARIABLE = "$MEMTIERD_SWAP_STATS_PATH"
MEMORY_KEYS = (
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
)
"""cgroup v2 files that hold `max` or bytes. Source: Documentation/admin-guide/cgroup-v2.rst."""
DEFAULT_ALLOWED = ("memory.swap.max", "memory.high")
EXAMPLE_CGROUP = "/sys/fs/cgroup/example"
EXAMPLE_STATS = "/run/nri-memtierd/namespace/pod/container/memtierd.stats"

BYTES_MOST = 4 << 20
"""Of a file. A ConfigMap holds 1 MiB."""
TIME_MOST_S = 10.0
"""For checking one file."""
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

CheckTemplate = Callable[[str], None]
"""Raises ConfigError, line and key path counted from the text's own start."""

_TOP_KEYS = ("classes", "allowannotations", "grace", "bandwidth", "scancpu")
_CLASS_KEYS = ("name", "allowswap", "memtierdconfig", "namespaces")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_GRACE = Durations()
_BANDWIDTH = Rates(hint="use MiB/s above 0, like 200 or 200MiB/s", bare="MiB/s")
_SCAN_CPU = Percents(hint="use percent of one core above 0, like 5%", bare=True, above_zero=True)
_LIKE_VARIABLE = re.compile(r"\$(?:CGROUP|MEMTIERD)[A-Z0-9_]*")
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_.:/@+~\\=-]*[A-Za-z0-9_./@+~\\=-]")
"""Nothing that has a meaning in YAML at such a place, and no blank."""


@dataclass(frozen=True, slots=True)
class WorkloadClass:
    """One entry of `classes`."""

    name: str
    allow_swap: bool | None = None
    """memory.swap.max: True `max`, False `0`, None untouched."""
    template: str | None = None
    """A memtierd configuration with variables. None: no engine."""
    namespaces: tuple[str, ...] | None = None
    """Where it may be used. None: everywhere."""

    def allows(self, namespace: str) -> bool:
        """Whether pods of that namespace may name it."""
        return self.namespaces is None or namespace in self.namespaces


@dataclass(frozen=True, slots=True)
class PluginConfig:
    """A configuration file."""

    classes: tuple[WorkloadClass, ...] = ()
    allow_annotations: tuple[str, ...] = DEFAULT_ALLOWED
    """memory.* annotations that pods may set."""
    grace_s: float = 0.0
    """How long a container is left alone after its start."""
    bandwidth_mib_per_s: float | None = None
    """Ceiling on what all engines of the node move together. None: each has only its own."""
    scan_cpu_share: float = 0.05
    """Of one core, for the scans of all engines: beyond that their intervals grow."""

    def find(self, name: str) -> WorkloadClass | None:
        """The class of exactly that name."""
        return next((each for each in self.classes if each.name == name), None)


def render(template: str, *, cgroup: str, stats: str) -> str:
    """Put the values in. Plain replacement, as the reference does, so the values must be plain.

    Raises:
        ConfigError: a value holds characters that YAML could read as something else (no runtime that follows
            Kubernetes' naming rules makes such names).
    """
    text = template
    for variable, value in ((CGROUP_VARIABLE, cgroup), (STATS_VARIABLE, stats)):
        if variable not in text:
            continue
        if _SAFE_VALUE.fullmatch(value) is None:
            raise ConfigError(f"value {value!r} for {variable}", hint="only letters, digits and _.:/@+~=- are safe")
        text = text.replace(variable, value)
    return text


def load_file(path: Path, check_template: CheckTemplate) -> PluginConfig:
    """Read and check a file.

    Raises:
        ConfigError: it cannot be read, or its content cannot be used.
    """
    return load_bytes(read_bytes(path), check_template, file=str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a plain file of a bounded size; a FIFO would be waited for, a device might never end.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            kind = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(kind):
                what = "a directory" if stat.S_ISDIR(kind) else "a FIFO" if stat.S_ISFIFO(kind) else "a device"
                raise ConfigError(f"is {what}", file=str(path), hint="use a plain file")
            content = file.read(BYTES_MOST + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from None
    if len(content) > BYTES_MOST:
        raise ConfigError(f"is longer than {BYTES_MOST >> 20} MiB", file=str(path))
    return content


def load_bytes(content: bytes, check_template: CheckTemplate, *, file: str | None = None) -> PluginConfig:
    """Check a whole configuration. Raises: ConfigError: also for what is not UTF-8."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text: {error.reason} at byte {error.start}", file=file) from None
    return load(text, check_template, file=file)


def is_empty(content: bytes) -> bool:
    """Whether there is no document in it, or one of nothing: what is left of a file that is just being written."""
    try:
        node = only_document(content.decode())
    except (TextError, UnicodeDecodeError):
        return False
    return node is None or _is_null(node)


def load(text: str, check_template: CheckTemplate, *, file: str | None = None) -> PluginConfig:
    """Check a whole configuration; the first thing wrong is raised as ConfigError.

    Time and memory are bounded, whatever the text is: see `BYTES_MOST`, `TIME_MOST_S` and `only_document`.
    """
    if len(text) > BYTES_MOST:
        raise ConfigError(f"is longer than {BYTES_MOST >> 20} MiB", file=file)
    try:
        node = only_document(text)
    except TextError as failure:
        line = None if failure.line is None else failure.line + 1
        raise ConfigError(f"is {failure}", file=file, line=line) from None
    if node is None:
        return PluginConfig()
    return _Reader(check_template, file).config(node)


def template_text(document: Mapping[str, Any]) -> str:
    """A memtierd configuration given as a mapping, as the text that memtierd reads: see `node_text`."""
    node = only_document(_dump(dict(document)))
    assert isinstance(node, yaml.MappingNode)
    return node_text(node)


def node_text(node: yaml.MappingNode) -> str:
    """A mapping of a configuration file as the text of a file of its own, every value as it is written.

    `config:` of policies, routines, trackers and pid watchers is a string in memtierd's files: where the mapping
    has a mapping there, it becomes the text of it.
    """
    return str(yaml.serialize(_plain(node), Dumper=_DUMPER))


def _plain(node: yaml.Node) -> yaml.Node:
    """A copy without aliases and merge keys, block style, inner configurations as text."""
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_plain(item) for item in node.value], flow_style=False)
    if isinstance(node, yaml.MappingNode):
        pairs = []
        for key, value in merged(node):
            inner = _plain(value)
            if isinstance(key, yaml.ScalarNode) and key.value == "config" and isinstance(inner, yaml.MappingNode):
                text = str(yaml.serialize(inner, Dumper=_DUMPER))
                inner = yaml.ScalarNode("tag:yaml.org,2002:str", text)
            pairs.append((_plain(key), inner))
        return yaml.MappingNode(node.tag, pairs, flow_style=False)
    return yaml.ScalarNode(node.tag, node.value)


def merged(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """The pairs of a mapping with those of its merge keys (`<<`): what stands here itself beats what is merged."""
    own: list[tuple[yaml.Node, yaml.Node]] = []
    others: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in node.value:
        if key.tag != "tag:yaml.org,2002:merge":
            own.append((key, value))
            continue
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for source in reversed(sources):  # of several, the first wins: the last pair of a key counts
            if not isinstance(source, yaml.MappingNode):
                raise ConfigError("is no mapping", key_path="<<", line=value.start_mark.line + 1, hint="use an alias")
            others += merged(source)
    here = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
    last = {key.value: index for index, (key, _) in enumerate(others) if isinstance(key, yaml.ScalarNode)}
    kept = [
        (key, value)
        for index, (key, value) in enumerate(others)
        if not isinstance(key, yaml.ScalarNode) or (key.value not in here and last[key.value] == index)
    ]
    return kept + own


def _dump(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_DUMPER, sort_keys=False, default_flow_style=False)
    return text


class _Reader:
    """Walks the YAML nodes, so that every complaint knows its line."""

    def __init__(self, check_template: CheckTemplate, file: str | None) -> None:
        self._check_template = check_template
        self._file = file
        self._end_s = time.monotonic() + TIME_MOST_S
        self._fine: set[str] = set()
        """Texts of templates that were checked: many classes may share one."""

    def config(self, node: yaml.Node) -> PluginConfig:
        if _is_null(node):
            return PluginConfig()
        entries = self._mapping(node, "", _TOP_KEYS)
        config = PluginConfig()
        return PluginConfig(
            classes=self._classes(entries["classes"]) if "classes" in entries else (),
            allow_annotations=(
                self._allowed(entries["allowannotations"])
                if "allowannotations" in entries
                else config.allow_annotations
            ),
            grace_s=self._value(entries["grace"], "grace", _GRACE.seconds) if "grace" in entries else config.grace_s,
            bandwidth_mib_per_s=(
                self._value(entries["bandwidth"], "bandwidth", _BANDWIDTH.mib_per_s)
                if "bandwidth" in entries and not _is_null(entries["bandwidth"])
                else None
            ),
            scan_cpu_share=(
                self._value(entries["scancpu"], "scancpu", _SCAN_CPU.percent) / 100
                if "scancpu" in entries
                else config.scan_cpu_share
            ),
        )

    def _classes(self, node: yaml.Node) -> tuple[WorkloadClass, ...]:
        classes: list[WorkloadClass] = []
        lines: dict[str, int] = {}
        for index, item in enumerate(self._sequence(node, "classes")):
            path = f"classes[{index}]"
            found = self._class(item, path)
            if found.name in lines:
                raise self._error(
                    item, f"{path}.name", f"value {found.name!r} is taken by line {lines[found.name]}",
                    "give each class a name of its own",
                )  # fmt: skip
            lines[found.name] = item.start_mark.line + 1
            classes.append(found)
        return tuple(classes)

    def _class(self, node: yaml.Node, path: str) -> WorkloadClass:
        if time.monotonic() > self._end_s:
            raise self._error(node, path, f"checking takes longer than {TIME_MOST_S:g} s", "use fewer classes")
        entries = self._mapping(node, path, _CLASS_KEYS)
        name = self._text(entries["name"], f"{path}.name") if "name" in entries else ""
        if not name:
            raise self._error(node, f"{path}.name", "is missing or empty", "a pod names the class by it")
        allow_swap = None
        if "allowswap" in entries and not _is_null(entries["allowswap"]):
            allow_swap = self._boolean(entries["allowswap"], f"{path}.allowswap")
        template = None
        if "memtierdconfig" in entries and not _is_null(entries["memtierdconfig"]):
            template = self._template(entries["memtierdconfig"], f"{path}.memtierdconfig")
        namespaces = None
        if "namespaces" in entries and not _is_null(entries["namespaces"]):
            namespaces = self._namespaces(entries["namespaces"], f"{path}.namespaces")
        return WorkloadClass(name, allow_swap, template, namespaces)

    def _template(self, node: yaml.Node, path: str) -> str | None:
        in_block = False
        if isinstance(node, yaml.MappingNode):
            text = node_text(node)
        elif isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
            text = node.value
            in_block = node.style == "|"
        else:
            raise self._error(node, path, f"is {_kind(node)}", "use text (|) or a mapping of memtierd's keys")
        if not text.strip():
            return None  # as the reference: an empty text starts nothing
        for word in _LIKE_VARIABLE.findall(text):
            # A longer word that begins with a variable is replaced too, as in the reference.
            if not word.startswith((CGROUP_VARIABLE, STATS_VARIABLE)):
                raise self._error(node, path, f"value {word}", f"use {CGROUP_VARIABLE} or {STATS_VARIABLE}")
        if text in self._fine:
            return text
        try:
            self._check_template(render(text, cgroup=EXAMPLE_CGROUP, stats=EXAMPLE_STATS))
        except ConfigError as error:
            line = node.start_mark.line + 1
            if in_block and error.line:
                line += error.line  # the text begins on the line below its `|`
            inner = f"{path}.{error.key_path}" if error.key_path else path
            raise ConfigError(error.message, key_path=inner, file=self._file, line=line, hint=error.hint) from None
        self._fine.add(text)
        return text

    def _allowed(self, node: yaml.Node) -> tuple[str, ...]:
        names = []
        for index, item in enumerate(self._sequence(node, "allowannotations")):
            path = f"allowannotations[{index}]"
            name = self._text(item, path)
            if name not in MEMORY_KEYS:
                raise self._error(item, path, f"value {name!r}", f"use any of {', '.join(MEMORY_KEYS)}")
            names.append(name)
        return tuple(dict.fromkeys(names))

    def _namespaces(self, node: yaml.Node, path: str) -> tuple[str, ...]:
        names = []
        for index, item in enumerate(self._sequence(node, path)):
            name = self._text(item, f"{path}[{index}]")
            if _NAMESPACE.fullmatch(name) is None:
                raise self._error(item, f"{path}[{index}]", f"value {name!r}", "use names of namespaces")
            names.append(name)
        return tuple(dict.fromkeys(names))

    def _value(self, node: yaml.Node, path: str, parse: Callable[[str], float]) -> float:
        text = self._text(node, path)
        try:
            return parse(text)
        except ConfigError as failure:
            raise self._error(node, path, f"value {text.strip()!r}", failure.hint or "") from None

    def _mapping(self, node: yaml.Node, path: str, known: tuple[str, ...]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, path, f"is {_kind(node)}", f"use a mapping with {', '.join(known)}")
        own = {id(key_node) for key_node, _ in node.value}
        try:
            pairs = merged(node)
        except ConfigError as error:
            where = f"{path}.{error.key_path}" if path else error.key_path
            raise ConfigError(
                error.message, key_path=where, file=self._file, line=error.line, hint=error.hint
            ) from None
        entries: dict[str, yaml.Node] = {}
        written_here: set[str] = set()
        for key_node, value in pairs:
            written = key_node.value if isinstance(key_node, yaml.ScalarNode) else _kind(key_node)
            key = written.lower()
            where = f"{path}.{written}" if path else written
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}"
                raise self._error(key_node, where, "no such key", hint)
            if key in written_here:
                raise self._error(key_node, where, "is there twice", "remove one")
            if id(key_node) in own:
                written_here.add(key)
            entries[key] = value
        return entries

    def _sequence(self, node: yaml.Node, path: str) -> list[yaml.Node]:
        if _is_null(node):
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, path, f"is {_kind(node)}", "use a list")
        items: list[yaml.Node] = node.value
        return items

    def _text(self, node: yaml.Node, path: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, path, f"is {_kind(node)}", "use text")
        return "" if _is_null(node) else str(node.value)

    def _boolean(self, node: yaml.Node, path: str) -> bool:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:bool":
            value = repr(node.value) if isinstance(node, yaml.ScalarNode) else _kind(node)
            raise self._error(node, path, f"value {value}", "use true, false (not quoted), or leave it out")
        return bool(yaml.SafeLoader.bool_values[node.value.lower()])

    def _error(self, node: yaml.Node, path: str, message: str, hint: str) -> ConfigError:
        return ConfigError(message, key_path=path or None, file=self._file, line=node.start_mark.line + 1, hint=hint)


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"{node.value[:40]!r}"
