"""Guards as pure decisions: readings and times in, open or closed and a reason out."""

from __future__ import annotations

import pytest

from memtier_engine.errors import ConfigError
from memtier_engine.guards.base import GraceGuard, Reading, ThresholdGuard, Thresholds
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.guards.meters import WindowMeter
from memtier_engine.guards.skip import ProcessFacts, SkipRules

HIGH = Thresholds(close_at=10, open_at=5, hold_s=10)
LOW = Thresholds(close_at=1.2, open_at=1.4, hold_s=0)


def guard(limits: Thresholds | None = HIGH) -> ThresholdGuard:
    return ThresholdGuard("fill", "used swap", limits)


def opens(one: ThresholdGuard, values: list[tuple[float, float | None]]) -> list[bool]:
    return [one.update({"fill": Reading(value)}, now_s).open for now_s, value in values]


def test_it_closes_at_the_threshold_and_opens_at_the_lower_one() -> None:
    """Between the two it stays as it is: no flapping."""
    assert opens(guard(), [(0, 9.9), (1, 10), (20, 9), (40, 5.1), (60, 5.0), (80, 9.9)]) == [
        True,
        False,
        False,
        False,
        True,
        True,
    ]


def test_it_stays_closed_for_the_hold_time() -> None:
    """Counted from the last reading that was too high."""
    assert opens(guard(), [(0, 12), (3, 11), (5, 0), (12.9, 0), (13, 0)]) == [False, False, False, False, True]


def test_a_floor_closes_below_and_opens_above() -> None:
    assert opens(guard(LOW), [(0, 1.3), (1, 1.2), (2, 1.3), (3, 1.4), (4, 1.3)]) == [True, False, False, True, True]


def test_the_reason_names_value_and_thresholds() -> None:
    state = guard().update({"fill": Reading(12.5, note="/proc/swaps")}, 0)
    assert state.reason == "used swap (/proc/swaps) is 12.5 %: closes at 10 %, opens again at 5 %"
    assert (state.value, state.close_at, state.open_at, state.unit) == (12.5, 10, 5, "%")


def test_without_a_reading_it_is_off_and_says_why() -> None:
    state = guard().update({"fill": Reading(missing="no swap area is in use")}, 0)
    assert state.open
    assert not state.active
    assert state.reason == "no swap area is in use"


def test_a_value_that_goes_missing_does_not_open_a_closed_guard_before_the_hold_time() -> None:
    assert opens(guard(), [(0, 12), (5, None), (9.9, None), (10, None), (11, 6)]) == [False, False, False, True, True]


def test_without_thresholds_it_is_switched_off() -> None:
    state = guard(None).update({"fill": Reading(100)}, 0)
    assert (state.open, state.active, state.reason) == (True, False, "switched off")


def test_a_trigger_closes_it_though_the_average_is_still_low() -> None:
    one = guard()
    assert one.update({"fill": Reading(1.0)}, 0).open
    state = one.update({"fill": Reading(1.0, fired_s=2.0)}, 2.0)
    assert not state.open
    assert "was at 10 % for a moment" in state.reason
    assert one.update({"fill": Reading(1.0, fired_s=2.0)}, 12.0).open is False
    assert one.update({"fill": Reading(1.0, fired_s=2.0)}, 12.1).open


def test_a_trigger_of_long_ago_means_nothing_to_a_new_guard() -> None:
    """Engines share the node's reader, and start at different times."""
    assert guard().update({"fill": Reading(1.0, fired_s=2.0)}, 100.0).open


def test_a_clock_that_is_set_back_does_not_keep_it_closed() -> None:
    one = guard()
    one.update({"fill": Reading(12)}, 1000)
    assert [one.update({"fill": Reading(0)}, now_s).open for now_s in (5, 16)] == [False, True]


def test_since_is_the_time_of_the_last_change() -> None:
    one = guard()
    times = [
        one.update({"fill": Reading(value)}, now_s).since_s for now_s, value in [(0, 1), (3, 11), (5, 11), (20, 0)]
    ]
    assert times == [0, 3, 3, 20]


