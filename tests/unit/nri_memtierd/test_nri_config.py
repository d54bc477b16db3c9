"""The configuration file of nri-memtierd: what it may say, and how it complains."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from memtier_cli.nri_memtierd.config import PluginConfig, WorkloadClass, load, load_file, render, template_text
from memtier_engine.errors import ConfigError


def accept(text: str) -> None:
    """A check that has no objections."""


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, accept, file="c.yaml")
    return str(caught.value)


REFERENCE = """\
classes:
- name: swap-idle-data
  allowswap: true
  memtierdconfig: |
    policy:
      name: age
      config: |
        pidwatcher:
          name: cgroups
          config: |
            cgroups:
              - $CGROUP2_ABS_PATH
- name: none
"""


def test_the_reference_format_is_read() -> None:
    config = load(REFERENCE, accept)
    first, second = config.classes
    assert first.name == "swap-idle-data"
    assert first.allow_swap is True
    assert first.template is not None
    assert first.template.startswith("policy:\n  name: age\n")
    assert second == WorkloadClass("none", None, None, None)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "classes:\n", "null\n"])
def test_a_file_without_content_has_no_classes(text: str) -> None:
    assert load(text, accept) == PluginConfig()


def test_keys_are_matched_without_regard_to_case() -> None:
    config = load("Classes: [{Name: a, AllowSwap: no, memtierdConfig: 'x: 1', NameSpaces: [b]}]", accept)
    assert config.classes == (WorkloadClass("a", False, "x: 1", ("b",)),)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), ("yes", True), ("On", True), ("false", False), ("off", False), ("", None), ("~", None)],
)
def test_allowswap_takes_the_booleans_of_yaml_1_1(value: str, expected: bool | None) -> None:
    assert load(f"classes: [{{name: a, allowswap: {value}}}]", accept).classes[0].allow_swap is expected


def test_a_number_as_name_is_its_text() -> None:
    assert load("classes: [{name: 010}]", accept).classes[0].name == "010"


def test_a_name_is_found_exactly() -> None:
    config = load("classes: [{name: a}, {name: A}]", accept)
    assert config.find("A") is config.classes[1]
    assert config.find("b") is None


def test_merge_keys_and_anchors_work() -> None:
    config = load("classes:\n- &a {name: a, allowswap: true}\n- {<<: *a, name: b}\n", accept)
    assert config.classes[1] == WorkloadClass("b", True)


TOP = "use classes, allowannotations, grace, bandwidth, scancpu"
OF_CLASS = "use a mapping with name, allowswap, memtierdconfig, namespaces"
NO_NAME = "is missing or empty (a pod names the class by it)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [{name: a}", "c.yaml:1: is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a\n", "c.yaml:1: is 'a' (use a mapping with classes, allowannotations, grace, bandwidth, scancpu)"),
        ("x: 1\n", f"c.yaml:1: x: no such key ({TOP})"),
        ("klasses: []\n", "c.yaml:1: klasses: no such key (did you mean classes?)"),
        ("classes: 3\n", "c.yaml:1: classes: is '3' (use a list)"),
        ("classes:\n- 3\n", f"c.yaml:2: classes[0]: is '3' ({OF_CLASS})"),
        ("classes:\n- allowswap: true\n", f"c.yaml:2: classes[0].name: {NO_NAME}"),
        ("classes:\n- name: ''\n", f"c.yaml:2: classes[0].name: {NO_NAME}"),
        ("classes:\n- name: [a]\n", "c.yaml:2: classes[0].name: is a list (use text)"),
        (
            "classes:\n- name: a\n- name: a\n",
            "c.yaml:3: classes[1].name: value 'a' is taken by line 2 (give each class a name of its own)",
        ),
        ("classes:\n- name: a\n  Name: b\n", "c.yaml:3: classes[0].Name: is there twice (remove one)"),
        (
            "classes:\n- name: a\n  allowswap: 'true'\n",
            "c.yaml:3: classes[0].allowswap: value 'true' (use true, false (not quoted), or leave it out)",
        ),
        (
            "classes:\n- name: a\n  allowswap: {}\n",
            "c.yaml:3: classes[0].allowswap: value a mapping (use true, false (not quoted), or leave it out)",
        ),
        (
            "classes:\n- name: a\n  memtierdconfig: 7\n",
            "c.yaml:3: classes[0].memtierdconfig: is '7' (use text (|) or a mapping of memtierd's keys)",
        ),
        (
            "classes:\n- name: a\n  memtierdconfig: |\n    cgroups: [$CGROUP2_PATH]\n",
            "c.yaml:3: classes[0].memtierdconfig: value $CGROUP2_PATH"
            " (use $CGROUP2_ABS_PATH or $MEMTIERD_SWAP_STATS_PATH)",
        ),
        (
            "classes:\n- name: a\n  namespaces: [Kube_System]\n",
            "c.yaml:3: classes[0].namespaces[0]: value 'Kube_System' (use names of namespaces)",
        ),
        ("grace: 10\n", "c.yaml:1: grace: value '10' (write it like 500ms, 10s, 5m or 1m30s)"),
        ("grace: -3s\n", "c.yaml:1: grace: value '-3s' (write it like 500ms, 10s, 5m or 1m30s)"),
        ("bandwidth: 0\n", "c.yaml:1: bandwidth: value '0' (use MiB/s above 0, like 200 or 200MiB/s)"),
        ("scancpu: 0\n", "c.yaml:1: scancpu: value '0' (use percent of one core above 0, like 5%)"),
        ("scancpu: half\n", "c.yaml:1: scancpu: value 'half' (use percent of one core above 0, like 5%)"),
        ("bandwidth: 3 GB\n", "c.yaml:1: bandwidth: value '3 GB' (use MiB/s above 0, like 200 or 200MiB/s)"),
        (
            "allowannotations: [memory.high, cpu.max]\n",
            "c.yaml:1: allowannotations[1]: value 'cpu.max' (use any of memory.high, memory.low, memory.max,"
            " memory.min, memory.swap.high, memory.swap.max, memory.zswap.max)",
        ),
        ("a: !!python/object:os.system {}\n", f"c.yaml:1: a: no such key ({TOP})"),
    ],
)  # fmt: skip
def test_an_error_names_file_line_key_path_value_and_what_is_allowed(text: str, message: str) -> None:
    assert error_of(text) == message


def test_the_node_wide_keys_have_units() -> None:
    config = load("grace: 1m30s\nbandwidth: 50MiB/s\nallowannotations: []\n", accept)
    assert config == PluginConfig(grace_s=90.0, bandwidth_mib_per_s=50.0, allow_annotations=())
    assert load("grace: 0\nbandwidth: 20\n", accept) == PluginConfig(bandwidth_mib_per_s=20.0)
    for text in ("2.5", "2.5%", "2.5 %"):
        assert load(f"scancpu: {text}\n", accept) == PluginConfig(scan_cpu_share=0.025)


def test_what_pods_may_set_is_by_default_what_the_reference_allows() -> None:
    assert load("", accept).allow_annotations == ("memory.swap.max", "memory.high")


def test_every_template_is_checked_with_values_in_place_of_the_variables() -> None:
    seen: list[str] = []
    load(REFERENCE, seen.append)
    (text,) = seen
    assert "$" not in text
    cgroups = yaml.safe_load(yaml.safe_load(yaml.safe_load(text)["policy"]["config"])["pidwatcher"]["config"])
    assert cgroups == {"cgroups": ["/sys/fs/cgroup/example"]}


def test_an_error_in_a_template_names_the_line_of_the_file() -> None:
    def refuse(text: str) -> None:
        raise ConfigError("value 0", key_path="policy.config.intervalms", line=4, hint="use 1 or more")

    with pytest.raises(ConfigError) as caught:
        load(REFERENCE, refuse, file="c.yaml")
    assert str(caught.value) == (
        "c.yaml:8: classes[0].memtierdconfig.policy.config.intervalms: value 0 (use 1 or more)"
    )


def test_a_template_may_be_a_mapping_all_the_way_down() -> None:
    """Inner configurations become the strings that memtierd's files have there."""
    text = """
classes:
- name: a
  memtierdconfig:
    policy:
      name: age
      config:
        intervalms: 1000
        pidwatcher: {name: cgroups, config: {cgroups: [$CGROUP2_ABS_PATH]}}
        mover: {intervalms: 20, bandwidth: 50}
    routines:
    - {name: statactions, config: {intervalms: 5, intervalcommand: [policy, -dump, "accessed"]}}
"""
    template = load(text, accept).classes[0].template
    assert template is not None
    outer = yaml.safe_load(template)
    policy = yaml.safe_load(outer["policy"]["config"])
    assert policy["mover"] == {"intervalms": 20, "bandwidth": 50}
    assert yaml.safe_load(policy["pidwatcher"]["config"]) == {"cgroups": ["$CGROUP2_ABS_PATH"]}
    assert yaml.safe_load(outer["routines"][0]["config"])["intervalcommand"] == ["policy", "-dump", "accessed"]
    assert template_text(yaml.safe_load(template)) == template, "strings stay as they are"


