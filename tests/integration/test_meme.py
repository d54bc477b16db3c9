"""The exerciser touches what it says and nothing else, so that scenarios made with it have sharp expectations."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id, read_mappings
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, SWAP_NODE, Spans
from memtier_engine.mover.backends import ProcessHandle, move
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S, until

MEME = Path(sys.executable).parent / "memtier-meme"
MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")


@dataclass
class Running:
    popen: subprocess.Popen[str]
    opening: list[str]
    arrays: list[tuple[int, int]]  # first byte, byte after the last

    def lines_until(self, pattern: str) -> list[str]:
        assert self.popen.stdout is not None
        found = []
        for line in self.popen.stdout:
            found.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return found
        raise AssertionError(f"ended without {pattern!r}: {found}")

    def until_round(self, number: int) -> list[str]:
        """All lines up to the first exerciser's round `number`. It may be past that before the opening is complete."""
        wanted = f"wake exerciser 0: round {number} "
        if any(line.startswith(wanted) for line in self.opening):
            return self.opening
        return [*self.opening, *self.lines_until(wanted)]


@contextmanager
def meme(*words: str, arrays: int = 1) -> Iterator[Running]:
    """It runs until Enter; `arrays` are created at the start."""
    command = [str(MEME), "-bc", str(arrays), *words]
    popen = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    running = Running(popen, [], [])
    try:
        running.opening = running.lines_until("press enter")
        for line in running.opening:
            found = re.fullmatch(r"    array: ([0-9a-f]+)-([0-9a-f]+) \((\d+) bytes\)", line)
            if found:
                first, last = int(found[1], 16), int(found[2], 16)
                assert last - first + 1 == int(found[3])
                running.arrays.append((first, last + 1))
        yield running
    finally:
        popen.kill()
        popen.communicate()


def test_each_array_is_an_area_of_its_own_with_every_page_touched() -> None:
    """The kernel makes one area of neighbours unless something lies between them."""
    with meme("-bs", "3M", "-brc", "0", "-bwc", "0", arrays=4) as running:
        assert len(running.arrays) == 4
        mappings = read_mappings(Host(), running.popen.pid)
        areas = dict(zip(mappings.starts.tolist(), mappings.ends.tolist(), strict=True))
        with Pagemap(Host(), running.popen.pid) as pagemap:
            for start, end in running.arrays:
                assert areas[start] == end
                assert pagemap.resident(start, end).all()


