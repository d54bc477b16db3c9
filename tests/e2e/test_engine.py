"""The engine on a kernel with the idle page bitmap and soft-dirty bits: the scenarios of tests/e2e/guest."""

from __future__ import annotations

from typing import Any

import pytest

from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)


def scenario(vm: VmSession, name: str, timeout_s: float = 400) -> dict[str, Any]:
    """Run a scenario of engine_scenarios.py; problems that the guest noticed fail it."""
    result = vm.run_script("engine_scenarios.py", name, timeout_s=timeout_s).check()
    problems = [record for record in result.records() if record.get("kind") == "problem"]
    assert not problems, problems[0]["text"]
    return result.record(name)


@pytest.mark.parametrize("tracker", ["idlepage", "softdirty"])
def test_the_reference_s_swap_scenario(vm: VmSession, tracker: str) -> None:
    """Cold out within 60 s and hot kept for 30 s; a stopped process goes out whole; its hot part comes back."""
    found = scenario(vm, f"swap-{tracker}")
    assert found["cold_out_s"] is not None
    assert found["cold_out_s"] <= 60
    assert found["cold_out_least"] >= 0.95
    assert found["hot_out_worst"] <= 0.02
    assert found["all_out_after_stop_s"] is not None
    assert found["hot_back_after_cont_s"] is not None
    assert found["cold_out_at_end"] >= 0.95


def test_two_engines_on_two_cgroups_do_not_disturb_each_other(vm: VmSession) -> None:
    found = scenario(vm, "two-cgroups")
    assert found["took_s"] is not None
    assert min(found["cold_out"]) >= 0.95
    assert max(found["hot_out"]) <= 0.02
    assert max(found["bystander_out"]) == 0


def test_a_page_is_judged_by_its_own_accesses_though_neighbours_share_its_bitmap_word(vm: VmSession) -> None:
    """25 random rounds over two processes whose frames lie side by side, each with a tracker of its own."""
    found = scenario(vm, "shared-words")
    assert found["shared_words"] >= 5  # else the test would show nothing
    assert found["wrong"] == 0


def test_processes_that_fork_exec_exit_grow_and_shrink_do_not_harm_a_run(vm: VmSession) -> None:
    found = scenario(vm, "churn")
    assert found["took_s"] is not None
    assert found["churner"] == [0, "churned"]
    assert found["hot_out"] <= 0.02
    assert found["daemon_alive"]


def test_a_workload_lives_on_unharmed_when_the_engine_is_killed(vm: VmSession) -> None:
    found = scenario(vm, "killed-engine")
    assert found["started_s"] is not None
    assert found["swap_used_at_kill"] > 4 << 20
    assert found["after"] == found["before"]
    assert found["alive"]
