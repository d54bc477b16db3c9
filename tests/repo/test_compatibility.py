"""docs/compatibility.md lists what the programs know: every key, name, flag, command and output, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from memtier_cli import meme
from memtier_cli.memtierd import program as memtierd
from memtier_cli.memtierd.prompt.commands import COMMANDS
from memtier_cli.nri_memtierd import program as nri_memtierd
from memtier_engine.config.files import parse
from memtier_engine.config.keys import COMPONENTS
from memtier_engine.config.parts import TARGETS, TRACKERS
from memtier_engine.config.policies import FORECASTERS, POLICIES
from memtier_engine.config.routines import ROUTINES
from memtier_engine.stats.tables import FORMATS, OWN_TABLES, TABLES

TEXT = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
STATES = ("yes", "better", "no")
OWN_COMPONENTS = ("policy.auto", "policy.reclaim")
OWN_TRACKERS = {"auto", "bpf", "bpf-hardware", "bpf-sampled", "refs", "userfault"}
OWN_POLICIES = {"auto", "reclaim"}


def section(heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    found = re.split(rf"^{re.escape(heading)}$", TEXT, flags=re.MULTILINE)
    assert len(found) == 2, f"{heading!r} is there {len(found) - 1} times"
    return re.split(rf"^#{{1,{level}}} ", found[1], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows but headings."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]
    return [row for row in cells if row[0] not in ("key", "kind", "command", "flag", "output", "what", "state")]


def words(cells: Iterable[str]) -> list[str]:
    return [cell.strip("`") for cell in cells]


def assert_states(table: list[list[str]], column: int) -> None:
    for row in table:
        assert row[column] in STATES, row
        assert row[column] == "yes" or row[column + 1], f"{row}: say why"


def test_every_key_of_the_reference_has_a_state() -> None:
    for component, keys in COMPONENTS.items():
        wanted = [] if component in OWN_COMPONENTS else [key.name for key in keys if key.go]
        heading = f"### `{component}`"
        if not wanted:
            assert f"{heading}\n" not in TEXT
            continue
        table = rows(section(heading))
        assert words(row[0] for row in table) == wanted, component
        assert_states(table, 1)
    headings = re.findall(r"^### `(.*)`$", TEXT, re.MULTILINE)
    assert set(headings) <= set(COMPONENTS)


def test_every_key_of_ours_is_explained_with_its_range_and_default() -> None:
    for component, keys in COMPONENTS.items():
        wanted = [key for key in keys if not key.go or component in OWN_COMPONENTS]
        heading = f"### `{component}`, ours"
        if not wanted:
            assert heading not in TEXT
            continue
        table = rows(section(heading))
        assert words(row[0] for row in table) == [key.name for key in wanted], component
        for row, key in zip(table, wanted, strict=True):
            assert row[2], f"{component}.{key.name}: say what it is for"
            if key.default is not None:
                shown = str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
                assert f"default {shown}" in row[1], f"{component}.{key.name}: {row[1]}"


def test_every_name_of_the_reference_has_a_state_and_ours_are_named() -> None:
    table = rows(section("## Names"))
    assert_states(table, 2)
    names = {
        "pidwatcher": set(TARGETS),
        "tracker": set(TRACKERS) - OWN_TRACKERS,
        "policy": set(POLICIES) - OWN_POLICIES,
        "routine": set(ROUTINES),
        "forecaster": set(FORECASTERS),
    }
    for kind, wanted in names.items():
        assert {row[1].strip("`") for row in table if row[0] == kind} == wanted
    for name in OWN_TRACKERS | OWN_POLICIES:
        assert f"`{name}`" in section("## Names")


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("## Flags of memtierd", [*(flag.name for flag in memtierd.FLAGS), "h"]),
        ("## Flags of meme (`memtier-meme`)", [flag.name for flag in meme.FLAGS]),
        ("## Flags of nri-memtierd", [flag.name for flag in nri_memtierd.FLAGS]),
    ],
)
def test_every_flag_has_a_state(heading: str, known: list[str]) -> None:
    table = rows(section(heading))
    assert sorted(words(row[0] for row in table)) == sorted(f"-{name}" for name in known)
    assert_states(table, 1)


def test_every_command_of_the_prompt_and_each_of_its_flags_has_a_state() -> None:
    table = [row for row in rows(section("## Prompt")) if len(row) == 4]
    assert_states(table, 2)
    found = [(row[0].strip("`"), row[1].strip("`")) for row in table]
    wanted = []
    for name, command in sorted(COMMANDS.items()):
        wanted += [(name, ""), *((name, f"-{flag.name}") for flag in command.flags)]
    assert sorted(found) == sorted(wanted)


def test_every_output_has_a_state() -> None:
    table = rows(section("## Outputs"))
    assert_states(table, 1)
    outputs = "\n".join(row[0] for row in table)
    for name in (*TABLES, *OWN_TABLES):
        assert f"`stats -t {name}`" in outputs
    for name in FORMATS:
        assert f"`stats -f {name}`" in outputs
    for dump in ("accessed", "heatmap", "heatgram", "numa", "forecast"):
        assert f"`policy -dump {dump}`" in outputs


def test_the_other_tables_have_states_too() -> None:
    for heading in ("## Files", "## The process"):
        table = rows(section(heading))
        assert len(table) > 3
        assert_states(table, 1)


def test_the_examples_are_configurations() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert examples
    for example in examples:
        parse(example)
