"""What a family shares, asked of an imitated kernel: in pieces, so that a stop need not wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from memtier_engine.abi.constants import PM_FILE, PM_MMAP_EXCLUSIVE, PM_PRESENT
from memtier_engine.engine.families import BLOCKS_AT_ONCE, EVERY_S, Families, histogram_of
from memtier_engine.hostfs.handles import OpenProcesses, ProcessFiles
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PAGE_BYTES, U64, ProcessId, Spans, Why
from memtier_engine.pages.ages import ProcessPages
from memtier_engine.pages.space import AddressSpace
from support.fakes import BASE

APART = 2 << 20


class Pagemap:
    """All pages in RAM; of every second mapping they are shared."""

    def __init__(self) -> None:
        self.reads = self.also = 0

    def read(self, start: int, end: int, out: U64 | None = None) -> U64:
        self.reads += 1
        own = PM_MMAP_EXCLUSIVE if (start - BASE) // APART % 2 else 0
        return np.full((end - start) // PAGE_BYTES, PM_PRESENT | own | self.also, np.uint64)

    def read_all(self, pieces: list[tuple[int, int]]) -> U64:
        return np.concatenate([self.read(*piece) for piece in pieces])


@pytest.fixture
def pagemap() -> Pagemap:
    return Pagemap()


@pytest.fixture
def files(pagemap: Pagemap) -> OpenProcesses:
    def opening(host: Host, process: ProcessId) -> ProcessFiles:
        return cast(ProcessFiles, SimpleNamespace(process=process, pagemap=pagemap, close=lambda: None))

    return OpenProcesses(Host(), opening=opening)


def family(mappings: int, members: int = 2) -> list[AddressSpace]:
    starts = np.uint64(BASE) + np.arange(mappings, dtype=np.uint64) * np.uint64(APART)
    made = []
    for pid in range(1, members + 1):
        process = ProcessId(pid, 1)
        pages = ProcessPages(process)
        pages.set_spans(Spans(starts, starts + np.uint64(PAGE_BYTES)), fill=3)
        made.append(AddressSpace(process, frozenset({process}), pages, seen=True, layout=b"same"))
    return made


def test_what_is_shared_is_found_mapping_by_mapping_and_counted_once(files: OpenProcesses) -> None:
    spaces = family(10, members=3)
    Families(files).count(spaces, 100.0)
    assert [space.shared_bytes for space in spaces] == [5 * PAGE_BYTES] * 3
    assert [space.kept_bytes() for space in spaces] == [{Why.SHARED: 5 * PAGE_BYTES}] * 3
    assert histogram_of(spaces)[3] == 3 * 5 + 5


def test_pages_of_a_file_are_nobodys_share(files: OpenProcesses, pagemap: Pagemap) -> None:
    """A library's pages are mapped by all who use it, related or not, and stay for a reason of their own."""
    pagemap.also = PM_FILE
    spaces = family(10)
    Families(files).count(spaces, 100.0)
    assert [space.shared_bytes for space in spaces] == [0, 0]


def test_it_is_not_looked_at_again_before_its_time(files: OpenProcesses, pagemap: Pagemap) -> None:
    spaces, families = family(10), Families(files)
    families.count(spaces, 100.0)
    reads = pagemap.reads
    families.count(spaces, 100.0 + EVERY_S / 2)
    assert pagemap.reads == reads
    families.count(spaces, 100.0 + EVERY_S)
    assert pagemap.reads == 2 * reads


def test_a_stop_ends_a_look_in_the_middle(files: OpenProcesses, pagemap: Pagemap) -> None:
    """60 000 mappings, all apart, took seconds each time; and there may be a thousand such processes."""
    answers = iter([False])
    spaces = family(10 * BLOCKS_AT_ONCE)
    Families(files, lambda: next(answers, True)).count(spaces, 100.0)
    assert 0 < pagemap.reads <= 2 * BLOCKS_AT_ONCE
    assert not any(space.shared_bytes for space in spaces)


def test_many_mappings_take_their_turns_in_several_scans(files: OpenProcesses, pagemap: Pagemap) -> None:
    spaces, families = family(60_000, members=6), Families(files)
    families.count(spaces, 100.0)
    assert 0 < sum(bool(space.shared_bytes) for space in spaces) < 6
    for scan in range(1, 6):
        families.count(spaces, 100.0 + scan)
    assert all(space.shared_bytes for space in spaces)
    assert pagemap.reads == 6 * 60_000
