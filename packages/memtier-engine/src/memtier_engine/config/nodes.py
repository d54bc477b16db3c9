"""YAML text into its node tree, within bounds of depth, size and what its aliases make of it. No objects are made."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's reads ten times as fast; PyYAML may have been built without it."""
DEPTH_MOST = 100
NODES_MOST = 200_000
"""Counted as often as aliases repeat them: ten lines can stand for billions."""
_EXPLAINED_MOST = 64 << 10
_CHARACTERS = 64
"""So many of a long text count as one more value."""


class TextError(Exception):
    """What a text is, and on which of its lines, from 0: "not YAML: ...", "nested too deeply"."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def first_document(text: str) -> yaml.Node | None:
    """The first document of a text; None if there is none. What follows it is not looked at.

    Aliases may repeat each other without end, or stand within themselves: whoever walks the nodes counts.

    Raises:
        TextError: it is no YAML, or too deep.
    """
    return _read(text, only=False)


def only_document(text: str) -> yaml.Node | None:
    """As `first_document`; a second document is an error, and so is more than `NODES_MOST` with aliases written out.

    All nodes can be walked without counting.
    """
    node = _read(text, only=True)
    if node is not None:
        _check_size(node)
    return node


def _read(text: str, *, only: bool) -> yaml.Node | None:
    loader = None
    try:
        _check_depth(text)
        loader = Loader(text)
        node: yaml.Node | None
        node = loader.get_single_node() if only else loader.get_node() if loader.check_node() else None
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # libyaml's own limit, for what comes before the first event
            raise TextError("nested too deeply") from None
        raise _syntax(text, error) from None
    except UnicodeError:
        raise TextError("not YAML: half a surrogate pair") from None
    except RecursionError:
        raise TextError("nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()
    return node


def _syntax(text: str, error: yaml.YAMLError) -> TextError:
    """PyYAML's own words say more than libyaml's; large texts would take it long."""
    if len(text) <= _EXPLAINED_MOST:
        try:
            for _ in yaml.parse(text, Loader=yaml.SafeLoader):
                pass
        except yaml.YAMLError as explained:
            error = explained
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "context", None) or " ".join(str(error).split())
    return TextError(f"not YAML: {problem}", None if mark is None else mark.line)


def _check_depth(text: str) -> None:
    """Composing is recursive, in C too: libyaml before 0.2.6 may have no limit of its own."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_MOST:
                raise TextError("nested too deeply", event.start_mark.line if event.start_mark else None)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentEndEvent):
            return  # what comes after is the business of whoever reads on


def _check_size(root: yaml.Node) -> None:
    sizes: dict[int, int] = {}
    entered: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, complete = stack.pop()
        key = id(node)
        if complete:
            entered.discard(key)
            size = 1 + sum(sizes[id(inner)] for inner in _inside(node))
            if isinstance(node, yaml.ScalarNode):
                size += len(node.value) // _CHARACTERS
            sizes[key] = size
            if size > NODES_MOST:
                raise TextError(f"more than {NODES_MOST} values, counted where aliases repeat them", _line(node))
        elif key not in sizes:
            if key in entered:
                raise TextError("nested too deeply: an alias stands in what it is an alias of", _line(node))
            entered.add(key)
            stack.append((node, True))
            stack += [(inner, False) for inner in _inside(node) if id(inner) not in sizes]


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line
