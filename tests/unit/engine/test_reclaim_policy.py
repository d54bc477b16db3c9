"""Policy `reclaim`: what is known of a cgroup in, bytes out. Intervals of 5 s, windows of a minute."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from memtier_engine.errors import ConfigError
from memtier_engine.model import PAGE_BYTES
from memtier_engine.policies.goals import Goal
from memtier_engine.reclaim.policy import (
    SHARE_START_PERCENT,
    SHARES_PERCENT,
    CgroupFacts,
    ReclaimPolicy,
    ReclaimPolicyConfig,
)

MIB = 1 << 20
GIB = 1 << 30


def policy(kind: str = "psi", value: float = 0.1, idle_least_s: float = 30.0) -> ReclaimPolicy:
    return ReclaimPolicy(ReclaimPolicyConfig(goal=Goal(kind, value), idle_least_s=idle_least_s))


def calm(current_bytes: int = GIB, ages: Mapping[float, int] | None = None, out_bytes: int = 0) -> CgroupFacts:
    """A cgroup in which nobody waits and nothing comes back. `ages`: idle seconds to bytes."""
    if ages is None:
        return CgroupFacts(current_bytes, out_bytes, 0.0, 0)
    idle_s = np.array(list(ages), np.float64)
    pages = np.array(list(ages.values()), np.int64) // PAGE_BYTES
    return CgroupFacts(current_bytes, out_bytes, 0.0, 0, idle_s, pages)


def troubled(stall_percent: float | None = 0.0, refault_pages: int | None = 0, **facts: int) -> CgroupFacts:
    return CgroupFacts(facts.get("current_bytes", GIB), 0, stall_percent, refault_pages)


def run(one: ReclaimPolicy, facts: CgroupFacts, seconds: float, begin_s: float = 0.0) -> list[int]:
    """What is asked for at each decision from `begin_s` on."""
    return [one.decide({"a": facts}, begin_s + at_s)["a"] for at_s in np.arange(0, seconds, 5.0)]


def test_nothing_is_asked_for_at_the_first_look() -> None:
    assert policy().decide({"a": calm()}, 0.0) == {"a": 0}


def test_without_ages_a_share_of_the_cgroup_is_asked_for_that_grows_while_nobody_waits() -> None:
    one = policy()
    asked = run(one, calm(), 600)
    per_decision = SHARE_START_PERCENT / 100 / 12 * GIB
    assert asked[1] == pytest.approx(per_decision, rel=0.01)
    assert asked[13] == pytest.approx(1.25 * per_decision, rel=0.01)
    assert asked == sorted(asked)
    one = policy()
    assert max(run(one, calm(), 7200)) == pytest.approx(SHARES_PERCENT[1] / 100 / 12 * GIB, rel=0.01)


def test_the_nearer_the_goal_the_less_is_asked_for_and_above_it_nothing() -> None:
    one = policy("psi", 0.1)
    full = run(one, calm(), 10)[1]
    assert one.decide({"a": troubled(0.05)}, 10.0)["a"] == pytest.approx(full / 2, rel=0.01)
    assert one.decide({"a": troubled(0.1)}, 15.0)["a"] == 0
    assert one.decide({"a": troubled(3.0)}, 20.0)["a"] == 0


def test_after_a_bad_window_nothing_goes_out_during_the_next_and_then_half_as_much() -> None:
    one = policy("psi", 0.1)
    before = run(one, troubled(0.05), 60)[-1]
    assert one.decide({"a": troubled(5.0)}, 60.0)["a"] == 0
    assert one.states["a"].paused
    assert "% stall" in one.states["a"].reason
    assert run(one, calm(), 55, 65.0) == [0] * 11
    after = one.decide({"a": calm()}, 120.0)["a"]
    assert 0 < after <= before * 2 * 0.5 * 1.25 * 1.01  # the calm window has made it grow again


def test_a_goal_of_refaults_counts_pages_that_come_back_as_a_share_of_the_memory_in_ram() -> None:
    one = policy("refaults", 0.2)
    run(one, calm(), 60)
    allowed = int(0.2 / 100 * GIB / PAGE_BYTES)  # per minute
    one.decide({"a": troubled(0.0, allowed + 100)}, 60.0)
    assert one.states["a"].paused
    assert one.states["a"].refaults_percent_per_min == pytest.approx(0.24, abs=0.05)
    one = policy("refaults", 0.2)
    run(one, troubled(0.0, allowed // 24), 65)
    assert not one.states["a"].paused


def test_with_ages_what_has_been_idle_for_the_threshold_is_asked_for_and_nothing_younger() -> None:
    one = policy(idle_least_s=30)
    facts = calm(ages={600.0: 100 * MIB, 30.0: 20 * MIB, 29.0: 400 * MIB, 0.0: 500 * MIB})
    assert run(one, facts, 10)[1] == 120 * MIB
    assert one.threshold_s("a") == 30


def test_a_bad_window_doubles_the_threshold_and_good_ones_bring_it_back() -> None:
    one = policy("refaults", 1.0, idle_least_s=30)
    run(one, calm(ages={600.0: MIB}), 60)
    one.decide({"a": troubled(0.0, 1 << 20)}, 60.0)
    assert one.threshold_s("a") == 60
    run(one, calm(ages={600.0: MIB}), 60, 65.0)
    assert one.threshold_s("a") == pytest.approx(48)
    run(one, calm(ages={600.0: MIB}), 600, 125.0)
    assert one.threshold_s("a") == 30


def test_what_the_goal_needs_and_the_kernel_does_not_tell_stops_it() -> None:
    for one, facts, what in (
        (policy("psi", 0.1), troubled(None, 0), "stall time is not known"),
        (policy("refaults", 1.0), troubled(0.0, None), "refaults are not known"),
    ):
        run(one, facts, 65)
        assert one.decide({"a": facts}, 65.0)["a"] == 0
        assert what in one.states["a"].reason


def test_a_goal_of_savings_asks_for_no_more_than_is_missing() -> None:
    one = policy("save", 30.0)
    ages = {600.0: 700 * MIB}
    assert run(one, calm(1000 * MIB, ages), 10)[1] == 300 * MIB
    assert one.decide({"a": calm(800 * MIB, ages, out_bytes=200 * MIB)}, 15.0)["a"] == 100 * MIB
    assert one.decide({"a": calm(600 * MIB, ages, out_bytes=400 * MIB)}, 20.0)["a"] == 0


def test_a_goal_of_free_memory_shares_what_is_missing_out_among_the_cgroups() -> None:
    one = policy("free", 2.0 * GIB)
    both = {"a": calm(ages={600.0: 300 * MIB}), "b": calm(ages={600.0: 100 * MIB})}
    one.decide(both, 0.0, 3 * GIB)
    assert one.decide(both, 5.0, 3 * GIB) == {"a": 0, "b": 0}
    assert one.decide(both, 10.0, 2 * GIB - 200 * MIB) == {"a": 150 * MIB, "b": 50 * MIB}
    assert one.decide(both, 15.0, GIB) == {"a": 300 * MIB, "b": 100 * MIB}
    assert one.decide(both, 20.0, None) == {"a": 0, "b": 0}


def test_each_cgroup_is_judged_by_itself_and_one_that_went_is_forgotten() -> None:
    one = policy("psi", 0.1)
    for at_s in range(0, 65, 5):
        wanted = one.decide({"good": calm(), "bad": troubled(5.0)}, float(at_s))
    assert wanted["bad"] == 0 < wanted["good"]
    one.decide({"good": calm()}, 65.0)
    assert set(one.states) == {"good"}
    assert one.decide({"good": calm(), "bad": calm()}, 70.0)["bad"] == 0  # a new one of that name: the first look


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"interval_ms": 0}, "intervalms"),
        ({"window_ms": 10}, "windowms"),
        ({"idle_least_s": 0.0}, "idleleastms"),
        ({"ages": "idlepage"}, "ages"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ReclaimPolicyConfig(**values)  # type: ignore[arg-type]
    assert raised.value.key_path == key
