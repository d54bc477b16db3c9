"""Whole configuration files around one component, for tests that try out its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

Values = Mapping[str, Any]

WATCHER: Values = {"name": "pidlist", "config": {"pids": [4242]}}
FINDER: Values = {"name": "finder"}
STUB: Values = {"name": "stub"}
BASES: Mapping[str, Values] = {
    "file": {"policy": STUB},
    "block": {"name": "idlepage"},
    "policy.age": {"pidwatcher": WATCHER, "tracker": FINDER},
    "policy.auto": {"pidwatcher": WATCHER, "goal": {"save": "30%"}},
    "policy.avoid-oom": {"cgroups": ["/sys/fs/cgroup/x"]},
    "policy.demote-idle": {"pidwatcher": WATCHER, "idlenumas": [1]},
    "policy.heat": {"pidwatcher": WATCHER, "tracker": FINDER},
    "policy.ratio": {"pidwatcher": WATCHER, "ratio": 0.5},
    "policy.reclaim": {"cgroups": ["/sys/fs/cgroup/x"], "goal": {"psi": "0.1%"}},
    "pidwatcher.cgroups": {"cgroups": ["/sys/fs/cgroup/x"]},
    "pidwatcher.filter": {"source": {"name": "proc"}, "filters": [{}]},
    "pidwatcher.pidlist": {"pids": [4242]},
    "tracker.multi": {"trackers": [FINDER]},
    "forecaster.stdio": {"command": ["cat"]},
    "forecaster.trace": {"file": "/nowhere/heat.trace"},
    "routine.statactions": {
        "intervalms": 1000,
        "intervalcommand": ["stats"],
        "intervalcommandrunner": "memtier",
        "pageoutcommand": ["stats"],
        "pageoutcommandrunner": "memtier",
    },
}
"""The least that each component needs; the others need nothing."""


def base(component: str) -> dict[str, Any]:
    """Values with which the component is complete."""
    return dict(BASES.get(component, {}))


def placed(component: str, values: Values) -> tuple[dict[str, Any], str]:
    """(a whole document with the component in it, the key path of the component)."""
    kind, _, name = component.partition(".")
    age: dict[str, Any] = {"name": "age", "config": base("policy.age")}
    heat: dict[str, Any] = {"name": "heat", "config": base("policy.heat")}
    block = {"name": name, "config": values}
    inside = "policy.config."
    if component == "file":
        return dict(values), ""
    if component == "block":
        return {"policy": {**age, "config": {**age["config"], "tracker": values}}}, inside + "tracker"
    if kind == "policy":
        return {"policy": block}, "policy.config"
    if kind == "mover":
        return {"policy": {**age, "config": {**age["config"], "mover": values}}}, inside + "mover"
    if kind == "heatmap":
        return {"policy": {**heat, "config": {**heat["config"], "heatmap": values}}}, inside + "heatmap"
    if kind == "pidwatcher":
        return {"policy": {**age, "config": {**age["config"], "pidwatcher": block}}}, inside + "pidwatcher.config"
    if kind == "filter":
        watcher = {"name": "filter", "config": {"source": {"name": "proc"}, "filters": [values]}}
        where = inside + "pidwatcher.config.filters[0]"
        return {"policy": {**age, "config": {**age["config"], "pidwatcher": watcher}}}, where
    if kind == "tracker":
        return {"policy": {**age, "config": {**age["config"], "tracker": block}}}, inside + "tracker.config"
    if kind == "forecaster":
        return {"policy": {**heat, "config": {**heat["config"], "forecaster": block}}}, inside + "forecaster.config"
    if kind == "routine":
        return {"policy": STUB, "routines": [block], "allowprograms": True}, "routines[0].config"
    if component == "guards.threshold":
        return {"policy": STUB, "guards": {"swapfill": values}}, "guards.swapfill"
    if component == "guards.skip":
        return {"policy": STUB, "guards": {"skip": values}}, "guards.skip"
    assert component == "guards", component
    return {"policy": STUB, "guards": values}, "guards"


def text_of(document: Values) -> str:
    """As a file: each `config` is text, as the reference has it."""

    def written(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: _dump(written(inner)) if key == "config" and isinstance(inner, Mapping) else written(inner)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [written(inner) for inner in value]
        return value

    return _dump(written(document))


class _Dumper(yaml.SafeDumper):
    """Without anchors, and long texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


class Plain(str):
    """Text that stands in the file as it is, without quotes: numbers that Python cannot write."""


def _represent_plain(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    tag: str = dumper.resolve(yaml.ScalarNode, str(text), (True, False))  # type: ignore[no-untyped-call]
    return dumper.represent_scalar(tag, str(text))


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Plain, _represent_plain)


def _dump(value: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1_000_000)
    return text
