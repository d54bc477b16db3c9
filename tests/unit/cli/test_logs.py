"""Lines of the daemon's log: whose they are, when they were, and one line each whatever is in them."""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from loguru import logger

from memtier_cli.logqueue import LogQueue
from memtier_cli.logquota import LINES_MOST
from memtier_cli.logs import configure, configure_daemon


class Kept(LogQueue):
    def __init__(self) -> None:
        super().__init__(-1)
        self.lines: list[str] = []

    def put(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    yield
    root.handlers[:], root.level = handlers, level
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    logger.remove()
    logger.add(sys.stderr)


@pytest.fixture
def text(_restored: None) -> list[str]:
    kept = Kept()
    configure_daemon(kept)
    return kept.lines


@pytest.fixture
def objects(_restored: None) -> list[str]:
    kept = Kept()
    configure_daemon(kept, as_json=True)
    return kept.lines


def test_a_line_has_its_time_its_level_and_whose_it_is(text: list[str]) -> None:
    with logger.contextualize(container="ns/pod:c0", engine="age/refs"):
        logger.warning("only {} of {}", 1, 2)
    logger.info("about nobody")
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", "TIME ", line) for line in text] == [
        "TIME WARN: ns/pod:c0: only 1 of 2\n",
        "TIME INFO: about nobody\n",
    ]


def test_json_is_flat(objects: list[str]) -> None:
    with logger.contextualize(container="ns/pod:c0", engine="age/refs"):
        logger.warning("it\nis {}", "so")
    found: dict[str, Any] = json.loads(objects[0])
    assert found.pop("time").endswith("Z")
    assert found == {"level": "WARN", "message": "it\nis so", "container": "ns/pod:c0", "engine": "age/refs"}
    assert objects[0].count("\n") == 1


def test_no_name_can_forge_a_line(text: list[str]) -> None:
    """A pod's annotation is in the message about it."""
    logger.info("class {}", "x\n2026-11-30T00:00:00.000Z ERROR: forged\x1b[2J\r")
    (line,) = text
    assert line.count("\n") == 1
    assert "\\n2026" in line
    assert "\x1b" not in line
    assert "\r" not in line


def test_no_name_of_a_container_and_no_text_of_an_exception_can_forge_one_either(text: list[str]) -> None:
    forged = "x\n2026-11-30T00:00:00.000Z ERROR: forged\x1b[2J\x9b2J\u202e\u2028\r"
    try:
        raise ValueError(forged)
    except ValueError:
        with logger.contextualize(container=forged):
            logger.exception("it failed")
    (line,) = text
    first, *others = line.removesuffix("\n").split("\n")
    assert "\\x1b[2J\\x9b2J\\u202e\\u2028\\r: it failed" in first
    assert others[0] == "  Traceback (most recent call last):"
    assert all(other.startswith("  ") for other in others), "none begins as a line of the log"
    assert not set(line) & set("\x1b\x9b\u202e\u2028\r")


def test_words_in_other_scripts_stay_as_they_are(text: list[str]) -> None:
    logger.info("naïve 容器 контейнер 🙂")
    assert "naïve 容器 контейнер 🙂" in text[0]


def test_one_container_cannot_fill_the_log(text: list[str]) -> None:
    """A line about each of its processes, and it may fork on and on."""
    for number in range(1000):
        with logger.contextualize(container="ns/pod:storm"):
            logger.info("pid {}: 8 MiB stay in RAM", number)
    with logger.contextualize(container="ns/pod:other"):
        logger.info("engine started")
    logger.info("about nobody")
    assert len(text) == LINES_MOST + 3
    assert text[-4].endswith("pid 99: 8 MiB stay in RAM\n")
    assert text[-3].endswith("ns/pod:storm: more than 100 lines about it: the next ones are left out for a while\n")
    assert text[-2].endswith("ns/pod:other: engine started\n")


@pytest.mark.usefixtures("_restored")
def test_who_asks_for_all_lines_gets_them() -> None:
    kept = Kept()
    configure_daemon(kept, debug=True)
    for number in range(1000):
        logger.bind(container="ns/pod:storm").info("pid {}", number)
    assert len(kept.lines) == 1000


def test_an_exception_is_there_without_the_values_of_variables(text: list[str], objects: list[str]) -> None:
    secret = "do not show"
    try:
        raise ValueError("a defect")
    except ValueError:
        logger.exception("it failed, {} characters", len(secret))
    found = json.loads(objects[-1])
    assert "ValueError: a defect" in found["exception"]
    assert secret not in objects[-1].replace('secret = "do not show"', "")


def test_what_is_about_the_node_is_said_once_by_all_engines(text: list[str]) -> None:
    def all_say(message: str, state: str) -> None:
        for number in range(5):
            with logger.contextualize(container=f"ns/pod:c{number}", engine="x"):
                logger.bind(node="guard psi", state=state).info("guard psi {}: {}", message, number)

    all_say("closed", "closed")
    all_say("opened", "open")
    all_say("closed", "closed")
    assert [line.split(" ", 1)[1] for line in text] == [
        "INFO: guard psi closed: 0\n",
        "INFO: guard psi opened: 0\n",
        "INFO: guard psi closed: 0\n",
    ]


def test_what_other_libraries_and_dying_threads_say_is_in_the_log(text: list[str]) -> None:
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    logging.getLogger("nri_core").info("connected")
    logging.getLogger("somebody").info("chatter")

    def dies() -> None:
        raise ZeroDivisionError

    thread = threading.Thread(target=dies, name="t1")
    thread.start()
    thread.join()
    first, second, third = text
    assert "ERROR: Task exception was never retrieved" in first
    assert "INFO: connected" in second
    assert "CRITICAL: a defect ends thread t1\n  Traceback" in third


class Disk(StringIO):
    full = False

    def write(self, text: str, /) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.usefixtures("_restored")
def test_a_log_on_a_full_disk_is_one_line_elsewhere_until_it_has_worked_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not loguru's report with a traceback for each message."""
    disk = Disk()
    configure(sink=disk)
    line = "the log takes no more, messages are lost: No space left on device\n"
    for said in (line, "", line):
        logger.info("taken")
        disk.full = bool(said)
        logger.info("one")
        logger.info("two")
        disk.full = False
        assert capsys.readouterr().err == said
    assert disk.getvalue() == "INFO: taken\n" + "INFO: taken\nINFO: one\nINFO: two\n" + "INFO: taken\n"
