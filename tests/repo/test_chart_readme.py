"""The Helm chart's README: its table is what values.yaml says, its reasons are the program's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_engine.hostfs.privileges import PLUGIN_NEEDS
from support.chart import CHART, REPO, pod_of, render

TOOL = REPO / "tools/gen_chart_readme.py"


def run_tool(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The tool of a copy of the chart and of itself below `root`."""
    chart = root / CHART.relative_to(REPO)
    if not chart.exists():
        shutil.copytree(CHART, chart)
        (root / "tools").mkdir()
        shutil.copy(TOOL, root / "tools")
    command: list[str | Path] = [sys.executable, root / "tools" / TOOL.name, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def readme(root: Path) -> Path:
    return root / CHART.relative_to(REPO) / "README.md"


def values(root: Path) -> Path:
    return root / CHART.relative_to(REPO) / "values.yaml"


def test_the_readme_is_fresh() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gen_chart_readme.py --check" in (REPO / "Makefile").read_text(), "make check runs it"


def test_a_stale_readme_is_noticed_and_made_fresh(tmp_path: Path) -> None:
    assert run_tool(tmp_path, "--check").returncode == 0
    with values(tmp_path).open("a") as file:
        file.write('added:\n  # One | two,\n  # three.\n  key: "x"\n')
    before = readme(tmp_path).read_text()
    done = run_tool(tmp_path, "--check")
    assert done.returncode == 1
    assert "README.md is stale: run `make chart-readme`" in done.stderr
    assert readme(tmp_path).read_text() == before, "a check changes nothing"
    assert run_tool(tmp_path).returncode == 0
    assert "| `added.key` | `x` | One \\| two, three. |\n" in readme(tmp_path).read_text()
    assert run_tool(tmp_path, "--check").returncode == 0


@pytest.mark.parametrize(
    ("appended", "said"),
    [
        ("\nadded: 1\n", "added has no comment above it"),
        ("# A comment that belongs to nothing.\n\nadded: 1\n", "added has no comment above it"),
        ("added: [\n", "gen_chart_readme.py: "),
    ],
)
def test_values_that_say_nothing_of_themselves_are_an_error(tmp_path: Path, appended: str, said: str) -> None:
    run_tool(tmp_path)
    with values(tmp_path).open("a") as file:
        file.write(appended)
    done = run_tool(tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_readme_without_a_place_for_the_table_is_an_error(tmp_path: Path) -> None:
    run_tool(tmp_path)
    readme(tmp_path).write_text("# nothing\n")
    done = run_tool(tmp_path)
    assert done.returncode == 1
    assert "README.md lacks the lines" in done.stderr


def test_every_privilege_that_the_pod_has_stands_in_the_readme_with_its_reason() -> None:
    """Reasons for capabilities in the words of the engine's own table."""
    text = (CHART / "README.md").read_text()
    for need in PLUGIN_NEEDS:
        assert f"| capability `{need.capability.name.removeprefix('CAP_')}` | {need.why} |" in text
    pod = pod_of(render())
    for volume in pod["volumes"]:
        if "hostPath" in volume:
            assert f"| host directory `{volume['hostPath']['path']}` | " in text
    for namespace in ("hostPID", "hostIPC", "hostNetwork"):
        assert (f"| `{namespace}: true` | " in text) == pod.get(namespace, False)
    for mode in ("enforce", "audit", "warn"):
        assert f"pod-security.kubernetes.io/{mode}=privileged" in text
