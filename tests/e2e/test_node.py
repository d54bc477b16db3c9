"""Thirty containers on a node with the idle page bitmap: the scenario of tests/e2e/guest/node_scenarios.py."""

from __future__ import annotations

import pytest

from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)


def test_thirty_containers_share_one_pass_and_stay_within_the_scan_budget(vm: VmSession) -> None:
    """All cold parts out, no hot part; each pass over the bitmap serves all engines."""
    found = vm.run_script("node_scenarios.py", "thirty", timeout_s=400).check().record("thirty")
    print(found)
    assert found["out_s"] is not None, found
    assert min(found["cold_out"]) >= 0.95
    assert max(found["hot_out"]) <= 0.02
    assert min(found["scans"]) >= 2, found
    # Each engine scanned; were every scan a pass of its own, there would be as many passes as scans.
    assert found["rounds"] <= max(found["scans"]) + 2, found
    assert sum(found["scans"]) >= 20 * found["rounds"]
    assert found["reads"] <= 2 * found["rounds"]  # one for the frames, one for the heads of large folios
    assert found["cpu_share"] <= 1.5 * found["budget"], found
