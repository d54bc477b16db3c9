"""Tracker `softdirty` with `track_referenced`: what was only read is never taken for idle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from memtier_engine.errors import TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import SmapsTable
from memtier_engine.model import PAGE_BYTES, ProcessId, Spans, Tracker
from memtier_engine.trackers import registry
from memtier_engine.trackers.softdirty import SoftDirtyConfig, SoftDirtyTracker, touched_beyond
from support.fakes import FakeTracker
from support.hostfolder import HostFolder

U64 = np.uint64
FIRST, SECOND = 0x10_0000, 0x20_0000
PRESENT, SOFT_DIRTY, EXCLUSIVE = 1 << 63, 1 << 55, 1 << 56
PROCESS = ProcessId(77, 100)


def table(*rows: tuple[int, int, int]) -> SmapsTable:
    """Mappings (start, end, referenced bytes)."""
    starts, ends, referenced = (np.array(column, U64) for column in zip(*rows, strict=True))
    nothing = np.zeros(len(rows), U64)
    no = np.zeros(len(rows), np.bool_)
    return SmapsTable(starts, ends, nothing, referenced, nothing, nothing, no, no, ("",) * len(rows), nothing)


def beyond(smaps: SmapsTable, *pieces: tuple[int, int, int]) -> list[bool]:
    starts, ends, written = (np.array(column, U64) for column in zip(*pieces, strict=True))
    found: list[bool] = touched_beyond(smaps, starts, ends, written).tolist()
    return found


def test_more_referenced_than_written_makes_the_whole_mapping_doubtful() -> None:
    """Its pieces count together; other mappings are judged by themselves."""
    smaps = table((0x1000, 0x5000, 0x3000), (0x5000, 0x9000, 0x2000), (0x9000, 0xB000, 0))
    pieces = [(0x1000, 0x3000, 0x1000), (0x3000, 0x5000, 0x1000), (0x5000, 0x9000, 0x2000), (0x9000, 0xB000, 0)]
    assert beyond(smaps, *pieces) == [True, True, False, False]


def test_a_piece_that_lies_in_no_mapping_or_reaches_over_its_end_is_doubtful() -> None:
    """The process changed its mappings between the two readings."""
    smaps = table((0x4000, 0x6000, 0), (0x8000, 0x9000, 0))
    assert beyond(smaps, (0x1000, 0x2000, 0), (0x4000, 0x7000, 0), (0x6000, 0x7000, 0), (0x8000, 0x9000, 0)) == [
        True,
        True,
        True,
        False,
    ]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=6))
def test_a_page_that_was_only_read_is_never_idle(mappings: list[tuple[int, int]]) -> None:
    """Pages written and pages only read, of each mapping: reads make it doubtful, writes alone do not."""
    size = 16 * PAGE_BYTES
    starts = [FIRST + number * size for number in range(len(mappings))]
    smaps = table(
        *[(at, at + size, (w + r) * PAGE_BYTES) for at, (w, r) in zip(starts, mappings, strict=True)],
    )
    pieces = [(at, at + size, w * PAGE_BYTES) for at, (w, _) in zip(starts, mappings, strict=True)]
    assert beyond(smaps, *pieces) == [read > 0 for _, read in mappings]


def machine(tmp_path: Path, *, referenced_kib: tuple[int, int]) -> HostFolder:
    """Two mappings of four pages; of each the first page was written."""
    folder = HostFolder(tmp_path)
    folder.process(PROCESS.pid, start_ticks=PROCESS.start_ticks)
    lines = ""
    for start, kib in zip((FIRST, SECOND), referenced_kib, strict=True):
        lines += f"{start:x}-{start + 4 * PAGE_BYTES:x} rw-p 00000000 00:00 0 \nReferenced:      {kib} kB\n"
    folder.write(f"proc/{PROCESS.pid}/smaps", lines)
    folder.write(f"proc/{PROCESS.pid}/clear_refs", "")
    words = {}
    for start in (FIRST, SECOND):
        for page in range(4):
            words[start + page * PAGE_BYTES] = PRESENT | EXCLUSIVE | (SOFT_DIRTY if page == 0 else 0)
    folder.pagemap(PROCESS.pid, words)
    return folder


def seen(tracker: SoftDirtyTracker) -> list[list[int]]:
    spans = Spans(np.array([FIRST, SECOND], U64), np.array([FIRST + 4 * PAGE_BYTES, SECOND + 4 * PAGE_BYTES], U64))
    list(tracker.scan(PROCESS, spans))
    return [np.flatnonzero(part.accessed).tolist() for c in tracker.scan(PROCESS, spans) for part in c.parts()]


def test_without_referenced_only_writes_count(tmp_path: Path) -> None:
    assert seen(SoftDirtyTracker(machine(tmp_path, referenced_kib=(16, 4)).host)) == [[0], [0]]


def test_with_referenced_a_mapping_that_was_also_read_counts_as_in_use(tmp_path: Path) -> None:
    folder = machine(tmp_path, referenced_kib=(8, 4))
    assert seen(SoftDirtyTracker(folder.host, SoftDirtyConfig(track_referenced=True))) == [[0, 1, 2, 3], [0]]


def test_auto_takes_softdirty_only_where_reads_are_seen_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its place is after damon and before refs, and it is made with `track_referenced`."""
    assert registry.AUTO_ORDER == ("bpf", "idlepage", "damon", "softdirty", "refs")

    def refuse(host: Host) -> Tracker:
        raise TrackerUnavailable("not here")

    monkeypatch.setattr(registry, "TRACKERS", dict.fromkeys(registry.AUTO_ORDER, refuse))
    monkeypatch.setattr(registry, "_NEEDS", {})
    monkeypatch.setattr(registry, "_NEEDS_IN_AUTO", {})
    choice = registry.create_tracker("auto", Host())
    assert isinstance(choice.tracker, SoftDirtyTracker)
    assert choice.tracker._config.track_referenced
    assert [name for name, _ in choice.rejected] == ["bpf", "idlepage", "damon"]


def test_auto_does_not_take_softdirty_where_smaps_does_not_tell_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine without clear_refs: by its name alone softdirty works there, for `auto` it does not."""

    def refuse(host: Host) -> Tracker:
        raise TrackerUnavailable("not here")

    monkeypatch.setattr(registry, "TRACKERS", {**dict.fromkeys(registry.AUTO_ORDER, refuse), "refs": FakeTracker})
    monkeypatch.setattr(registry, "AUTO_ORDER", ("softdirty",))
    monkeypatch.setattr(registry, "_NEEDS", {})
    with pytest.raises(TrackerUnavailable, match=r"softdirty: .*clear_refs"):
        registry.create_tracker("auto", Host(tmp_path))


def test_every_tracker_that_auto_tries_has_a_reason() -> None:
    assert all(registry.AUTO_REASONS[name] for name in registry.AUTO_ORDER)


def test_whose_bits_it_clears_is_said_at_the_start(tmp_path: Path) -> None:
    """CRIU and collectors go by the same bits."""
    told: list[str] = []
    sink = logger.add(told.append, level="WARNING", format="{message}")
    logger.enable("memtier_engine")
    try:
        SoftDirtyTracker(machine(tmp_path, referenced_kib=(0, 0)).host)
    finally:
        logger.disable("memtier_engine")
        logger.remove(sink)
    assert len(told) == 1
    assert "CRIU" in told[0]
