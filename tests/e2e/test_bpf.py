"""Tracker `bpf` on the guest's kernel, beside the idle page bitmap: scenarios of tests/e2e/guest/bpf_scenarios.py."""

from __future__ import annotations

from typing import Any

import pytest

from support.scenarios import expect_swapped
from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)


Records = dict[str, dict[str, Any]]
TOGETHER = ("exact", "huge", "forked", "swapped", "migrating", "agreement", "softdirty-reads", "faults", "cost")
"""Quick ones, in one process of the guest: starting Python there takes longer than most of them."""


@pytest.fixture(scope="module")
def seen(vm: VmSession) -> Records:
    """What the quick scenarios saw, by name."""
    result = vm.run_script("bpf_scenarios.py", *TOGETHER, timeout_s=400).check()
    return {name: result.record(name) for name in TOGETHER}


def scenario(vm: VmSession, name: str, timeout_s: float = 300) -> dict[str, Any]:
    """Run a scenario; problems that the guest noticed fail it."""
    result = vm.run_script("bpf_scenarios.py", name, timeout_s=timeout_s).check()
    problems = [record for record in result.records() if record.get("kind") == "problem"]
    assert not problems, problems[0]["text"]
    return result.record(name)


def test_exactly_the_touched_pages_are_accessed_on_this_kernel_too(seen: Records) -> None:
    """Anonymous, shared, private and shared of a file: recall and precision 100 %."""
    found = seen["exact"]
    assert set(found["wrong"]) == {"anonymous", "shared", "file-private", "file-shared"}
    assert set(found["wrong"].values()) == {0}, found
    assert found["loader"] == "libbpf"


def test_pages_of_2_mib_are_touched_as_a_whole(seen: Records) -> None:
    found = seen["huge"]
    assert found["huge"] == found["blocks"], "the guest had no free huge pages"
    assert (found["wrong"], found["wrong_one"]) == (0, 0)


def test_a_forked_child_and_its_parent_are_told_apart(seen: Records) -> None:
    found = seen["forked"]
    # On this kernel (CONFIG_MEM_SOFT_DIRTY) bits of pages that both map are not cleared: such pages count as in use.
    # They cannot be paged out anyway; what matters is that no touch is missed, and none is taken for the child's.
    assert (found["missed"], found["of_child"]) == (0, 0)


def test_swapped_pages_do_no_harm(seen: Records) -> None:
    found = seen["swapped"]
    assert found["out"] > 3000
    assert (found["wrong"], found["wrong_resident"]) == (0, 0)


def test_migrating_pages_do_no_harm(seen: Records) -> None:
    """One may count as in use for a window too long, never as idle, and moving alone does not make one look used."""
    found = seen["migrating"]
    assert found["moved"] > 2000
    assert (found["missed"], found["never_touched"], found["failures"]) == (0, 0, 0), found
    assert found["resident_at_end"] == 2000


def test_it_agrees_with_the_idle_page_bitmap_page_by_page(seen: Records) -> None:
    found = seen["agreement"]
    assert found["touched"] == 5000
    assert found["same"] >= 0.99 * found["pages"]


def test_auto_tries_bpf_idlepage_damon_softdirty_refs_in_this_order(vm: VmSession) -> None:
    """All five work in the guest, so does all that BPF offers but the samples of a CPU that is emulated."""
    found = scenario(vm, "order")
    assert found["order"] == ["bpf", "idlepage", "damon", "softdirty", "refs"]
    assert set(found["why_not"].values()) == {None}, found["why_not"]
    assert found["chosen"] == "bpf"
    assert found["sources"] == ["accessed", "sampled", "faults"]
    assert found["loaders"] == ["libbpf", "bcc"]


def test_softdirty_as_auto_takes_it_never_takes_memory_for_idle_that_was_read(seen: Records) -> None:
    found = seen["softdirty-reads"]
    assert found["nothing"] == 0
    assert found["written"], "writes alone are exact"
    assert found["read"] == found["both"] == found["pages"]


def test_bcc_loads_the_same_source_with_the_kernels_own_headers(vm: VmSession) -> None:
    found = scenario(vm, "bcc")
    assert found["loader"] == "bcc", found
    assert found["exact"]


def test_page_faults_and_swap_ins_are_counted(seen: Records) -> None:
    found = seen["faults"]
    assert found["faults"] >= 2000
    assert 1 <= found["waited"] <= found["swap_ins"]
    assert found["wait_s"] > 0


def test_a_scan_costs_less_than_one_of_the_idle_page_bitmap(seen: Records) -> None:
    found = seen["cost"]["per_gib_s"]
    print("CPU per GiB against bpf:", {name: f"{value / found['bpf']:.2f}" for name, value in found.items()})
    assert found["bpf"] < 0.5 * found["idlepage"]
    assert found["bpf"] < found["refs"]
    assert found["walk"] < found["pagemap"]


def test_the_reference_s_swap_scenario(vm: VmSession) -> None:
    expect_swapped(scenario(vm, "swap"))


def test_the_demo(vm: VmSession) -> None:
    found = scenario(vm, "demo")
    assert found["status"] == 0, found
    assert found["verdict"]["tracker"] == "bpf"
