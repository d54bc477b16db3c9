"""Which pages of a batch go and which stay: arrays in, arrays out."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import PM_FILE, PM_MMAP_EXCLUSIVE, PM_PRESENT, PM_SWAP
from memtier_engine.errors import AccessDenied, KernelCallError
from memtier_engine.hostfs.pagemap import Pagemap
from memtier_engine.model import PAGE_BYTES, U64, Bools, Kept, Spans, Why
from memtier_engine.mover import backends, edge
from memtier_engine.mover.backends import BatchResult, ProcessHandle, page_out
from memtier_engine.mover.edge import GOES, HUGE_BYTES
from memtier_engine.mover.mover import take, take_whole
from memtier_engine.mover.refusals import KEPT_S, Refusals
from support.fakes import BASE, PROCESS, pages_of, spans

OURS = PM_PRESENT | PM_MMAP_EXCLUSIVE
BLOCK = HUGE_BYTES // PAGE_BYTES


def words(*each: int) -> U64:
    return np.array(each, np.uint64)


def flags(*each: int) -> Bools:
    return np.array(each, np.bool_)


def pages(*numbers: int) -> U64:
    return np.array(numbers, np.uint64) * np.uint64(PAGE_BYTES) + np.uint64(BASE)


def test_a_page_goes_only_if_it_is_ours_alone_in_ram_and_of_no_file() -> None:
    found = edge.reasons_before(
        words(OURS, PM_PRESENT, OURS | PM_FILE, PM_PRESENT | PM_FILE, 0, PM_SWAP, OURS, PM_PRESENT),
        refused=flags(0, 0, 0, 0, 0, 0, 1, 0),
        zero=flags(0, 0, 0, 0, 0, 0, 0, 1),
    )
    assert found.tolist() == [GOES, Why.SHARED, Why.FILE, Why.FILE, Why.ABSENT, Why.ABSENT, Why.LOCKED, Why.ABSENT]


def test_after_the_call_a_page_is_out_or_there_is_a_reason() -> None:
    found = edge.reasons_after(
        flags(1, 1, 1, 1, 1, 0),
        words(PM_SWAP, OURS, OURS, PM_PRESENT, 0, OURS),
        flags(0, 0, 1, 0, 0, 0),
    )
    assert found.tolist() == [GOES, Why.BUSY, Why.LOCKED, Why.SHARED, Why.ABSENT, GOES]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 900)), max_size=5),
    st.lists(st.integers(0, 8), unique=True),
)
def test_pieces_are_the_same_pages_and_huge_ones_stay_whole(runs: list[tuple[int, int]], huge: list[int]) -> None:
    at, wanted = 0, []
    for size, gap in runs:
        wanted.append((at, at + size))
        at += size + gap + 1
    blocks = sorted(huge)
    found = edge.in_pieces(spans(*wanted), 64 * PAGE_BYTES, spans(*((BLOCK * n, BLOCK * (n + 1)) for n in blocks)))
    pieces = pages_of(found)
    assert [page for first, end in pieces for page in range(first, end)] == [
        page for first, end in wanted for page in range(first, end)
    ]
    for first, end in pieces:
        assert first // 64 == (end - 1) // 64 or (first // BLOCK == (end - 1) // BLOCK and first // BLOCK in blocks)
    for block in blocks:  # nothing is cut within it, but where the spans are
        inner = [first for first, _ in pieces if BLOCK * block < first < BLOCK * (block + 1)]
        assert set(inner) <= {first for first, _ in wanted}


@pytest.mark.parametrize("kind", range(23, 32))
def test_a_page_under_migration_or_a_guard_page_is_not_in_swap(kind: int) -> None:
    assert not edge.is_out(words(PM_SWAP | kind | 5 << 5)).any()
    assert edge.is_out(words(PM_SWAP | (kind - 23) | 5 << 5)).all()


@given(st.lists(st.booleans(), min_size=1, max_size=3 * BLOCK), st.integers(0, BLOCK - 1), st.integers(1, 2 * BLOCK))
def test_a_batch_is_cut_after_what_it_may_hold_or_at_the_end_of_2_mib_that_go_whole(
    goes: list[bool], first: int, limit: int
) -> None:
    addresses = pages(*range(first, first + len(goes)))
    cut = edge.cut_batch(addresses, np.array(goes), limit * PAGE_BYTES)
    taken = sum(goes[: cut.pages])
    assert cut.more == (sum(goes) > taken)
    assert taken >= min(limit, sum(goes))
    if taken > limit:
        assert (first + cut.pages) % BLOCK == 0
        assert all(goes[max(0, cut.pages - BLOCK) : cut.pages])
        assert taken < limit + BLOCK


def test_a_probe_is_cut_to_the_page_unless_there_is_a_huge_page() -> None:
    goes = np.ones(4 * BLOCK, np.bool_)
    addresses = pages(*range(4 * BLOCK))
    assert edge.cut_batch(addresses, goes, 64 * PAGE_BYTES, Spans.empty()).pages == 64
    assert edge.cut_batch(addresses, goes, 64 * PAGE_BYTES, spans((0, BLOCK))).pages == BLOCK
    assert edge.cut_batch(addresses, goes, 64 * PAGE_BYTES, spans((BLOCK, 2 * BLOCK))).pages == 64


@given(st.integers(0, 2 * BLOCK), st.integers(1, 4 * BLOCK), st.integers(0, 5 * BLOCK), st.none() | st.integers(0, 5))
def test_one_run_that_goes_as_a_whole_is_cut_where_its_pages_would_be(
    first: int, count: int, limit: int, huge_block: int | None
) -> None:
    addresses = pages(*range(first, first + count))
    huge = None if huge_block is None else spans((huge_block * BLOCK, (huge_block + 1) * BLOCK))
    cut = edge.cut_batch(addresses, np.ones(count, np.bool_), limit * PAGE_BYTES, huge)
    start, end = int(addresses[0]), int(addresses[-1]) + PAGE_BYTES
    assert edge.cut_whole(start, end, limit * PAGE_BYTES, huge) == start + cut.pages * PAGE_BYTES


@given(st.lists(st.sampled_from([OURS, PM_PRESENT, OURS | PM_FILE, 0, PM_SWAP, OURS | 1 << 55]), min_size=1))
def test_all_go_if_none_has_a_reason_to_stay(each: list[int]) -> None:
    assert edge.all_go(words(*each)) == (edge.reasons_before(words(*each)) == GOES).all()


def test_what_stays_costs_nothing_of_a_batch() -> None:
    goes = np.zeros(1000, np.bool_)
    goes[900:] = True
    cut = edge.cut_batch(pages(*range(1000)), goes, 10 * PAGE_BYTES)
    assert (cut.pages, cut.more) == (910, True)


def test_no_cut_inside_2_mib_that_are_covered_as_a_whole() -> None:
    whole = spans((BLOCK, 4 * BLOCK))
    assert pages_of(take_whole(whole, 5 * PAGE_BYTES)[0]) == [(BLOCK, 2 * BLOCK)]
    assert pages_of(take_whole(whole, HUGE_BYTES + PAGE_BYTES)[0]) == [(BLOCK, 3 * BLOCK)]
    assert pages_of(take_whole(spans((BLOCK + 1, 4 * BLOCK)), 5 * PAGE_BYTES)[0]) == [(BLOCK + 1, BLOCK + 6)]
    assert pages_of(take_whole(spans((BLOCK, 2 * BLOCK - 1)), 5 * PAGE_BYTES)[0]) == [(BLOCK, BLOCK + 5)]


def test_blocks_that_are_asked_for_in_part() -> None:
    asked = spans((0, BLOCK), (BLOCK + 3, BLOCK + 9), (3 * BLOCK - 1, 4 * BLOCK))
    assert pages_of(edge.partly_asked(asked)) == [(BLOCK, 2 * BLOCK), (2 * BLOCK, 3 * BLOCK)]


_SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=12)


def _of_shape(shape: list[tuple[int, int]]) -> Spans:
    at, ranges = 0, []
    for gap, length in shape:
        ranges.append((at + gap, at + gap + length))
        at += gap + length
    return spans(*ranges)


def _numbers(found: Spans) -> set[int]:
    return {page for first, last in pages_of(found) for page in range(first, last)}


@given(_SHAPES, _SHAPES)
def test_spans_without_others_are_the_pages_that_are_only_in_them(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    left = edge.without(_of_shape(one), _of_shape(other))
    assert _numbers(left) == _numbers(_of_shape(one)) - _numbers(_of_shape(other))
    assert (left.starts < left.ends).all()


@given(_SHAPES, st.integers(0, 60), st.integers(1, 12))
def test_a_task_is_cut_after_so_many_pages_or_spans(shape: list[tuple[int, int]], budget: int, most: int) -> None:
    whole = _of_shape(shape)
    first, rest = take(whole, budget * PAGE_BYTES, most)
    assert sorted(_numbers(first) | _numbers(rest)) == sorted(_numbers(whole))
    assert not _numbers(first) & _numbers(rest)
    assert max(_numbers(first), default=-1) < min(_numbers(rest), default=1 << 20)
    assert (first.starts < first.ends).all()
    assert (rest.starts < rest.ends).all()
    assert len(first) <= most
    if len(rest) and len(first) < most:
        assert len(_numbers(first)) == max(1, budget)
    assert len(_numbers(first)) <= max(1, budget)


@given(_SHAPES, st.integers(1, 20))
def test_a_sample_is_of_the_spans_and_no_larger_than_asked_for(shape: list[tuple[int, int]], count: int) -> None:
    whole = _of_shape(shape)
    found = _numbers(edge.sample(whole, count))
    assert found <= _numbers(whole)
    assert len(found) <= count
    assert len(found) >= min(count, len(_numbers(whole))) - 1


def test_what_went_is_all_but_what_was_kept() -> None:
    kept = (Kept(Why.FILE, spans((2, 4))), Kept(Why.BUSY, spans((0, 1), (8, 9))))
    assert pages_of(edge.went(spans((0, 10)), kept)) == [(1, 2), (4, 8), (9, 10)]


class Kernel:
    """process_madvise over mappings, of which some refuse; `most` bytes a call, as when a signal arrives."""

    def __init__(self, *, mappings: list[tuple[int, int]], locked: set[int], most: int = 1 << 60) -> None:
        self.mappings, self.locked, self.most = mappings, locked, most
        self.out: set[int] = set()
        self.calls = 0
        self.errors: list[int] = []

    def advise(self, pidfd: int, starts: U64, lengths: U64, advice: int) -> int:
        self.calls += 1
        if self.errors:
            raise KernelCallError.from_errno("process_madvise", self.errors.pop(0))
        done: int = 0
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            part = min(length, self.most - done)
            first = (start - BASE) // PAGE_BYTES
            for page in range(first, first + part // PAGE_BYTES):
                number = next(n for n, (a, b) in enumerate(self.mappings) if a <= page < b)
                if number in self.locked:
                    if done:
                        return int(done)
                    raise KernelCallError.from_errno("process_madvise", errno.EINVAL)
                self.out.add(page)
            done += part
            if done >= self.most:
                break
        return int(done)

    def read(self, start: int, end: int) -> U64:
        first, last = (start - BASE) // PAGE_BYTES, (end - BASE) // PAGE_BYTES
        return words(*(PM_SWAP if page in self.out else OURS for page in range(first, last)))

    def maps(self, name: str) -> bytes:
        assert name == "maps"
        rows = (f"{BASE + a * PAGE_BYTES:x}-{BASE + b * PAGE_BYTES:x} rw-p 0 00:00 0 " for a, b in self.mappings)
        return "\n".join(rows).encode()

    def handle(self) -> ProcessHandle:
        pagemap = SimpleNamespace(read=self.read, scan_runs=lambda *args, **rest: np.zeros((0, 3), np.uint64))
        return cast(ProcessHandle, SimpleNamespace(process=PROCESS, pidfd=3, pagemap=pagemap, read=self.maps))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(mappings=[(0, 10), (10, 20), (20, 30), (30, 1000)], locked=set())
    monkeypatch.setattr(syscalls, "process_madvise", made.advise)
    return made


def kept(result: BatchResult) -> dict[Why, list[tuple[int, int]]]:
    return {each.why: pages_of(each.spans) for each in result.kept}


def test_a_call_that_ends_in_the_middle_is_gone_on_with(kernel: Kernel) -> None:
    kernel.most = 7 * PAGE_BYTES
    result = page_out(kernel.handle(), spans((0, 12), (14, 30)))
    assert result.moved_bytes == 28 * PAGE_BYTES
    assert result.kept == ()
    assert kernel.calls == 4


def test_a_refused_mapping_is_found_and_the_others_go_all_the_same(kernel: Kernel) -> None:
    kernel.locked = {1, 2}
    refusals = Refusals()
    result = page_out(kernel.handle(), spans((5, 100)), refusals=refusals)
    assert result.moved_bytes == 75 * PAGE_BYTES
    assert kept(result) == {Why.LOCKED: [(10, 30)]}
    assert result.busy.total_bytes == 0
    assert kernel.calls <= 5
    calls = kernel.calls
    again = page_out(kernel.handle(), spans((12, 25)), refusals=refusals)
    assert kernel.calls == calls, "known by now, the kernel is not asked"
    assert kept(again) == {Why.LOCKED: [(12, 25)]}


def test_after_a_while_the_kernel_is_asked_again_whether_memory_is_locked(kernel: Kernel) -> None:
    now = [100.0]
    refusals = Refusals(lambda: now[0])
    kernel.locked = {1}
    page_out(kernel.handle(), spans((0, 30)), refusals=refusals)
    kernel.locked = set()
    now[0] += KEPT_S + 1
    assert page_out(kernel.handle(), spans((10, 20)), refusals=refusals).moved_bytes == 10 * PAGE_BYTES


def test_the_kernel_that_asks_to_come_later_is_believed(kernel: Kernel) -> None:
    kernel.errors = [errno.EAGAIN]
    result = page_out(kernel.handle(), spans((0, 10)))
    assert pages_of(result.busy) == pages_of(result.stuck) == [(0, 10)]


def test_a_hole_and_an_interruption_lose_nothing_of_the_rest(kernel: Kernel) -> None:
    kernel.errors = [errno.EINTR, errno.ENOMEM]
    result = page_out(kernel.handle(), spans((0, 10), (12, 20)))
    assert kernel.out == set(range(12, 20))
    assert result.moved_bytes == 8 * PAGE_BYTES


def test_a_right_that_is_missing_is_told(kernel: Kernel) -> None:
    kernel.errors = [errno.EPERM]
    with pytest.raises(AccessDenied):
        page_out(kernel.handle(), spans((0, 10)))


def test_what_was_touched_since_the_decision_stays(kernel: Kernel) -> None:
    asked: list[list[tuple[int, int]]] = []

    def look(process: object, where: Spans) -> Bools:
        asked.append(pages_of(where))
        return np.arange(int(where.pages.sum())) < 4

    result = page_out(kernel.handle(), spans((0, 20)), look=look, limit_bytes=8 * PAGE_BYTES)
    assert asked == [[(0, 8)]]
    assert kept(result) == {Why.TOUCHED: [(0, 4)]}
    assert kernel.out == {4, 5, 6, 7}
    assert (result.tried_bytes, result.touched_share) == (8 * PAGE_BYTES, 0.5)


@settings(deadline=None)
@given(
    stays=st.sets(st.integers(0, 29)),
    locked=st.sets(st.integers(0, 2)),
    touched=st.none() | st.sets(st.integers(0, 29)),
    limit=st.none() | st.integers(1, 40),
    shape=st.sampled_from([[(0, 30)], [(3, 27)], [(0, 10), (10, 20)], [(1, 4), (8, 30)]]),
)
@example(stays={3, 4, 26}, locked=set(), touched=None, limit=21, shape=[(3, 27)])  # just what can go, and one more
def test_whatever_stays_the_rest_goes(
    stays: set[int], locked: set[int], touched: set[int] | None, limit: int | None, shape: list[tuple[int, int]]
) -> None:
    """One run that goes as a whole is handled apart from all others: the outcome is that of each page by itself."""
    kernel = Kernel(mappings=[(0, 10), (10, 20), (20, 30)], locked=locked)
    kernel.out = set(stays)

    def look(process: object, where: Spans) -> Bools | None:
        return None if touched is None else np.isin(sorted(_numbers(where)), sorted(touched))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(syscalls, "process_madvise", kernel.advise)
        limit_bytes = None if limit is None else limit * PAGE_BYTES
        result = page_out(kernel.handle(), spans(*shape), look=look, limit_bytes=limit_bytes)
    asked = sorted(_numbers(spans(*shape)))
    can = [page for page in asked if page not in stays]
    if limit is not None and limit <= len(can):
        asked = asked[: asked.index(can[limit - 1]) + 1]
    in_use = set() if touched is None else touched & set(asked) - stays
    wanted = set(asked) - stays - in_use
    held = {page for page in wanted if page // 10 in locked}
    assert kernel.out - stays == wanted - held
    assert (result.moved_bytes, result.asked_bytes) == (len(wanted - held) * PAGE_BYTES, len(wanted) * PAGE_BYTES)
    assert result.tried_bytes == (None if limit is None else len(asked) * PAGE_BYTES)
    found = {each.why: _numbers(each.spans) for each in result.kept}
    expected = {Why.TOUCHED: in_use, Why.LOCKED: held, Why.ABSENT: stays & set(asked)}
    assert found == {why: numbers for why, numbers in expected.items() if numbers}
    assert _numbers(result.stuck) == in_use | held
    assert result.looked == (touched is not None and len(set(asked) - stays) > 0)


def test_words_of_many_spans_are_read_in_few_calls() -> None:
    calls: list[tuple[int, int]] = []

    def read(start: int, end: int) -> U64:
        calls.append((start, end))
        return (np.arange(start, end, PAGE_BYTES, dtype=np.uint64) - np.uint64(BASE)) // np.uint64(PAGE_BYTES)

    pagemap = cast(Pagemap, SimpleNamespace(read=read))
    wanted = spans((0, 2), (5, 6), (9, 12), (1000, 1003))
    assert backends.read_words(pagemap, wanted).tolist() == [0, 1, 5, 9, 10, 11, 1000, 1001, 1002]
    assert len(calls) == 2
