"""Configuration files with all policies, trackers, targets and forecasters of the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_engine.config.files import Spec, parse
from memtier_engine.config.parts import TRACKERS
from memtier_engine.config.policies import FORECASTERS, POLICIES
from memtier_engine.errors import ConfigError
from memtier_engine.policies.age import AgePolicy
from memtier_engine.policies.avoid_oom import AvoidOomPolicyConfig
from memtier_engine.policies.demote_idle import DemoteIdlePolicyConfig
from memtier_engine.policies.heat import HeatPolicy, HeatPolicyConfig
from memtier_engine.policies.heatmap import HeatmapConfig
from memtier_engine.policies.ratio import RatioPolicy, RatioPolicyConfig
from memtier_engine.stats.recorder import Statistics
from memtier_engine.targets.filter import FilterTarget
from memtier_engine.trackers.damon import DamonConfig
from memtier_engine.trackers.finder import FinderConfig, FinderTracker
from memtier_engine.trackers.multi import MultiTracker
from support.hostfolder import HostFolder
from support.messages import messages


def block(name: str, text: str = "", indent: int = 0) -> str:
    """A `name` and `config` block."""
    lines = [f"name: {name}"]
    if text:
        lines += ["config: |", *("  " + line for line in text.splitlines())]
    return "\n".join(" " * indent + line for line in lines) + "\n"


def file_of(policy: str, text: str) -> str:
    return "policy:\n" + block(policy, text, 2)


WATCHER = "pidwatcher:\n" + block("pidlist", "pids: [4242]", 2)
IDLEPAGE = "tracker:\n" + block("idlepage", "pagesinregion: 256\nmaxcountperregion: 0\nscanintervalms: 5000", 2)
HEAT = """\
intervalms: 10000
heatnumas: {0: [2,3], 3: [0,1]}
numasize: {0: 1G, 2: 200M, 3: 200M}
heatmap:
  heatmax: 0.01
  heatretention: 0.8
  heatclasses: 4
