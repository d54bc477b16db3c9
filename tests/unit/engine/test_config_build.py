"""From configuration text to engines: what is started, what is not, and what crashed the reference."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memtier_engine import EngineConfig
from memtier_engine.config.files import (
    from_yaml,
    load,
    parse,
    parse_policy,
    parse_routine,
    parse_target,
    parse_tracker,
    read,
)
from memtier_engine.config.parts import TargetSpec, TrackerSpec
from memtier_engine.errors import ConfigError, MemtierError
from memtier_engine.guards.base import GIB, MIB, Thresholds
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.model import PageChunk, ProcessId, Spans
from memtier_engine.policies.auto import AutoPolicy, AutoPolicyConfig
from memtier_engine.policies.goals import Goal
from memtier_engine.routines.statactions import StatActions
from memtier_engine.routines.stub import StubRoutine
from memtier_engine.stats.recorder import Statistics
from memtier_engine.trackers.finder import FinderConfig
from support.configs import base, placed, text_of
from support.hostfolder import HostFolder

POLICIES_WITH_TRACKER: dict[str, dict[str, Any]] = {
    "age": {"swapoutms": 1000},
    "heat": {"heatnumas": {0: [-1]}},
    "ratio": {"ratio": 0.5},
    "demote-idle": {"idlenumas": [-1]},
    "auto": {"goal": {"save": "30%"}},
}


@pytest.fixture
def machine(tmp_path: Path) -> HostFolder:
    """With one process, a node, and nothing else."""
    folder = HostFolder(tmp_path)
    for name in ("self/mounts", "self/status", "vmstat"):
        folder.write(f"proc/{name}", "")
    folder.write("proc/swaps", "Filename\n")
    folder.write("proc/meminfo", "MemTotal: 1000 kB\nMemAvailable: 500 kB\n")
    folder.process(4242, maps="7f0000000000-7f0000010000 rw-p 00000000 00:00 0 \n")
    folder.pagemap(4242, {0x7F000000F000: 1 << 63})
    return folder


def file_of(component: str, **values: Any) -> str:
    return text_of(placed(component, {**base(component), **values})[0])


# From text to an engine


def test_from_yaml_takes_text_and_paths(machine: HostFolder, tmp_path: Path) -> None:
    text = file_of("policy.age", swapoutms=1234, intervalms=2000)
    path = tmp_path / "m.yaml"
    path.write_text(text)
    for source in (text, path, str(path)):
        engine = from_yaml(source, host=machine.host, dry_run=True)
        assert (engine.policy.name, engine.tracker.name, engine.policy.interval_ms) == ("age", "finder", 2000)
        assert (engine.config.policy.swap_out_ms, engine.config.dry_run) == (1234, True)
        engine.close()
    one_line = "{policy: {name: age, config: {pidwatcher: {name: stub}, tracker: {name: finder}}}}"
    assert read(one_line).target.name == "stub"
    with pytest.raises(ConfigError, match="cannot be read"):
        from_yaml("policy.yaml", host=machine.host)


def test_from_yaml_tells_observers(machine: HostFolder) -> None:
    statistics = Statistics()
    engine = from_yaml(file_of("policy.age"), host=machine.host, observers=[statistics])
    engine.step()
    assert statistics.events["PolicyAge.loop"].count == 1
    engine.close()


def test_parts_are_decoded_by_name_and_text_alone() -> None:
    assert parse_tracker("idlepage", '{"PagesInRegion": 4}') == TrackerSpec("idlepage", 5000, 4)
    assert parse_tracker("softdirty", "") == TrackerSpec("softdirty", 5000)
    assert parse_target("pidlist", "pids: [3]") == TargetSpec("pidlist", pids=(3,))
    assert parse_policy("age", "pidwatcher: {name: stub}\ntracker: {name: finder}").tracker.name == "finder"
    routine = parse_routine("statactions", "intervalms: 5\nintervalcommand: [date]", allow_programs=True)
    assert routine.config is not None
    assert routine.config.interval_command == ("date",)
    for wrong in (parse_tracker, parse_target, parse_policy, parse_routine):
        with pytest.raises(ConfigError, match="'nosuch' is not known"):
            wrong("nosuch", "a: 1")
    with pytest.raises(ConfigError, match="pagesinregion"):
        parse_tracker("idlepage", "pagesinregion: 0")


# Policy auto


@pytest.mark.parametrize(
    ("written", "goal"),
    [
        ("psi: 0.1%", Goal("psi", 0.1)),
        ({"psi": "0.1%"}, Goal("psi", 0.1)),
        ("refaults: 0.2%/min", Goal("refaults", 0.2)),
        ({"free": "2GiB"}, Goal("free", 2 * GIB)),
        ({"save": "30%"}, Goal("save", 30)),
    ],
)
def test_policy_auto_is_built_for_its_goal(machine: HostFolder, written: Any, goal: Goal) -> None:
    tracker = {"name": "finder"}
    spec = parse(file_of("policy.auto", goal=written, windowms=7000, idleleastms=2500, tracker=tracker))
    assert spec.policy == AutoPolicyConfig(goal=goal, interval_ms=5000, window_ms=7000, idle_least_s=2.5)
    assert spec.swaps
    engine = spec.build(machine.host)
    assert isinstance(engine.policy, AutoPolicy)
    assert engine.step().candidate_bytes == 0
    engine.close()


def test_policy_auto_chooses_its_tracker_by_default() -> None:
    assert parse(file_of("policy.auto")).tracker == TrackerSpec("auto", 5000)


def test_a_window_of_auto_is_not_shorter_than_its_interval() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(file_of("policy.auto", windowms=10, intervalms=1000), file="m.yaml")
    assert caught.value.key_path == "policy.config.windowms"
    assert caught.value.line is not None


def test_counting_swap_ins_can_be_switched_off(machine: HostFolder) -> None:
    """It costs every page fault of the machine a little."""
    text = "policy: {name: age, config: {pidwatcher: {name: stub}, tracker: {name: finder}}}\n"
    for line, expected in (("", True), ("countswapins: true\n", True), ("countswapins: false\n", False)):
        engine = parse(text + line).build(machine.host)
        assert engine.config.count_swap_ins is expected
        engine.close()


# Guards


def test_guards_reach_the_engine(machine: HostFolder) -> None:
    spec = parse(
        """
