"""`make test` runs in two processes: what changes the node runs in one of them, one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.sharing import BESIDE, OF_THE_NODE, scope_of

pytest.importorskip("xdist", reason="needs pytest-xdist: make setup")

TESTS = Path(__file__).parents[1]
CASES = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(3))
def test_it(number):
    with pathlib.Path({notes!r}).open("a") as notes:
        notes.write("{name} " + os.environ["PYTEST_XDIST_WORKER"] + "\\n")
"""


def test_the_node_s_tests_run_in_one_process_in_their_order_and_the_others_beside_them(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    node = [f"{OF_THE_NODE}test_{letter}.py" for letter in "abc"]
    others = [f"tests/unit/test_{letter}.py" for letter in "abc"]
    for name in [*node, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(CASES.format(name=name, notes=str(notes)))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "2", "-p", "support.sharing", "tests"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others take time to import
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split() for line in notes.read_text().splitlines()]
    assert len(ran) == 18
    assert [name for name, _ in ran if name.startswith(OF_THE_NODE)] == [name for name in node for _ in range(3)]
    assert len({worker for name, worker in ran if name.startswith(OF_THE_NODE)}) == 1
    for other in others:
        assert len({worker for name, worker in ran if name == other}) == 1


def test_what_runs_beside_the_node_s_tests_though_its_folder_is_theirs_is_there() -> None:
    for name in BESIDE:
        assert (TESTS.parent / name).is_file()
        assert scope_of(f"{name}::test_x") == name
