"""pagemap, idle bitmap and kpageflags as plain files: which words are read, and which bits are written."""

from __future__ import annotations

import tempfile
import tracemalloc
from itertools import groupby, pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.abi.constants import KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_LRU, PM_PRESENT, PM_SWAP
from memtier_engine.errors import ProcessGone
from memtier_engine.hostfs import pagemap as pm
from memtier_engine.hostfs.kpageflags import KPAGEFLAGS, KpageFlags
from memtier_engine.hostfs.page_idle import IDLE_BITMAP, WRITE_GAP_WORDS, IdleBitmap, distinct
from memtier_engine.hostfs.runs import run_bounds
from memtier_engine.model import PAGE_BYTES
from memtier_engine.trackers.words import tags_of, tags_out_of
from support.hostfolder import HostFolder

WORDS = 64
FRAMES = st.lists(st.integers(0, WORDS * 64 - 1), max_size=200)
BASE = 0x10000 * PAGE_BYTES


def u64(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.uint64)


@given(frames=FRAMES)
def test_setting_frames_idle_writes_each_bit_once_and_no_bit_of_another(frames: list[int]) -> None:
    """The kernel ignores a 0 written: so what is written along, between nearly neighbouring words, is 0."""
    written: list[tuple[int, list[int]]] = []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        written.append((offset // 8, np.frombuffer(data, np.uint64).tolist()))
        return len(data)

    with tempfile.TemporaryDirectory() as directory, mock.patch("os.pwrite", pwrite):
        folder = HostFolder(Path(directory))
        folder.write(IDLE_BITMAP, bytes(WORDS * 8))
        with IdleBitmap(folder.host) as bitmap:
            bitmap.set_idle(u64(frames))
    ours = dict.fromkeys(sorted({frame // 64 for frame in frames}), 0)
    for frame in frames:
        ours[frame // 64] |= 1 << frame % 64
    words = [(first + number, word) for first, run in written for number, word in enumerate(run)]
    assert {index: word for index, word in words if word} == ours
    assert len({index for index, _ in words}) == len(words)
    assert all(run[0] and run[-1] for _, run in written)
    zeros = [len(list(group)) for _, run in written for word, group in groupby(run) if word == 0]
    assert all(length < WRITE_GAP_WORDS for length in zeros)
    assert all(right[0] - (left[0] + len(left[1]) - 1) > WRITE_GAP_WORDS for left, right in pairwise(written))


@given(
    indexes=st.sets(st.integers(0, WORDS + 8)).map(sorted),
    words=st.lists(st.integers(0, (1 << 64) - 1), min_size=WORDS, max_size=WORDS),
)
def test_reading_words_gives_each_its_own_and_zero_past_the_end(indexes: list[int], words: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = HostFolder(Path(directory))
        folder.write(IDLE_BITMAP, u64(words).tobytes())
        with IdleBitmap(folder.host) as bitmap:
            found = bitmap.read_words(u64(indexes))
    assert found.tolist() == [words[index] if index < WORDS else 0 for index in indexes]


@given(frames=FRAMES, idle=FRAMES)
def test_a_frame_is_idle_if_its_own_bit_says_so(frames: list[int], idle: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = HostFolder(Path(directory))
        folder.write(IDLE_BITMAP, bytes(WORDS * 8))
        with IdleBitmap(folder.host) as bitmap:
            bitmap.set_idle(u64(idle))
            assert bitmap.is_idle(u64(frames)).tolist() == [frame in set(idle) for frame in frames]


@pytest.mark.parametrize("spread", [1000, 3000, 1 << 22, 1 << 40])
def test_words_are_found_in_memory_that_goes_by_their_number_not_by_what_they_are_spread_over(spread: int) -> None:
    """The frames of a small process lie all over the memory of a large machine."""
    numbers = np.random.default_rng(spread).integers(0, spread, 1000).astype(np.uint64) + np.uint64(1 << 20)
    tracemalloc.start()
    try:
        found, places = distinct(numbers)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tolist() == sorted(set(numbers.tolist()))
    assert found[places].tolist() == numbers.tolist()
    assert peak_bytes < 20 * numbers.nbytes


def test_a_word_within_which_memory_ends_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sets the bits of such a word, and says that it wrote 0 bytes (mm/page_idle.c counts full words)."""
    folder = HostFolder(tmp_path)
    folder.write(IDLE_BITMAP, bytes(WORDS * 8))
    calls: list[tuple[int, int]] = []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append((offset, len(data)))
        return min(len(data), max(0, (WORDS - 1) * 8 - offset))

    monkeypatch.setattr("os.pwrite", pwrite)
    with IdleBitmap(folder.host) as bitmap:
        bitmap.set_idle(u64([64 * (WORDS - 2), 64 * (WORDS - 1), 64 * (WORDS - 1) + 5]))
    assert calls == [((WORDS - 2) * 8, 16), ((WORDS - 1) * 8, 8)]


@given(numbers=st.sets(st.integers(0, 300)).map(sorted), gap=st.integers(1, 9))
def test_runs_cover_all_numbers_and_break_only_at_wide_steps(numbers: list[int], gap: int) -> None:
    bounds = run_bounds(u64(numbers), gap).tolist()
    runs = [numbers[begin:end] for begin, end in pairwise(bounds)]
    assert [number for run in runs for number in run] == numbers
    assert all(b - a <= gap for run in runs for a, b in pairwise(run))
    assert all(right[0] - left[-1] > gap for left, right in pairwise(runs))


def compounds(orders: list[int]) -> tuple[list[int], list[int]]:
    """Flags of compound pages of these orders, each where it is aligned, and every frame's head."""
    flags: list[int] = []
    heads: list[int] = []
    for order in orders:
        while len(flags) % (1 << order):
            heads.append(len(flags))
            flags.append(int(KPF_LRU))
        heads += [len(flags)] * (1 << order)
        flags.append(int(KPF_COMPOUND_HEAD | KPF_LRU) if order else int(KPF_LRU))
        flags += [int(KPF_COMPOUND_TAIL)] * ((1 << order) - 1)
    return flags, heads


@given(
    orders=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    picks=st.lists(st.floats(0, 1, exclude_max=True), max_size=50),
)
def test_every_frame_of_a_huge_page_maps_to_its_head(orders: list[int], picks: list[float]) -> None:
    """Whatever lies next to it: orders from 1 to 9, side by side."""
    flags, heads = compounds(orders)
    frames = [int(pick * len(flags)) for pick in picks]
    with tempfile.TemporaryDirectory() as directory:
        folder = HostFolder(Path(directory))
        folder.write(KPAGEFLAGS, u64(flags).tobytes())
        with KpageFlags(folder.host) as file:
            assert file.compound_heads(u64(frames)).tolist() == [heads[frame] for frame in frames]
            some = sorted(set(frames))
            assert file.read(u64(some)).tolist() == [flags[frame] for frame in some]


def test_flags_of_frames_far_apart_are_read_without_what_lies_between(tmp_path: Path) -> None:
    """Frame numbers of a machine with 4 TiB: a read of everything in between would not end."""
    folder = HostFolder(tmp_path)
    path = folder.write(KPAGEFLAGS, u64([1, 2, 3]).tobytes())
    far = 1 << 30
    with path.open("r+b") as file:
        file.seek(far * 8)
        file.write(u64([7]).tobytes())
    with KpageFlags(folder.host) as flags:
        assert flags.read(u64([0, 2, far, far + 5])).tolist() == [1, 3, 7, 0]


@pytest.fixture
def mapped(tmp_path: Path) -> HostFolder:
    folder = HostFolder(tmp_path)
    folder.process(7)
    words = {BASE + page * PAGE_BYTES: PM_PRESENT | (100 + page) for page in range(8)}
    words[BASE + 3 * PAGE_BYTES] = PM_SWAP | 5
    words[BASE + 9 * PAGE_BYTES] = PM_SWAP | 6
    folder.pagemap(7, words)
    return folder


def test_pagemap_is_read_in_one_piece_and_decoded_by_column(mapped: HostFolder) -> None:
    with pm.Pagemap(mapped.host, 7) as pages:
        words = pages.read(BASE, BASE + 10 * PAGE_BYTES)
        assert pm.present(words).tolist() == [True] * 3 + [False] + [True] * 4 + [False] * 2
        assert pm.swapped(words).nonzero()[0].tolist() == [3, 9]
        assert pm.pfns(words)[:3].tolist() == [100, 101, 102]
        assert not pm.soft_dirty(words).any()
        assert not pm.exclusive(words).any()
        assert pages.resident(BASE, BASE + 2 * PAGE_BYTES).tolist() == [True, True]
        assert len(pages.read(BASE, BASE)) == 0


@given(words=st.lists(st.integers(0, (1 << 64) - 1), max_size=40))
def test_a_scan_reads_the_same_out_of_a_byte_as_out_of_the_word(words: list[int]) -> None:
    numbers = u64(words)
    flags = pm.flags_of(pm.high_bytes(numbers))
    assert flags.present.tolist() == pm.present(numbers).tolist()
    assert flags.swapped.tolist() == pm.swapped(numbers).tolist()
    assert flags.exclusive.tolist() == pm.exclusive(numbers).tolist()
    assert (pm.soft_dirty_bytes(numbers) != 0).tolist() == pm.soft_dirty(numbers).tolist()
    tags = tags_of(numbers)
    taken = tags_out_of(numbers, flags.present)
    assert (tags is None) == (taken is None)
    if tags is not None and taken is not None:
        assert taken.tolist() == tags.tolist()


def test_pagemap_fills_the_callers_array(mapped: HostFolder) -> None:
    out = np.full(16, 9, np.uint64)
    with pm.Pagemap(mapped.host, 7) as pages:
        words = pages.read(BASE, BASE + 4 * PAGE_BYTES, out)
        assert np.shares_memory(words, out)
        assert out[4] == 9
        with pytest.raises(ValueError, match="16 words, 32 pages"):
            pages.read(BASE, BASE + 32 * PAGE_BYTES, out)


def test_swapped_bytes_are_counted_without_pagemap_scan(mapped: HostFolder) -> None:
    """A plain file answers the ioctl with ENOTTY, as a kernel before 6.7 does."""
    with pm.Pagemap(mapped.host, 7) as pages:
        starts = u64([BASE, BASE + 5 * PAGE_BYTES])
        ends = u64([BASE + 4 * PAGE_BYTES, BASE + 10 * PAGE_BYTES])
        assert pages.swapped_bytes(starts, ends) == 2 * PAGE_BYTES
        assert pages.swapped_bytes(starts[:0], ends[:0]) == 0


def test_a_pagemap_that_answers_nothing_belongs_to_a_process_that_exited(mapped: HostFolder) -> None:
    with pm.Pagemap(mapped.host, 7) as pages, pytest.raises(ProcessGone):
        pages.read(BASE + 100 * PAGE_BYTES, BASE + 101 * PAGE_BYTES)


def test_a_pagemap_is_not_taken_for_that_of_a_later_process(mapped: HostFolder) -> None:
    with pm.Pagemap(mapped.host, 7) as pages:
        mapped.process(7, start_ticks=999)
        with pytest.raises(ProcessGone):
            pages.read(BASE + 100 * PAGE_BYTES, BASE + 101 * PAGE_BYTES)


@st.composite
def runs_and_spans(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    edges = draw(st.sets(st.integers(0, 60)).filter(lambda found: len(found) % 2 == 0))
    other = draw(st.sets(st.integers(0, 60)).filter(lambda found: len(found) % 2 == 0))
    return sorted(edges), sorted(other)


@given(runs_and_spans())
def test_the_overlap_of_runs_with_spans_is_counted_to_the_byte(edges: tuple[list[int], list[int]]) -> None:
    runs, spans = (u64(side).reshape(-1, 2) for side in edges)
    below = pm._bytes_below
    total = int((below(runs, spans[:, 1]) - below(runs, spans[:, 0])).sum(dtype=np.uint64))
    cells = [{n for a, b in side.tolist() for n in range(a, b)} for side in (runs, spans)]
    assert total == len(cells[0] & cells[1])


@pytest.mark.parametrize(("start_ticks", "same"), [(100, True), (200, False)])
def test_a_pagemap_that_answers_nothing_is_opened_anew_for_the_same_process_only(
    tmp_path: Path, start_ticks: int, same: bool
) -> None:
    """After an exec it is the memory of before; after the end of the process the pid may be another's."""
    folder = HostFolder(tmp_path)
    folder.process(7, start_ticks=100)
    folder.pagemap(7, {})
    with pm.Pagemap(folder.host, 7) as pagemap:
        (tmp_path / "proc/7/pagemap").unlink()
        folder.process(7, start_ticks=start_ticks)
        folder.pagemap(7, {0x1000: PM_PRESENT})
        if same:
            assert pagemap.resident(0x1000, 0x2000).tolist() == [True]
        else:
            with pytest.raises(ProcessGone):
                pagemap.read(0x1000, 0x2000)
