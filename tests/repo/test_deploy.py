"""What is deployed: manifests, chart, unit file and samples are valid and say the same."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import kubernetes_validate  # type: ignore[import-untyped,unused-ignore]
import pytest
import yaml

from memtier_cli.nri_memtierd.classify import classify
from memtier_cli.nri_memtierd.config import load, load_file
from memtier_cli.nri_memtierd.launch.inprocess import check_template
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.privileges import MOVERS, PLUGIN, PLUGIN_NEEDS, TRACKERS, least
from support.chart import CHART, KUBERNETES_VERSION, Object, check_objects, pod_of, render

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "deploy"
REASONS = {need.capability.name.removeprefix("CAP_"): need.why for need in PLUGIN_NEEDS}
CAPABILITIES = sorted(REASONS)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DEPLOY / f"image/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


manifests = script("manifests")


def base() -> dict[str, Object]:
    return check_objects(manifests.render(DEPLOY / "kubernetes/base"))


def test_the_objects_have_the_names_of_the_reference() -> None:
    names = {kind: each["metadata"]["name"] for kind, each in base().items()}
    assert names == {"ConfigMap": "nri-memtierd-config.default", "DaemonSet": "nri-memtierd"}
    assert list(base()["ConfigMap"]["data"]) == ["config.yaml"]


def test_the_pod_has_the_powers_it_needs_and_no_other() -> None:
    (container,) = pod_of(base())["containers"]
    context = container["securityContext"]
    assert context["privileged"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"], "add": CAPABILITIES}
    assert container["resources"]["limits"].keys() == {"cpu", "memory"}
    assert pod_of(base())["automountServiceAccountToken"] is False
    assert "initContainers" not in pod_of(base()), "nothing changes or restarts the runtime"


@pytest.mark.parametrize("folder", ["base", "overlays/e2e"])
def test_the_pod_is_asked_whether_it_is_well_where_the_program_says_so(folder: str) -> None:
    """By the run directory that it was given; ready is another question than alive."""

    def command(objects: dict[str, Object], probe: str) -> list[str]:
        (container,) = pod_of(objects)["containers"]
        found: list[str] = container[probe]["exec"]["command"]
        return found

    objects = check_objects(manifests.render(DEPLOY / "kubernetes" / folder))
    (container,) = pod_of(objects)["containers"]
    run_directory = container["command"][container["command"].index("--run-dir") + 1]
    for probe, question in (
        ("startupProbe", "--healthy"),
        ("livenessProbe", "--healthy"),
        ("readinessProbe", "--ready"),
    ):
        assert command(objects, probe) == ["nri-memtierd", question, "--run-dir", run_directory]


def test_the_powers_are_the_fewest_for_all_trackers_and_movers() -> None:
    assert least(*TRACKERS.values(), *MOVERS.values()) == PLUGIN
    assert yaml.safe_load((CHART / "values.yaml").read_text())["capabilities"] == CAPABILITIES


def test_the_seccomp_profile_has_the_form_of_runtimes_and_the_unit_file_says_the_same() -> None:
    """Only the keys of the OCI runtime specification: a runtime would ignore others, and allow nothing by them."""
    profile = json.loads((DEPLOY / "seccomp/nri-memtierd.json").read_text())
    assert profile.keys() == {"defaultAction", "defaultErrnoRet", "architectures", "syscalls"}
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    names = []
    for rule in profile["syscalls"]:
        assert rule.keys() <= {"names", "action", "args"}
        assert rule["action"] == "SCMP_ACT_ALLOW"
        names += rule["names"]
        if "socket" in rule["names"]:
            (only,) = rule["args"]
            assert (only["index"], only["op"]) == (0, "SCMP_CMP_EQ")
            assert only["value"] in (socket.AF_UNIX, socket.AF_NETLINK)
        else:
            assert "args" not in rule
    assert not {"ptrace", "process_vm_writev", "mount", "setns", "unshare", "init_module", "listen"}.intersection(names)
    unit = re.findall(r"^SystemCallFilter=(.*)$", (DEPLOY / "systemd/nri-memtierd.service").read_text(), re.M)
    assert {name for line in unit for name in line.split()} == set(names)


def test_every_capability_has_its_reason_beside_it() -> None:
    """In the words of the engine's own table."""
    for path in (DEPLOY / "kubernetes/base/daemonset.yaml", CHART / "templates/daemonset.yaml"):
        for name, reason in REASONS.items():
            assert re.search(rf"{name} +(# )?{re.escape(reason)}$", path.read_text(), re.M), f"{path}: {name}"


def test_directories_are_mounted_and_they_exist_on_every_kernel() -> None:
    """The socket is made anew when the runtime restarts; page_idle/bitmap is not there on most kernels."""
    host = {
        each["hostPath"]["path"]: each["hostPath"]["type"] for each in pod_of(base())["volumes"] if "hostPath" in each
    }
    assert host == {
        "/var/run/nri": "DirectoryOrCreate",
        "/sys/fs/cgroup": "Directory",
        "/sys/kernel/mm": "Directory",
        "/run/memtier": "DirectoryOrCreate",
    }


