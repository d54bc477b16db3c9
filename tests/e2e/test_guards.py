"""What can go wrong on a node, each for real in the test VM: tests/e2e/guest/guard_scenarios.py.

All scenarios run one after the other in one guest, on first use; each test is about one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)
MIB = 1 << 20

Records = Mapping[str, dict[str, Any]]


@pytest.fixture(scope="module")
def records(vm: VmSession) -> Records:
    result = vm.run_script("guard_scenarios.py", timeout_s=600)
    print(result.output)
    return {record["kind"]: record for record in result.records() if "kind" in record}


def found_in(records: Records, name: str) -> dict[str, Any]:
    """The record of a scenario. One that failed in the guest fails its test with the guest's words."""
    assert name in records, f"{name}: the guest did not come to it; it said {list(records)}"
    found = records[name]
    assert "problem" not in found, found["problem"]
    return found


def test_moving_stops_within_a_second_of_another_cgroups_pressure_and_resumes_after_it(records: Records) -> None:
    """The second counts from when the last second was past the threshold; the stalls are another cgroup's."""
    found = found_in(records, "pressure")
    assert found["started"]
    assert found["closed"]
    assert found["last_move_after_s"] is None or found["last_move_after_s"] <= 1.0  # None: closed before that
    assert "memory stall time" in found["reasons"][0]
    assert found["resumed_s"] is not None
    assert found["intact"]


def test_a_cgroup_throttled_at_its_memory_high_is_left_alone_until_that_is_over(records: Records) -> None:
    found = found_in(records, "memory-high")
    assert found["started"]
    assert found["closed_s"] is not None
    assert "/sys/fs/cgroup/high/memory.pressure" in found["reasons"][0]
    assert found["moved_while_closed_bytes"] == 0
    assert found["resumed_s"] is not None
    assert found["intact"]


def test_a_full_swap_keeps_its_reserve_and_with_more_swap_the_rest_follows(records: Records) -> None:
    """64 MiB idle, 32 MiB of swap, which closes at 90 %."""
    found = found_in(records, "swap-full")
    assert found["closed_s"] is not None
    assert 0.85 * 32 * MIB <= found["used_bytes"] <= 32 * MIB
    assert found["calls_while_full"] == 0
    assert found["rest_out_s"] is not None
    assert found["errors"] == []
    assert found["intact"]


def test_a_swap_device_may_be_removed_while_it_is_written_to(records: Records) -> None:
    found = found_in(records, "swap-removed")
    assert found["began"]
    assert found["left_bytes"] == 0
    assert found["moved_without_bytes"] == 0
    assert "no swap area" in found["off"]
    assert found["again_s"] is not None
    assert found["errors"] == []
    assert found["intact"]


def test_incompressible_memory_stops_going_to_zram(records: Records) -> None:
    """160 MiB of random data: some 64 MiB must be in zram to tell."""
    found = found_in(records, "incompressible")
    assert found["closed_s"] is not None
    assert found["moved_bytes"] < 128 * MIB
    assert found["moved_after_bytes"] == 0
    assert "compression ratio" in found["reasons"][0]
    assert found["intact"]


def test_a_cgroup_made_anew_under_the_same_name_is_taken_care_of_like_a_new_one(records: Records) -> None:
    found = found_in(records, "recreated")
    assert found["another_inode"]
    assert found["first_s"] is not None
    assert found["gone_s"] is not None
    assert found["second_s"] is not None
    assert found["processes"] == 1
    assert found["paged_out_bytes"] <= 64 * MIB, "what went out of the first process is not on the account"
    assert found["guard_active"]
    assert found["errors"] == []
    assert found["intact"]


def test_an_oom_kill_of_a_target_costs_the_engine_nothing(records: Records) -> None:
    found = found_in(records, "oom-kill")
    assert found["began"]
    assert found["kills"] >= 1
    assert found["gone_s"] is not None
    assert found["second_s"] is not None
    assert found["errors"] == []
    assert found["intact"]


def test_jumps_of_the_wall_clock_make_no_memory_idle(records: Records) -> None:
    found = found_in(records, "clock-jumps")
    assert found["cold_s"] is not None
    assert found["hot_out_worst"] <= 0.02
    assert found["scans"] >= 6
    assert found["cold_out"] > 0.9


def test_a_daemon_stopped_for_many_intervals_takes_up_its_work_and_what_is_in_use_stays(records: Records) -> None:
    found = found_in(records, "stopped")
    assert found["cold_s"] is not None, found["log"]
    assert found["out_meanwhile_bytes"] == 0
    assert found["hot_out_worst"] <= 0.02
    assert found["late_s"] is not None, found["log"]
    assert found["alive"]
    assert found["intact"]


def test_the_kernels_generations_show_idle_memory_and_memory_reclaim_takes_it(records: Records) -> None:
    """64 MiB held and not touched; 32 MiB asked for."""
    found = found_in(records, "mglru-reclaim")
    assert found["begun"] >= 2
    assert found["idle_bytes"] >= 60 * MIB
    assert found["reclaimed_bytes"] >= 30 * MIB
    assert found["swapped_bytes"] >= 28 * MIB
    assert found["swap_current_bytes"] >= 28 * MIB


def test_what_memory_low_guarantees_is_not_taken(records: Records) -> None:
    found = found_in(records, "protection")
    assert found["headroom_bytes"] == pytest.approx(found["current_bytes"] - 32 * MIB, abs=2 * MIB)
    assert found["closed"] == ["protection"]


def test_trackers_and_movers_need_exactly_the_capabilities_of_the_table(records: Records) -> None:
    """Those that the host's kernel does not have; tests/integration/test_privileges.py tries the others."""
    found = found_in(records, "privileges")
    assert found["complaints"].keys() >= {"idlepage", "softdirty", "mglru", "move-pages", "memory-reclaim"}
    assert {name: words for name, words in found["complaints"].items() if words} == {}


def test_killed_at_random_points_it_leaves_memory_swap_max_and_processes_as_they_were(records: Records) -> None:
    found = found_in(records, "kills")
    assert found["kills"] == 2
    assert found["adoptions"] >= 3
    assert found["complaints"] == []
