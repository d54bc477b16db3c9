"""Forecaster `trace`: appends the heats of each round to a file, and has no forecast."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import starmap
from pathlib import Path

from memtier_engine.errors import KernelCallError
from memtier_engine.model import PAGE_BYTES, ProcessId
from memtier_engine.policies.heatmap import Heats

HIDDEN_BELOW = 1e-9


class TraceForecaster:
    """A text table per round: `pid addr size heat created updated`."""

    name = "trace"

    def __init__(self, file: str | Path, *, hide_heat_zero: bool = False) -> None:
        """Open `file` for appending; it is made with mode 0644.

        Raises:
            KernelCallError: it cannot be opened.
        """
        self._hide_heat_zero = hide_heat_zero
        self._file = str(file)
        try:
            self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise KernelCallError.from_errno(f"open {file}", error.errno or 0) from None

    def forecast(self, heats: Mapping[ProcessId, Heats], now_ns: int) -> Mapping[ProcessId, Heats] | None:
        """Write, and answer None.

        Raises:
            KernelCallError: the disk is full, for example.
        """
        lines = [f"table: heat forecast {now_ns} pid addr size heat created updated\n"]
        for process, own in sorted(heats.items()):
            kept = own.heat >= HIDDEN_BELOW if self._hide_heat_zero else slice(None)
            columns = (own.starts, own.pages * PAGE_BYTES, own.heat, own.created_ns, own.updated_ns)
            rows = zip(*(column[kept].tolist() for column in columns), strict=True)
            lines.extend(starmap(f"{process.pid} {{:x}} {{}} {{:.9f}} {{}} {{}}\n".format, rows))
        data = "".join(lines).encode()
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise KernelCallError.from_errno(f"write {self._file}", error.errno or 0) from None
        return None

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
