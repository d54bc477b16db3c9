"""Files of /proc whose lines a process made long: what they say stays, what they cost is bounded."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.longlines import DROPPED_BYTES_MOST, LINE_BYTES, STEP_BYTES, gathered
from memtier_engine.hostfs.maps import parse_mappings

PART = 1 << 12


def pieces(text: bytes) -> Iterator[bytes]:
    return (text[at : at + PART] for at in range(0, len(text), PART))


def maps(count: int, name: bytes) -> bytes:
    rows = (
        b"%012x-%012x rw-p 00000000 00:2a 7 " % (at << 12, at + 1 << 12) for at in range(1 << 20, (1 << 20) + count)
    )
    return b"".join(row.ljust(73) + name + b"\n" for row in rows)


@pytest.mark.parametrize("count", [0, 1, 100, 30_000])
def test_an_ordinary_text_is_taken_as_it_is(count: int) -> None:
    text = maps(count, b"/usr/lib/x86_64-linux-gnu/libc.so.6")
    assert gathered(pieces(text), "maps") == text


def test_mappings_are_all_there_whatever_the_length_of_their_names() -> None:
    text = maps(9_000, b"/tmp/" + b"\\012" * 900)
    short = gathered(pieces(text), "maps")
    assert len(short) <= 9_000 * (LINE_BYTES + 1)
    found = parse_mappings(short)
    assert (found.starts == parse_mappings(maps(9_000, b"/tmp/x")).starts).all()
    assert found.tierable().total_bytes == 9_000 << 12
    assert all(name.startswith("/tmp/\\012") for name in found.names)


def test_a_few_long_names_among_many_mappings_stay_whole() -> None:
    text = maps(20_000, b"") + maps(1, b"/" + b"x" * 4000)
    assert gathered(pieces(text), "maps") == text


def test_what_never_ends_is_given_up() -> None:
    read = 0

    def endless() -> Iterator[bytes]:
        nonlocal read
        while True:
            read += PART
            yield b"a" * PART

    with pytest.raises(KernelCallError, match="/proc/7/cmdline") as caught:
        gathered(endless(), "/proc/7/cmdline")
    assert caught.value.errno == errno.EFBIG
    assert read <= DROPPED_BYTES_MOST + 2 * STEP_BYTES
