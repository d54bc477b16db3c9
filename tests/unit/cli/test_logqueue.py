"""Whoever reads the log may stall, die, or have a full disk: nobody who logs waits for it, and nothing grows."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from memtier_cli import logqueue
from memtier_cli.logqueue import LogQueue, lost_object


@dataclass
class Pipe:
    read: int
    write: int

    def text(self) -> str:
        """What is in it now."""
        os.set_blocking(self.read, False)
        parts = []
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.read, 1 << 16):
                parts.append(part)
        return b"".join(parts).decode()

    def fill(self) -> None:
        """Nobody reads, and it is full."""
        os.set_blocking(self.write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.write, b"." * 4096)
        os.set_blocking(self.write, True)


def _told_lost(text: str) -> int:
    return sum(map(int, re.findall(r"WARN: (\d+) log lines are lost", text)))


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe(*os.pipe())
    yield made
    for fd in (made.read, made.write):
        with contextlib.suppress(OSError):
            os.close(fd)


def test_lines_are_written_in_order(pipe: Pipe) -> None:
    queue = LogQueue(pipe.write)
    queue.put("before the start\n")
    queue.start()
    for number in range(100):
        queue.put(f"{number}\n")
    assert queue.close(30)
    assert pipe.text() == "before the start\n" + "".join(f"{number}\n" for number in range(100))


@pytest.mark.timeout(60)
def test_a_reader_that_stalls_holds_nobody_up_and_what_is_lost_is_counted(pipe: Pipe) -> None:
    pipe.fill()
    queue = LogQueue(pipe.write, lines_max=100)
    queue.start()
    for number in range(5000):
        queue.put(f"line {number}\n")
    assert not queue.flush(0.01)
    assert 0 < queue.lost_total < 5000
    lost = queue.lost_total
    text = ""
    deadline = time.monotonic() + 30
    while _told_lost(text) < lost and time.monotonic() < deadline:
        text += pipe.text()
    assert _told_lost(text) == lost, "in one line, or in two where the writer began in the middle"
    assert text.lstrip(".").startswith("line 0\nline 1\n"), "what came first tells most"
    queue.put("and on it goes\n")
    assert queue.close(30)
    assert pipe.text() == "and on it goes\n"


def test_a_few_long_lines_are_as_much_as_many_short_ones(pipe: Pipe) -> None:
    pipe.fill()
    queue = LogQueue(pipe.write, bytes_max=1 << 20)
    queue.start()
    for _ in range(100):
        queue.put("x" * (1 << 17) + "\n")
    assert queue.lost_total >= 90
    assert not queue.close(0.01)


@pytest.mark.timeout(60)
def test_the_end_waits_no_longer_than_it_is_told(pipe: Pipe) -> None:
    pipe.fill()
    queue = LogQueue(pipe.write)
    queue.start()
    queue.put("last words\n")
    assert not queue.close(0.01)
    queue.put("too late\n")
    assert queue.lost_total == 1


@pytest.mark.timeout(60)
def test_a_pipe_that_somebody_made_non_blocking_is_waited_for(pipe: Pipe) -> None:
    pipe.fill()
    os.set_blocking(pipe.write, False)
    queue = LogQueue(pipe.write)
    queue.start()
    queue.put("a line\n")
    assert not queue.flush(0.05)
    text = pipe.text()  # the line may follow while this reads
    assert queue.close(30)
    assert (text + pipe.text()).endswith(".a line\n")


@pytest.mark.timeout(60)
def test_a_log_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a reader that is gone: once it works again, the lines come and what was lost is told."""
    monkeypatch.setattr(logqueue, "_AGAIN_S", 0.01)
    write, failing, failed = os.write, threading.Event(), threading.Event()

    def maybe(fd: int, data: bytes) -> int:
        if failing.is_set() and fd == file.fileno():
            failed.set()
            raise OSError(errno.ENOSPC, "full")
        return write(fd, data)

    monkeypatch.setattr(os, "write", maybe)
    with (tmp_path / "log").open("ab") as file:
        queue = LogQueue(file.fileno())
        failing.set()
        queue.start()
        queue.put("one\n")
        assert failed.wait(30)
        failing.clear()
        assert queue.flush(30)
        queue.put("two\n")
        assert queue.close(30)
    text = (tmp_path / "log").read_text()
    assert text.endswith("two\n")
    assert "log lines are lost" in text


def test_a_reader_that_is_gone_does_not_end_the_program(pipe: Pipe) -> None:
    os.close(pipe.read)
    queue = LogQueue(pipe.write)
    queue.start()
    queue.put("nobody reads this\n")
    assert not queue.close(0.2)


def test_lost_ones_are_told_as_an_object_where_the_log_is_of_objects() -> None:
    told = lost_object(3)
    assert told.endswith("\n")
    found = json.loads(told)
    assert (found["level"], found["message"]) == ("WARN", "3 log lines are lost: the log's reader is too slow")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["time"])