@needs_root
def test_only_the_exercised_bytes_are_touched() -> None:
    """After everything is paged out, exactly the pages that are read or written come back."""
    read = ["-brc", "1", "-bro", "2M", "-brs", "1M"]
    write = ["-bwc", "1", "-bwo", "5M", "-bws", "512k", "-bwp", "3"]
    with temporary_zram_swap(256 * MIB), meme("-bs", "8M", *read, *write, "-bri", "20ms", "-bwi", "20ms") as running:
        (start, end) = running.arrays[0]
        process = process_id(Host(), running.popen.pid)
        wanted = np.zeros((end - start) // PAGE_BYTES, bool)
        wanted[2 * MIB // PAGE_BYTES : 3 * MIB // PAGE_BYTES] = True
        wanted[5 * MIB // PAGE_BYTES : (5 * MIB + (512 << 10)) // PAGE_BYTES] = True
        whole = Spans(np.array([start], np.uint64), np.array([end], np.uint64))
        with closing(ProcessHandle(Host(), process)) as handle, Pagemap(Host(), process.pid) as pagemap:

            def all_others_out() -> bool:
                move(handle, whole, SWAP_NODE)
                return not pagemap.resident(start, end)[~wanted].any()

            # Not at once: up to 31 pages wait in the batch of each CPU, until it touches others, to join an LRU list.
            until(all_others_out)
            for _ in range(3):
                until(lambda: pagemap.resident(start, end)[wanted].all())
                for number in (0, 1):
                    running.lines_until(f"wake exerciser {number}")
                assert not pagemap.resident(start, end)[~wanted].any()
                move(handle, whole, SWAP_NODE)


def test_a_moving_window_goes_round_the_array_and_says_where_it_is() -> None:
    words = ["-bs", "4M", "-brc", "0", "-bwc", "1", "-bws", "1M", "-bwod", "1M", "-bwsd", "-4k", "-bwi", "1ms"]
    with meme(*words) as running:
        start = running.arrays[0][0]
        lines = [line for line in running.until_round(6) if line.startswith("wake exerciser 0")]
    for number, line in enumerate(lines):
        first = start + number % 4 * MIB
        size = MIB - 4096 * number
        assert line == f"wake exerciser 0: round {number + 1} range {first:x}-{first + size - 1:x}"


def test_the_number_of_arrays_changes_in_time_and_speeds_are_told() -> None:
    """Each by a thread of its own: which is first on a busy machine is open."""
    with meme("-bs", "1M", "-brc", "1", "-bwc", "0", "-bcd", "2/100ms,-1/250ms", "-p", "50ms") as running:
        lines = running.opening[:]
        for pattern, count in (("    free array", 1), ("    array: ", 1 + 2), ("avgspeed", 1)):
            while sum(line.startswith(pattern) for line in lines) < count:
                lines += running.lines_until(pattern)
    assert "creating byte array reallocators" in running.opening
    assert "    allocate 2 arrays (every 0.1 s)" in running.opening
    assert any(re.fullmatch(r"avgspeed exerciser 0: \d+\.\d+ s/round", line) for line in lines)


def test_portions_are_visited_in_one_random_order() -> None:
    with meme("-bs", "1M", "-brp", "4", "-bwc", "0", "-bri", "1ms") as running:
        lines = running.until_round(5)
    found = re.findall(r"^portion order: \[([0-9 ]+)\]$", "\n".join(lines), re.M)
    assert len(found) == 1
    assert sorted(found[0].split()) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["-bc", "x"], 2, 'invalid value "x" for flag -bc'),
        (["-bs"], 2, "needs an argument: -bs"),
        (["-bc", "-1"], 1, "invalid value -1 for -bc"),
        (["-bs", "0"], 1, "must be more than 0"),
        (["-bri", "2d"], 1, "invalid time '2d'"),
        (["-bcd", "3"], 1, "invalid change '3'"),
        (["-bs", "4096000G"], 1, "-bs: cannot allocate memory"),
    ],
)
def test_a_bad_value_ends_it_with_a_message(words: list[str], status: int, message: str) -> None:
    done = subprocess.run(
        [MEME, "-ttl", "1s", *words],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=WAIT_S,
    )
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_readers_of_nothing_do_no_harm() -> None:
    """The reference crashes on a size of 0 with a reader; more readers than arrays are as many as arrays."""
    done = subprocess.run(
        [MEME, "-bc", "0x2", "-bs", "1M", "-brc", "5", "-brs", "0", "-bwc", "0", "-ttl", "100ms"],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("start exerciser") == 2


def test_enter_and_the_end_of_input_end_it_and_ctrl_c_does_without_a_traceback() -> None:
    words = ["-bs", "1M", "-bri", "10ms", "-bwi", "10ms"]
    with meme(*words) as running:
        assert running.popen.stdin is not None
        running.popen.stdin.write("\n")
        running.popen.stdin.flush()
        assert running.popen.wait(WAIT_S) == 0
    with meme(*words) as running:
        assert running.popen.stdin is not None
        running.popen.stdin.close()
        assert running.popen.wait(WAIT_S) == 0
        running.popen.stdin = None
    with meme(*words) as running:
        running.popen.send_signal(signal.SIGINT)
        assert running.popen.wait(WAIT_S) == 130
        assert running.popen.stdout is not None
        assert "Traceback" not in running.popen.stdout.read()