def test_the_e2e_variant_logs_everything_and_shows_its_files_below_tmp_memtierd() -> None:
    objects = check_objects(manifests.render(DEPLOY / "kubernetes/overlays/e2e"))
    (container,) = pod_of(objects)["containers"]
    assert container["command"][-1] == "-vv"
    assert "/host/tmp/memtierd" in container["command"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod_of(objects)["volumes"]}
    assert mounts["run-dir"] == "/host/tmp"
    assert volumes["run-dir"]["hostPath"] == {"path": "/tmp", "type": "Directory"}
    assert volumes.keys() == mounts.keys()


def test_make_images_writes_both_manifests_for_the_image(tmp_path: Path) -> None:
    command = [sys.executable, str(DEPLOY / "image/manifests.py"), "--image", "x/y:z", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("nri-memtierd-deployment.yaml", "nri-memtierd-deployment-e2e.yaml"):
        objects = check_objects(list(yaml.safe_load_all((tmp_path / name).read_text())))
        assert pod_of(objects)["containers"][0]["image"] == "x/y:z"
        assert all(each["metadata"]["namespace"] == "kube-system" for each in objects.values())
        load(objects["ConfigMap"]["data"]["config.yaml"], check_template)


def test_a_patch_that_leads_nowhere_is_an_error() -> None:
    for path in ("/a/0/b", "/a/5", "/x/y", "/z"):
        with pytest.raises(manifests.RenderError):
            manifests.apply({"a": [1]}, {"op": "replace", "path": path, "value": 1})


def test_the_chart_and_the_kustomization_are_the_same_by_default() -> None:
    def comparable(objects: dict[str, Object]) -> dict[str, Object]:
        for each in objects.values():
            each["metadata"].pop("labels")
            each["metadata"].pop("namespace")
        template = objects["DaemonSet"]["spec"]
        template.pop("selector")
        template["template"].pop("metadata")
        if not template["template"]["spec"].get("tolerations"):
            template["template"]["spec"].pop("tolerations", None)
        objects["ConfigMap"]["data"]["config.yaml"] = load(objects["ConfigMap"]["data"]["config.yaml"], check_template)
        return objects

    assert comparable(render()) == comparable(base())


@pytest.mark.parametrize(
    ("key", "texts"),
    [
        ("grace", ["0", "500ms", "1m30s", "1.5h", ".5s", "2d", "10us"]),
        ("bandwidth", ["200", "1.5", "200MiB/s", "0.5 GiB/s", "100MB/s", "512KiB/s"]),
        ("scancpu", ["5%", "2.5 %", "5"]),
    ],
)
def test_the_charts_schema_and_the_program_take_the_same_values(key: str, texts: list[str]) -> None:
    schema = json.loads((DEPLOY / "helm/nri-memtierd/values.schema.json").read_text())
    written = schema["properties"]["config"]["properties"][key]
    pattern = next(one["pattern"] for one in written.get("oneOf", [written]) if "pattern" in one)
    for text in texts:
        assert re.search(pattern, text), text
        load(f"{key}: '{text}'\n", check_template)
    for text in ("ten", "5 apples", "-1s", "-1%", "1x", ""):
        assert not re.search(pattern, text), text
        with pytest.raises(ConfigError):
            load(f"{key}: '{text}'\n", check_template)


def test_the_unit_file_is_one_that_systemd_takes_and_grants_the_same_powers() -> None:
    unit = DEPLOY / "systemd/nri-memtierd.service"
    text = unit.read_text()
    assert re.search(r"^CapabilityBoundingSet=(.*)$", text, re.M)[1].split() == [f"CAP_{name}" for name in CAPABILITIES]  # type: ignore[index]
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "nri-memtierd.service" in line]
    assert not complaints, done.stderr


def test_the_sample_configuration_has_the_references_classes_and_more() -> None:
    config = load_file(REPO / "sample-configs/nri-memtierd.yaml", check_template)
    assert {each.name: each.allow_swap for each in config.classes} == {
        "swap-idle-data": True,
        "track-working-set-size": False,
        "swap-idle-auto": True,
        "swap-auto": True,
        "demote-idle-to-node1": None,
        "track-only": None,
    }


def test_the_test_pod_asks_for_a_class_another_class_and_none() -> None:
    pod = yaml.safe_load((REPO / "sample-configs/nri-memtierd-test-pod.yaml").read_text())
    kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
    config = load_file(REPO / "sample-configs/nri-memtierd.yaml", check_template)
    found = {}
    for container in pod["spec"]["containers"]:
        decision = classify(pod["metadata"]["annotations"], container["name"], "default", config)
        found[container["name"]] = (
            decision.workload_class.name if decision.workload_class else None,
            dict(decision.unified),
        )
    assert found == {
        "c0": ("swap-idle-data", {"memory.swap.max": "max"}),
        "c1": ("track-working-set-size", {"memory.swap.max": "0"}),
        "c2": (None, {}),
    }


@pytest.mark.parametrize("name", ["test-pod.sh", "get-helm"])
def test_shell_scripts_have_no_syntax_error(name: str) -> None:
    assert os.access(DEPLOY / name, os.X_OK)
    subprocess.run(["sh", "-n", str(DEPLOY / name)], check=True)
