"""The text form of heats that forecasters exchange with other programs: one JSON object per round.

`{"PID": [{"addr": BYTES, "length": PAGES, "heat": F, "created": UNIX_NS, "updated": UNIX_NS}, ...], ...}`
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import starmap
from typing import Any

import numpy as np

from memtier_engine.errors import MemtierError
from memtier_engine.model import PAGE_BYTES, ProcessId
from memtier_engine.policies.heatmap import Heats

_KEYS = ("addr", "length", "heat", "created", "updated")
_ADDRESS_MAX = 1 << 63
# Text by a template: a dictionary per range would cost several times as much.
_ROW = '{{"addr":{},"length":{},"heat":{},"created":{},"updated":{}}}'.format


class ForecastError(MemtierError):
    """A forecaster did not answer, or not with heats."""


def encode(heats: Mapping[ProcessId, Heats]) -> bytes:
    """One line of JSON with a newline. Heats have all their digits."""
    processes = []
    for process, own in heats.items():
        columns = (own.starts, own.pages, own.heat, own.created_ns, own.updated_ns)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        listed = ",".join(starmap(_ROW, rows))
        processes.append(f'"{process.pid}":[{listed}]')
    return ("{" + ",".join(processes) + "}\n").encode()


def decode(value: Any, processes: Collection[ProcessId]) -> dict[ProcessId, Heats] | None:
    """Heats from a parsed JSON value: None for null; pids that are not among `processes` are left out.

    Keys may have any case and be missing (0), as in the reference. Where ranges overlap, the later start wins.

    Raises:
        ForecastError: it is something else.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ForecastError(f"an object of pids is expected, not {str(value)[:40]!r}")
    known = {str(process.pid): process for process in processes}
    found = {}
    for pid, rows in value.items():
        if pid in known:
            found[known[pid]] = _heats(pid, rows)
    return found


def parse(text: bytes, processes: Collection[ProcessId]) -> dict[ProcessId, Heats] | None:
    """`decode` of JSON text.

    Raises:
        ForecastError: it is no JSON, or no heats.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ForecastError(f"the answer is no JSON: {error}") from None
    return decode(value, processes)


def _heats(pid: str, rows: Any) -> Heats:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ForecastError(f"pid {pid}: a list of objects is expected")
    if rows and any(key not in rows[0] for key in _KEYS):
        rows = [{key.lower(): value for key, value in row.items()} for row in rows]
    columns = [[row.get(key, 0) for row in rows] for key in _KEYS]
    try:
        addresses, lengths, heat = (np.array(column, np.float64) for column in columns[:3])
        starts, created, updated = (np.array(list(map(int, columns[index])), np.int64) for index in (0, 3, 4))
    except (TypeError, ValueError, OverflowError) as error:
        raise ForecastError(f"pid {pid}: {error}") from None
    usable = np.isfinite(heat) & (lengths >= 0) & (addresses >= 0)
    if not usable.all() or (addresses + lengths * PAGE_BYTES >= _ADDRESS_MAX).any():
        raise ForecastError(f"pid {pid}: a range with a value that cannot be")
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    ends = starts + lengths[order].astype(np.int64) * PAGE_BYTES
    if len(starts) > 1:
        ends[:-1] = np.minimum(ends[:-1], starts[1:])
    kept = ends > starts
    rows_kept = order[kept]
    return Heats(
        starts[kept].astype(np.uint64),
        ends[kept].astype(np.uint64),
        np.maximum(heat[rows_kept], 0.0),  # below 0 there is no class
        created[rows_kept],
        updated[rows_kept],
    )