def test_an_empty_template_starts_nothing() -> None:
    assert load("classes: [{name: a, memtierdconfig: ''}]", accept).classes[0].template is None


def test_variables_are_replaced_everywhere_and_without_quoting() -> None:
    text = render("a: $CGROUP2_ABS_PATH\nb: $CGROUP2_ABS_PATH/x $MEMTIERD_SWAP_STATS_PATH", cgroup="/c", stats="/s")
    assert text == "a: /c\nb: /c/x /s"


@given(st.text(alphabet="ab/\n\"'#:{}[]&*!|>% \\-.,@`\t", min_size=1, max_size=12))
def test_no_value_can_change_what_the_template_says(value: str) -> None:
    """Cgroup names of runtimes that do not follow Kubernetes could hold anything but '/' and NUL."""
    try:
        text = render("cgroups:\n- $CGROUP2_ABS_PATH\n", cgroup=f"/sys/fs/cgroup/{value}", stats="")
    except ConfigError:
        return
    assert yaml.safe_load(text) == {"cgroups": [f"/sys/fs/cgroup/{value}"]}


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read: No such file or directory"):
        load_file(path, accept)
    path.write_bytes(b"classes: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_file(path, accept)
    path.write_text("a: 1\n---\nb: 2\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_file(path, accept)


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_configuration_error(text: str) -> None:
    message = ""
    try:
        load(text, accept)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
