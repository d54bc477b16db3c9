"""The Helm chart takes any value that its schema allows, and says of any other what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from memtier_cli.nri_memtierd.config import load
from memtier_cli.nri_memtierd.launch.inprocess import check_template
from support.chart import CHART, Object, container_of, parsed, pod_of, refusal, render

SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text())
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
VALUES: Object = yaml.safe_load((CHART / "values.yaml").read_text())

Path = tuple[str, ...]
"""Keys from the outermost in; `[]` is the first item of a list."""


def resolved(schema: Object) -> Object:
    if "$ref" in schema:
        found: Object = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
        return found
    return schema


def optional(schema: Object, path: Path = ()) -> Iterator[Path]:
    """Every key that the schema knows and does not require, with its path."""
    for key, inner in schema.get("properties", {}).items():
        inner, here = resolved(inner), (*path, key)
        if key not in schema.get("required", ()):
            yield here
        yield from optional(inner, here)
        if "items" in inner:
            yield from optional(resolved(inner["items"]), (*here, "[]"))


def required(path: Path) -> Object:
    """What an item of the list at `path` must have."""
    schema = SCHEMA
    for key in path:
        schema = resolved(schema["items"] if key == "[]" else schema["properties"][key])
    return dict.fromkeys(schema.get("required", ()), "x")


def values_with(path: Path, value: object) -> Object:
    """Values with that one key set, and what its neighbours in a list must have."""
    built: Any = value
    for depth in range(len(path) - 1, -1, -1):
        built = [built] if path[depth] == "[]" else {**required(path[:depth]), path[depth]: built}
    found: Object = built
    return found


OPTIONAL = list(optional(SCHEMA))
NAMES = [".".join(path) for path in OPTIONAL]


def test_the_schema_knows_the_keys_of_the_values_file_and_requires_none() -> None:
    def keys(values: Object, path: Path = ()) -> Iterator[Path]:
        for key, value in values.items():
            yield (*path, key)
            if isinstance(value, dict):
                yield from keys(value, (*path, key))

    assert set(keys(VALUES)) <= set(OPTIONAL)
    assert "required" not in SCHEMA
    assert len(OPTIONAL) > 60


@pytest.mark.parametrize("path", OPTIONAL, ids=NAMES)
def test_null_is_valid_for_any_value(path: Path) -> None:
    """Kubernetes' schemas and the program's own checks see what is rendered."""
    objects = render(values_with(path, None))
    load(objects["ConfigMap"]["data"]["config.yaml"], check_template)


def test_null_everywhere_is_the_default_without_resources_and_classes() -> None:
    """Also what `helm upgrade --reuse-values` gives, from a release that knew none of the values."""
    objects, default = render(dict.fromkeys(SCHEMA["properties"])), render()
    assert container_of(default).pop("resources")
    assert objects["DaemonSet"] == default["DaemonSet"]
    assert load(objects["ConfigMap"]["data"]["config.yaml"], check_template).classes == ()


def test_nothing_can_be_asked_for() -> None:
    """By what is empty, where null is the default."""
    container = container_of(
        render(
            {"capabilities": [], "appArmorProfile": "", "seccompProfile": "", "verbosity": 0},
        )
    )
    context = container["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert not {"appArmorProfile", "seccompProfile"} & context.keys()
    assert not {"-v", "-vv"}.intersection(container["command"])


def test_null_takes_one_limit_away_or_all_of_them() -> None:
    """How else would one get rid of a limit: Helm merges mappings."""
    assert container_of(render({"resources": {"limits": {"cpu": None}}}))["resources"]["limits"] == {"memory": "512Mi"}
    for limits in (None, {"cpu": None, "memory": None}):
        resources = container_of(render({"resources": {"limits": limits}}))["resources"]
        assert resources == {"requests": {"cpu": "250m", "memory": "100Mi"}}


@pytest.mark.parametrize("path", OPTIONAL, ids=NAMES)
def test_what_is_empty_is_valid_or_refused_and_never_broken_yaml(path: Path) -> None:
    """What the schema refuses is refused before anything is rendered."""
    empties: tuple[object, ...] = ({}, [], "")
    for empty in empties:
        values = values_with(path, empty)
        if VALIDATOR.is_valid(values):
            render(values)


OURS = [path for path in OPTIONAL if path[0] != "global"]
"""`global` is Helm's own: what all charts of an umbrella chart know."""


