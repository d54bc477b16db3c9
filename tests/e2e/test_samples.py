"""The sample configurations on a kernel with every tracker, swap and four NUMA nodes."""

from __future__ import annotations

import pytest

from support.samples import samples
from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)

MAY_LACK = {"age-bpf-hardware-swap"}
"""Needs a processor that samples memory accesses, which the guest's does not."""
EXACT = ("bpf", "idlepage")
"""Trackers with which all memory of a process that does nothing looks idle."""
DEMOTING = ("age-softdirty", "age-multi", "demote-idle", "ratio-softdirty")
"""What these find idle goes to another node."""


def test_every_sample_runs_and_does_what_it_says(vm: VmSession) -> None:
    """One process of 2048 pages that does nothing; the intervals of the configurations pass at once."""
    result = vm.run_script("sample_scenarios.py", timeout_s=400).check()
    found = {record["name"]: record for record in result.records() if record.get("kind") == "sample"}
    assert set(found) == {sample.name for sample in samples()}
    lacking = {name: record["lacking"] for name, record in found.items() if "lacking" in record}
    assert set(lacking) <= MAY_LACK, lacking
    for name, record in found.items():
        if name in lacking:
            assert record["hint"]
            continue
        assert record["scans"] == record["wanted_scans"], name
        assert record["errors"] == [], name
        if record["policy"] in ("age", "demote-idle") and record["swaps"] and record["tracker"] in EXACT:
            if "filter" not in name:
                # Not all: pages in a batch of a CPU wait.
                assert record["out_pages"] >= 0.9 * record["pages"], name
        elif not record["swaps"]:
            assert record["out_pages"] == 0, name
        if name in DEMOTING:
            assert sum(record["to_nodes"].values()) > 0, name
    assert 0.2 * 2048 <= found["auto-save"]["out_pages"] <= 0.4 * 2048 + 400
