"""YAML and JSON text into checked values: every error names file, line, key path, value and what is allowed.

A `Section` is a mapping that a decoder takes for a component of `config_keys`: that says which keys there are,
with ranges and defaults. Conversions are those of the reference (YAML 1.1 integers, floats for integers cut off,
quoted numbers refused), its zero for a missing key is not: each key has a default of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml

from memtier_engine.config.keys import COMPONENTS, Key
from memtier_engine.config.nodes import TextError, first_document
from memtier_engine.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "str": "text",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "map": "a mapping",
    "seq": "a list",
    "timestamp": "text",
    "value": "text",
}
_INTEGER = re.compile(r"([-+]?)(?:0b([01]+)|0o?([0-7]+)|0x([0-9a-fA-F]+)|(0|[1-9][0-9]*))")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_STRING_OR_TAB = re.compile(r'"(?:\\.|[^"\\])*"|\t')
"""JSON may be indented with tabs, YAML may not."""
_SHORT_FLAGS = {"y": True, "Y": True, "n": False, "N": False}
"""Of YAML 1.1; PyYAML takes them for text."""
_DEPTH_MOST = 100
_SECTIONS_MOST = 10_000
_CHARACTERS_MOST = 8 << 20
"""With the texts within the text, each as often as it is read."""
_SHOWN_MOST = 60
"""Longer values are cut in errors."""
_DIGITS_MOST = 1000
"""Longer integers are read as floats: converting them takes quadratic time."""


class Work:
    """Mappings decoded and text read of one file: aliases can make endlessly many out of a few lines."""

    def __init__(self) -> None:
        self.sections = 0
        self.characters = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where in which file a value is."""

    file: str | None
    first_line: int
    """Line of the file on which line 0 of the text being read lies."""
    work: Work = field(default_factory=Work, compare=False)
    """Shared by all texts within the file."""

    def error(self, node: yaml.Node | None, path: str, message: str, hint: str | None = None) -> ConfigError:
        """An error at `node`."""
        line = None if node is None else self.first_line + node.start_mark.line
        return ConfigError(message, key_path=path or None, file=self.file, line=line, hint=hint)


