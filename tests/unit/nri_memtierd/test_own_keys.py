"""Policy auto and guards in the templates of classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtier_cli.nri_memtierd.config import load, load_file, render
from memtier_cli.nri_memtierd.launch.inprocess import check_template
from memtier_cli.nri_memtierd.launch.process import check_template as check_template_of_a_process
from memtier_engine.config.files import Spec, parse
from memtier_engine.errors import ConfigError
from memtier_engine.policies.auto import AutoPolicyConfig
from memtier_engine.policies.goals import Goal

SAMPLE = Path(__file__).parents[3] / "sample-configs/nri-memtierd.yaml"
CGROUP = "/sys/fs/cgroup/kubepods.slice/x"
AS_TEXT = """
classes:
- name: own
  memtierdconfig: |
    policy:
      name: auto
      config: |
        goal: "psi: 0.1%"
        pidwatcher:
          name: cgroups
          config: |
            cgroups: [$CGROUP2_ABS_PATH]
    guards:
      refaults: null
      swapfill: {closeat: 80}
"""
AS_MAPPING = """
classes:
- name: own
  memtierdconfig:
    policy:
      name: auto
      config:
        goal: {psi: 0.1%}
        pidwatcher: {name: cgroups, config: {cgroups: [$CGROUP2_ABS_PATH]}}
    guards: {refaults: null, swapfill: {closeat: 80}}
"""


def spec_of(template: str | None) -> Spec:
    assert template is not None
    return parse(render(template, cgroup=CGROUP, stats="/run/x/memtierd.stats"))


@pytest.mark.parametrize("text", [AS_TEXT, AS_MAPPING], ids=["text", "mapping"])
def test_a_class_may_have_a_goal_and_guards(text: str) -> None:
    spec = spec_of(load(text, check_template).classes[0].template)
    assert isinstance(spec.policy, AutoPolicyConfig)
    assert spec.policy.goal == Goal("psi", 0.1)
    assert spec.target.cgroups == (CGROUP,)
    assert spec.guards.refaults is None
    assert spec.guards.swap_fill is not None
    assert spec.guards.swap_fill.close_at == 80


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ('"psi: 0.1%"', '"speed: 3"', "policy.config.goal"),
        ("closeat: 80", "closeat: 800", "guards.swapfill.closeat"),
        ("refaults: null", "refault: null", "guards.refault"),
    ],
)
def test_a_wrong_one_is_refused_with_the_plugin_s_file_and_line(old: str, new: str, path: str) -> None:
    assert old in AS_TEXT
    with pytest.raises(ConfigError) as caught:
        load(AS_TEXT.replace(old, new), check_template, file="config.yaml")
    assert caught.value.key_path == f"classes[0].memtierdconfig.{path}"
    wanted = next(number for number, line in enumerate(AS_TEXT.replace(old, new).splitlines(), 1) if new in line)
    assert (caught.value.file, caught.value.line) == ("config.yaml", wanted)


_RUNS_DATE = "    routines:\n    - name: statactions\n      config: |\n        intervalms: 1000\n"
_RUNS_DATE += "        intervalcommand: [date]\n"


@pytest.mark.parametrize("switch", ["", "    allowprograms: true\n"])
def test_templates_run_no_programs(switch: str) -> None:
    """A class's routine would run them as root for every pod that names the class. No switch is named: none helps."""
    with pytest.raises(ConfigError, match="only `intervalcommandrunner: memtier` is supported here") as caught:
        load(AS_TEXT + switch + _RUNS_DATE, check_template)
    assert "allow" not in str(caught.value).replace("whatever allows them", "")


def test_templates_for_memtierd_processes_run_programs_where_they_say_so() -> None:
    load(AS_TEXT + "    allowprograms: true\n" + _RUNS_DATE, check_template_of_a_process)
    with pytest.raises(ConfigError, match="put `allowprograms: true` at the top of the template") as caught:
        load(AS_TEXT + _RUNS_DATE, check_template_of_a_process)
    assert "-allow-programs" not in str(caught.value)  # nobody can give the flag there
    assert caught.value.line == (AS_TEXT + _RUNS_DATE).count("\n")


def test_the_sample_has_a_class_with_both() -> None:
    config = load_file(SAMPLE, check_template)
    found = config.find("swap-auto")
    assert found is not None
    spec = spec_of(found.template)
    assert isinstance(spec.policy, AutoPolicyConfig)
    assert spec.guards.start_grace_s == 60