policy: {name: age, config: {pidwatcher: {name: stub}, tracker: {name: finder}}}
guards:
  psimemorynode: null
  psimemorycgroup: {closeat: 8}
  psiionode: {closeat: 60, openat: 20, holdms: 2500, fastat: 70}
  psiiocgroup: {fastat: null}
  swapfill: {openat: 10}
  compression: ~
  refaults: {closeat: 4, openat: 1}
  swapwritesperday: null
  protection: false
  startgracems: 0
  skip: {rssleast: 8M, names: ["qemu*"], realtime: false, traced: false}
"""
    )
    guards = spec.guards
    assert guards.memory_psi_node is None
    assert guards.memory_psi_cgroup == Thresholds(close_at=8, open_at=3.2), "opens as far below as by default"
    assert guards.io_psi_node == Thresholds(close_at=60, open_at=20, hold_s=2.5, fast_at=70)
    assert guards.io_psi_cgroup == Thresholds(close_at=30, open_at=15)
    assert guards.swap_fill == Thresholds(close_at=90, open_at=10)
    assert guards.compression is None
    assert guards.refaults == Thresholds(close_at=4, open_at=1)
    assert (guards.swap_writes_bytes_per_day, guards.protection, guards.start_grace_s) == (None, False, 0)
    assert (guards.skip.rss_least_bytes, guards.skip.names) == (8 * MIB, ("qemu*",))
    assert not guards.skip.realtime
    assert not guards.skip.traced
    engine = spec.build(machine.host)
    assert engine.config.guards == guards
    states = {state.name: state for state in engine.step().guards}
    assert states["psi-memory-node"].reason == "switched off"
    engine.close()


def test_without_guards_in_the_file_all_have_their_defaults() -> None:
    assert parse("policy: {name: stub}\n").guards == GuardsConfig()
    assert parse("policy: {name: stub}\nguards: null\n").guards == GuardsConfig(), "there is no switch for all at once"


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("swapfill: {closeat: 10, openat: 20}", "guards.swapfill", "opening at or below"),
        ("compression: {closeat: 2, openat: 1}", "guards.compression", "opening above"),
        ("swapwritesperday: 0", "guards.swapwritesperday", "above 0"),
        ("refaults: {holdms: -1}", "guards.refaults.holdms", "out of range"),
        ("skip: {rssleast: much}", "guards.skip.rssleast", "'much' is no size"),
    ],
)
def test_wrong_guards_are_refused_by_their_place(text: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"policy: {{name: stub}}\nguards:\n  {text}\n", file="m.yaml")
    assert (caught.value.file, caught.value.line, caught.value.key_path) == ("m.yaml", 3, path)
    assert words in str(caught.value)


# Routines


def test_routines_are_built_with_a_prompt_given_to_them() -> None:
    spec = parse(
        """
