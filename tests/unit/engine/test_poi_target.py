"""Pages of interest: files that say which memory of which processes may be moved."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans
from memtier_engine.targets.poi import PagesOfInterestTarget, intersection, parse_ranges, union
from support.fakes import BASE, pages_of, spans
from support.hostfolder import HostFolder

ONE = ProcessId(1001, 100)


def ranges(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<QQ", BASE + a * PAGE_BYTES, BASE + b * PAGE_BYTES) for a, b in pairs)


@pytest.fixture
def folder(tmp_path: Path) -> HostFolder:
    made = HostFolder(tmp_path / "host")
    made.process(1001)
    (tmp_path / "poi").mkdir()
    return made


@pytest.fixture
def poi(tmp_path: Path, folder: HostFolder) -> Path:
    return tmp_path / "poi"


def test_processes_with_a_file_are_found_and_limited_to_its_ranges(folder: HostFolder, poi: Path) -> None:
    (poi / "1001.vab").write_bytes(ranges((2, 4), (8, 20)))
    target = PagesOfInterestTarget(folder.host, poi)
    assert target.poll() == {ONE}
    assert pages_of(target.restrict(ONE, spans((0, 10), (10, 15)))) == [(2, 4), (8, 10), (10, 15)]
    assert len(target.restrict(ProcessId(1002, 1), spans((0, 10)))) == 0


def test_files_are_read_again_at_every_poll(folder: HostFolder, poi: Path) -> None:
    target = PagesOfInterestTarget(folder.host, poi)
    assert target.poll() == frozenset()
    (poi / "1001.vab").write_bytes(ranges((0, 1)))
    assert target.poll() == {ONE}
    (poi / "1001.vab").unlink()
    assert target.poll() == frozenset()


def test_the_same_question_gets_the_same_object_until_the_file_says_something_else(
    folder: HostFolder, poi: Path
) -> None:
    """So that who keeps what he made of the spans sees at once that it still holds."""
    (poi / "1001.vab").write_bytes(ranges((0, 4)))
    target = PagesOfInterestTarget(folder.host, poi)
    mapped = spans((0, 10))
    target.poll()
    first = target.restrict(ONE, mapped)
    target.poll()
    assert target.restrict(ONE, mapped) is first
    assert pages_of(target.restrict(ONE, spans((0, 2)))) == [(0, 2)]
    (poi / "1001.vab").write_bytes(ranges((0, 5)))
    target.poll()
    assert pages_of(target.restrict(ONE, mapped)) == [(0, 5)]


def test_while_a_writer_holds_the_lock_the_last_answer_stands(folder: HostFolder, poi: Path) -> None:
    (poi / "1001.vab").write_bytes(ranges((0, 2)))
    target = PagesOfInterestTarget(folder.host, poi)
    assert target.poll() == {ONE}
    with open(poi / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (poi / "1001.vab").write_bytes(b"half written")
        assert target.poll() == {ONE}
        assert pages_of(target.restrict(ONE, spans((0, 10)))) == [(0, 2)]
    assert target.poll() == frozenset()


def test_the_lock_is_shared_among_readers_and_free_between_polls(folder: HostFolder, poi: Path) -> None:
    target = PagesOfInterestTarget(folder.host, poi)
    target.poll()
    with open(poi / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_SH)
        (poi / "1001.vab").write_bytes(ranges((0, 1)))
        assert target.poll() == {ONE}


@pytest.mark.parametrize("content", [b"x" * 15, b"x" * 24])
def test_a_file_that_is_not_pairs_is_ignored(content: bytes, folder: HostFolder, poi: Path) -> None:
    (poi / "1001.vab").write_bytes(content)
    assert PagesOfInterestTarget(folder.host, poi).poll() == frozenset()


def test_links_pipes_and_other_names_are_ignored(folder: HostFolder, poi: Path, tmp_path: Path) -> None:
    """Whoever may write there must not make us read, or wait for, something else."""
    (tmp_path / "secret").write_bytes(ranges((0, 1)))
    (poi / "1001.vab").symlink_to(tmp_path / "secret")
    os.mkfifo(poi / "1002.vab")
    (poi / "x.vab").write_bytes(ranges((0, 1)))
    (poi / "1001").write_bytes(ranges((0, 1)))
    assert PagesOfInterestTarget(folder.host, poi).poll() == frozenset()


def test_processes_that_do_not_exist_are_left_out(folder: HostFolder, poi: Path) -> None:
    (poi / "1234.vab").write_bytes(ranges((0, 1)))
    assert PagesOfInterestTarget(folder.host, poi).poll() == frozenset()


def test_ranges_may_come_in_any_order_overlap_and_be_void() -> None:
    assert pages_of(parse_ranges(ranges((8, 9), (0, 4), (2, 6), (6, 7), (5, 5), (30, 20)))) == [(0, 7), (8, 9)]
    huge = struct.pack("<QQ", 0, (1 << 64) - 1)
    assert parse_ranges(huge).total_bytes < 1 << 63
    assert len(parse_ranges(b"")) == 0


def test_ranges_are_cut_to_whole_pages() -> None:
    found = parse_ranges(struct.pack("<QQ", BASE + 10, BASE + 10 + 2 * PAGE_BYTES + 5))
    assert pages_of(found) == [(0, 2)]


def test_set_operations_on_spans() -> None:
    one, two = spans((0, 10), (20, 30)), spans((5, 25), (25, 40))
    assert pages_of(intersection(one, two)) == [(5, 10), (20, 25), (25, 30)]
    assert len(intersection(one, Spans.empty())) == 0
    assert len(intersection(spans((0, 1)), spans((2, 3)))) == 0
    both = union(two.starts, two.ends)
    assert pages_of(both) == [(5, 40)]


def test_a_missing_directory_is_refused_at_once(folder: HostFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pagesofinterestdir: .* is no directory"):
        PagesOfInterestTarget(folder.host, tmp_path / "absent")
