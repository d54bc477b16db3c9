"""The configuration file while the program runs: only what is complete is taken, and nothing ends the watch."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memtier_cli.nri_memtierd import config_file
from memtier_cli.nri_memtierd.config import BYTES_MOST, PluginConfig, load
from memtier_cli.nri_memtierd.config_file import ConfigFile, ConfigWatch
from memtier_cli.nri_memtierd.launch.inprocess import check_template
from memtier_engine.errors import ConfigError

GOOD = "classes: [{name: a}]\n"
OTHER = "classes: [{name: b}]\n"


def accept(text: str) -> None:
    if "bad" in text:
        raise ConfigError("value bad", line=1)
    if "defect" in text:
        raise ZeroDivisionError("a defect of a decoder")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "config.yaml"
    made.write_text(GOOD)
    return made


def opened(path: Path, check: Callable[[str], None] = accept) -> ConfigFile:
    file = ConfigFile(path, check)
    file.load()
    return file


def names(config: PluginConfig | None) -> list[str]:
    assert config is not None
    return [each.name for each in config.classes]


def test_a_changed_file_is_noticed_and_a_touched_one_is_not(path: Path) -> None:
    file = opened(path)
    assert not file.changed()
    path.write_text(GOOD)  # written again, the same
    assert [file.changed() for _ in range(3)] == [False] * 3
    path.write_text(OTHER)
    assert [file.changed() for _ in range(2)] == [False, True]
    assert names(file.reload()) == ["b"]
    path.unlink()
    assert [file.changed() for _ in range(3)] == [False] * 3, "absent for a moment while it is replaced"


def test_a_file_that_is_being_written_is_not_taken(path: Path) -> None:
    """`echo > config` and editors empty it first; `cp` writes in pieces."""
    file = opened(path)
    whole = "classes:\n- name: a\n- name: b\n- name: c\n"
    for end in (0, 20, 30, len(whole)):
        path.write_text(whole[:end])
        assert not file.changed(), f"after {end} bytes"
    assert file.changed()
    assert names(file.reload()) == ["a", "b", "c"]


def test_a_config_map_that_switches_its_link_is_noticed(tmp_path: Path) -> None:
    """The kubelet writes a new directory and renames a link over ..data."""
    for name, text in (("v1", GOOD), ("v2", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
    file = opened(tmp_path / "config.yaml")
    (tmp_path / "..data_tmp").symlink_to("v2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert [file.changed() for _ in range(2)] == [False, True]
    assert names(file.reload()) == ["b"]
    assert [file.changed() for _ in range(3)] == [False] * 3, "told once"


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def template(text: str) -> Callable[[Path], object]:
    content = f"classes:\n- name: a\n  memtierdconfig: {text}\n"
    return lambda path: path.write_text(content)


BAD: dict[str, Callable[[Path], object]] = {
    "template": template("bad"),
    "a defect of ours": template("defect"),
    "syntax": lambda path: path.write_text("classes: ["),
    "not UTF-8": lambda path: path.write_bytes(b"classes: \xff"),
    "NUL": lambda path: path.write_bytes(b"classes: []\0"),
    "empty": lambda path: path.write_text(""),
    "blank": lambda path: path.write_text("\n  \n"),
    "comments": lambda path: path.write_text("# classes: []\n"),
    "document of nothing": lambda path: path.write_text("---\n"),
    "null": lambda path: path.write_text("null\n"),
    "two documents": lambda path: path.write_text("classes: []\n---\nclasses: []\n"),
    "directory": replace_by_directory,
    "FIFO": replace_by_fifo,
    "device": replace_by_device,
    "too long": lambda path: path.write_bytes(b"#" * (BYTES_MOST + 1)),
    "deep": lambda path: path.write_text("classes: " + "[" * 200_000),
    "deep in a line": lambda path: path.write_text("- " * 100_000),
    "contains itself": lambda path: path.write_text("classes: &a [*a]\n"),
    "merges itself": lambda path: path.write_text("classes:\n- &a\n  <<: *a\n  name: x\n"),
    "merges no mapping": lambda path: path.write_text("classes:\n- {<<: [3], name: x}\n"),
    "surrogate": lambda path: path.write_text('classes: [{name: a, memtierdconfig: "\\ud800"}]\n'),
}


@pytest.mark.parametrize("how", BAD)
@pytest.mark.timeout(60)
def test_whatever_is_wrong_the_configuration_in_force_stays(path: Path, how: str) -> None:
    file = opened(path)
    BAD[how](path)
    assert [file.changed() for _ in range(2)] == [False, True]
    assert file.reload() is None
    assert [file.changed() for _ in range(2)] == [False] * 2, "not tried again until it changes again"
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    path.write_text(OTHER)
    assert [file.changed() for _ in range(2)] == [False, True], "and it is still looked at"
    assert names(file.reload()) == ["b"]


NOTHING = ("empty", "blank", "comments", "null", "document of nothing")


@pytest.mark.parametrize("how", [key for key in BAD if key not in NOTHING])
@pytest.mark.timeout(60)
def test_at_start_it_is_one_line(path: Path, how: str) -> None:
    BAD[how](path)
    with pytest.raises(ConfigError) as caught:
        ConfigFile(path, accept).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", NOTHING)
def test_a_file_of_nothing_has_no_classes_at_start(path: Path, how: str) -> None:
    BAD[how](path)
    assert ConfigFile(path, accept).load() == PluginConfig()


VALUES = ["2024-99-99", "9" * 5000, "!!binary 'x'", "1:99:99", "0b", "!!float x", "!!int ''", "!!bool x", "!!set {a}"]
VALUES += [
    "!!timestamp 2024-99-99",
    "2001-01-01T99:00:00Z",
    "!!omap [a]",
    "!!pairs [1]",
    "!!python/none x",
    ".inf",
    "~",
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("form", ["mapping", "text"])
def test_a_value_that_yaml_itself_cannot_make_is_an_error_like_any_other(value: str, form: str) -> None:
    inner = f"policy: {{name: age, config: {{intervalms: {value}}}}}"
    text = f"\n    {inner}" if form == "mapping" else f" |\n    {inner}"
    with pytest.raises(ConfigError):
        load(f"classes:\n- name: a\n  memtierdconfig:{text}\n", check_template)


def bomb(kind: str) -> str:
    lines = {
        "lists": ["a0: &a0 [x, x, x, x, x, x, x, x, x]"],
        "mappings": ["a0: &a0 {x: x}"],
        "merges": ["a0: &a0 {x: x}"],
        "texts": [f"a0: &a0 [{'x' * 4000}]"],
    }[kind]
    for number in range(1, 10):
        nine = ", ".join([f"*a{number - 1}"] * 9)
        keys = ", ".join(f"k{key}: *a{number - 1}" for key in range(9))
        made = {"mappings": f"{{{keys}}}", "merges": f"{{<<: [{nine}], y{number}: 1}}"}.get(kind, f"[{nine}]")
        lines.append(f"a{number}: &a{number} {made}")
    return "".join(f"      {line}\n" for line in lines)


@pytest.mark.parametrize("kind", ["lists", "mappings", "merges", "texts"])
@pytest.mark.parametrize("form", ["mapping", "text", "top"])
@pytest.mark.timeout(60)
def test_aliases_that_multiply_are_refused_before_they_do(kind: str, form: str) -> None:
    """Ten lines stand for a billion values."""
    begin = {"mapping": "\n    policy:\n      name: age\n", "text": " |\n    policy:\n      name: age\n", "top": ""}[
        form
    ]
    text = f"classes:\n- name: x\n  memtierdconfig:{begin}" if begin else "classes:\n"
    with pytest.raises(ConfigError):
        load(text + bomb(kind), check_template)


def test_texts_read_again_and_again_are_bounded() -> None:
    """An alias of a long text within a template: each time it is text to be read."""
    lines = "".join(f"      # {'x' * 90}\n" for _ in range(3000))
    lines += "      intervalms: 5\n      intervalcommand: [x]\n      intervalcommandrunner: memtier\n"
    text = f"routines:\n- name: statactions\n  config: &c |\n{lines}" + "- {name: statactions, config: *c}\n" * 3000
    with pytest.raises(ConfigError, match=r"more than \d+ characters"):
        check_template(text)


CLASS = """- name: class-%d
  memtierdconfig: |
    policy:
      name: age
      config: |
        intervalms: %d
        pidwatcher: {name: cgroups, config: "cgroups: [$CGROUP2_ABS_PATH]"}
        tracker: {name: auto, config: "scanintervalms: 10000"}