policy: {name: stub}
routines:
- name: statactions
  config: |
    intervalms: 1000
    intervalcommand: [stats, -t, events]
    intervalcommandrunner: memtier
    pageoutmb: 3
    pageoutcommand: ["stats | wc"]
    pageoutcommandrunner: memtier-prompt
    timestamp: "a"
    timestampafter: "z"
- name: stub
"""
    )
    statistics = Statistics()
    ran: list[object] = []
    written: list[str] = []

    def run(command: object) -> int:
        ran.append(command)
        return 0

    first, second = (
        each.build(statistics, now_s=0.0, run_words=run, run_line=run, write=written.append) for each in spec.routines
    )
    assert isinstance(first, StatActions)
    assert isinstance(second, StubRoutine)
    assert first.advance(1.0) == 2.0
    assert ran == [("stats", "-t", "events")]
    assert written == ["a", "z"]
    with pytest.raises(ConfigError, match="needs a prompt"):
        spec.routines[0].build(statistics, now_s=0.0)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("intervalms: 5", "intervalcommand"),
        ("intervalms: 5\npageoutmb: 5\npageoutcommandrunner: memtier", "intervalcommand"),
        ("intervalcommand: [a]\nintervalcommandrunner: memtier", "intervalms"),
        ("intervalms: 5\nintervalcommand: [a, b]\nintervalcommandrunner: memtier-prompt", "intervalcommandrunner"),
        ("intervalms: 5\npageoutcommand: [a, b]\npageoutcommandrunner: memtier-prompt", "pageoutcommandrunner"),
        ("intervalms: 5\nintervalcommand: [a]\nintervalcommandrunner: sh", "intervalcommandrunner"),
    ],
)
def test_wrong_routines_are_refused_before_anything_runs(text: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_routine("statactions", text)
    assert caught.value.key_path == f"routine.config.{path}"


# Nothing half applied


def test_a_policy_that_cannot_be_built_leaves_nothing_open(machine: HostFolder, tmp_path: Path) -> None:
    """The second forecaster cannot start: the first one's program has ended, and the tracker is closed."""
    told = tmp_path / "pid"
    child = [sys.executable, "-c", f"import os,sys; open({str(told)!r}, 'w').write(str(os.getpid())); sys.stdin.read()"]
    links = [
        {"name": "stdio", "config": {"command": child}},
        {"name": "stdio", "config": {"command": ["/nowhere/at-all"]}},
    ]
    text = file_of("policy.heat", forecaster={"name": "chain", "config": {"forecasters": links}})
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="/nowhere/at-all"):
        from_yaml(text, host=machine.host)
    assert len(os.listdir("/proc/self/fd")) == open_before
    if told.exists():  # the program may have been ended before it wrote its pid
        assert not Path(f"/proc/{told.read_text()}").exists()


class _Closing:
    """A tracker that counts how often one of it was closed."""

    name = "counting"
    page_exact = True
    closed = 0

    def watch(self, processes: frozenset[ProcessId]) -> None:
        """Nothing."""

    def scan(self, process: ProcessId, spans: Spans) -> Iterator[PageChunk]:
        return iter(())

    def close(self) -> None:
        _Closing.closed += 1


def test_parts_of_multi_are_closed_if_one_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtier_engine.config.parts.create_tracker", _no_tracker)
    monkeypatch.setattr("memtier_engine.config.parts.FinderTracker", lambda host, options: _Closing())
    spec = parse_tracker("multi", "trackers: [{name: finder}, {name: softdirty}]")
    _Closing.closed = 0
    with pytest.raises(MemtierError, match="no soft-dirty bit"):
        spec.build(Host())
    assert _Closing.closed == 1


def _no_tracker(name: str, host: Host) -> None:
    raise MemtierError("no soft-dirty bit here")


def test_a_directory_that_is_not_there_is_told_when_the_engine_is_built(machine: HostFolder, tmp_path: Path) -> None:
    values = {"idlenumas": [1], "pagesofinterestdir": str(tmp_path / "absent"), "tracker": {"name": "finder"}}
    spec = parse(text_of(placed("policy.demote-idle", values)[0]))
    with pytest.raises(ConfigError, match="is no directory"):
        spec.build(machine.host)


