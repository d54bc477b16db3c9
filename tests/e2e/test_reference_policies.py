"""The reference's end-to-end scenarios for age, heat, ratio and demote-idle, in a guest with four NUMA nodes.

Sizes and times are scaled down, shares are kept. The scenarios of a policy run side by side on the same guest.
"""

from __future__ import annotations

import re

import pytest

from support.scenarios import ScenarioGroups, share
from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)
ARRAY_MIB, ARRAY_MB = 32, 33.6
REACHED_S = 60.0
"""For each phase, on a machine that emulates and is busy with other things; 5 to 15 s are usual."""


@pytest.fixture(scope="module")
def policies(vm: VmSession) -> ScenarioGroups:
    return ScenarioGroups(vm, "reference_policies.py")


@pytest.mark.parametrize("tracker", ["idlepage", "softdirty"])
@pytest.mark.parametrize("policy", ["age", "heat"])
def test_cold_memory_goes_to_its_node_and_hot_memory_to_the_other(
    policies: ScenarioGroups, policy: str, tracker: str
) -> None:
    """And all of it when the process stops, the hot part back when it goes on, and all of it again."""
    found = policies.record(policy, f"{policy}-move-{tracker}")
    assert found["apart_s"] is not None, found
    assert share(found["hot"], 1) >= 0.95
    assert share(found["cold"], 3) >= 0.88  # a region at the border of both counts as hot
    for phase in ("stopped_s", "going_on_s", "stopped_again_s"):
        assert found[phase] is not None, found
        assert found[phase] <= REACHED_S


@pytest.mark.parametrize("tracker", ["idlepage", "softdirty"])
@pytest.mark.parametrize("policy", ["age", "heat"])
def test_cold_memory_goes_to_swap_and_hot_memory_stays(policies: ScenarioGroups, policy: str, tracker: str) -> None:
    """As above with swap; what the daemon says about it at its prompt agrees with the kernel's page tables."""
    found = policies.record(policy, f"{policy}-swap-{tracker}")
    assert found["apart_s"] is not None, found
    assert share(found["hot"], -1) <= 0.05
    assert share(found["cold"], -1) >= 0.88
    for phase in ("stopped_s", "going_on_s", "stopped_again_s"):
        assert found[phase] is not None, found
    said = re.fullmatch(r"\d+ \d+ / \d+ pages, (\d+) / \d+ MB \(.*%\) swapped out\n", found["status"])
    assert said is not None
    assert int(said[1]) == pytest.approx(ARRAY_MB, abs=3)  # the array, and some of the rest
    assert found["moved_gib"][0] * 1024 >= 1.2 * ARRAY_MIB  # all of it once, the hot part twice


@pytest.mark.parametrize("tracker", ["idlepage", "softdirty"])
@pytest.mark.parametrize(("destination", "node", "wanted"), [("swap", -1, 0.3), ("move", 3, 0.4)])
def test_ratio_keeps_the_least_used_share_away(
    policies: ScenarioGroups, destination: str, node: int, wanted: float, tracker: str
) -> None:
    """Within five percent of the process's memory, and none of it is in use."""
    found = policies.record("ratio", f"ratio-{destination}-{tracker}")
    assert found["reached_s"] is not None, found
    assert found["share"] == pytest.approx(wanted, abs=0.05)
    assert share(found["hot"], node) <= 0.05


def test_ratio_one_with_tracker_finder_takes_everything_also_of_a_process_that_comes_later(
    policies: ScenarioGroups,
) -> None:
    found = policies.record("ratio", "ratio-swap-finder")
    assert found["first_s"] is not None
    assert found["second_s"] is not None
    assert min(found["shares"]) >= 0.95


def test_demote_idle_moves_what_was_idle_for_an_interval_and_never_back(policies: ScenarioGroups) -> None:
    found = policies.record("demote", "demote-idle")
    assert found["cold_s"] is not None
    assert found["hot_share"] <= 0.05
    assert found["all_s"] is not None
    assert found["one_way"] >= 0.95


def test_demote_idle_takes_only_what_the_pages_of_interest_files_name(policies: ScenarioGroups) -> None:
    """Nothing while there is no file, or while the writer has the lock."""
    found = policies.record("demote", "demote-idle-poi")
    assert found["empty_mib"] <= 0.6  # 20 of 1024 in the reference
    assert found["locked_mib"] <= 0.6
    assert found["some_s"] is not None
    assert found["some_mib"] == pytest.approx(8, abs=0.5)
    assert found["rest_s"] is not None
    assert share(found["hot"], 3) == 0
