"""Every key of every component with good, missing, bad and extreme values, generated from the table of keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.config.files import Spec, parse
from memtier_engine.config.keys import COMPONENTS, STUBS, Key, Kind
from memtier_engine.config.parts import TARGETS, TRACKERS
from memtier_engine.config.policies import FORECASTERS, POLICIES
from memtier_engine.config.routines import ROUTINES
from memtier_engine.errors import ConfigError
from support.configs import Plain, base, placed, text_of

FILE = "/etc/memtierd.yaml"
CASES = [(component, key) for component, keys in COMPONENTS.items() for key in keys]
IDS = [f"{component}-{key.name}" for component, key in CASES]
NUMBERS = [case for case in CASES if case[1].kind in (Kind.INTEGER, Kind.NUMBER)]
LISTS = [case for case in CASES if case[1].kind == Kind.INTEGERS]

FURTHER: Mapping[str, dict[str, Any]] = {
    # What else must be said for an extreme value of the key to be allowed.
    "policy.auto.intervalms": {"windowms": 24 * 3600 * 1000},
    "policy.auto.windowms": {"intervalms": 1},
    "policy.reclaim.intervalms": {"windowms": 24 * 3600 * 1000},
    "policy.reclaim.windowms": {"intervalms": 1},
    "tracker.damon.samplingus": {"aggregationus": 24 * 3600 * 10**6},
    "tracker.damon.aggregationus": {"samplingus": 1},
    "tracker.damon.mintargetregions": {"maxtargetregions": 1 << 20},
    "tracker.damon.maxtargetregions": {"mintargetregions": 3},
    "guards.threshold.openat": {"closeat": 100},
    "guards.threshold.fastat": {"closeat": 50},
}
NOT_SUPPORTED: Mapping[tuple[str, str, object], str] = {
    ("tracker.damon", "interface", 2): "debugfs",
}
"""Values of the reference that are refused, and a word of the reason."""
TEXTS: Mapping[str, tuple[list[str], list[str]]] = {
    # Good and bad ones.
    "block.name": (["softdirty"], ["idelpage"]),
    "block.config": (["pagesinregion: 2", '{"PagesInRegion": 3}'], ["pagesinregion: [", "- 1", "pages: 2"]),
    "policy.avoid-oom.startfreeingmemory": (["1%", "0.5 %", "100 MB", "1GiB"], ["much", "101%", "-1", "17%"]),
    "policy.avoid-oom.stopfreeingmemory": (["20%", "100%"], ["%", "-5%"]),
    "policy.demote-idle.pagesofinterestdir": (["/run/poi"], []),
    "policy.reclaim.ages": (["mglru", "none"], ["idlepage"]),
    "filter.procexeregexp": ([".*/meme", "^/usr/(bin|sbin)/x$"], ["(", "a**", "(?=x)"]),
    "tracker.damon.connection": (["perf", "perf --max-stack 3"], ["smoke"]),
    "forecaster.stdio.stderr": (["file:/dev/null"], ["syslog"]),
    "forecaster.trace.file": (["/elsewhere/x"], [""]),
    "routine.statactions.intervalcommandrunner": (["exec", "memtier-prompt"], ["bash"]),
    "routine.statactions.pageoutcommandrunner": (["exec", "memtier-prompt"], ["bash"]),
    "routine.statactions.timestamp": (["unix.milli\n"], []),
    "routine.statactions.timestampafter": (["rfc3339\n"], []),
    "guards.swapwritesperday": (["10G", "1T"], ["10X", "0", "-1"]),
    "guards.skip.rssleast": (["0", "8M"], ["8X", "-1"]),
}
LISTS_OF_TEXTS: Mapping[str, tuple[list[list[str]], list[list[str]]]] = {
    "policy.avoid-oom.cgroups": ([["/y", "/sys/fs/cgroup/z"]], [[], ["relative"], ["/a/../b"]]),
    "policy.reclaim.cgroups": ([["/y", "/sys/fs/cgroup/z"]], [[], ["relative"], ["/a/../b"]]),
    "pidwatcher.cgroups.cgroups": ([["/y", "/sys/fs/cgroup/z"]], [[], ["relative"], ["/a/../b"]]),
    "forecaster.stdio.command": ([["head", "-n", "1"]], [[], [""]]),
    "routine.statactions.intervalcommand": ([["policy", "-dump"]], [[" "]]),
    "routine.statactions.pageoutcommand": ([["policy", "-dump"]], [[" "]]),
    "guards.skip.names": ([["qemu*", "?"]], []),
}
FINDERS = [{"name": "finder"}, {"name": "softdirty"}]
OTHERS: Mapping[str, tuple[list[Any], list[Any]]] = {
    "policy": ([{"name": "ratio", "config": base("policy.ratio")}], [{"name": "aeg"}, {"config": "x"}, {}]),
    "routines": ([[{"name": "stub"}]], [[{"name": "cron"}], [{"config": "x"}], ["stub"]]),
    "guards": ([{"refaults": None}], [{"refault": None}]),
    "pidwatcher": ([{"name": "proc"}, {"name": "stub"}], [{"name": "pids"}, {"config": "x"}]),
    "source": ([{"name": "pidlist", "config": {"pids": [1]}}], [{"name": "pids"}, {}]),
    "tracker": ([{"name": "softdirty"}, {"name": "idlepage", "config": ""}], [{"name": "softdrity"}]),
    "trackers": ([FINDERS], [[], [{"name": "softdrity"}], [{}], [{"name": "refs"}, {"name": "bpf"}]]),
    "mover": ([{"bandwidth": 7}], [{"bandwith": 7}]),
    "heatmap": ([{"heatmax": 7}], [{"heat": 7}]),
    "forecaster": ([{"name": "trace", "config": {"file": "/x"}}], [{"name": "oracle"}]),
    "forecasters": ([[{"name": "stub"}]], [[{"name": "oracle"}], [{}]]),
    "filters": ([[{"minvmrsskb": 3}]], [[], [{"minrss": 3}]]),
    "and": ([[{"minvmrsskb": 3}, {}]], [[{"minrss": 3}]]),
    "or": ([[{"minvmrsskb": 3}, {}]], [[{"minrss": 3}]]),
    "not": ([{"minvmrsskb": 3}], [{"minrss": 3}]),
    "skip": ([{"traced": False}], [{"trace": False}]),
    "goal": (["psi: 0.1%", {"psi": "0.2 %"}, {"refaults": "0.3%/min"}, {"free": "2GiB"}, {"save": "31%"}],
             ["psi", "speed: 3", {"psi": "2GiB"}, {"free": "30%"}, {"save": "101%"}, {"save": "0%"}, {},
              {"psi": "1%", "save": "1%"}, {"psi": "1%/min"}, "save: -3%"]),
    "heatnumas": ([{0: [2, 3], 9: [-1]}, {"0": [2]}, {}, {10: [0], -1: []}], [{0: [1024]}, {"hot": [0]}, {0: 1}]),
    "numasize": ([{0: "1G", 3: "10k", 1023: "1.5GiB"}], [{1024: "1G"}, {0: "1X"}, {0: "-1"}, {0: ["1G"]}]),
}  # fmt: skip
NO_EFFECT = {
    # Checked, and without effect: what they tune does not exist here.
    *(f"tracker.idlepage.{key}" for key in ("regionsupdatems", "pagemapreadahead")),
    *(f"tracker.softdirty.{key}" for key in ("regionsupdatems", "pagemapreadahead", "skippageprob")),
    "tracker.idlepage.kpageflagsreadahead",
    "tracker.idlepage.bitmapreadahead",
    *(f"tracker.damon.{key}" for key in ("connection", "interface", "sysfsregionsmanager")),
}


def full_name(component: str, key: Key) -> str:
    return f"{component}.{key.name}"


def document(component: str, key: Key, value: Any) -> tuple[str, str]:
    """(text of a file in which the key has the value, its key path)."""
    values = {**base(component), **FURTHER.get(full_name(component, key), {}), key.name: value}
    whole, path = placed(component, values)
    return text_of(whole), f"{path}.{key.name}" if path else key.name


def without(component: str, key: Key) -> tuple[str, str]:
    values = {**base(component), **FURTHER.get(full_name(component, key), {})}
    values.pop(key.name, None)
    whole, path = placed(component, values)
    return text_of(whole), f"{path}.{key.name}" if path else key.name


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, file=FILE)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return caught.value


def assert_names_its_place(error: ConfigError, path: str) -> None:
    assert error.file == FILE
    assert error.line is not None
    assert (error.key_path or "").startswith(path), f"{error.key_path} is not {path}"
    assert str(error).startswith(f"{FILE}:{error.line}: {error.key_path}: ")


def numbers(key: Key) -> list[Any]:
    """Good ones: the ends of the range, the default, and something between."""
    found = {key.least, key.most, min(key.most, key.least + 1)}
    if key.default is not None:
        assert not isinstance(key.default, str)
        found.add(key.default)
    as_kind = int if key.kind in (Kind.INTEGER, Kind.INTEGERS) else float
    return sorted(as_kind(each) for each in found)


def good_values(component: str, key: Key) -> Iterable[Any]:
    name = full_name(component, key)
    if key.kind in (Kind.INTEGER, Kind.NUMBER):
        values = [value for value in numbers(key) if (component, key.name, value) not in NOT_SUPPORTED]
        if name in ("tracker.damon.mintargetregions", "tracker.damon.maxtargetregions"):
            values = [value for value in values if value != 1]  # the kernel watches a process as three areas
        return values
    if key.kind == Kind.TEXT:
        return TEXTS[name][0]
    if key.kind == Kind.FLAG:
        return [value for value in (True, False) if (component, key.name, value) not in NOT_SUPPORTED]
    if key.kind == Kind.INTEGERS:
        return [[int(key.least), int(key.most)]]
    if key.kind == Kind.TEXTS:
        return LISTS_OF_TEXTS[name][0]
    if key.kind == Kind.GONE:
        return [[]]
    if component == "guards" and key.off:
        return [{"closeat": 50, "openat": 40} if key.name != "compression" else {"closeat": 2, "openat": 3}, None]
    return OTHERS[key.name][0]


def bad_values(component: str, key: Key) -> Iterable[Any]:
    name = full_name(component, key)
    if key.kind in (Kind.INTEGER, Kind.NUMBER):
        return ["fast", "17", True, [1], {"a": 1}, Plain("1:30"), Plain(".nan"), Plain("0x"), Plain("1,5")]
    if key.kind == Kind.TEXT:
        return [*TEXTS[name][1], ["a"], *([] if name == "block.config" else [{"a": "b"}])]
    if key.kind == Kind.FLAG:
        return ["maybe", 1, [True], {"a": True}, "true"]
    if key.kind == Kind.INTEGERS:
        return [3, "3", {"a": 3}, ["x"], [True], [[1]], [Plain(".inf")]]
    if key.kind == Kind.TEXTS:
        return [*LISTS_OF_TEXTS[name][1], "word", {"a": "b"}, [["a"]], [{"a": "b"}]]
    if key.kind == Kind.GONE:
        return [["/x"], [1], "x"]
    if component == "guards" and key.off:
        return [{"close": 3}, 80, ["a"], {"closeat": "x"}, {"closeat": 10, "openat": -1}]
    wrong_kind = [3, ["a"]] if key.kind not in (Kind.BLOCKS, Kind.SECTIONS) else [3, {"a": 1}, ["a"], [3]]
    return [*OTHERS[key.name][1], *wrong_kind]


@pytest.mark.parametrize(("component", "key"), CASES, ids=IDS)
def test_good_values_are_taken(component: str, key: Key) -> None:
    values = list(good_values(component, key))
    assert values
    for value in values:
        assert isinstance(parse(document(component, key, value)[0], file=FILE), Spec)


@pytest.mark.parametrize(("component", "key"), CASES, ids=IDS)
def test_a_key_has_an_effect_or_is_listed_as_one_without(component: str, key: Key) -> None:
    """A value that is read and forgotten would be taken for obeyed."""
    plain, _ = document(component, key, None)
    parsed = [parse(document(component, key, value)[0]) for value in good_values(component, key)]
    changes = any(spec != other for spec in parsed for other in parsed)
    if not key.required and component != "block":
        changes = changes or any(spec != parse(plain) for spec in parsed)
    elif len(parsed) == 1:
        changes = True  # a required key with one example: that it is asked for is another test
    if key.kind == Kind.GONE or full_name(component, key) in NO_EFFECT:
        assert not changes
    elif full_name(component, key) != "file.allowprograms":  # that it has one shows with a program, see below
        assert changes


@pytest.mark.parametrize(("component", "key"), CASES, ids=IDS)
def test_a_missing_key_has_its_default_or_is_asked_for(component: str, key: Key) -> None:
    text, path = without(component, key)
    null = document(component, key, None)[0]
    if key.required:
        for each in (text, null):
            error = refused(each)
            if component != "file":
                assert_names_its_place(error, path)
            assert error.key_path == path
            assert "missing" in str(error) or "empty" in str(error)
        return
    if component == "block" or full_name(component, key) in ("policy.demote-idle.pidwatcher",):
        return  # see the two tests below
    default = parse(text)
    assert parse(null) == default or key.off
    if key.off:
        assert parse(null) != default
    if key.default is not None:
        assert parse(document(component, key, key.default)[0]) == default


def test_a_block_needs_a_name_and_some_parts_need_a_config() -> None:
    whole, path = placed("block", {"config": "pagesinregion: 2"})
    assert_names_its_place(refused(text_of(whole)), f"{path}.name")
    for component in ("pidwatcher.pidlist", "pidwatcher.cgroups", "pidwatcher.filter", "tracker.multi",
                      "forecaster.stdio", "forecaster.trace", "routine.statactions", "policy.age", "policy.heat",
                      "policy.ratio", "policy.auto", "policy.avoid-oom", "policy.demote-idle",
                      "policy.reclaim"):  # fmt: skip
        whole, path = placed(component, {})
        name = component.partition(".")[2]
        for nothing in (None, ""):
            error = refused(text_of(_with_config(whole, name, nothing)))
            assert_names_its_place(error, path)
            assert "missing" in str(error) or "empty" in str(error)


def _with_config(value: Any, name: str, config: Any) -> Any:
    """The document with the `config` of the block of that name replaced."""
    if isinstance(value, list):
        return [_with_config(each, name, config) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("name") == name:
        return {**value, "config": config}
    return {key: _with_config(each, name, config) for key, each in value.items()}


@pytest.mark.parametrize("key", ["intervalcommand", "pageoutcommand"])
def test_programs_run_only_where_that_is_switched_on_and_the_error_names_the_switches(key: str) -> None:
    whole, path = placed("routine.statactions", {"intervalms": 1000, key: ["sh", "-c", "date"]})
    assert parse(text_of(whole)).routines[0].programs_allowed
    for switch in (False, None):
        error = refused(text_of({**whole, "allowprograms": switch}))
        assert_names_its_place(error, f"{path}.{key}")
        assert "'sh'" in str(error)
        assert "`allowprograms: true`" in str(error)
        assert "-allow-programs" in str(error)
    del whole["allowprograms"]
    assert parse(text_of(whole), allow_programs=True).routines[0].programs_allowed
    for runner in ("memtier", "memtier-prompt"):
        commands = {"intervalms": 1000, key: ["stats"], f"{key}runner": runner}
        whole, _ = placed("routine.statactions", commands)
        del whole["allowprograms"]
        assert not parse(text_of(whole)).routines[0].programs_allowed


def test_demote_idle_needs_a_watcher_or_a_directory() -> None:
    whole, path = placed("policy.demote-idle", {"idlenumas": [1]})
    assert_names_its_place(refused(text_of(whole)), f"{path}.pidwatcher")


@pytest.mark.parametrize(("component", "key"), CASES, ids=IDS)
def test_a_bad_value_is_refused_by_file_line_path_and_what_is_allowed(component: str, key: Key) -> None:
    for value in bad_values(component, key):
        text, path = document(component, key, value)
        error = refused(text)
        assert_names_its_place(error, path)
        assert error.hint or "not YAML" in str(error) or "regular expression" in str(error)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and key.kind not in (Kind.GONE, Kind.BLOCK):
            words = [str(value), *str(value).split(": ")[1:]]
            shown = any(word in str(error) for word in words)
            assert shown or full_name(component, key) == "block.config", f"{value!r} is not in: {error}"


@pytest.mark.parametrize(("component", "key"), NUMBERS, ids=[full_name(*case) for case in NUMBERS])
def test_an_extreme_value_is_refused_with_the_range(component: str, key: Key) -> None:
    step = 1 if key.kind == Kind.INTEGER else 0.5
    below, above = key.least - step, key.most * 2 if key.most > 1e18 else key.most + step
    as_kind = int if key.kind == Kind.INTEGER else float
    for value in (
        as_kind(below),
        as_kind(above),
        Plain("-.inf"),
        Plain(".inf"),
        Plain("9" * 400),
        Plain("-" + "9" * 2000),
    ):
        text, path = document(component, key, value)
        error = refused(text)
        assert_names_its_place(error, path)
        assert error.key_path == path
        assert "out of range" in str(error)
        least = f"{key.least:g}" if key.kind == Kind.NUMBER else str(int(key.least))
        assert least in str(error), f"{least} is not in: {error}"
        if value != below and str(value)[0] != "-" and key.kind == Kind.INTEGER:
            assert str(int(key.most)) in str(error), "who is above the limit is told the limit"


@pytest.mark.parametrize(("component", "key"), LISTS, ids=[full_name(*case) for case in LISTS])
def test_an_extreme_value_in_a_list_is_refused_by_its_index(component: str, key: Key) -> None:
    for value in (int(key.least) - 1, int(key.most) + 1, Plain("9" * 400)):
        text, path = document(component, key, [int(key.least), value])
        error = refused(text)
        assert_names_its_place(error, f"{path}[1]")
        assert str(int(key.least)) in str(error)
        assert str(int(key.most)) in str(error)


@pytest.mark.parametrize(("component", "name", "value"), NOT_SUPPORTED)
def test_what_the_reference_takes_and_we_do_not_is_refused_with_what_to_do(
    component: str, name: str, value: object
) -> None:
    key = next(key for key in COMPONENTS[component] if key.name == name)
    text, path = document(component, key, value)
    error = refused(text)
    assert_names_its_place(error, path)
    assert NOT_SUPPORTED[component, name, value] in str(error)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_misspelt_key_is_refused_and_a_key_twice_too(component: str) -> None:
    for name in ("nosuchkey", COMPONENTS[component][0].name.upper()):
        whole, path = placed(component, {**base(component), name: 1})
        error = refused(text_of(whole))
        assert_names_its_place(error, f"{path}.{name}" if path else name)
        assert COMPONENTS[component][0].name in str(error)


def test_the_table_of_keys_and_the_tables_of_names_are_of_the_same_components() -> None:
    known = {
        *(f"policy.{name}" for name in POLICIES),
        *(f"tracker.{name}" for name in TRACKERS),
        *(f"pidwatcher.{name}" for name in TARGETS),
        *(f"forecaster.{name}" for name in FORECASTERS),
        *(f"routine.{name}" for name in ROUTINES),
    }
    parts = {"file", "block", "mover", "heatmap", "filter", "guards", "guards.threshold", "guards.skip"}
    assert set(COMPONENTS) | set(STUBS) == known | parts
    for component, keys in COMPONENTS.items():
        assert len({key.name for key in keys}) == len(keys), component


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([".*", "30%", "psi: 1%", "4G", "/sys/fs/cgroup/x", "memtier", "stub", "finder", "multi"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers(-1, 9) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(case=st.sampled_from(CASES), value=_VALUES)
def test_whatever_stands_at_a_key_is_taken_or_refused_with_its_place(case: tuple[str, Key], value: Any) -> None:
    """Nothing but ConfigError comes out, and that names file and line in one line of text."""
    text, _ = document(*case, value)
    try:
        parse(text, file=FILE)
    except ConfigError as error:
        assert str(error).startswith(FILE), str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