# What crashed or stopped the reference


@pytest.mark.parametrize("policy", ["age", "heat", "ratio", "demote-idle", "avoid-oom", "auto"])
def test_an_interval_of_zero_is_refused_or_means_the_default(policy: str) -> None:
    """It ended the reference's process at the start."""
    text = file_of(f"policy.{policy}", intervalms=0)
    if policy == "ratio":
        assert parse(text).policy == parse(file_of("policy.ratio")).policy
        return
    with pytest.raises(ConfigError, match=r"intervalms: 0 is out of range \(use a number (of 1 or more|from 1)"):
        parse(text)


@pytest.mark.parametrize("tracker", ["idlepage", "softdirty"])
def test_a_tracker_with_some_of_its_keys_has_defaults_for_the_others(tracker: str) -> None:
    """Without `pagesinregion` the reference took all memory, without `scanintervalms` it ended."""
    spec = parse(file_of(f"tracker.{tracker}", maxcountperregion=3)).tracker
    assert (spec.pages_in_region, spec.max_count_per_region, spec.scan_interval_ms) == (512, 3, 5000)
    for key in ("pagesinregion", "scanintervalms"):
        with pytest.raises(ConfigError, match=f"{key}: 0 is out of range"):
            parse(file_of(f"tracker.{tracker}", **{key: 0}))


@pytest.mark.parametrize("mover", [None, {}, {"intervalms": 20}, {"bandwidth": 50}])
def test_a_mover_with_none_or_some_of_its_keys_moves(mover: dict[str, int] | None) -> None:
    """The reference dropped every task where `mover` or one of its keys was missing."""
    found = parse(file_of("policy.age", mover=mover)).mover
    wanted = {"intervalms": 10, "bandwidth": 100, **(mover or {})}
    assert (found.interval_ms, found.bandwidth_mib_per_s) == (wanted["intervalms"], wanted["bandwidth"])


def test_heat_without_a_heatmap_tells_hot_from_cold() -> None:
    """In the reference everything fell in class 0, and out."""
    policy = parse(file_of("policy.heat")).policy
    assert policy is not None
    heatmap = getattr(policy, "heatmap")  # noqa: B009
    assert (heatmap.heat_max, heatmap.heat_retention, heatmap.heat_classes) == (1.0, 0.9513, 10)


def test_a_filter_on_a_pidlist_starts(machine: HostFolder) -> None:
    """The reference waited for itself for ever."""
    source = {"name": "pidlist", "config": {"pids": [4242, 5555]}}
    engine = from_yaml(file_of("pidwatcher.filter", source=source, filters=[{}]), host=machine.host)
    assert {process.pid for process in engine.target.poll()} == {4242}
    engine.close()


@pytest.mark.parametrize("policy", POLICIES_WITH_TRACKER)
@pytest.mark.parametrize("tracker", ["stub", "multi", "finder"])
def test_any_policy_steps_on_a_tracker_that_sees_nothing(machine: HostFolder, policy: str, tracker: str) -> None:
    """The reference's stub ended the process in age, ratio and heat."""
    block: dict[str, Any] = {"name": tracker}
    if tracker == "multi":
        block["config"] = {"trackers": [{"name": "stub"}, {"name": "finder"}]}
    text = file_of(f"policy.{policy}", tracker=block, **POLICIES_WITH_TRACKER[policy])
    engine = from_yaml(text, host=machine.host)
    for _ in range(3):
        assert engine.step().processes == 1
    engine.close()
    engine.close()


def test_a_damon_tracker_that_never_ran_is_closed(machine: HostFolder) -> None:
    """Stopping one before it was configured ended the reference."""
    with pytest.raises(MemtierError):
        parse_tracker("damon", "").build(machine.host)  # there is no DAMON here


@pytest.mark.parametrize("key", ["intervalms", "bandwidth"])
def test_negative_speeds_are_refused(key: str) -> None:
    """They moved everything at once, or not at all."""
    with pytest.raises(ConfigError, match="-1 is out of range"):
        parse(file_of("mover", **{key: -1}))


@pytest.mark.parametrize("written", ["10k", "10kB", "10KiB", "1.5G", "10GiB", "10 MB", "1073741824"])
def test_sizes_are_taken_in_every_common_spelling(written: str) -> None:
    assert parse(file_of("policy.heat", numasize={0: written})).policy is not None