class Section:
    """A mapping being decoded."""

    def __init__(self, node: yaml.MappingNode, path: str, place: Place, *, any_case: bool = False) -> None:
        """Raises ConfigError for keys that are no text, or stand twice."""
        self.path = path
        self.place = place
        self._node = node
        self._any_case = any_case
        self._keys: dict[str, Key] = {}
        self._values: dict[str, yaml.Node] = {}
        self._written: dict[str, yaml.ScalarNode] = {}
        if path.count(".") > _DEPTH_MOST:  # an alias of a mapping that it stands in goes on for ever
            raise place.error(node, _short(path), "is nested too deeply")
        place.work.sections += 1
        if place.work.sections > _SECTIONS_MOST:
            raise place.error(node, path, f"more than {_SECTIONS_MOST} mappings", "use fewer aliases")
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise place.error(key_node, path, "a key must be a word")
            if key_node.tag == f"{_TAG}merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key = key_node.value.lower() if any_case else key_node.value
            if key in self._values:
                raise place.error(key_node, self.at(key_node.value), "the key stands twice", "keep one")
            self._values[key] = value_node
            self._written[key] = key_node
        for other in merged:  # what stands here itself comes first, then the mappings in their order
            if not isinstance(other, yaml.MappingNode):
                raise place.error(other, self.at("<<"), "is no mapping", "use an alias of one, or a list of them")
            base = Section(other, path, place, any_case=any_case)
            self._values = {**base._values, **self._values}
            self._written = {**base._written, **self._written}

    def at(self, key: str) -> str:
        """Key path of `key` in this section."""
        return f"{self.path}.{key}" if self.path else key

    def error(self, key: str, message: str, hint: str | None = None) -> ConfigError:
        """An error at the value of `key` (or of what is in it: `key[2]`), or at the section if it has none."""
        node = self._values.get(key) or self._values.get(re.split(r"[.\[]", key, maxsplit=1)[0])
        return self.place.error(node or self._node, self.at(key) if key else self.path, message, hint)

    def use(self, component: str) -> Section:
        """Take the mapping for this component of `config_keys`; refuse every key that it does not have.

        Called first, so that a misspelt key is told before a missing one.
        """
        self._keys = {key.name: key for key in COMPONENTS[component]}
        for key, written in self._written.items():
            if key not in self._keys:
                import difflib

                near = difflib.get_close_matches(key.lower(), self._keys, 1)
                meant = f"did you mean {near[0]}? " if near else ""
                known = ", ".join(sorted(self._keys))
                raise self.place.error(written, self.at(written.value), "is not a key here", f"{meant}keys: {known}")
        return self

    def located(self, failure: ConfigError, key: str | None = None) -> ConfigError:
        """The error of a check that does not know the file, with the place of `key`, or of the key that it names.

        An error that has its place already is returned as it is.
        """
        if failure.line is not None:
            return failure
        return self.error(key or failure.key_path or "", failure.message, failure.hint)

    def keys(self) -> tuple[str, ...]:
        """The keys of a mapping that is a table, in the order of the file."""
        return tuple(self._values)

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self._get(key) is not None

    def is_off(self, key: str) -> bool:
        """Whether `key` is there and null."""
        return key in self._values and not self.has(key)

    def integer(self, key: str) -> int:
        """An integer; the key has a default or must be there."""
        value = self.integer_or_none(key)
        assert value is not None, f"{self.at(key)} has no default"
        return value

    def integer_or_none(self, key: str) -> int | None:
        """An integer in the range of the key; a missing key or null is its default."""
        known, node = self._keys[key], self._get(key)
        default = known.default
        assert default is None or isinstance(default, int)
        if node is None:
            if known.required:
                raise self.error(key, "is missing", _span(known.least, known.most))
            return default
        value = self._integer(node, self.at(key), int(known.least), int(known.most), default)
        return default if known.zero_is_default and value == 0 else value

    def number(self, key: str) -> float:
        """A number; the key has a default or must be there."""
        value = self.number_or_none(key)
        assert value is not None, f"{self.at(key)} has no default"
        return value

    def number_or_none(self, key: str) -> float | None:
        """A number in the range of the key."""
        known, node = self._keys[key], self._get(key)
        default = known.default
        assert default is None or isinstance(default, (int, float))
        if node is None:
            if known.required:
                raise self.error(key, "is missing", _span(known.least, known.most))
            return default
        value = _scalar(node)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(node, self.at(key), _span(known.least, known.most), default)
        if not known.least <= value <= known.most:
            raise self._range(node, self.at(key), known.least, known.most, default)
        return float(value)

    def text(self, key: str) -> str:
        """Any scalar, as it is written; empty if there is none and no default."""
        node = self._get(key)
        if node is None:
            default = self._keys[key].default if key in self._keys else None
            return "" if default is None else str(default)
        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(node, self.at(key), "text", None)
        found = str(node.value)
        if key in self._keys and self._keys[key].choices:
            self._among(key, found, self._keys[key].choices)
        return found

    def text_or_none(self, key: str) -> str | None:
        """The text of a scalar; None for anything else, or nothing."""
        node = self._get(key)
        return str(node.value) if isinstance(node, yaml.ScalarNode) else None

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        """One of `allowed`; the key must be there."""
        found = self.text(key)
        if not found:
            raise self.error(key, "is missing", f"one of: {', '.join(sorted(allowed))}")
        self._among(key, found, allowed)
        return found

    def flag_or_none(self, key: str) -> bool | None:
        """true or false."""
        default = self._keys[key].default
        assert default is None or isinstance(default, bool)
        node = self._get(key)
        if node is None:
            return default
        value = _scalar(node)
        if isinstance(node, yaml.ScalarNode) and not node.style and node.value in _SHORT_FLAGS:
            return _SHORT_FLAGS[node.value]
        if not isinstance(value, bool):
            raise self._wrong(node, self.at(key), "true or false", default)
        return value

    def flag(self, key: str) -> bool:
        """true or false; missing without a default: false."""
        return bool(self.flag_or_none(key))

    def integers(self, key: str, *, least: float | None = None, most: float | None = None) -> tuple[int, ...]:
        """A list of integers; empty if missing. Of a table, whose keys are not known, the range is given."""
        if least is None or most is None:
            least, most = self._keys[key].least, self._keys[key].most
        path = self.at(key)
        nodes = enumerate(self._sequence(key))
        return tuple(self._integer(node, f"{path}[{index}]", int(least), int(most), None) for index, node in nodes)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty if missing."""
        found = []
        for index, node in enumerate(self._sequence(key)):
            if not isinstance(node, yaml.ScalarNode):
                raise self._wrong(node, f"{self.at(key)}[{index}]", "text", None)
            found.append(str(node.value))
        return tuple(found)

    def gone(self, key: str, hint: str) -> None:
        """Refuse a key that the reference has given up; an empty list means nothing, there and here."""
        node = self._get(key)
        if node is not None and not (isinstance(node, yaml.SequenceNode) and not node.value):
            raise self.error(key, "this key is gone", hint)

    def section(self, key: str) -> Section | None:
        """A nested mapping; None if missing."""
        node = self._get(key)
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, self.at(key), "a mapping", None)
        return Section(node, self.at(key), self.place, any_case=self._any_case)

    def sections(self, key: str) -> list[Section]:
        """A list of mappings; empty if missing."""
        found = []
        for index, node in enumerate(self._sequence(key)):
            path = f"{self.at(key)}[{index}]"
            if not isinstance(node, yaml.MappingNode):
                raise self._wrong(node, path, "a mapping", None)
            found.append(Section(node, path, self.place, any_case=self._any_case))
        return found

    def config(self, key: str = "config") -> Section | None:
        """The text of a `name` and `config` block, read as JSON or YAML; a mapping is taken as it is. None if missing.

        JSON is tried first, and its keys may have any case: that is how the reference reads it.
        """
        node = self._get(key)
        if node is None:
            return None
        path = self.at(key)
        if isinstance(node, yaml.MappingNode):
            return Section(node, path, self.place, any_case=self._any_case)
        if not isinstance(node, yaml.ScalarNode) or _scalar(node) is not node.value:
            raise self._wrong(node, path, "text or a mapping", None)
        # A literal block starts on the line after its `|`; of folded and quoted text only the start is known.
        first_line = self.place.first_line + node.start_mark.line + (1 if node.style == "|" else 0)
        place = Place(self.place.file, first_line, self.place.work)
        text, any_case = str(node.value), False
        try:
            value, end = json.JSONDecoder().raw_decode(text.lstrip())
            if isinstance(value, dict):
                text, any_case = text[: len(text) - len(text.lstrip()) + end], True
                text = _STRING_OR_TAB.sub(lambda found: found[0].replace("\t", " "), text)
        except (ValueError, RecursionError):
            pass
        inner = compose(text, place, path)
        if inner is None:
            raise self.place.error(node, path, "is empty", "write keys, or leave `config` out")
        return Section(inner, path, place, any_case=any_case)

    def _among(self, key: str, found: str, allowed: Sequence[str]) -> None:
        if found not in allowed:
            listed = ", ".join(sorted(filter(None, allowed)))
            import difflib

            near = difflib.get_close_matches(found, allowed, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise self.error(key, f"{found!r} is not known", f"{meant}one of: {listed}")

    def _get(self, key: str) -> yaml.Node | None:
        node = self._values.get(key)
        return None if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null") else node

    def _sequence(self, key: str) -> list[yaml.Node]:
        node = self._get(key)
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(node, self.at(key), "a list", None)
        return list(node.value)

    def _integer(self, node: yaml.Node, path: str, least: int, most: int, default: int | None) -> int:
        value = _scalar(node)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise self._wrong(node, path, _span(least, most), default)
        if not least <= value <= most:
            raise self._range(node, path, least, most, default)
        return int(value)

    def _wrong(self, node: yaml.Node, path: str, allowed: str, default: object) -> ConfigError:
        kind = _KINDS.get(node.tag.removeprefix(_TAG), "something else")
        shown = f"{_short(node.value)!r} is {kind}" if isinstance(node, yaml.ScalarNode) else f"is {kind}"
        return self.place.error(node, path, shown, f"use {allowed}{_default(default)}")

    def _range(self, node: yaml.Node, path: str, least: float, most: float, default: object) -> ConfigError:
        shown = _short(node.value) if isinstance(node, yaml.ScalarNode) else ""
        above = isinstance(node, yaml.ScalarNode) and (_number(node.value) or 0) > most
        span = _span(least, most, whole=above)
        return self.place.error(node, path, f"{shown} is out of range", f"use {span}{_default(default)}")


def _span(least: float, most: float, *, whole: bool = False) -> str:
    """The range in words; `whole`: also a limit so high that who is below it need not know."""
    if most >= (1 << 30) and not whole:
        return f"a number of {_plain(least)} or more"
    return f"a number from {_plain(least)} to {_plain(most)}"


def _plain(value: float) -> str:
    return str(int(value)) if abs(value) < 1e19 and value == int(value) else f"{value:.6g}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_MOST else f"{text[:_SHOWN_MOST]}..."


def _default(default: object) -> str:
    return "" if default is None else f"; default {default}"


def _scalar(node: yaml.Node) -> object:
    """The value of a scalar: number or bool, its text for everything else; the node itself for what is no scalar."""
    if not isinstance(node, yaml.ScalarNode):
        return node
    kind = node.tag.removeprefix(_TAG)
    if kind == "bool":
        return yaml.SafeLoader.bool_values.get(node.value.lower(), node.value)
    if kind in ("int", "float") or not node.style:  # quoted text is never a number
        number = _number(node.value)
        return node.value if number is None else number
    return node.value


def _number(text: str) -> int | float | None:
    """A number in YAML 1.1 or 1.2 (0x10, 010, 0o10, 0b1, 1_000, 1e3, .5, .inf), as the reference takes both.

    1:30 and the like, numbers to the base of 60 in YAML 1.1, are text to the reference and here.
    """
    plain = text.replace("_", "")
    found = _INTEGER.fullmatch(plain)
    if found and len(plain) <= _DIGITS_MOST:
        sign, binary, octal, hexadecimal, decimal = found.groups()
        value = int(
            binary or octal or hexadecimal or decimal, 2 if binary else 8 if octal else 16 if hexadecimal else 10
        )
        return -value if sign == "-" else value
    if _FLOAT.fullmatch(plain):
        return float(plain)
    special = plain.lower().lstrip("+-")
    if special in (".inf", ".nan") and len(plain) - len(special) <= 1:
        return float(plain.replace(".", "", 1))
    return None


def compose(text: str, place: Place, path: str) -> yaml.MappingNode | None:
    """The first YAML document as a node tree; None if it is empty.

    Raises:
        ConfigError: it is no YAML, or no mapping.
    """
    place.work.characters += len(text)
    if place.work.characters > _CHARACTERS_MOST:
        raise ConfigError(f"more than {_CHARACTERS_MOST} characters", key_path=path or None, file=place.file)
    try:
        node = first_document(text)
    except TextError as failure:
        line = None if failure.line is None else place.first_line + failure.line
        message = str(failure) if str(failure).startswith("not YAML") else f"is {failure}"
        raise ConfigError(message, key_path=path or None, file=place.file, line=line) from None
    if node is None:
        return None
    if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null":
        return yaml.MappingNode(f"{_TAG}map", [], node.start_mark, node.end_mark)
    if not isinstance(node, yaml.MappingNode):
        raise place.error(node, path, f"is {_KINDS.get(node.tag.removeprefix(_TAG), 'a value')}", "use a mapping")
    return node
