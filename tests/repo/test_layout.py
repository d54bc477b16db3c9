"""What the repository promises about itself: layers, files, commands in the documents."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
from graphlib import TopologicalSorter
from importlib.util import cache_from_source
from pathlib import Path

import grimp
import pytest

import memtier_engine

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SITE = Path(sysconfig.get_path("platlib"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
DOCUMENTS += sorted((ROOT / "packages").glob("*/README.md"))
PROGRAMS = {"memtier", "memtierd", "nri-memtierd", "memtier-meme", "nri-ping"}


def tracked_files() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs a git checkout: {done.stderr.strip()}")
    return done.stdout.splitlines()


def code_blocks(document: Path) -> list[str]:
    return re.findall(r"```(?:sh|console|bash)\n(.*?)```", document.read_text(), re.DOTALL)


def commands(document: Path) -> list[str]:
    """Command lines in the document's shell blocks, continuation lines joined, comments and prompts cut."""
    found = []
    for block in code_blocks(document):
        for line in block.replace("\\\n", " ").splitlines():
            bare = re.sub(r"(^|\s)#\s.*$", "", line).strip().removeprefix("$ ")
            found += [part.strip() for part in re.split(r"&&|;|\|", bare) if part.strip()]
    return found


def test_import_layers_hold() -> None:
    """Libraries do not know the programs, stages meet in model.py only, policies do no IO."""
    done = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_make_setup_leaves_byte_code_of_all_that_it_installs() -> None:
    """Where none may be written later, every start would compile all it imports."""
    stamp = ROOT / ".venv/.stamp"
    if not stamp.exists() or stamp.stat().st_mtime < (ROOT / "tools/bootstrap").stat().st_mtime:
        pytest.skip("run `make setup`")
    if sys.pycache_prefix is not None:
        pytest.skip("PYTHONPYCACHEPREFIX is set: byte code is looked for elsewhere")
    sources = [path for name in ("click", "loguru", "numpy/lib", "yaml") for path in SITE.glob(f"{name}/*.py")]
    assert len(sources) > 60
    assert [path for path in sources if not Path(cache_from_source(str(path))).exists()] == []
    assert Path(cache_from_source(str(Path(memtier_engine.__file__)))).exists()


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Nor through a package's own `__init__`, which the import contracts do not look at."""
    graph = grimp.build_graph("nri_core", "memtier_engine", "memtier_cli", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert sum(map(len, imports.values())) > len(imports)
    TopologicalSorter(imports).prepare()  # raises CycleError with the circle


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = re.findall(r"\bmake ([a-z][a-z0-9-]*)\b", "\n".join(commands(document)))
        named += re.findall(r"`make ([a-z][a-z0-9-]*)\b[^`]*`", document.read_text())
        assert set(named) <= targets, f"{document.name}: {set(named) - targets}"


def test_the_targets_of_the_make_file_are_the_promised_ones() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = {line.split()[0] for line in done.stdout.splitlines()}
    assert targets >= {
        "help",
        "setup",
        "fmt",
        "check",
        "test",
        "e2e",
        "demo",
        "bench",
        "vm",
        "proto",
        "clean",
    }


def test_every_program_in_the_documents_is_installed_and_knows_the_options_used() -> None:
    """Each `memtier SUB --option ...` is run with --help added; unknown commands and options fail."""
    checked = 0
    for document in DOCUMENTS:
        for command in commands(document):
            words = command.removeprefix("sudo ").split()
            if not words or words[0] not in PROGRAMS:
                continue
            program = BIN / words[0]
            assert program.exists(), f"{document.name}: {command}: no such program"
            subcommand = [words[1]] if words[0] == "memtier" and len(words) > 1 and words[1][0] != "-" else []
            done = subprocess.run(
                [program, *subcommand, "--help"], capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 0, f"{document.name}: {command}: {done.stderr}"
            text = done.stdout + done.stderr
            for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", " ".join(words[1:])):
                assert option.lstrip("-") in text, f"{document.name}: {command}: {option} is unknown"
            checked += 1
    assert checked >= 4


def test_the_readme_opens_with_the_two_commands() -> None:
    first, second = [command for command in commands(ROOT / "README.md") if command.startswith("make ")][:2]
    assert (first, second) == ("make demo", "make test")


def test_ci_runs_the_checks_the_readme_s_test_command_and_the_vm_tests() -> None:
    """In this order: the closing line of the last test run is the last line."""
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in script if line.startswith("make ")] == ["make check", "make test", "make e2e"]
    assert script[-1] == "make e2e"


def test_python_versions_agree_in_all_packages() -> None:
    for path in [ROOT / "pyproject.toml", *sorted((ROOT / "packages").glob("*/pyproject.toml"))]:
        assert tomllib.loads(path.read_text())["project"]["requires-python"] == ">=3.11", path


def test_nothing_in_the_tree_names_a_machine_of_ours() -> None:
    """A stranger has only the clone: no absolute path of a developer's machine, no private host."""
    pattern = re.compile(r"(?<![\w.])/(?:work|root/main)/|\.library|/home/[a-z]+/")
    for name in tracked_files():
        path = ROOT / name
        if path.suffix in {".o", ".tar"} or not path.is_file() or path == Path(__file__):
            continue
        text = path.read_bytes().decode("utf-8", "ignore")
        assert not pattern.search(text), f"{name}: {pattern.search(text)}"


def test_source_files_stay_short() -> None:
    """Mostly under 400 lines; none over 600."""
    sizes = {
        name: len((ROOT / name).read_text().splitlines())
        for name in tracked_files()
        if name.startswith("packages/") and name.endswith(".py") and "/pb/" not in name and (ROOT / name).exists()
    }
    assert max(sizes.values()) <= 600, max(sizes, key=lambda name: sizes[name])
    assert sum(size < 400 for size in sizes.values()) >= 0.9 * len(sizes)