def test_shares_may_have_decimals() -> None:
    assert parse(file_of("policy.avoid-oom", startfreeingmemory="12.5%")).policy is not None
    with pytest.raises(ConfigError, match="is more than stopfreeingmemory"):
        parse(file_of("policy.avoid-oom", startfreeingmemory="17%"))


DAYS_MS = 24 * 3600 * 1000


@pytest.mark.parametrize(
    ("component", "keys"),
    [
        ("pidwatcher.pidlist", {"pids": []}),
        ("pidwatcher.proc", {"intervalms": 2 * DAYS_MS}),
        ("pidwatcher.cgroups", {"intervalms": 2 * DAYS_MS}),
        ("policy.age", {"intervalms": 2 * DAYS_MS}),
        ("policy.heat", {"intervalms": 2 * DAYS_MS}),
        ("policy.ratio", {"intervalms": 2 * DAYS_MS}),
        ("policy.ratio", {"ratio": 1e-8}),
        ("policy.demote-idle", {"intervalms": 2 * DAYS_MS}),
        ("policy.avoid-oom", {"intervalms": 2 * DAYS_MS}),
        ("tracker.idlepage", {"scanintervalms": 2 * DAYS_MS, "regionsupdatems": 2 * DAYS_MS}),
        ("tracker.softdirty", {"scanintervalms": 2 * DAYS_MS, "regionsupdatems": 2 * DAYS_MS}),
        ("tracker.finder", {"regionsupdatems": 2 * DAYS_MS}),
        ("mover", {"intervalms": 60_001, "bandwidth": 10_000_000}),
    ],
)
def test_odd_values_that_the_reference_takes_are_taken(component: str, keys: dict[str, Any]) -> None:
    """A list that is filled later, intervals that mean never."""
    parse(file_of(component, **keys))


def test_a_pidlist_without_pids_follows_nobody(machine: HostFolder) -> None:
    engine = from_yaml(file_of("pidwatcher.pidlist", pids=[]), host=machine.host)
    assert engine.target.poll() == frozenset()
    engine.close()


def test_a_negative_size_of_a_filter_lets_every_process_pass(machine: HostFolder) -> None:
    source = {"name": "pidlist", "config": {"pids": [4242]}}
    keys = ("minvmsizekb", "minvmrsskb", "minprivatedirtykb")
    text = file_of("pidwatcher.filter", source=source, filters=[dict.fromkeys(keys, -5)])
    engine = from_yaml(text, host=machine.host)
    assert {process.pid for process in engine.target.poll()} == {4242}
    engine.close()


def test_a_tab_behind_a_colon_is_a_blank() -> None:
    text = (
        "policy:\t\n  name:\tage\n  config: |\n    intervalms:\t1000\n    pidwatcher:\n      name:\tpidlist\n"
        "      config: |\n        pids:\t[1]\n    tracker: {name:\tfinder, config: 'reportaccesses:\t5'}\n"
    )
    spec = parse(text)
    assert (spec.target.pids, spec.tracker.options) == ((1,), FinderConfig(report_accesses=5))
    with pytest.raises(ConfigError, match="cannot start any token"):
        parse("policy:\n\tname: stub\n")


@pytest.mark.parametrize(("written", "value"), [("y", True), ("Y", True), ("n", False), ("On", True), ("no", False)])
def test_flags_are_those_of_yaml_1_1(written: str, value: bool) -> None:
    assert parse_tracker("finder", f"pagemapbitpresent: {written}").options == FinderConfig(present=value)
    with pytest.raises(ConfigError, match="use true or false"):
        parse_tracker("finder", f"pagemapbitpresent: '{written}'")


def test_a_ratio_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.5 is out of range \(use a number from 1e-37 to 1\)"):
        parse(file_of("policy.ratio", ratio=1.5))


def test_an_error_in_json_is_told_as_such_and_not_as_one_of_yaml() -> None:
    """The reference tells of a YAML error in what is JSON."""
    text = json.dumps({"PidWatcher": {"Name": "stub"}, "Tracker": {"Name": "finder"}, "IntervallMs": 5})
    with pytest.raises(ConfigError, match=r"IntervallMs: is not a key here \(did you mean intervalms\?"):
        parse_policy("age", text)


def test_an_engine_config_by_hand_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="scanintervalms"):
        EngineConfig(scan_interval_ms=0)


def test_a_file_that_cannot_be_used_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "memtierd.yaml"
    path.write_text(file_of("policy.age", intervalms=0))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:")
