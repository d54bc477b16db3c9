"""/proc/PID/maps into columns: few lines and many, each by its own way, and the same object for the same text."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from memtier_engine.hostfs import maps
from memtier_engine.hostfs.maps import Mappings, MappingsCache, parse_mappings
from memtier_engine.model import ProcessId
from support.hostfolder import HostFolder

NAMES = (
    *["", "[heap]", "[stack]", "[stack:12]", "[anon:a b]", "[anon:heap]", "[heap", "[heap]x", "[vdso]", "[vvar]"],
    *[
        "[uprobes]",
        "/lib/a file  with blanks.so",
        "/a",
        r"/with\012newline rw-p 00000000 00:00 0",
        "/dev/zero (deleted)",
    ],
    *["/dev/shm/x", "/dev/vfio/1", "/dev/zer", "/anon_hugepage (deleted)", "/memfd:x (deleted)", "/[aio] (deleted)"],
    *["anon_inode:[io_uring]", "/SYSV00000000 (deleted)", "/" + "long" * 200, "/x\udce9"],
)
MODES = ("rw-p", "r--p", "r-xp", "---p", "rw-s", "r--s", "rwxp", "-w-p", "--xp")


def line(start: int, end: int, mode: str, inode: int, name: str, offset: int = 0) -> bytes:
    """As the kernel writes it: the name begins at column 73, and what has none ends with a blank."""
    text = f"{start:08x}-{end:08x} {mode} {offset:08x} {inode % 256:02x}:{inode % 4096:02x} {inode} "
    return (text.ljust(73) + name if name else text).encode("utf-8", "surrogateescape") + b"\n"


def random_maps(seed: int, lines: int) -> bytes:
    draw = random.Random(seed)
    text, at = [], draw.choice([0x1000, 0x400000, 0x7F0000000000, 0xFFFFFF0000000000])
    for _ in range(lines):
        start = at + draw.choice([0, 0x1000, 0x200000])
        at = start + draw.choice([0x1000, 0x1000, 0x21000, 1 << 30])
        inode = draw.choice([0, 0, 0, 7, 1234, 18446744073709551615])
        offset = draw.choice([0, 0x1000, 0xFFFFFFFF000, 0xFFFFFFFFFFFFF000])
        text.append(line(start, at, draw.choice(MODES), inode, draw.choice(NAMES), offset))
    return b"".join(text)


def columns(found: Mappings) -> list[object]:
    tierable = found.tierable()
    arrays = (found.starts, found.ends, found.readable, found.writable, found.shared, found.inodes)
    return [*(a.tolist() for a in arrays), found.names, tierable.starts.tolist(), tierable.ends.tolist()]


@pytest.mark.parametrize("seed", range(20))
def test_many_lines_at_once_say_the_same_as_line_by_line(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_maps(seed, 1 + seed * 30)
    monkeypatch.setattr(maps, "_FEW_BYTES", 1 << 40)
    by_line = columns(parse_mappings(text))
    monkeypatch.setattr(maps, "_FEW_BYTES", 0)
    assert columns(parse_mappings(text)) == by_line
    assert columns(parse_mappings(text[:-1])) == by_line, "the newline at the end may be missing"


def test_each_name_is_tierable_or_not_alone_and_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    tierable = {*NAMES[:6], "/dev/zero (deleted)", "/dev/shm/x"}
    plain = {name for name in NAMES if name.startswith(("/", "anon_inode")) and not name.startswith(("/dev/", "/anon"))}
    for few in (0, 1 << 40):
        monkeypatch.setattr(maps, "_FEW_BYTES", few)
        rows = [line((i + 1) << 20, (i + 1) << 20 | 0x1000, "rw-p", 0, name) for i, name in enumerate(NAMES)]
        found = parse_mappings(b"".join(rows))
        kept = set(found.tierable().starts.tolist())
        wanted = {(i + 1) << 20 for i, name in enumerate(NAMES) if name in tierable | plain}
        assert kept == wanted


@pytest.mark.parametrize("few", [0, 1 << 40])
def test_nothing_garbage_and_broken_lines_yield_what_is_well_formed(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "_FEW_BYTES", few)
    good = line(0x1000, 0x2000, "rw-p", 5, "/a")
    for bad in (b"", b"\n", b"\n\n", b"deadbeef\n", b"12345678-\n", b"Rss: 4 kB\n", b"1-2 rw-p\n", b"f" * 200 + b"\n"):
        assert parse_mappings(bad).names == ()
        assert parse_mappings(good + bad + good).names == ("/a", "/a")


@pytest.mark.parametrize("few", [0, 1 << 40])
def test_mappings_that_merged_while_they_were_read_do_not_overlap(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells them in pieces: here the first two before they merged with the third, and then all three."""
    monkeypatch.setattr(maps, "_FEW_BYTES", few)
    spans = [(0x1000, 0x2000), (0x2000, 0x3000), (0x1000, 0x5000), (0x4000, 0x5000), (0x9000, 0xA000)]
    found = parse_mappings(b"".join(line(start, end, "rw-p", 0, "") for start, end in spans))
    assert len(found) == 5, "a row per line: smaps has a row of numbers for each"
    tierable = found.tierable()
    assert list(zip(tierable.starts.tolist(), tierable.ends.tolist(), strict=True)) == [
        *((0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x5000), (0x9000, 0xA000))
    ]


def test_the_most_mappings_a_process_may_have_by_default() -> None:
    text = b"".join(line(i << 13, (i << 13) + 4096, "rw-p", 0, f"[anon:{i}]" if i % 2 else "") for i in range(1, 65531))
    found = parse_mappings(text)
    assert len(found) == len(found.tierable()) == len(found.names) == 65530
    assert found.starts[-1] == 65530 << 13
    assert found.names[-2:] == ("[anon:65529]", "")


def test_the_same_text_is_the_same_object(tmp_path: Path) -> None:
    folder, process = HostFolder(tmp_path), ProcessId(7, 100)
    cache = MappingsCache()
    folder.process(7, maps=line(0x1000, 0x2000, "rw-p", 0, "").decode())
    first = cache.read(folder.host, process)
    assert cache.read(folder.host, process) is first
    assert cache.read(folder.host, process).tierable() is first.tierable()
    folder.process(7, maps=line(0x1000, 0x3000, "rw-p", 0, "").decode())
    assert cache.read(folder.host, process).tierable().total_bytes == 0x2000
    assert cache.read(folder.host, ProcessId(7, 200)) is not first, "another process of that pid"


def test_processes_that_are_gone_are_forgotten() -> None:
    cache = MappingsCache()
    here, gone = ProcessId(1, 1), ProcessId(2, 2)
    kept = cache.parse(here, b"")
    cache.parse(gone, b"")
    cache.retain({here})
    assert len(cache) == 1
    assert cache.parse(here, b"") is kept


def test_columns_have_their_types() -> None:
    for text in (b"", random_maps(1, 3), random_maps(2, 1000)):
        found = parse_mappings(text)
        assert {column.dtype for column in (found.starts, found.ends, found.inodes)} == {np.dtype(np.uint64)}
        assert {column.dtype for column in (found.readable, found.writable, found.shared)} == {np.dtype(np.bool_)}
