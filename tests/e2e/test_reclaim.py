"""Policy `reclaim` with the kernel's own memory.reclaim and MGLRU: tests/e2e/guest/reclaim_scenarios.py."""

from __future__ import annotations

from typing import Any

import pytest

from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)
MIB = 1 << 20


def scenario(vm: VmSession, name: str) -> dict[str, Any]:
    result = vm.run_script("reclaim_scenarios.py", name, timeout_s=240).check()
    problems = [record for record in result.records() if record.get("kind") == "problem"]
    assert not problems, problems[0]["text"]
    return result.record(name)


def test_generations_tell_memory_in_use_from_memory_that_is_not(vm: VmSession) -> None:
    """48 of 64 MiB are never touched again; page tables and the program's own pages are not in them."""
    found = scenario(vm, "generations")
    assert found["whole"] >= 60 * MIB
    assert 40 * MIB <= found["idle"] <= found["whole"] - 12 * MIB


def test_by_the_kernel_s_ages_cold_memory_goes_and_hot_memory_stays(vm: VmSession) -> None:
    found = scenario(vm, "by-ages")
    assert found["took_s"] is not None, found
    assert found["tracker"] == "mglru"
    assert found["cold_out"] >= 0.9
    assert found["hot_out"] <= 0.1
    assert found["out"] >= 50 * MIB
    assert found["moved"] >= 50 * MIB
    assert found["errors"] == []


def test_without_ages_little_goes_and_what_comes_back_stops_it(vm: VmSession) -> None:
    """Of 80 MiB 70 are in use: what is taken of them is wanted back. Idle are 10, and most of its interpreter's 6."""
    found = scenario(vm, "by-feedback")
    assert found["tracker"] == "none"
    assert 0 < found["moved"] <= 20 * MIB
    assert found["refaults"] <= 0.1 * found["moved"]
    assert found["hot_out"] <= 0.1


def test_what_memory_min_guarantees_stays(vm: VmSession) -> None:
    """60 MiB are guaranteed. Where swap is slow, the kernel takes some MiB more in a call than it was asked for."""
    found = scenario(vm, "protected")
    assert 50 * MIB <= found["resident"] <= 64 * MIB, found
    assert found["moved"] > 0


def test_a_cgroup_made_anew_under_the_same_name_is_worked_on(vm: VmSession) -> None:
    found = scenario(vm, "made-anew")
    assert min(found["cold_out"]) >= 0.9, found
