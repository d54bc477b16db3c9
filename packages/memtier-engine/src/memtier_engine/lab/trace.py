"""Access traces: what a tracker saw, written to a file scan by scan, and read back.

A file is one line of JSON, then one record per scan of a process: two little-endian 32-bit lengths (packed,
unpacked), then as many bytes packed by zlib: a line of JSON, then arrays of 64-bit numbers. Pages are numbered
through the process's spans; flags are stored as runs. A trace of a day is some megabytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from memtier_engine.closing import Closing
from memtier_engine.errors import MemtierError
from memtier_engine.model import PAGE_BYTES, PAGE_SHIFT, Bools, PageChunk, ProcessId, Spans
from memtier_engine.pages.ages import true_runs
from memtier_engine.stats.observer import Observer

VERSION = 1
RECORD_BYTES_MAX = 1 << 30
PAGES_MAX = 1 << 32
"""16 TiB of address space in one process."""
_LENGTHS = struct.Struct("<II")


class TraceError(MemtierError):
    """A file that is no trace, or was cut off."""


@dataclass(frozen=True, slots=True)
class TraceScan:
    """One scan of one process; pages [p] are numbered through `spans`."""

    time_s: float
    process: ProcessId
    spans: Spans
    accessed: Bools  # [p]
    resident: Bools  # [p]
    written: Bools | None  # [p] None: the tracker could not tell


class TraceRecorder(Observer, Closing):
    """Give it to an engine as an observer."""

    def __init__(self, path: str | Path) -> None:
        """Begin a new file. Raises OSError if that does not work."""
        self._file: BinaryIO | None = Path(path).open("wb")  # noqa: SIM115
        self._file.write(json.dumps({"memtier-trace": VERSION, "page_bytes": PAGE_BYTES}).encode() + b"\n")
        self._time_s = 0.0
        self._spans = Spans.empty()
        self._offsets = np.zeros(1, np.int64)
        self._runs: dict[str, list[NDArray[np.int64]]] = {}

    @property
    def every_scan(self) -> bool:
        """See `Observer`."""
        return True

    def scan_began(self, process: ProcessId, spans: Spans, now_s: float) -> None:
        """See `Observer`."""
        self._time_s, self._spans = now_s, spans
        self._offsets = np.concatenate(([0], np.cumsum(spans.pages)))
        self._runs = {"accessed": [], "resident": []}

    def chunk(self, process: ProcessId, chunk: PageChunk) -> None:
        """See `Observer`."""
        span = int(np.searchsorted(self._spans.starts, np.uint64(chunk.start), side="right")) - 1
        first = int(self._offsets[span]) + (chunk.start - int(self._spans.starts[span]) >> PAGE_SHIFT)
        columns = {"accessed": chunk.accessed, "resident": chunk.resident}
        if chunk.written is not None:
            columns["written"] = chunk.written
        for name, flags in columns.items():
            self._runs.setdefault(name, []).append(true_runs(flags) + first)

    def scan_ended(self, process: ProcessId, seconds: float) -> None:
        """See `Observer`."""
        if self._file is None:
            return
        runs = {name: np.concatenate(parts) if parts else _NO_RUNS for name, parts in self._runs.items()}
        head = {
            "time_s": self._time_s,
            "pid": process.pid,
            "start_ticks": process.start_ticks,
            "spans": len(self._spans),
            "runs": {name: len(found) for name, found in runs.items()},
        }
        body = b"".join(
            (
                json.dumps(head).encode() + b"\n",
                self._spans.starts.astype("<u8").tobytes(),
                self._spans.ends.astype("<u8").tobytes(),
                *(found.astype("<i8").tobytes() for found in runs.values()),
            )
        )
        packed = zlib.compress(body, 1)
        self._file.write(_LENGTHS.pack(len(packed), len(body)) + packed)

    def close(self) -> None:
        """Finish the file. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


