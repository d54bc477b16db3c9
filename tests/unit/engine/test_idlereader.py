"""The idle bits of frames: which are set again, and where those of large folios are looked up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.abi.constants import KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_LRU
from memtier_engine.hostfs.kpageflags import KPAGEFLAGS
from memtier_engine.hostfs.page_idle import IDLE_BITMAP
from memtier_engine.trackers import idlereader
from memtier_engine.trackers.idlereader import KNOWN_S, IdleReader
from support.hostfolder import HostFolder

FRAMES = 64 * 64
HEAD, TAIL = int(KPF_COMPOUND_HEAD | KPF_LRU), int(KPF_COMPOUND_TAIL)


class Machine:
    """A bitmap as the kernel's: tails have no bit, a 0 written changes nothing, an access clears the bit."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = HostFolder(root)
        self.flags = np.full(FRAMES, int(KPF_LRU), np.uint64)
        self.bits = np.zeros(FRAMES, np.bool_)
        self.time_s = 0.0
        self.set: list[int] = []
        """Frames whose bit was written, ever."""
        self.asked: list[int] = []
        """Frames whose flags were asked for since the last call of `touched`."""
        self.folder.write(IDLE_BITMAP, b"")
        self.folder.write(KPAGEFLAGS, b"")
        self.reader = IdleReader(self.folder.host, now_s=lambda: self.time_s)
        read = self.reader._flags.read

        def counted(frames: np.ndarray) -> np.ndarray:
            self.asked += frames.tolist()
            return read(frames)

        monkeypatch.setattr(self.reader._flags, "read", counted)
        monkeypatch.setattr("os.pwrite", self._written)

    def _written(self, fd: int, data: memoryview, offset: int) -> int:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").view(np.bool_)
        frames = np.flatnonzero(bits) + offset * 8
        self.set += frames.tolist()
        self.bits[frames[self.flags[frames] != TAIL]] = True
        return len(data)

    def compound(self, first: int, frames: int) -> None:
        self.flags[first] = HEAD
        self.flags[first + 1 : first + frames] = TAIL
        self.bits[first : first + frames] = False

    def touch(self, *frames: int) -> None:
        for frame in frames:
            while self.flags[frame] == TAIL:
                frame -= 1
            self.bits[frame] = False

    def touched(self, *frames: int) -> list[int]:
        self.asked.clear()
        self.set.clear()
        (self.folder.root / IDLE_BITMAP).write_bytes(np.packbits(self.bits, bitorder="little").tobytes())
        (self.folder.root / KPAGEFLAGS).write_bytes(self.flags.tobytes())
        numbers = np.array(frames, np.uint64)
        return [int(frame) for frame in numbers[self.reader.touched_and_marked(numbers)]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path, monkeypatch)
    yield made
    made.reader.close()


def test_only_what_was_touched_is_set_again(machine: Machine) -> None:
    """To set the bit of an idle frame again would clear an access of just now, and costs another walk."""
    assert machine.touched(5, 70, 700) == [5, 70, 700]
    assert sorted(machine.set) == [5, 70, 700]
    machine.touch(70)
    assert machine.touched(5, 70, 700) == [70]
    assert machine.set == [70]
    assert machine.touched(5, 70, 700) == []
    assert machine.set == []


def test_frames_come_in_any_order_and_more_than_once(machine: Machine) -> None:
    """Also none at all: of a process that has nothing in RAM."""
    machine.touched(700, 5, 70, 6)
    machine.touch(6, 700)
    assert machine.touched(6, 700, 5, 6, 70) == [6, 700, 6]
    assert sorted(machine.set) == [6, 700]
    assert machine.touched() == []


def test_a_large_folio_is_touched_as_a_whole_and_set_at_its_head(machine: Machine) -> None:
    machine.compound(64, 16)
    assert machine.touched(10, 64, 65, 79) == [10, 64, 65, 79]
    assert machine.touched(10, 64, 65, 79) == []
    machine.touch(70)
    assert machine.touched(10, 64, 65, 79) == [64, 65, 79]
    assert set(machine.set) == {64}
    assert machine.touched(10, 65, 79) == []


def test_flags_of_a_frame_that_is_no_tail_are_asked_for_once_in_a_minute(machine: Machine) -> None:
    frames = [3, 64, 65, 1000]
    machine.compound(64, 2)
    machine.touched(*frames)
    assert set(frames) <= set(machine.asked)
    for time_s in (1.0, KNOWN_S - 1, KNOWN_S + 1, 2 * KNOWN_S - 1):
        machine.time_s = time_s
        machine.touch(3, 64, 1000)
        assert machine.touched(*frames) == frames
        assert {3, 1000}.isdisjoint(machine.asked)  # the head was asked for with its tail
    machine.time_s = 2 * KNOWN_S + 2
    machine.touch(3, 1000)
    assert machine.touched(*frames) == [3, 1000]
    assert {3, 1000} <= set(machine.asked)


def test_a_frame_that_came_back_as_a_tail_looks_touched_no_longer_than_its_flags_are_remembered(
    machine: Machine,
) -> None:
    """It errs towards in use, and not for long."""
    machine.touched(128, 129)
    machine.compound(128, 2)
    assert machine.touched(128, 129) == [128, 129]
    assert machine.touched(128, 129) == [129]
    machine.time_s = 2 * KNOWN_S
    assert machine.touched(128, 129) == []


def test_to_remember_a_frame_costs_little_however_many_are_known(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scan of a large process asks for all of its frames, chunk by chunk."""
    looked_up = 0

    def counted(table: tuple[np.ndarray, np.ndarray], indexes: np.ndarray) -> np.ndarray:
        nonlocal looked_up
        looked_up += len(indexes)
        return words_at(table, indexes)

    words_at = idlereader._at
    monkeypatch.setattr(idlereader, "_at", counted)
    frames = list(range(7, FRAMES, 64))
    for frame in np.random.default_rng(1).permutation(frames).tolist():
        machine.touched(frame)
    each = looked_up / len(frames)
    assert each < 4 * np.log2(len(frames)), "by halving, not all that is known again for each"
    machine.touch(*frames)
    assert machine.touched(*frames) == frames
    assert machine.asked == [], "all of them are known"


@given(data=st.data())
def test_every_scan_tells_what_was_touched_since_the_one_before(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Small pages and folios side by side, whatever is touched and however long it takes."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(tmp_path_factory.mktemp("bitmap"), patch)
        for order, block in enumerate(data.draw(st.lists(st.integers(0, 7), min_size=6, max_size=6, unique=True))):
            machine.compound(block * 512 + 64, 1 << order + 1)
        frames = data.draw(st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=60, unique=True))
        machine.touched(*frames)
        for _ in range(3):
            machine.time_s += data.draw(st.sampled_from((1.0, KNOWN_S / 2, 3 * KNOWN_S)))
            touched = data.draw(st.lists(st.sampled_from(frames), max_size=20))
            machine.touch(*touched)
            idle_heads = machine.bits.copy()
            assert sorted(machine.touched(*frames)) == sorted(
                frame for frame in frames if not idle_heads[_head(machine, frame)]
            )
            assert set(machine.set) == {_head(machine, frame) for frame in touched}
        machine.reader.close()


def _head(machine: Machine, frame: int) -> int:
    while machine.flags[frame] == TAIL:
        frame -= 1
    return frame
