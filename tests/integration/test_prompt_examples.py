"""The sessions in docs/prompt.md are run on a real process: every line there is what comes out, numbers aside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_cli.memtierd.prompt.commands import COMMANDS
from support.prompt import PROMPT, memtierd
from support.swap import temporary_zram_swap
from support.toucher import Toucher, toucher

DOCUMENT = Path(__file__).parents[2] / "docs" / "prompt.md"
PAGES = 2048
ADDRESS, PID = "7fe69c000000", "5123"
BLOCKS = re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```memtierd\n(.*?)```", DOCUMENT.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toucher]:
    with temporary_zram_swap(64 << 20), toucher("anonymous", PAGES, tmp_path_factory.mktemp("toucher")) as load:
        load.write(range(PAGES))
        yield load


def pattern(text: str) -> str:
    """The text with every number replaced: counts, addresses and times differ from run to run."""
    return re.sub(
        r"(?:\d|\b[0-9a-f]*\d)[0-9a-f.]*", "N", re.sub(" +", " ", text.replace(ADDRESS, "N").replace(PID, "N"))
    )


def test_the_document_has_examples() -> None:
    assert [title for title, _ in BLOCKS] == [
        "Looking at a process",
        "Moving and paging out",
        "Tracking",
        "Policies and routines",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")
@pytest.mark.parametrize(("title", "block"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_an_example_is_what_happens(title: str, block: str, child: Toucher) -> None:
    steps = [step.partition("\n") for step in block.split(PROMPT)[1:]]
    assert len(steps) > 3
    with memtierd() as daemon:
        for line, _, expected in steps:
            typed = line.replace("PID", str(child.process.pid)).replace(ADDRESS, f"{child.address:x}")
            assert pattern(daemon.ask(typed)) == pattern(expected), line


def test_the_table_of_commands_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*?)\| .* \|$", DOCUMENT.read_text(), re.M)
    listed = {name: set(re.findall(r"`-([a-z-]+)`", flags)) for name, flags in rows if name in COMMANDS}
    assert listed == {name: {flag.name for flag in command.flags} for name, command in COMMANDS.items()}