mover: {intervalms: 20, bandwidth: 200}
"""


@pytest.fixture
def warnings_of() -> Iterator[list[str]]:
    """What is warned of."""
    with messages("WARNING") as found:
        yield found


def failure(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, file="m.yaml")
    return caught.value


def test_heat_as_in_the_reference_s_sample() -> None:
    spec = parse(file_of("heat", HEAT + WATCHER + IDLEPAGE))
    assert spec.policy == HeatPolicyConfig(
        interval_ms=10_000,
        heatmap=HeatmapConfig(heat_max=0.01, heat_retention=0.8, heat_classes=4),
        heat_numas={0: (2, 3), 3: (0, 1)},
        numa_size_bytes={0: 1 << 30, 2: 200 << 20, 3: 200 << 20},
    )
    assert (spec.tracker.pages_in_region, spec.tracker.max_count_per_region) == (256, 0)
    assert not spec.swaps


def test_a_json_configuration_has_numbers_as_text_keys_and_any_case() -> None:
    text = (
        '{"IntervalMs": 5000, "HeatNumas": {"0": [-1]}, "Heatmap": {"HeatMax": 1},'
        ' "PidWatcher": {"Name": "pidlist", "Config": "{\\"Pids\\": [1]}"}, "Tracker": {"Name": "finder"}}'
    )
    spec = parse(file_of("heat", text))
    assert isinstance(spec.policy, HeatPolicyConfig)
    assert spec.policy.heat_numas == {0: (-1,)}
    assert spec.swaps


def test_a_heat_class_that_there_is_not_has_no_effect_and_is_told(warnings_of: list[str]) -> None:
    spec = parse(file_of("heat", HEAT.replace("3: [0,1]}", "3: [0,1], 4: [1], -1: [1]}") + WATCHER + IDLEPAGE))
    assert isinstance(spec.policy, HeatPolicyConfig)
    assert spec.policy.heat_numas == {0: (2, 3), 3: (0, 1)}
    assert [text.split(": ", 1)[0].rpartition(".")[2] for text in warnings_of] == ["4", "-1"]
    assert all(text.endswith("they go from 0 to 3") for text in warnings_of)


def test_missing_heatmap_keys_have_the_object_s_defaults_and_not_zero() -> None:
    spec = parse(file_of("heat", "heatnumas: {9: [0]}\n" + WATCHER + IDLEPAGE))
    assert isinstance(spec.policy, HeatPolicyConfig)
    assert spec.policy.heatmap == HeatmapConfig(heat_max=1.0, heat_retention=0.9513, heat_classes=10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("{0: [2,3], 3: [0,1]}", "{hot: [0]}"), ["heatnumas.hot", "no number"]),
        (("{0: [2,3], 3: [0,1]}", "{0: [-2]}"), ["heatnumas.0[0]", "out of range"]),
        (("0: 1G", "0: 1X"), ["numasize.0", "'1X' is no size"]),
        (("0: 1G", "5000: 1G"), ["numasize.5000", "out of range"]),
        (("heatclasses: 4", "heatclasses: 0"), ["heatmap.heatclasses", "from 1"]),
        (("heatretention: 0.8", "heatretention: 1.8"), ["heatmap.heatretention", "from 0 to 1"]),
        (("heatmax: 0.01", "heatmax: -1"), ["heatmap.heatmax", "out of range"]),
        (("intervalms: 10000", "intervalms: 0"), ["intervalms", "out of range"]),
        (("intervalms: 10000", "cgroups: [/x]"), ["cgroups", "pidwatcher"]),
    ],
)
def test_wrong_heat_values_are_refused_with_their_place(change: tuple[str, str], words: list[str]) -> None:
    assert change[0] in HEAT
    error = failure(file_of("heat", HEAT.replace(*change) + WATCHER + IDLEPAGE))
    assert error.line is not None
    for word in words:
        assert word in str(error)


FORECAST = HEAT + WATCHER + IDLEPAGE + "forecaster:\n"


def test_forecasters_nest(tmp_path: Path) -> None:
    stdio = block("stdio", "command: [cat]\nretry: 2\ndeadlinems: 100")
    trace = block("trace", f"file: {tmp_path}/heat.trace\nhideheatzero: true")
    links = "forecasters:\n" + "".join(
        "- " + each.replace("\n", "\n  ").rstrip() + "\n" for each in (trace, stdio, block("stub"))
    )
    spec = parse(file_of("heat", FORECAST + block("chain", links, 2)))
    assert spec.forecaster is not None
    assert [link.name for link in spec.forecaster.links] == ["trace", "stdio", "stub"]
    assert (spec.forecaster.links[1].command, spec.forecaster.links[1].retry) == (("cat",), 2)
    made = spec.forecaster.build()
    assert made.name == "chain"
    made.close()
    assert (tmp_path / "heat.trace").exists()


@pytest.mark.parametrize(
    ("forecaster", "words"),
    [
        (block("crystalball", "", 2), ["forecaster.name", "'crystalball'"]),
        (block("stdio", "retry: 1", 2), ["command", "missing"]),
        (block("stdio", "command: [cat]\nstderr: syslog", 2), ["stderr", "file:PATH"]),
        (block("stdio", "command: [cat]\ndeadlinems: 0", 2), ["deadlinems", "out of range"]),
        (block("trace", "hideheatzero: true", 2), ["file", "missing"]),
        (block("trace", "", 2), ["config", "missing"]),
    ],
)
def test_wrong_forecasters_are_refused(forecaster: str, words: list[str]) -> None:
    error = failure(file_of("heat", FORECAST + forecaster))
    for word in words:
        assert word in str(error)


def test_ratio_has_a_tracker_and_a_target_by_default() -> None:
    spec = parse(file_of("ratio", "ratio: 0.25\nintervalms: 0\n" + WATCHER))
    assert spec.policy == RatioPolicyConfig(interval_ms=5000, ratio=0.25, ratio_targets=(-1,))
    assert spec.tracker.name == "idlepage"
    assert (spec.mover.interval_ms, spec.mover.bandwidth_mib_per_s) == (10, 100)
    assert spec.swaps
    for wrong in ("ratio: 0\n", "ratio: 1.5\n", "intervalms: 5\n"):
        assert "ratio" in str(failure(file_of("ratio", wrong + WATCHER)))


def test_demote_idle_follows_a_watcher_or_a_directory(tmp_path: Path) -> None:
    spec = parse(file_of("demote-idle", "intervalms: 4000\nidlenumas: [3]\n" + WATCHER))
    assert spec.policy == DemoteIdlePolicyConfig(interval_ms=4000, idle_numas=(3,))
    assert (spec.tracker.name, spec.target.name, spec.scan_interval_ms) == ("idlepage", "pidlist", 4000)
    spec = parse(file_of("demote-idle", f"intervalms: 4000\nidlenumas: [3]\npagesofinterestdir: {tmp_path}\n"))
    assert (spec.target.name, spec.target.directory) == ("pagesofinterest", str(tmp_path))
    assert "idlenumas" in str(failure(file_of("demote-idle", WATCHER)))
    assert "pidwatcher" in str(failure(file_of("demote-idle", "idlenumas: [3]\n")))


def test_avoid_oom_needs_neither_tracker_nor_watcher() -> None:
    text = "intervalms: 5000\nstartfreeingmemory: 10%\nstopfreeingmemory: 15%\n"
    text += "cgroups: [/sys/fs/cgroup/kubepods.slice]\nmover: {intervalms: 100, bandwidth: 250}\n"
    spec = parse(file_of("avoid-oom", text))
    assert spec.policy == AvoidOomPolicyConfig(interval_ms=5000, start_freeing_memory="10%", stop_freeing_memory="15%")
    assert spec.cgroups == ("/sys/fs/cgroup/kubepods.slice",)
    assert (spec.tracker.name, spec.target.pids) == ("stub", ())
    for change in (("10%", "20%"), ("15%", "much"), ("intervalms: 5000", "intervalms: 0"), ("[/sys", "[sys")):
        assert failure(file_of("avoid-oom", text.replace(*change))).line is not None


def test_the_stub_takes_anything() -> None:
    for text in ("policy: {name: stub}\n", "policy: {name: stub, config: ': :'}\n", file_of("stub", "x: [1")):
        assert parse(text).policy is None


def age_with(tracker: str, watcher: str = WATCHER) -> str:
    return file_of("age", "intervalms: 4000\n" + watcher + "tracker:\n" + tracker)


def test_damon_takes_the_reference_s_keys_and_zero_means_default() -> None:
    text = "connection: bpftrace\nkdamondslist: [0, 1]\nnrkdamonds: 4\ninterface: 1\n"
    text += "filteraddressrangesizemax: 67108864\nsamplingus: 1000\naggregationus: 1000000\n"
    text += "regionsupdateus: 5000000\nmintargetregions: 10\nmaxtargetregions: 2000\n"
    spec = parse(age_with(block("damon", text, 2)))
    options = spec.tracker.options
    assert isinstance(options, DamonConfig)
    assert (options.kdamonds, options.create, options.filter_bytes_max) == ((0, 1), 4, 64 << 20)
    assert (options.sample_us, options.aggregation_us) == (1000, 1_000_000)
    assert (options.regions_min, options.regions_max) == (10, 2000)
    assert spec.scan_interval_ms == 4000, "DAMON is looked at once per decision"
    spec = parse(age_with(block("damon", "samplingus: 0", 2)))
    assert spec.tracker.options == DamonConfig()
    spec = parse(age_with(block("damon", "filteraddressrangesizemax: -1", 2)))
    assert isinstance(spec.tracker.options, DamonConfig)
    assert spec.tracker.options.filter_bytes_max is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("interface: 2", "debugfs"),
        ("connection: smoke", "connection"),
        ("samplingus: 200000\naggregationus: 100000", "samplingus"),
        ("mintargetregions: 2000", "mintargetregions"),
        ("kdamondslist: [-1]", "kdamondslist[0]"),
    ],
)
def test_wrong_damon_values_are_refused(text: str, word: str) -> None:
    error = failure(age_with(block("damon", text, 2)))
    assert word in str(error)
    assert error.line is not None


def test_finder_and_multi_are_decoded_and_built(tmp_path: Path) -> None:
    text = "reportaccesses: 3\npagemapbitpresent: true\nregionsupdatems: 2000\n"
    spec = parse(age_with(block("finder", text, 2)))
    assert spec.tracker.options == FinderConfig(report_accesses=3, present=True)
    assert spec.scan_interval_ms == 2000
    assert isinstance(spec.tracker.build(HostFolder(tmp_path).host), FinderTracker)
    idlepage = block("idlepage", "pagesinregion: 512\nmaxcountperregion: 1\nscanintervalms: 20000")
    softdirty = block("softdirty", "pagesinregion: 256\nmaxcountperregion: 1\nscanintervalms: 5000")
    parts = "trackers:\n" + "".join("- " + each.replace("\n", "\n  ").rstrip() + "\n" for each in (idlepage, softdirty))
    spec = parse(age_with(block("multi", parts, 2)))
    assert [part.name for part in spec.tracker.parts] == ["idlepage", "softdirty"]
    assert (spec.tracker.scan_interval_ms, spec.tracker.pages_in_region) == (5000, 256)
    stubs = "trackers:\n- name: finder\n- name: stub\n"
    spec = parse(age_with(block("multi", stubs, 2)))
    assert isinstance(spec.tracker.build(HostFolder(tmp_path).host), MultiTracker)
    twice = parts + "- name: refs\n"
    assert "disturb each other" in str(failure(age_with(block("multi", twice, 2))))
    assert "trackers" in str(failure(age_with(block("multi", "trackers: []", 2))))


def test_filters_nest_and_come_from_any_watcher(tmp_path: Path) -> None:
    text = """\
