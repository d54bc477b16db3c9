"""Mappings that cannot be paged out: remembered, forgotten, and cheap when there are thousands."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

from memtier_engine.hostfs.handles import ProcessFiles
from memtier_engine.model import PAGE_BYTES
from memtier_engine.mover.refusals import KEPT_S, MAPS_S, Refusals
from support.fakes import BASE, pages_of
from support.growth import least_ratio


def at(page: int) -> int:
    return BASE + page * PAGE_BYTES


def files(mappings: list[tuple[int, int]]) -> ProcessFiles:
    lines = "".join(f"{at(first):x}-{at(last):x} rw-p 00000000 00:00 0 \n" for first, last in mappings)
    return cast(ProcessFiles, SimpleNamespace(read=lambda name: lines.encode()))


def test_the_whole_mapping_is_remembered_however_many_of_its_parts_are_refused() -> None:
    refusals = Refusals(lambda: 0.0)
    refusals.borders(files([(0, 10), (20, 30), (30, 31)]))
    assert refusals.refused(at(22), at(23)) == at(30), "the kernel may go on behind the mapping"
    refusals.refused(at(25), at(26))
    refusals.refused(at(3), at(4))
    assert pages_of(refusals.spans) == [(0, 10), (20, 30)]
    refusals.refused(at(30), at(31))
    refusals.refused(at(2), at(4))
    assert {page for first, last in pages_of(refusals.spans) for page in range(first, last)} == {
        *range(10),
        *range(20, 31),
    }


def test_all_are_forgotten_a_while_after_the_first() -> None:
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    refusals.borders(files([(0, 10), (20, 30)]))
    refusals.refused(at(0), at(1))
    now[0] = KEPT_S / 2
    refusals.refused(at(20), at(21))
    assert len(refusals.spans) == 2
    now[0] = KEPT_S
    assert len(refusals.spans) == 0
    refusals.refused(at(0), at(1))
    assert pages_of(refusals.spans) == [(0, 10)]


def test_the_list_of_mappings_is_read_again_after_a_while_and_not_before() -> None:
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    first, later = files([(0, 10)]), files([(0, 5), (5, 10)])
    assert len(refusals.borders(first)) == 2
    now[0] = MAPS_S / 2
    assert len(refusals.borders(later)) == 2
    now[0] = MAPS_S
    assert len(refusals.borders(later)) == 4


def test_thousands_of_locked_mappings_cost_in_proportion() -> None:
    """A process may lock every second page of 65 530 mappings: with a search through all for each, it was quadratic."""

    def refuse(count: int) -> Callable[[], object]:
        refusals = Refusals(lambda: 0.0)
        refusals.borders(files([(2 * number, 2 * number + 1) for number in range(count)]))

        def work() -> object:
            for number in range(count):
                refusals.refused(at(2 * number), at(2 * number + 1))
            return refusals.spans

        return work

    assert least_ratio(lambda: refuse(16_000), lambda: refuse(2_000)) < 20
