"""Write the table of values in the Helm chart's README.md from values.yaml. With --check: fail if it is stale.

Each value that is not a mapping with keys of its own is a row: its path, its default, and the comment directly above
it. A value without a comment is an error, so that none is left undescribed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy/helm/nri-memtierd"
BEGIN = "<!-- Made from values.yaml by `make chart-readme`: edit the comments there. -->\n"
END = "<!-- End of what is made. -->\n"
LONG = 60
"""A default that takes more characters is not shown."""


class ReadmeError(Exception):
    """Values or a README that no table can be made of."""


def table(values: str) -> str:
    """The values.yaml text as a table in Markdown. Raises: ReadmeError."""
    lines = values.splitlines()
    root = yaml.compose(values)
    if not isinstance(root, yaml.MappingNode):
        raise ReadmeError("values.yaml is no mapping")
    rows = ["| value | default | |", "|---|---|---|"]
    for path, key, value in leaves(root, ()):
        text = comment(lines, key.start_mark.line)
        if not text:
            raise ReadmeError(f"values.yaml line {key.start_mark.line + 1}: {path} has no comment above it")
        rows.append(f"| `{path}` | {default(value)} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def leaves(node: yaml.MappingNode, path: tuple[str, ...]) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(path, key, value) of every value without keys of its own, in the order of the file."""
    for key, value in node.value:
        here = (*path, str(key.value))
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from leaves(value, here)
        else:
            yield ".".join(here), key, value


def comment(lines: list[str], key_line: int) -> str:
    """The lines of comment directly above a key, as one."""
    found: list[str] = []
    for line in reversed(lines[:key_line]):
        if not line.strip().startswith("#"):
            break
        found.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(found)


def default(node: yaml.Node) -> str:
    """A value as one would write it, if it is short."""
    value = yaml.safe_load(yaml.serialize(node))
    if value is None:
        return ""
    text = json.dumps(value) if not isinstance(value, str) or not value else value
    return f"`{text}`" if len(text) <= LONG else "see values.yaml"


def with_table(readme: str, rows: str) -> str:
    """The README with another table. Raises: ReadmeError."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReadmeError(f"README.md lacks the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


def main(arguments: list[str], chart: Path = CHART) -> int:
    """Write the file, or compare it."""
    path = chart / "README.md"
    try:
        there = path.read_text()
        wanted = with_table(there, table((chart / "values.yaml").read_text()))
    except (ReadmeError, OSError, yaml.YAMLError) as error:
        print(f"gen_chart_readme.py: {error}", file=sys.stderr)
        return 1
    if there == wanted:
        return 0
    if "--check" in arguments:
        print(f"{path} is stale: run `make chart-readme`", file=sys.stderr)
        return 1
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
