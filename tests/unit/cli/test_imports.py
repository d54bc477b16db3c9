"""What a start imports, by name: what is not needed yet is not there. Large libraries come without what nobody uses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROMPT = {
    "memtier_cli",
    "memtier_cli.flags",
    "memtier_cli.front",
    "memtier_cli.libraries",
    "memtier_cli.memtierd",
    "memtier_cli.memtierd.program",
    "memtier_cli.memtierd.prompt",
    "memtier_cli.memtierd.prompt.basic",
    "memtier_cli.memtierd.prompt.command",
    "memtier_cli.memtierd.prompt.commands",
    "memtier_cli.memtierd.prompt.errors",
    "memtier_cli.memtierd.prompt.lines",
    "memtier_cli.memtierd.prompt.output",
    "memtier_cli.memtierd.prompt.session",
    "memtier_cli.memtierd.prompt.state",
    "memtier_cli.memtierd.prompt.stopwatch",
    "memtier_cli.memtierd.prompt.words",
    "memtier_cli.signals",
    "memtier_cli.standard_files",
}
MEMTIER = {"memtier_cli", "memtier_cli.memtier", "memtier_cli.memtier.program", "memtier_cli.standard_files"}
DEAR = {
    *("asyncio", "ctypes", "decimal", "email", "importlib.metadata", "json", "logging", "multiprocessing"),
    *("readline", "socket", "ssl", "subprocess", "tempfile"),
}
"""Of the standard library; which small modules it takes for its own use differs between versions."""


def run(code: str, *words: str, text: str = "", **environment: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *words],
        input=text,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n").rpartition("\n")[2]


def imported_by(code: str, *words: str, text: str = "") -> set[str]:
    """All modules, without those that an interpreter has anyway."""
    show = "print(); print(*sys.modules)"
    return set(run(f"{code}\n{show}", *words, text=text).split()) - set(run(show).split())


def foreign(modules: set[str]) -> set[str]:
    """Those that are not Python's own."""
    return {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names}


MEMTIERD = "from memtier_cli.memtierd.program import main; main()"


@pytest.mark.parametrize(
    ("words", "text"),
    [(["-c", "nop"], ""), (["-prompt", "-debug"], "help\ntime -now\nfoo\nq\n"), (["-c", "log"], "")],
    ids=["nop", "some", "log"],
)
def test_a_prompt_that_asks_nothing_of_the_engine_imports_nothing_of_it(words: list[str], text: str) -> None:
    """Nor numpy, loguru or yaml: a prompt answers at once."""
    found = imported_by(MEMTIERD, *words, text=text)
    assert foreign(found) == PROMPT
    assert not found & DEAR


def test_a_prompt_that_waits_for_its_first_line_has_no_command_yet() -> None:
    found = imported_by(MEMTIERD, "-prompt")
    assert foreign(found) == PROMPT - {f"memtier_cli.memtierd.prompt.{name}" for name in ("basic", "stopwatch")}


def test_a_command_of_the_engine_imports_its_own_module_only() -> None:
    found = imported_by(MEMTIERD, "-c", "stats -t events")
    assert {name for name in found if name.startswith("memtier_cli.")} - PROMPT == {
        "memtier_cli.logqueue",
        "memtier_cli.logquota",
        "memtier_cli.logs",
        "memtier_cli.memtierd.prompt.statistics",
    }
    assert not {name for name in found if name.startswith("memtier_engine.trackers")}


def test_usage_and_version_of_the_programs_import_neither_the_engine_nor_what_it_needs() -> None:
    found = imported_by("from memtier_cli.memtier.program import main\ntry: main()\nexcept SystemExit: pass", "--help")
    assert {name for name in found if name.startswith("memtier_")} == MEMTIER
    assert foreign(found) - MEMTIER == {name for name in found if name.partition(".")[0] == "click"}
    assert "importlib.metadata" not in found
    found = imported_by(MEMTIERD, "-version")
    assert {name for name in foreign(found) if not name.startswith("memtier_cli")} == set()


def test_a_policy_imports_nothing_for_coroutines_encryption_or_masked_arrays() -> None:
    found = imported_by(
        "from memtier_cli import libraries; libraries.ready()\n"
        "import memtier_cli.memtierd.prompt.configs, memtier_cli.memtierd.prompt.policy_part"
    )
    assert {"numpy", "loguru", "yaml", "memtier_engine.engine.loop"} <= found
    assert not (found - imported_by("import numpy")) & {
        "asyncio",
        "ssl",
        "importlib.metadata",
        "numpy.ma",
        "numpy.random",
        "numpy.testing",
    }


POLICY = """
policy:
  name: age
  config: |
    intervalms: 1000
    swapoutms: 1000
    tracker: {name: stub}
    pidwatcher: {name: stub}
"""


def test_a_policy_imports_only_the_parts_that_its_configuration_names() -> None:
    found = imported_by(
        "from memtier_cli import libraries; libraries.ready()\n"
        f"from memtier_engine.config.files import parse; parse({POLICY!r}).build().close()"
    )
    assert {"memtier_engine.policies.age", "memtier_engine.trackers.stub"} <= found
    assert not {name for name in found if name.startswith("memtier_engine.forecasters.")}
    assert not found & {
        *(f"memtier_engine.trackers.{name}" for name in ("bpf.tracker", "damon", "idlepage", "multi", "refs")),
        *("memtier_engine.engine.auto", "memtier_engine.engine.oom_facts", "memtier_engine.reclaim.engine"),
        *("gzip", "importlib.resources", "subprocess", "tempfile"),
    }


def test_loguru_without_asyncio_serves_coroutines_all_the_same() -> None:
    code = """
from memtier_cli.libraries import import_loguru
import_loguru()
assert "asyncio" not in sys.modules
from loguru import logger
import asyncio
assert asyncio.run and asyncio.events
async def take(message): took.append(str(message))
async def main():
    logger.remove()
    logger.add(take, format="{message}")
    logger.info("hello")
    await logger.complete()
took = []
asyncio.run(main())
print(took)
"""
    assert run(code) == "['hello\\n']"


def test_loguru_comes_after_asyncio_as_it_is() -> None:
    code = "import asyncio\nfrom memtier_cli.libraries import import_loguru\nimport_loguru()\n"
    assert run(code + "print(sys.modules['asyncio'] is asyncio)") == "True"


def test_numpy_starts_no_threads_and_our_children_know_nothing_of_it() -> None:
    code = """
import os
from memtier_cli.libraries import import_numpy
before = dict(os.environ)
import_numpy()
print(len(os.listdir("/proc/self/task")), dict(os.environ) == before)
"""
    assert run(code) == "1 True"
    assert run(code, OPENBLAS_NUM_THREADS="1") == "1 True"


def test_what_waits_for_the_engine_is_done_once_and_only_if_it_comes() -> None:
    code = """
from memtier_cli import libraries
done = []
libraries.before_use(lambda: done.append("numpy" in sys.modules))
import memtier_cli.memtierd.prompt.commands as commands
assert [commands.COMMANDS[name].name for name in ("help", "log", "nop", "q", "time")] and not done
commands.COMMANDS["swap"], commands.COMMANDS["stats"]
libraries.logger()
print(done)
"""
    assert run(code) == "[True]"
