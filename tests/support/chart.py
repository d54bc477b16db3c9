"""Renders the Helm chart with a real helm, and checks the objects against the schemas of Kubernetes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped,unused-ignore]
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
CHART = REPO / "deploy/helm/nri-memtierd"
KUBERNETES_VERSION = "1.34.0"
HELM_TIMEOUT_S = 120

Object = dict[str, Any]


class KubernetesLoader(yaml.SafeLoader):
    """Reads what helm prints as Kubernetes does: a lone `=` or `<<` is text, which YAML 1.1 has other uses for."""

    yaml_implicit_resolvers = {
        key: [(tag, pattern) for tag, pattern in found if not tag.endswith((":merge", ":value"))]
        for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def parsed(text: str) -> list[Object]:
    """The documents in what helm prints."""
    return [each for each in yaml.load_all(text, KubernetesLoader) if each]


def check_objects(objects: list[Object], kubernetes: str = KUBERNETES_VERSION) -> dict[str, Object]:
    """Against the schemas of Kubernetes, no unknown field allowed; by kind."""
    for each in objects:
        kubernetes_validate.validate(each, kubernetes, strict=True)
    return {each["kind"]: each for each in objects}


def pod_of(objects: dict[str, Object]) -> Object:
    pod: Object = objects["DaemonSet"]["spec"]["template"]["spec"]
    return pod


def container_of(objects: dict[str, Object]) -> Object:
    """The only one."""
    (container,) = pod_of(objects)["containers"]
    found: Object = container
    return found


def run_directory(container: Object) -> str:
    """What the program is given as -run-dir."""
    words: list[str] = container["command"]
    return words[words.index("--run-dir") + 1]


def run_volume(objects: dict[str, Object]) -> Object:
    """The volume of the run directory, without its name."""
    (found,) = [each for each in pod_of(objects)["volumes"] if each["name"] == "run-dir"]
    return {key: value for key, value in found.items() if key != "name"}


def helm() -> str:
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memtier/tools/helm"
    found = shutil.which("helm") or (str(cached) if cached.exists() else None)
    if found is None:
        pytest.skip("helm is not installed: deploy/get-helm builds it once, with Go")
    return found


def run_helm(*words: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Any helm command; `given` is its standard input."""
    command = [helm(), *map(str, words)]
    return subprocess.run(command, input=given or "", capture_output=True, text=True, timeout=HELM_TIMEOUT_S)


def template(
    values: Object | None = None,
    *,
    kubernetes: str = KUBERNETES_VERSION,
    release: str = "r",
    namespace: str = "kube-system",
    chart: Path = CHART,
) -> subprocess.CompletedProcess[str]:
    """`helm template` with a values file, as JSON: every string is taken for a string."""
    words: list[str | Path] = [
        "template",
        release,
        chart,
        "--namespace",
        namespace,
        "--kube-version",
        kubernetes,
        "--values",
        "-",
    ]
    return run_helm(*words, given=json.dumps(values or {}, ensure_ascii=False))


def render(
    values: Object | None = None,
    *,
    kubernetes: str = KUBERNETES_VERSION,
    release: str = "r",
    namespace: str = "kube-system",
) -> dict[str, Object]:
    """The chart's objects by kind, valid for that version of Kubernetes; helm had nothing to complain about."""
    done = template(values, kubernetes=kubernetes, release=release, namespace=namespace)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "a warning"
    return check_objects(parsed(done.stdout), kubernetes)


def refusal(values: Object) -> str:
    """What helm says of values that it must refuse, on one line."""
    done = template(values)
    assert done.returncode != 0, done.stdout
    return re.sub(r"\s+", " ", done.stderr)


def notes(values: Object | None, scratch: Path, *, namespace: str = "kube-system") -> str:
    """NOTES.txt as a user gets it: helm shows it only after an installation, so it becomes an object of a copy."""
    copy = scratch / "chart"
    shutil.copytree(CHART, copy)
    (copy / "templates/NOTES.txt").rename(copy / "NOTES")
    for path in copy.glob("templates/*.yaml"):
        path.unlink()
    (copy / "templates/notes.yaml").write_text('notes: {{ tpl (.Files.Get "NOTES") . | toJson }}\n')
    done = template(values, namespace=namespace, chart=copy)
    assert done.returncode == 0, done.stderr
    return str(yaml.safe_load(done.stdout)["notes"])
