"""The kernel that Debian ships, as it comes: randomized addresses, five-level page tables, lockdown; no idle bitmap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.scenarios import expect_swapped
from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)

Records = dict[str, dict[str, Any]]
LARGE_PAGES = "hugepagesz=1G hugepages=1"
NODES = "3072:0-1"
FIXED_BASE = {4: 0xFFFF_8880_0000_0000, 5: 0xFF11_0000_0000_0000}
"""Where physical memory is mapped without randomization, by levels. Documentation/arch/x86/x86_64/mm.rst."""
EXACT = ("memory-map", "exact", "huge", "gigantic", "forked", "swapped", "faults")


@pytest.fixture(scope="module")
def node() -> Iterator[VmSession]:
    """A guest of its own: the other files' guest need not be booted again."""
    with VmSession() as session:
        yield session


def seen(node: VmSession, append: str, *names: str) -> Records:
    """What scenarios of tests/e2e/guest/bpf_scenarios.py saw; problems that the guest noticed fail the test."""
    result = node.run_script(
        "bpf_scenarios.py", *names, timeout_s=500, nodes=NODES, append=append, distribution=True
    ).check()
    problems = [record for record in result.records() if record.get("kind") == "problem"]
    assert not problems, problems[0]["text"]
    return {name: result.record(name) for name in (each.removesuffix("-auto") for each in names)}


def expect_exact(found: Records) -> None:
    """Recall and precision 100 %, on pages of each size, and of memory that is forked, swapped, or faulted in."""
    assert set(found["exact"]["wrong"].values()) == {0}, found["exact"]
    assert found["huge"]["huge"] == found["huge"]["blocks"], "the guest had no free huge pages"
    assert (found["huge"]["wrong"], found["huge"]["wrong_one"]) == (0, 0)
    assert found["gigantic"]["one_entry"], "the guest set no page of 1 GiB aside"
    assert (found["gigantic"]["resident_before"], found["gigantic"]["wrong"]) == (0, 0)
    assert (found["forked"]["missed"], found["forked"]["of_child"]) == (0, 0)
    assert found["swapped"]["out"] > 3000
    assert (found["swapped"]["wrong"], found["swapped"]["wrong_resident"]) == (0, 0)
    assert 1 <= found["faults"]["waited"] <= found["faults"]["swap_ins"]


def test_bpf_is_exact_with_five_levels_random_addresses_and_split_page_tables(node: VmSession) -> None:
    """Also above 128 TiB, where four levels do not reach. pti=on: user space has a top-level table of its own."""
    found = seen(node, f"{LARGE_PAGES} pti=on", *EXACT, "high")
    assert found["memory-map"]["levels"] == 5
    assert found["memory-map"]["base"] != FIXED_BASE[5]
    assert found["high"]["address"] > 1 << 47
    assert found["high"]["wrong"] == 0
    expect_exact(found)


def test_the_demo_and_the_swap_scenario_take_bpf_there(node: VmSession) -> None:
    found = seen(node, f"{LARGE_PAGES} pti=on", "demo", "swap-auto", "order")
    assert found["order"]["chosen"] == "bpf"
    assert found["order"]["order"] == ["bpf", "idlepage", "damon", "softdirty", "refs"]
    assert "CONFIG_IDLE_PAGE_TRACKING" in str(found["order"]["why_not"]["idlepage"])
    assert found["demo"]["status"] == 0, found["demo"]
    assert found["demo"]["verdict"]["tracker"] == "bpf"
    expect_swapped(found["swap"])


def test_bpf_is_exact_with_four_levels_under_lockdown_integrity(node: VmSession) -> None:
    """That mode lets nobody write to the kernel, and programs may read it."""
    append = f"{LARGE_PAGES} no5lvl lockdown=integrity"
    found = seen(node, append, *EXACT)
    assert lockdown(node, append) == "integrity"
    assert found["memory-map"]["levels"] == 4
    assert found["memory-map"]["base"] != FIXED_BASE[4]
    expect_exact(found)


def test_under_lockdown_confidentiality_bpf_says_so_and_another_tracker_does_the_work(node: VmSession) -> None:
    """That mode forbids programs to read kernel memory."""
    append = "lockdown=confidentiality"
    found = seen(node, append, "order", "swap-auto")
    assert lockdown(node, append) == "confidentiality"
    assert "locked down (confidentiality)" in found["order"]["why_not"]["bpf"]
    assert found["order"]["sources"] == []
    assert found["order"]["chosen"] == "damon"
    # It samples: hot pages among idle ones may go out, come back, and make the guard `refaults` stop it for a while.
    assert found["swap"]["cold_out"] >= 0.8, found["swap"]
    assert found["swap"]["hot_out_worst"] <= 0.1
    assert found["swap"]["hot_back_after_cont_s"] is not None
    assert found["swap"]["damon_sample_us"] == "10000", "a hundredth of the time between scans"


def lockdown(node: VmSession, append: str) -> str:
    """The mode that is chosen: the word in brackets of "none [integrity] confidentiality"."""
    shown = node.run("cat /sys/kernel/security/lockdown", nodes=NODES, append=append, distribution=True).check()
    return shown.output.partition("[")[2].partition("]")[0]