@pytest.mark.parametrize("path", OURS, ids=[".".join(path) for path in OURS])
def test_a_key_of_another_name_is_refused_by_its_name(path: Path) -> None:
    said = refusal(values_with((*path[:-1], f"{path[-1]}Typo"), "x"))
    assert f"additional properties '{path[-1]}Typo' not allowed" in said


def wrong_types(schema: Object) -> list[object]:
    kinds = schema.get("type", [type_of(each) for each in schema.get("enum", ())])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    samples: dict[str, object] = {"string": "x y", "number": 1.5, "boolean": True, "array": ["x"], "object": {"x": "y"}}
    return [sample for kind, sample in samples.items() if kind not in kinds]


def type_of(value: object) -> str:
    return {str: "string", type(None): "null"}[type(value)]


def schema_of(path: Path) -> Object:
    schema = SCHEMA
    for key in path:
        schema = resolved(schema["items"] if key == "[]" else schema["properties"][key])
    return schema


@pytest.mark.parametrize("path", OPTIONAL, ids=NAMES)
def test_a_value_of_another_type_is_refused_with_its_place(path: Path) -> None:
    first, *others = wrong_types(schema_of(path))
    assert f"at '/{'/'.join(path).replace('[]', '0')}" in refusal(values_with(path, first))
    for value in others:  # the same by another reader of schemas, which is faster
        assert not VALIDATOR.is_valid(values_with(path, value)), value


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image": {"name": ""}}, "at '/image/name'"),
        ({"image": {"name": "a b"}}, "at '/image/name'"),
        ({"image": {"tag": 1.1}}, "at '/image/tag': got number, want string or null"),
        ({"image": {"tag": "a:b"}}, "at '/image/tag'"),
        ({"image": {"pullPolicy": "Sometimes"}}, "at '/image/pullPolicy'"),
        ({"imagePullSecrets": ["mine"]}, "at '/imagePullSecrets/0': got string, want object"),
        ({"nri": {"plugin": {"index": 100}}}, "at '/nri/plugin/index'"),
        ({"nri": {"runtime": {"config": {"pluginRequestTimeout": "1s"}}}}, "at '/nri/runtime/config/pluginRequestTi"),
        ({"onUnknownClass": "maybe"}, "at '/onUnknownClass'"),
        ({"classes": [{"allowswap": True}]}, "at '/classes/0': missing property 'name'"),
        ({"classes": [{"name": "a", "namespaces": ["A_b"]}]}, "at '/classes/0/namespaces/0'"),
        ({"classes": [{"name": 123}]}, "at '/classes/0/name': got number, want string"),
        ({"config": {"grace": "ten"}}, "at '/config/grace'"),
        ({"config": {"bandwidth": 0}}, "at '/config/bandwidth'"),
        ({"config": {"allowannotations": ["memory.hihg"]}}, "at '/config/allowannotations/0'"),
        ({"verbosity": 3}, "at '/verbosity'"),
        ({"resources": {"memory": "100 Mi"}}, "at '/resources/memory'"),
        ({"resources": {"limits": {"cpu": -1}}}, "at '/resources/limits/cpu'"),
        ({"outputDir": "/x\ny"}, "at '/outputDir'"),
        ({"seccompLocalhostProfile": "/x"}, "at '/seccompLocalhostProfile'"),
        ({"podAnnotations": {"a": True}}, "at '/podAnnotations/a': got boolean, want string or null"),
        ({"nodeSelector": {"a": 1}}, "at '/nodeSelector/a': got number, want string or null"),
        ({"nodeSelector": ["a"]}, "at '/nodeSelector'"),
        ({"tolerations": [{"operator": "Exist"}]}, "at '/tolerations/0/operator'"),
        ({"updateStrategy": {"rollingUpdate": {"maxUnavailable": 0}}}, "at '/updateStrategy/rollingUpdate/maxUnav"),
        ({"capabilities": ["SYS_ADMIN", "SYS_ADMIN"]}, "at '/capabilities'"),
        ({"capabilities": ["CAP_SYS_ADMIN"]}, "capabilities: CAP_SYS_ADMIN: Kubernetes' names have no CAP_: write SYS"),
        ({"seccompLocalhostProfile": "a/../b"}, 'seccompLocalhostProfile is "a/../b": give a path below'),
        (
            {"classes": [{"name": "a"}, {"name": "b"}, {"name": "a"}]},
            'classes[2].name is "a", as that of classes[0]: give each class a name of its own',
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_place(values: Object, said: str) -> None:
    found = refusal(values).replace("null or string", "string or null")
    assert said in found


ODD = (
    *("yes", "no", "on", "true", "null", "~", "", "123", "1.10", "0x1f", "1e3", "1_000", "2026-11-30", "=", "<<"),
    *(
        "a: b",
        "a:",
        ":a",
        "#x",
        "x #y",
        "'",
        '"',
        "a\"b'c",
        "\\",
        "\\n",
        "- a",
        "? a",
        "*a",
        "&a",
        "!a",
        "%a",
        "@a",
        "`a",
    ),
    *("[a", "{a}", "{{ .Values.x }}", "a, b", "> a", "| a", "---", "...", " a ", "\ta", "ü", "\u00a0", "\u2028", "🦀"),
)
LINES = ("a\nb", "a\n", "\na", " a\nb\n\n", "a\r\nb", "\n", "a \n b", "a: b\n#c\n", "\x07", "---\na")


def test_any_text_arrives_as_it_is_where_many_fit() -> None:
    texts = [each for each in (*ODD, *LINES) if each != "\u2028"]  # Helm's own toYaml makes an error of it in a list
    by_name = {f"n{at}": text for at, text in enumerate(texts)}
    term = {"matchExpressions": [{"key": "k", "operator": "In", "values": list(texts)}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    tolerations = [{"key": "k", "operator": "Equal", "value": text} for text in texts]
    secrets = [{"name": text} for text in texts if text]
    classes = [{"name": text, "memtierdconfig": text} for text in texts if text]
    mapping = {"name": "mapping", "memtierdconfig": {"policy": dict(by_name)}}
    objects = render(
        {
            "podAnnotations": by_name,
            "podLabels": by_name,
            "nodeSelector": by_name,
            "affinity": affinity,
            "tolerations": tolerations,
            "imagePullSecrets": secrets,
            "classes": [*classes, mapping],
        }
    )
    pod, meta = pod_of(objects), objects["DaemonSet"]["spec"]["template"]["metadata"]
    assert meta["annotations"] == by_name
    assert {key: value for key, value in meta["labels"].items() if "/" not in key} == by_name
    assert {key: value for key, value in pod["nodeSelector"].items() if "/" not in key} == by_name
    assert pod["affinity"] == affinity
    assert pod["tolerations"] == tolerations
    assert pod["imagePullSecrets"] == secrets
    assert parsed(objects["ConfigMap"]["data"]["config.yaml"])[0]["classes"] == [*classes, mapping]


@pytest.mark.parametrize("text", [each for each in (*ODD, *LINES) if each], ids=repr)
def test_any_text_arrives_as_it_is_where_one_fits(text: str) -> None:
    one_line = text if text.isprintable() and not text.startswith("/") else "x"
    objects = render(
        {
            "priorityClassName": text,
            "seLinuxOptions": {"type": text, "level": text},
            "seccompLocalhostProfile": one_line,
            "outputDir": f"/opt/{one_line}",
        }
    )
    context = container_of(objects)["securityContext"]
    assert pod_of(objects)["priorityClassName"] == text
    assert context["seLinuxOptions"] == {"type": text, "level": text}
    assert context["seccompProfile"]["localhostProfile"] == one_line
    (volume,) = [each for each in pod_of(objects)["volumes"] if each["name"] == "run-dir"]
    assert volume["hostPath"]["path"] == f"/opt/{one_line}/nri-memtierd"