_NO_RUNS = np.zeros((0, 2), np.int64)


def read_trace(path: str | Path) -> Iterator[TraceScan]:
    """The scans of a file in the order they were made. A scan cut off at the end (a crash) is left out.

    Raises:
        TraceError: not a trace, of another page size, or damaged.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        _check_header(path, file.readline(1000))
        while len(lengths := file.read(_LENGTHS.size)) == _LENGTHS.size:
            packed_bytes, body_bytes = _LENGTHS.unpack(lengths)
            if packed_bytes > RECORD_BYTES_MAX or body_bytes > RECORD_BYTES_MAX:
                raise TraceError(f"{path}: damaged: a record of {max(packed_bytes, body_bytes)} bytes")
            packed = file.read(packed_bytes)
            if len(packed) < packed_bytes:
                return
            try:
                unpacker = zlib.decompressobj()
                body = unpacker.decompress(packed, body_bytes)
                if len(body) != body_bytes or not unpacker.eof:
                    raise ValueError("a length that does not fit")
                yield _scan(body)
            except (zlib.error, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise TraceError(f"{path}: damaged: {error}") from None


def _check_header(path: str | Path, line: bytes) -> None:
    try:
        head = json.loads(line)
        version, page_bytes = head["memtier-trace"], head["page_bytes"]
    except (ValueError, KeyError, TypeError):
        raise TraceError(f"{path}: no trace of accesses", hint="record one with TraceRecorder") from None
    if version != VERSION or page_bytes != PAGE_BYTES:
        raise TraceError(f"{path}: version {version} with pages of {page_bytes} bytes, not {VERSION} and {PAGE_BYTES}")


def _scan(body: bytes) -> TraceScan:
    line, _, data = body.partition(b"\n")
    head = json.loads(line)
    counts = {str(name): int(count) for name, count in head["runs"].items()}
    spans_count = int(head["spans"])
    if spans_count < 0 or min(counts.values(), default=0) < 0:
        raise ValueError("a negative count")
    if len(data) != 8 * (2 * spans_count + 2 * sum(counts.values())):
        raise ValueError("a length that does not fit")
    words = np.frombuffer(data, "<u8")
    spans = Spans(words[:spans_count].astype(np.uint64), words[spans_count : 2 * spans_count].astype(np.uint64))
    _check_spans(spans)
    pages = int(spans.pages.sum())
    flags: dict[str, Bools] = {}
    at = 2 * spans_count
    for name, count in counts.items():
        flags[name] = _flags(words[at : at + 2 * count].view("<i8").reshape(-1, 2), pages)
        at += 2 * count
    process = ProcessId(int(head["pid"]), int(head["start_ticks"]))
    return TraceScan(float(head["time_s"]), process, spans, flags["accessed"], flags["resident"], flags.get("written"))


def _check_spans(spans: Spans) -> None:
    mask = np.uint64(PAGE_BYTES - 1)
    ordered = bool((spans.starts < spans.ends).all() and (spans.ends[:-1] <= spans.starts[1:]).all())
    if not ordered or (spans.starts & mask).any() or (spans.ends & mask).any():
        raise ValueError("spans that are not ascending ranges of pages")
    if len(spans) and int(spans.pages.sum()) > PAGES_MAX:
        raise ValueError("more pages than a process can have")


def _flags(runs: NDArray[np.int64], pages: int) -> Bools:
    """bool[pages] from half-open runs."""
    edges = np.zeros(pages + 1, np.int8)
    if len(runs):
        firsts, lasts = runs[:, 0], runs[:, 1]
        if firsts.min() < 0 or lasts.max() > pages or (firsts >= lasts).any() or (lasts[:-1] > firsts[1:]).any():
            raise ValueError("runs that are not ascending ranges of pages")
        edges[firsts] += 1
        edges[lasts] -= 1
    return np.cumsum(edges[:-1], dtype=np.int8) > 0
