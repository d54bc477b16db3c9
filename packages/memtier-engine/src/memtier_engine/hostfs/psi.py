"""Pressure stall information: the text of *.pressure files, and triggers that wake a poll.

Source: Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass
from pathlib import Path

from memtier_engine.closing import OpenFile
from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.host import Host


@dataclass(frozen=True, slots=True)
class PressureLine:
    """Share of wall time stalled, in percent over 10, 60 and 300 s, and the sum since boot."""

    avg10_percent: float
    avg60_percent: float
    avg300_percent: float
    total_us: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """One .pressure file."""

    some: PressureLine
    """Some task waited."""
    full: PressureLine | None
    """All tasks waited; None where the kernel does not print it (cpu before Linux 5.13)."""


def parse_pressure(text: str) -> Pressure:
    """The content of a .pressure file.

    Raises:
        ValueError: not in the kernel's format.
    """
    lines: dict[str, PressureLine] = {}
    for line in text.splitlines():
        kind, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs)
        try:
            lines[kind] = PressureLine(
                float(values["avg10"]), float(values["avg60"]), float(values["avg300"]), int(values["total"])
            )
        except KeyError as error:
            raise ValueError(f"pressure line {line!r} has no {error}") from None
    if "some" not in lines:
        raise ValueError(f"no 'some' line in {text[:80]!r}")
    return Pressure(lines["some"], lines.get("full"))


def read_pressure(host: Host, path: Path) -> Pressure | None:
    """The pressure in file `path`; None when there is none: no CONFIG_PSI, psi=0, or an older kernel.

    Raises:
        ValueError: not in the kernel's format.
        AccessDenied: not ours to read.
    """
    try:
        return parse_pressure(host.read_text(path))
    except KernelCallError as error:
        # EOPNOTSUPP: built in but switched off. ENODEV: the cgroup was removed while the file was open.
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return None
        raise


class PsiTrigger(OpenFile):
    """A file descriptor that polls POLLPRI when stalls exceed a threshold within a window."""

    def __init__(
        self, host: Host, path: Path, *, stall_us: int, window_us: int = 2_000_000, full: bool = False
    ) -> None:
        """Register it.

        Args:
            host: the machine.
            path: a .pressure file.
            stall_us: wake when tasks were stalled for so long within the window.
            window_us: 500 000 to 10 000 000; a multiple of 2 000 000 without CAP_SYS_RESOURCE.
            full: count only times in which all tasks were stalled.
        Raises:
            KernelCallError: EINVAL for values the kernel does not take or does not grant, ENOENT without
                CONFIG_PSI.
        """
        self._fd = host.open(path, os.O_RDWR | os.O_NONBLOCK)
        try:
            os.write(self._fd, f"{'full' if full else 'some'} {stall_us} {window_us}\0".encode())
        except OSError as error:
            self.close()
            raise host.error(path, error, "register a trigger in") from None

    def wait(self, timeout_s: float) -> bool:
        """Whether it fired within `timeout_s`; False too when the cgroup was removed (POLLERR)."""
        poller = select.poll()
        poller.register(self._fd, select.POLLPRI)
        return any(
            events & select.POLLPRI and not events & select.POLLERR for _, events in poller.poll(timeout_s * 1000)
        )