"""


def test_many_classes_cost_what_they_differ_in() -> None:
    """A thousand classes with one template cost about as much as reading the file; it was three seconds."""

    def cpu_s(template: Callable[[int], int]) -> float:
        text = "classes:\n" + "".join(CLASS % (number, template(number)) for number in range(1000))
        began_s = time.process_time()
        assert len(load(text, check_template).classes) == 1000
        return time.process_time() - began_s

    # The least of several: what else the machine does only adds to it, and the first one also imports.
    alike, different = (
        min(cpu_s(template) for _ in range(4)) for template in (lambda number: 1000, lambda number: 1000 + number)
    )
    assert alike < different / 2


class Watched:
    """A watch in a loop of its own, and what it handed over."""

    def __init__(self, file: ConfigFile | None) -> None:
        self.used: list[PluginConfig] = []
        self.beats = 0
        self.watch = ConfigWatch(file, self.used.append, beat=self.beat, poll_s=0.01)

    def beat(self) -> None:
        self.beats += 1

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not what():  # noqa: ASYNC110  # a thread's doing
                await asyncio.sleep(0.01)


def watching(file: ConfigFile | None, body: Callable[[Watched], object]) -> None:
    async def main() -> None:
        watched = Watched(file)
        task = asyncio.create_task(watched.watch.run())
        try:
            await body(watched)  # type: ignore[misc]
            assert not task.done()
        finally:
            task.cancel()

    asyncio.run(main())


def test_the_watch_hands_over_what_is_new(path: Path) -> None:
    async def body(watched: Watched) -> None:
        path.write_text(OTHER)  # noqa: ASYNC240
        await watched.until(lambda: watched.used)
        assert names(watched.used[0]) == ["b"]

    watching(opened(path), body)


def test_asked_it_reads_again_what_has_not_changed(path: Path) -> None:
    async def body(watched: Watched) -> None:
        for _ in range(100):
            watched.watch.ask()
        await watched.until(lambda: watched.used)
        assert names(watched.used[0]) == ["a"]

    watching(opened(path), body)


def test_asked_while_the_file_is_written_it_waits_until_it_is_complete(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_file, "SETTLE_S", 0.05)
    file = opened(path)
    looks = [file.look(), None, None]  # absent, and there again
    monkeypatch.setattr(file, "look", lambda: looks.pop(0) if len(looks) > 1 else looks[0])

    async def body(watched: Watched) -> None:
        watched.watch.ask()
        await watched.until(lambda: watched.used)
        assert len(looks) == 1

    watching(file, body)


def test_asked_without_a_file_it_says_so_and_goes_on() -> None:
    async def body(watched: Watched) -> None:
        watched.watch.ask()
        beats = watched.beats
        await watched.until(lambda: watched.beats > beats + 3)
        assert watched.used == []

    watching(None, body)


def test_a_check_that_takes_long_does_not_hold_up_the_loop(path: Path) -> None:
    """Hooks are answered in this loop."""
    gate, checking = threading.Event(), threading.Event()

    def slow(text: str) -> None:
        checking.set()
        assert gate.wait(30)

    file = opened(path)

    async def body(watched: Watched) -> None:
        file._check_template = slow
        path.write_text("classes: [{name: b, memtierdconfig: 'x: 1'}]")  # noqa: ASYNC240
        await watched.until(checking.is_set)
        for _ in range(10):  # this runs on meanwhile
            await asyncio.sleep(0)
        assert watched.used == []
        gate.set()
        await watched.until(lambda: watched.used)

    watching(file, body)
