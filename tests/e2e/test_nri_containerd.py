"""nri-core with real containerd in the test VM: the scenarios of tests/e2e/guest/nri_containerd_scenarios.py."""

from __future__ import annotations

from typing import Any

import pytest

from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)
SWAP_MAX = "20971520"


def scenario(vm: VmSession, name: str) -> dict[str, Any]:
    """Run a scenario and return its record."""
    return vm.run_script("nri_containerd_scenarios.py", name, timeout_s=400).check().record(name)


def test_a_plugin_lives_through_a_container_s_life_and_its_adjustment_shows_in_the_cgroup(vm: VmSession) -> None:
    """Registered, configured, synchronized with what runs; then every event in order, and an update of its own."""
    found = scenario(vm, "life")
    assert found["runtime"] == "containerd"
    assert found["version"].removeprefix("v") == found["containerd_version"].removeprefix("v")
    assert found["synchronized_containers"] == {found["early"]: "RUNNING"}
    assert found["synchronized_pods"] == [found["early_pod"]]
    assert found["swap_max"]["a"] == SWAP_MAX
    assert found["swap_max"]["p"] != SWAP_MAX, "a container that did not ask for it"
    assert (found["failed"], int(found["high"])) == ([], 40_000_000 // 4096 * 4096)
    assert found["heard"] == [
        "RunPodSandbox",
        "CreateContainer",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "StopContainer",
        "RemoveContainer",
        "StopPodSandbox",
        "RemovePodSandbox",
    ]


def test_when_containerd_restarts_or_crashes_the_plugin_reconnects_and_no_container_is_lost(vm: VmSession) -> None:
    found = scenario(vm, "runtime-restart")
    assert [each["how"] for each in found["rounds"]] == ["term", "kill"]
    for each in found["rounds"]:
        assert each["missing"] == [], each
        assert each["states"] == ["RUNNING"], each
        assert each["same_processes"], each
        assert each["swap_max"] == SWAP_MAX, each
    assert found["stopped"] == []


def test_while_the_plugin_is_dead_containers_start_unadjusted_and_it_finds_them_when_it_is_back(vm: VmSession) -> None:
    found = scenario(vm, "plugin-restart")
    first, without, after = found["swap_max"]
    assert (first, after) == (SWAP_MAX, SWAP_MAX)
    assert without != SWAP_MAX
    assert found["synchronized"]
    assert found["states"] == ["RUNNING"]


def test_nri_ping_lists_the_node_and_says_what_is_wrong_when_containerd_is_down(vm: VmSession) -> None:
    found = scenario(vm, "ping")
    assert found["status"] == 0, found["errors"]
    assert found["pods"] == ["seen"]
    assert found["found"]
    assert found["refused_status"] == 1
    assert "nri.sock" in found["refused"]
    assert len(found["refused"].strip().splitlines()) == 1, found["refused"]
