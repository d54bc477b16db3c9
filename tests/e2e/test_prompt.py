"""memtierd's prompt on NUMA nodes, the idle page bitmap and soft-dirty bits: guest/prompt_scenarios.py."""

from __future__ import annotations

from typing import Any

import pytest

from support.vm import VmResult, VmSession

pytestmark = pytest.mark.timeout(900)


def scenario(vm: VmSession, name: str) -> VmResult:
    return vm.run_script("prompt_scenarios.py", name, timeout_s=300).check()


def test_pages_go_to_the_node_they_are_sent_to_and_are_selected_by_node(vm: VmSession) -> None:
    found = scenario(vm, "moves").record("moves")
    assert found["nodes"] == [[f"node {node}: 2048"] for node in (3, 1, 0, 2)]
    assert found["none"] == []
    assert found["two"] == ["node 2: 2048"]
    assert found["row"] == "0:0.008;1:0.008;2:0.008;3:0.008"


def test_idle_and_soft_dirty_bits_of_pages_are_seen_and_set(vm: VmSession) -> None:
    found = scenario(vm, "bits").record("bits")
    assert found["marked"].endswith(" idle: true\n")
    assert found["touched_s"] is not None
    assert found["cleared_s"] is not None
    assert (found["dirty"], found["clean"]) == (10, 2038)
    assert found["shown"] == "110001"


def test_trackers_made_at_the_prompt_tell_touched_memory_from_the_rest(vm: VmSession) -> None:
    result = scenario(vm, "trackers")
    records: dict[str, dict[str, Any]] = {record["kind"]: record for record in result.records() if "kind" in record}
    for name in ("idlepage", "softdirty", "multi"):
        found = records[f"tracker-{name}"]
        assert found["hot"] > 0
        assert found["cold"] == 0
        assert found["rows"] > 0
    assert records["tracker-damon"]["hot"] > 0
    assert records["tracker-multi"]["dump"].startswith("tracker 1:\nmap[")