def test_the_grace_time_counts_from_the_first_look() -> None:
    one = GraceGuard(10)
    assert [one.update({}, now_s).open for now_s in (100, 109.9, 110)] == [False, False, True]


def test_no_grace_time_is_no_guard() -> None:
    state = GraceGuard(0).update({}, 5)
    assert state.open
    assert not state.active


def test_a_meter_gives_the_growth_within_its_window() -> None:
    meter = WindowMeter(60, slots=6)
    assert [meter.add(total, now_s) for now_s, total in [(0, 1000), (5, 1010), (30, 1100), (60, 1100)]] == [
        0,
        10,
        100,
        100,
    ]
    assert meter.add(1100, 200) == 0


def test_a_meter_never_misses_what_was_observed_in_the_window() -> None:
    """Steady growth of 10 per second: at least the window's 600, at most a slot more."""
    meter = WindowMeter(60, slots=6)
    amounts = [meter.add(10 * now_s, now_s) for now_s in range(400)]
    assert all(600 <= amount <= 700 for amount in amounts[70:])


def test_a_meter_that_begins_late_counts_what_was_before_as_spread_evenly() -> None:
    """Two windows of 600 each: one of them counts, and leaves the window as time goes on."""
    meter = WindowMeter(60, slots=6)
    meter.begin(1200, since_s=120, now_s=1000)
    assert [meter.add(1200, now_s) for now_s in (1000, 1030, 1060)] == [600, 300, 0]
    assert meter.add(1250, 1061) == 50


def test_a_meter_that_begins_with_a_young_counter_counts_all_of_it() -> None:
    meter = WindowMeter(60, slots=6)
    meter.begin(900, since_s=30, now_s=0)
    assert [meter.add(900, now_s) for now_s in (0, 29, 60)] == [900, 900, 0]


def test_a_counter_that_starts_anew_counts_from_zero() -> None:
    """A device that was removed and came back."""
    meter = WindowMeter(60)
    meter.add(1000, 0)
    meter.add(1500, 1)
    assert meter.add(20, 2) == 520


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (ProcessFacts("a", rss_bytes=1 << 20), "has 1 MiB in RAM, less than 4 MiB"),
        (ProcessFacts("a", rss_bytes=4 << 20), None),
        (ProcessFacts("a"), None),
        (ProcessFacts("sshd"), "is named like 'ssh*'"),
        (ProcessFacts("a", realtime_policy=2), "has a real-time thread (SCHED_RR)"),
        (ProcessFacts("a", tracer_pid=7), "is traced by pid 7"),
        (ProcessFacts("a", tracer_pid=0), None),
        (ProcessFacts("a", core_dumping=True), "is writing a core dump"),
    ],
)
def test_a_process_is_left_alone_for_a_reason(facts: ProcessFacts, why: str | None) -> None:
    assert SkipRules(names=("ssh*",)).why(facts) == why


def test_each_skip_rule_can_be_switched_off() -> None:
    rules = SkipRules(rss_least_bytes=0, realtime=False, traced=False)
    assert rules.why(ProcessFacts("a", 0, 7, True, 1)) is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"swap_fill": Thresholds(close_at=50, open_at=60)}, "guards.swap_fill"),
        ({"memory_psi_node": Thresholds(close_at=101, open_at=60)}, "guards.memory_psi_node"),
        ({"compression": Thresholds(close_at=1.5, open_at=1.2)}, "guards.compression"),
        ({"swap_writes_bytes_per_day": 0}, "guards.swap_writes_bytes_per_day"),
        ({"start_grace_s": -1.0}, "guards.start_grace_s"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GuardsConfig(**settings)  # type: ignore[arg-type]
    assert caught.value.key_path == key


def test_every_guard_is_on_by_default() -> None:
    config = GuardsConfig()
    assert all(getattr(config, name) for name in config.__slots__ if name != "start_grace_s")
