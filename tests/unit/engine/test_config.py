"""Configuration files: what is taken, what is refused, and that an error says where."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier_engine.config.files import Spec, load, parse
from memtier_engine.errors import ConfigError
from memtier_engine.policies.age import AgePolicyConfig

ROOT = Path(__file__).parents[3]
GOOD = """\
policy:
  name: age
  config: |
    intervalms: 4000
    swapoutms: 5000
    pidwatcher:
      name: pidlist
      config: |
        pids: [4242]
    tracker:
      name: idlepage
      config: |
        pagesinregion: 512
        scanintervalms: 2000
    mover:
      intervalms: 20
      bandwidth: 100
"""


def changed(before: str, after: str) -> str:
    assert before in GOOD
    return GOOD.replace(before, after)


def failure(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, file="m.yaml")
    return caught.value


def test_a_good_file_is_decoded_with_all_its_values() -> None:
    spec = parse(GOOD)
    assert isinstance(spec.policy, AgePolicyConfig)
    assert (spec.policy.interval_ms, spec.policy.swap_out_ms) == (4000, 5000)
    assert (spec.tracker.name, spec.tracker.scan_interval_ms, spec.tracker.pages_in_region) == ("idlepage", 2000, 512)
    assert (spec.target.name, spec.target.pids) == ("pidlist", (4242,))
    assert (spec.mover.interval_ms, spec.mover.bandwidth_mib_per_s) == (20, 100)


def test_every_missing_key_has_a_real_default() -> None:
    """The reference starts from zero: no mover section there means that every task is dropped."""
    spec = parse(GOOD[: GOOD.index("    mover:")].replace("    intervalms: 4000\n", ""))
    assert (spec.mover.interval_ms, spec.mover.bandwidth_mib_per_s) == (10, 100)
    assert isinstance(spec.policy, AgePolicyConfig)
    assert spec.policy.interval_ms == 5000


def test_a_tracker_without_config_has_its_defaults() -> None:
    text = GOOD.replace("      config: |\n        pagesinregion: 512\n        scanintervalms: 2000\n", "")
    assert parse(text).tracker.scan_interval_ms == 5000


def test_config_text_may_be_json_with_keys_of_any_case_and_junk_behind_it() -> None:
    text = changed("      config: |\n        pids: [4242]\n", """      config: '{"PIDs": [7]} and words'\n""")
    assert parse(text).target.pids == (7,)


def test_json_may_be_indented_with_tabs() -> None:
    text = changed("        pids: [4242]\n", """        {\n        \t"PIDs":\t[7]\n        }\n""")
    assert parse(text).target.pids == (7,)


def test_yaml_keys_must_be_lower_case() -> None:
    error = failure(changed("        pids: [4242]", "        Pids: [4242]"))
    assert error.key_path == "policy.config.pidwatcher.config.Pids"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0x10", 16),
        ("010", 8),
        ("0o10", 8),
        ("0b11", 3),
        ("1_000", 1000),
        ("100.7", 100),
        ("1e3", 1000),
        ("08", 8),
        ("+7", 7),
        ("5000", 5000),
    ],
)
def test_numbers_are_read_as_the_reference_reads_them(written: str, value: int) -> None:
    policy = parse(changed("swapoutms: 5000", f"swapoutms: {written}")).policy
    assert isinstance(policy, AgePolicyConfig)
    assert policy.swap_out_ms == value


BAD = [
    # replaced, by, line, key path, words of the message
    ("intervalms: 4000", "intervalms: 0", 4, "policy.config.intervalms", ["0", "out of range", "1"]),
    ("intervalms: 4000", "intervalms: -5", 4, "policy.config.intervalms", ["-5", "out of range"]),
    ("intervalms: 4000", "intervalms: fast", 4, "policy.config.intervalms", ["'fast'", "text", "number"]),
    ("intervalms: 4000", 'intervalms: "4000"', 4, "policy.config.intervalms", ["'4000'", "text"]),
    ("intervalms: 4000", "intervalms: true", 4, "policy.config.intervalms", ["true or false", "number"]),
    ("intervalms: 4000", "intervalms: 1:30", 4, "policy.config.intervalms", ["1:30"]),
    ("intervalms: 4000", "intervalms: .nan", 4, "policy.config.intervalms", [".nan"]),
    ("intervalms: 4000", "intervalms: 99999999999999999999", 4, "policy.config.intervalms", ["out of range"]),
    ("swapoutms: 5000", "swapoutms: -1", 5, "policy.config.swapoutms", ["-1", "0"]),
    ("swapoutms: 5000", "swapotms: 5000", 5, "policy.config.swapotms", ["did you mean swapoutms?"]),
    ("swapoutms: 5000", "intervalms: 5", 5, "policy.config.intervalms", ["twice"]),
    ("swapoutms: 5000", "idlenumas: 3", 5, "policy.config.idlenumas", ["a list"]),
    ("swapoutms: 5000", "idlenumas: [3, x]", 5, "policy.config.idlenumas[1]", ["'x'"]),
    ("swapoutms: 5000", "pids: [1]", 5, "policy.config.pids", ["gone", "pidwatcher"]),
    ("swapoutms: 5000", "cgroups: [/x]", 5, "policy.config.cgroups", ["gone", "pidwatcher"]),
    ("pids: [4242]", "pids:", 9, "policy.config.pidwatcher.config.pids", ["missing"]),
    ("pids: [4242]", "pids: [0]", 9, "policy.config.pidwatcher.config.pids[0]", ["out of range"]),
    ("name: pidlist", "name: pidlst", 7, "policy.config.pidwatcher.name", ["did you mean pidlist?"]),
    ("name: idlepage", "name: idelpage", 11, "policy.config.tracker.name", ["idlepage", "softdirty"]),
    ("name: age", "name: aeg", 2, "policy.name", ["did you mean age?"]),
    ("scanintervalms: 2000", "scanintervalms: 0", 14, "policy.config.tracker.config.scanintervalms", ["default 5000"]),
    (
        "pagesinregion: 512",
        "pagesinregion: 0",
        13,
        "policy.config.tracker.config.pagesinregion",
        ["of 1 or more", "512"],
    ),
    ("bandwidth: 100", "bandwidth: 0", 17, "policy.config.mover.bandwidth", ["0", "default 100"]),
    ("      intervalms: 20\n", "      intervalms: 0\n", 16, "policy.config.mover.intervalms", ["default 10"]),
    ("bandwidth: 100", "bandwith: 100", 17, "policy.config.mover.bandwith", ["did you mean bandwidth?"]),
]


@pytest.mark.parametrize(("before", "after", "line", "key_path", "words"), BAD)
def test_an_error_names_file_line_key_value_and_what_is_allowed(
    before: str, after: str, line: int, key_path: str, words: list[str]
) -> None:
    error = failure(changed(before, after))
    assert (error.file, error.line, error.key_path) == ("m.yaml", line, key_path)
    assert str(error).startswith(f"m.yaml:{line}: {key_path}: ")
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty", "policy"]),
        ("# only a comment\n", ["empty"]),
        ("- a\n- b\n", ["a list", "mapping"]),
        ("policy: 3\n", ["policy", "mapping"]),
        ("Policy: {}\n", ["Policy", "did you mean policy?"]),
        ("policy:\n\tname: age\n", ["not YAML"]),
        ("policy: {name: age}\n", ["policy.config", "missing"]),
        ("policy: {name: age, config: ''}\n", ["policy.config", "empty"]),
        ("policy: {name: age, config: 'a: [1'}\n", ["policy.config", "not YAML"]),
        ("routines: 3\npolicy: {name: age}\n", ["routines", "a list"]),
        ("other: 1\n", ["other", "not a key here"]),
        ("policy: " + "[" * 3000, ["nested too deeply"]),
        ("policy: {name: age, config: 'swapoutms: !!int \"x\"'}\n", ["swapoutms", "'x'"]),
    ],
)
def test_a_file_of_the_wrong_shape_is_refused(text: str, words: list[str]) -> None:
    error = failure(text)
    for word in words:
        assert word in str(error)


def test_a_mapping_is_taken_in_place_of_config_text() -> None:
    text = changed("      config: |\n        pids: [4242]\n", "      config:\n        pids: [5]\n")
    assert parse(text).target.pids == (5,)


def test_lines_are_counted_from_where_the_text_stands_in_its_file() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed("bandwidth: 100", "bandwidth: no"), file="plugin.yaml", first_line=11)
    assert caught.value.line == 27


def test_an_unreadable_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "sample-configs").glob("memtierd-*.yaml")), ids=lambda path: path.name)
def test_every_sample_configuration_loads(path: Path) -> None:
    assert isinstance(load(path), Spec)


ALIASES = """\
policy:
  name: age
  config:
    pidwatcher: &watcher
      name: filter
      config: {CONFIG}
    tracker: &tracker {name: finder}