source:
  name: proc
  config: ""
filters:
- procexeregexp: .*/meme
  minvmrsskb: 10
- or: [{minvmsizekb: 5}, {not: {procexeregexp: x}}]
  and: [{}, {minprivatedirtykb: 7}]
"""
    spec = parse(age_with(block("finder", "", 2), "pidwatcher:\n" + block("filter", text, 2)))
    first, second = spec.target.filters
    assert first.exe_regexp is not None
    assert (first.exe_regexp.pattern, first.min_vm_rss_kib) == (".*/meme", 10)
    assert [each.min_vm_size_kib for each in second.or_filters] == [5, 0]
    assert second.or_filters[1].not_filter is not None
    assert second.and_filters[1].min_private_dirty_kib == 7
    assert spec.target.source is not None
    assert spec.target.source.name == "proc"
    folder = HostFolder(tmp_path)
    folder.write("proc/meminfo", "")
    target = spec.target.build(folder.host)
    assert isinstance(target, FilterTarget)
    assert target.poll() == frozenset()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("filters: [{}]", ["source", "missing"]),
        ("source: {name: proc}\nfilters: []", ["filters", "is empty"]),
        ("source: {name: proc}\nfilters: [{procexeregexp: '('}]", ["filters[0].procexeregexp", "regular expression"]),
        ("source: {name: proc}\nfilters: [{minvmrsskb: -9999999999999999}]", ["filters[0].minvmrsskb", "out of range"]),
        ("source: {name: proc}\nfilters: [{or: [{minrss: 1}]}]", ["filters[0].or[0].minrss", "not a key"]),
    ],
)
def test_wrong_filters_are_refused(text: str, words: list[str]) -> None:
    error = failure(age_with(block("finder", "", 2), "pidwatcher:\n" + block("filter", text, 2)))
    for word in words:
        assert word in str(error)


def test_every_policy_is_built_and_steps_on_a_machine_without_processes(tmp_path: Path) -> None:
    """With tracker finder, so that it runs on any kernel."""
    folder = HostFolder(tmp_path)
    folder.write("proc/self/mounts", "")
    folder.write("proc/self/status", "")
    folder.write("proc/swaps", "Filename\n")
    folder.write("proc/meminfo", "MemTotal: 1000 kB\n")
    folder.write("proc/vmstat", "")
    finder = "tracker:\n" + block("finder", "", 2)
    texts = {
        "age": "swapoutms: 1000\n",
        "heat": "heatnumas: {0: [-1]}\n",
        "ratio": "ratio: 0.5\n",
        "demote-idle": "idlenumas: [-1]\n",
    }
    statistics = Statistics()
    for name, text in texts.items():
        engine = parse(file_of(name, text + WATCHER + finder)).build(folder.host, observers=[statistics])
        assert engine.policy.name == name
        report = engine.step()
        assert report.processes == 0
        engine.close()
        engine.close()
    oom = parse(file_of("avoid-oom", "cgroups: [/sys/fs/cgroup/x]\n"))
    assert isinstance(oom, Spec)
    for name in ("PolicyAge.loop", "PolicyHeat.loop", "PolicyRatio.loop", "PolicyDemoteIdle.loop"):
        assert statistics.events[name].count == 1
    kinds = [parse(file_of(name, text + WATCHER + finder)) for name, text in texts.items()]
    built = [spec.build(folder.host).policy for spec in kinds[:3]]
    assert [type(each) for each in built] == [AgePolicy, HeatPolicy, RatioPolicy]


def test_all_names_of_the_reference_are_known() -> None:
    assert {"age", "avoid-oom", "demote-idle", "heat", "ratio", "stub"} <= set(POLICIES)
    assert {"damon", "finder", "idlepage", "multi", "softdirty", "stub"} <= set(TRACKERS)
    assert set(FORECASTERS) == {"chain", "stdio", "stub", "trace"}
