"""Address ranges as the reference writes and reads them, and which of a process's are meant. No IO."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, ProcessId, Spans
from memtier_engine.units import Sizes

_HEX = "([0-9a-fA-F]+)"
_RANGE = re.compile(rf"{_HEX}(?:-{_HEX}|\+(.+))?", re.DOTALL)
_LENGTHS = Sizes(prefixes="kMGT", any_case=False, signed=True, whole=True, blanks=False, most_bytes=(1 << 64) - 1)
_ADDRESS_MAX = (1 << 64) - 1


class RangeError(Exception):
    """Text that is no address range."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Memory of one process that a command has selected."""

    process: ProcessId
    spans: Spans


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """(start, end) of each range of a comma list: `START` is a page, `START-END`, `START+SIZE` (8k, 2MiB). Hex.

    Lengths are whole pages, rounded down; reversed bounds are put in order.

    Raises:
        RangeError: one of them is none.
    """
    return [_parse_range(part) for part in text.split(",")]


def _parse_range(text: str) -> tuple[int, int]:
    found = _RANGE.fullmatch(text)
    try:
        length = PAGE_BYTES if found is None or found[3] is None else _LENGTHS.to_bytes(found[3])
    except ConfigError:
        found = None
    if found is None:
        raise RangeError(f'invalid address range "{text}", expected START, START-END or START+SIZE')
    start = int(found[1], 16)
    end = start + length if found[2] is None else int(found[2], 16)
    start, end = min(start, end), max(start, end)
    if not 0 <= start <= end <= _ADDRESS_MAX:
        raise RangeError(f'address range "{text}" reaches beyond the address space')
    return start, start + (end - start) // PAGE_BYTES * PAGE_BYTES


def restrict(spans: Spans, wanted: Iterable[tuple[int, int]]) -> Spans:
    """The parts of `spans` that lie in any of the ranges; whole pages, in address order."""
    mask = np.uint64(PAGE_BYTES - 1)
    parts = []
    for start, end in wanted:
        low, high = np.uint64(start) & ~mask, np.uint64(end - start) + (np.uint64(start) & ~mask)
        starts, ends = np.maximum(spans.starts, low), np.minimum(spans.ends, high)
        parts.append(np.stack((starts, ends), axis=1)[starts < ends])
    if not parts:
        return Spans.empty()
    rows = np.concatenate(parts)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    if not len(rows):
        return Spans.empty()
    # Ranges that were asked for twice count once; neighbouring mappings stay apart.
    reach = np.maximum.accumulate(rows[:, 1])
    starts = np.maximum(rows[:, 0], np.concatenate((rows[:1, 0], reach[:-1])))
    keep = starts < rows[:, 1]
    return Spans(starts[keep], rows[keep, 1])


def range_text(start: int, end: int) -> str:
    """One range as the reference prints it: hex without 0x, the end exclusive, and its bytes."""
    return f"{start:x}-{end:x} ({end - start} B)"


def range_lines(spans: Spans) -> list[str]:
    """`range_text` of each."""
    return list(map(range_text, spans.starts.tolist(), spans.ends.tolist()))


def page_count(spans: Spans) -> int:
    """Pages of all."""
    return spans.total_bytes >> PAGE_SHIFT
