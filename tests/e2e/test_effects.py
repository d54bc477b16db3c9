"""What paging out to a disk frees, with the kernel's own memory.reclaim: tests/e2e/guest/effects_scenarios.py."""

from __future__ import annotations

import pytest

from support.vm import VmSession

pytestmark = pytest.mark.timeout(600)
MIB = 1 << 20


def test_what_is_reported_as_moved_to_a_disk_is_free_soon_and_others_memory_stays(vm: VmSession) -> None:
    result = vm.run_script("effects_scenarios.py", "swap-cache", timeout_s=240).check()
    found = result.record("swap-cache")
    assert "disk" in found["swap"], found
    # Of 64 MiB; the last pages written are in CPUs' batches, where reclaim does not see them yet.
    assert found["moved"] >= 60 * MIB, found
    assert found["fell"] >= 0.95 * found["moved"], found
    assert found["not_yet_freed"] <= 2 * MIB, found
    assert found["others_out"] <= 0.05, found
    assert found["file_fell"] <= 2 * MIB, found