"""


@pytest.mark.parametrize(
    "config",
    [
        "{source: *watcher, filters: [{}]}",
        "{source: {name: proc}, filters: [&f {not: *f}]}",
        "{source: {name: proc}, filters: [&f {and: [*f, *f]}]}",
    ],
)
def test_an_alias_of_what_it_stands_in_is_refused(config: str) -> None:
    error = failure(ALIASES.replace("{CONFIG}", config))
    assert "nested too deeply" in str(error)
    assert error.line is not None


def test_aliases_do_not_multiply_without_end() -> None:
    """Twelve lines that stand for ten to the twelfth filters."""
    lines = ["- &f0 {minvmrsskb: 1}"]
    lines += [f"- &f{n} {{and: [{', '.join([f'*f{n - 1}'] * 10)}]}}" for n in range(1, 13)]
    filters = "".join(f"        {line}\n" for line in lines)
    text = ALIASES.replace(" {CONFIG}", "\n        source: {name: proc}\n        filters:\n" + filters.rstrip("\n"))
    error = failure(text)
    assert "more than 10000 mappings" in str(error)


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("policy:", "poliku:", "m.yaml:1: poliku: is not a key here (did you mean policy?"),
        ("    tracker:", "    trackr:", "m.yaml:10: policy.config.trackr: is not a key here (did you mean tracker?"),
    ],
)
def test_a_misspelt_key_is_told_with_its_own_line_not_that_of_what_is_in_it(
    before: str, after: str, place: str
) -> None:
    assert str(failure(changed(before, after))).startswith(place)


def test_merge_keys_give_what_does_not_stand_there_itself() -> None:
    text = """\
policy:
  name: age
  config:
    intervalms: 4000
    pidwatcher: {name: stub}
    tracker: {name: idlepage, config: {<<: [*near, *far], scanintervalms: 7}}
"""
    anchors = "guards:\n  refaults: &near {closeat: 1}\n"
    with pytest.raises(ConfigError, match="closeat: is not a key here"):
        parse(anchors + text.replace("[*near, *far]", "*near"))
    slow = "{pagesinregion: 64, scanintervalms: 9, maxcountperregion: 5}"
    one, other = "&one {pagesinregion: 32}", f"&other {slow}"
    found = parse(text.replace("*near, *far", f"{one}, {other}")).tracker
    assert (found.pages_in_region, found.max_count_per_region, found.scan_interval_ms) == (32, 5, 7)
    with pytest.raises(ConfigError, match="<<: is no mapping"):
        parse(text.replace("[*near, *far]", "3"))


@given(st.text(max_size=200) | st.text(alphabet="policyname: age\n|config{}[]\"'-#&*!%\t", max_size=200))
def test_any_text_is_decoded_or_refused_with_a_config_error(text: str) -> None:
    message = ""
    try:
        parse(text)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
