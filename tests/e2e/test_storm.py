"""A minute and a half of the storm over a node with nri-memtierd; `make storm` is half an hour of it."""

from __future__ import annotations

import pytest

from support.vm import VmSession

pytestmark = pytest.mark.timeout(900)

MINUTES = "1.5"
SEED = "3"


def test_after_a_storm_each_container_is_managed_or_named_with_its_reason(vm: VmSession) -> None:
    result = vm.run_script("nri_storm.py", MINUTES, SEED, timeout_s=600, smp=1, nodes="2048:0 512:")
    verdict = result.record("verdict")
    assert verdict["complaints"] == [], result.output[-20_000:]
    assert result.status == 0
    assert verdict["churn"]["container"] > 5, "something was managed at all"
