"""Whether `memtier demo` took everything back, by the names that it printed."""

from __future__ import annotations

import re
from pathlib import Path

from support.waiting import until


def assert_all_taken_back(output: str) -> None:
    """Another process may get the same zram number as soon as it is free: the kernel counts devices by `diskseq`."""
    found = re.search(r"swap: (\S+) \((.*?)\) +cgroup: (\S+)", output)
    assert found is not None, output
    device, whose, cgroup = found.groups()
    assert not Path(cgroup).exists()
    if whose == "made for this demo" and (first := _sequence(device)) is not None:
        until(lambda: _sequence(device) != first, f"{device} is still there")


def _sequence(device: str) -> str | None:
    try:
        return Path("/sys/block", Path(device).name, "diskseq").read_text()  # Linux 5.15
    except OSError:
        return "?" if Path("/sys/block", Path(device).name).exists() else None
