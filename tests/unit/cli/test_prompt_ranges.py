"""Address ranges as the prompt takes and prints them. Vectors: what the reference does, pages of 4096 bytes."""

from __future__ import annotations

import numpy as np
import pytest

from memtier_cli.memtierd.prompt.ranges import RangeError, parse_ranges, range_text, restrict
from memtier_engine.model import Spans


def spans(*pairs: tuple[int, int]) -> Spans:
    rows = np.array(pairs, np.uint64).reshape(-1, 2)
    return Spans(rows[:, 0].copy(), rows[:, 1].copy())


def pairs(found: Spans) -> list[tuple[int, int]]:
    return list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1000-3000", [(0x1000, 0x3000)]),
        ("3000-1000", [(0x1000, 0x3000)]),
        ("1001-3000", [(0x1001, 0x2001)]),
        ("1000+8k", [(0x1000, 0x3000)]),
        ("1000+1", [(0x1000, 0x1000)]),
        ("1000+2MiB", [(0x1000, 0x201000)]),
        ("1000", [(0x1000, 0x2000)]),
        ("7F0000000000-7f0000001000,1000", [(0x7F0000000000, 0x7F0000001000), (0x1000, 0x2000)]),
        ("1000+10k", [(0x1000, 0x3000)]),
        ("1000+10kiB", [(0x1000, 0x3000)]),
        ("1000+1Mi", [(0x1000, 0x101000)]),
        ("1000+2T", [(0x1000, 0x20000001000)]),
    ],
)
def test_ranges_are_read_as_the_reference_reads_them(text: str, found: list[tuple[int, int]]) -> None:
    assert parse_ranges(text) == found


@pytest.mark.parametrize(
    "text", ["0x1000", "-", "", "1000-", "+1k", "1000+", "1000+10K", "1000+B", "1000+i", "1000,", "x", "1" * 17 + "-2"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(RangeError):
        parse_ranges(text)


def test_a_size_may_point_backwards_but_not_below_0() -> None:
    assert parse_ranges("800000+-4M") == [(0x400000, 0x800000)]
    with pytest.raises(RangeError):
        parse_ranges("1000+-5M")


def test_a_range_is_printed_in_hex_with_its_bytes() -> None:
    assert range_text(0x7EFB00000000, 0x7EFB00200000) == "7efb00000000-7efb00200000 (2097152 B)"


def test_only_what_lies_in_a_range_is_kept_also_when_the_range_begins_before_the_mapping() -> None:
    mapped = spans((0x10000, 0x20000), (0x20000, 0x30000), (0x50000, 0x60000))
    assert pairs(restrict(mapped, [(0x8000, 0x12000)])) == [(0x10000, 0x12000)]
    assert pairs(restrict(mapped, [(0x1E000, 0x58000)])) == [
        (0x1E000, 0x20000),
        (0x20000, 0x30000),
        (0x50000, 0x58000),
    ]
    assert pairs(restrict(mapped, [(0x30000, 0x50000)])) == []
    assert pairs(restrict(mapped, [])) == []


def test_what_is_asked_for_twice_counts_once() -> None:
    mapped = spans((0x10000, 0x20000))
    assert pairs(restrict(mapped, [(0x10000, 0x14000), (0x11000, 0x12000), (0x13000, 0x15000)])) == [
        (0x10000, 0x14000),
        (0x14000, 0x15000),
    ]


def test_a_range_that_begins_within_a_page_begins_with_the_page() -> None:
    assert pairs(restrict(spans((0x1000, 0x9000)), [(0x2001, 0x3001)])) == [(0x2000, 0x3000)]
