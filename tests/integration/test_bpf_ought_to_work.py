"""The default tracker's tests skip where BPF does not work: here that is a failure, where it ought to."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.registry import why_not

LOCKDOWN = Path("/sys/kernel/security/lockdown")


def why_it_need_not() -> str | None:
    """What this machine lacks by its nature; None: nothing that the tracker needs."""
    if os.geteuid() != 0:
        return "needs root"
    if platform.machine() != "x86_64":
        return f"page tables of {platform.machine()} are not known to it"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "needs a kernel with BTF (CONFIG_DEBUG_INFO_BTF)"
    capabilities = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    if capabilities.bit_count() < 38:
        return "needs all capabilities: some are taken from this container"
    if LOCKDOWN.exists() and "[confidentiality]" in LOCKDOWN.read_text():
        return "kernel lockdown is in mode confidentiality"
    return None


def test_the_default_tracker_works_where_it_ought_to() -> None:
    """Else a defect that keeps it from loading would only show as some hundred skipped tests."""
    reason = why_it_need_not()
    if reason is not None:
        pytest.skip(f"tracker bpf: {reason}; `make e2e` runs it in the test VM")
    assert why_not("bpf", Host()) is None
