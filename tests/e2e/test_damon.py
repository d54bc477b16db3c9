"""Tracker damon on a kernel whose kdamonds nobody else uses: the scenarios of tests/e2e/guest/damon_scenarios.py."""

from __future__ import annotations

import pytest

from support.scenarios import ScenarioGroups, share
from support.vm import VmSession

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def damon(vm: VmSession) -> ScenarioGroups:
    return ScenarioGroups(vm, "damon_scenarios.py")


def test_processes_come_and_go_without_what_is_known_of_the_others_being_lost(damon: ScenarioGroups) -> None:
    """The reference switches everything off and on. Here the kdamond goes on, and regions keep their ages."""
    found = damon.record("come-and-go")
    for hot, cold in (found["before"], *found["during"], found["after"]):
        assert hot >= 0.9
        assert cold <= 0.25
    assert found["same_thread"]
    assert found["oldest_after"] > found["oldest_before"]


def test_when_all_processes_are_gone_it_ends_and_starts_again_with_the_next(damon: ScenarioGroups) -> None:
    found = damon.record("all-gone")
    assert found["stopped_s"] is not None
    assert found["errors"] == ["ProcessGone"]
    hot, cold = found["again"]
    assert hot >= 0.9
    assert cold <= 0.25


def test_where_only_physical_memory_can_be_watched_pages_are_judged_by_their_frames(damon: ScenarioGroups) -> None:
    """With an idle process beside it. It is switched off when there is nobody to watch."""
    found = damon.record("physical")
    assert found["operations"] == "paddr"
    hot, cold = found["shares"]
    assert hot >= 0.8
    assert cold <= 0.5
    assert found["off"] == "off"


def test_kdamonds_are_shared_politely(damon: ScenarioGroups) -> None:
    """Free ones are taken, others' are left alone, and what was made is taken away again."""
    found = damon.record("polite")
    assert found["at_first"] == 0
    assert found["made"] == found["while_second_lives"] == found["number_stays"] == 2
    assert found["numbers"] == [0, 1]
    assert "kdamonds 0, 1 in use by somebody else" in found["third"]
    assert found["beside_another"] == 1
    assert "kdamond 0 in use by somebody else" in found["wanted_another_s"]
    assert found["another_s_context"] == "paddr"


def test_after_a_kill_the_error_says_how_to_get_the_kdamond_back(damon: ScenarioGroups) -> None:
    """And doing that brings it back."""
    found = damon.record("killed")
    assert found["started_s"] is not None
    assert "write 0 to /sys/kernel/mm/damon/admin/kdamonds/nr_kdamonds" in found["message"]


def test_policy_heat_puts_the_coldest_and_the_hottest_class_on_their_nodes(damon: ScenarioGroups) -> None:
    """With the reference's keys, and one of the kdamonds it lists."""
    found = damon.record("damon-heat")
    assert found["apart_s"] is not None, found
    assert share(found["cold"], 3) >= 0.75
    assert share(found["hot"], 2) >= 0.75
    assert found["kdamonds"] == 8
    assert len(found["running"]) == 1
    assert found["running"][0] in (3, 4, 5)
    assert damon.record("damon-heat", "damon-heat-end")["kdamonds"] == 0


def test_policy_age_pages_out_what_damon_finds_idle(damon: ScenarioGroups) -> None:
    found = damon.record("damon-age")
    assert found["out_s"] is not None, found
    assert share(found["cold"], -1) >= 0.8
    assert share(found["hot"], -1) <= 0.1
