"""The Helm chart: what its values become, rendered by a real helm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from memtier_cli.nri_memtierd.config import load
from memtier_cli.nri_memtierd.launch.inprocess import check_template
from memtier_cli.nri_memtierd.runpath import SYSTEM_DIRECTORIES, SYSTEM_TREES, RunDirError, checked_path
from support.chart import (
    CHART,
    REPO,
    container_of,
    notes,
    pod_of,
    refusal,
    render,
    run_directory,
    run_helm,
    run_volume,
    template,
)

OWN = "localhost/memtier/nri-memtierd"
GO_PLUGIN = "ghcr.io/containers/nri-plugins/nri-memtierd"
REFERENCE = {
    "image": {"name": GO_PLUGIN, "pullPolicy": "Always"},
    "resources": {"cpu": "250m", "memory": "100Mi"},
    "outputDir": "",
    "nri": {"plugin": {"index": 90}, "runtime": {"patchConfig": False}},
    "initContainerImage": {"name": "ghcr.io/containers/nri-plugins/nri-config-manager", "pullPolicy": "Always"},
    "tolerations": [],
    "affinity": [],
    "nodeSelector": [],
    "podPriorityClassNodeCritical": True,
}
"""Keys and defaults of the values file of the Go plugin's chart, v0.14.0."""
APPARMOR = "container.apparmor.security.beta.kubernetes.io/nri-memtierd"


def test_helm_finds_nothing_to_complain_about() -> None:
    done = run_helm("lint", "--strict", "--kube-version", "1.34.0", CHART)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


def test_the_references_values_file_gives_what_the_chart_gives_without_it() -> None:
    assert render(REFERENCE) == render()


def test_what_the_references_values_set_is_set() -> None:
    timeouts = {"pluginRegistrationTimeout": "10s", "pluginRequestTimeout": "5s"}
    term = {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    tolerations = [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists", "effect": "NoSchedule"}]
    objects = render(
        {
            "image": {"name": "x/y", "tag": "v1", "pullPolicy": "Always"},
            "resources": {"cpu": "100m", "memory": "50Mi"},
            "nri": {"plugin": {"index": 7}, "runtime": {"patchConfig": True, "config": timeouts}},
            "initContainerImage": {"name": "a/b", "tag": "c", "pullPolicy": "Always"},
            "tolerations": tolerations,
            "affinity": affinity,
            "nodeSelector": {"tier": "slow"},
            "podPriorityClassNodeCritical": False,
            "outputDir": "/var/lib/memtierd",
        }
    )
    pod, container = pod_of(objects), container_of(objects)
    assert (container["image"], container["imagePullPolicy"]) == ("x/y:v1", "Always")
    assert container["command"][:3] == ["nri-memtierd", "--idx", "07"]
    assert container["resources"]["requests"] == {"cpu": "100m", "memory": "50Mi"}
    assert pod["tolerations"] == tolerations
    assert pod["affinity"] == affinity
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", "tier": "slow"}
    assert "priorityClassName" not in pod
    assert "initContainers" not in pod
    assert run_directory(container) == "/run-dir"
    assert run_volume(objects)["hostPath"] == {"path": "/var/lib/memtierd/nri-memtierd", "type": "DirectoryOrCreate"}


@pytest.mark.parametrize(
    ("image", "reference", "policy"),
    [
        ({}, f"{OWN}:devel", "IfNotPresent"),
        ({"tag": "7"}, f"{OWN}:7", "IfNotPresent"),
        ({"name": "reg:5000/x", "tag": "v1"}, "reg:5000/x:v1", "IfNotPresent"),
        ({"name": "reg:5000/x:v1", "pullPolicy": "Always"}, "reg:5000/x:v1", "Always"),
        ({"name": f"reg/x@sha256:{'0' * 64}"}, f"reg/x@sha256:{'0' * 64}", "IfNotPresent"),
        ({"name": GO_PLUGIN, "tag": "v0.14.0", "pullPolicy": "Always"}, f"{OWN}:devel", "IfNotPresent"),
        ({"name": f"mirror:5000/{GO_PLUGIN}:v0.14.0"}, f"{OWN}:devel", "IfNotPresent"),
        ({"name": "reg/nri-memtierd", "tag": "v1", "pullPolicy": None}, "reg/nri-memtierd:v1", "IfNotPresent"),
    ],
)
def test_name_tag_and_pull_policy_of_the_image_belong_together(
    image: dict[str, Any], reference: str, policy: str
) -> None:
    """The Go plugin's image is another program than the one whose flags the chart gives."""
    container = container_of(render({"image": image}))
    assert (container["image"], container["imagePullPolicy"]) == (reference, policy)


def test_an_image_that_is_not_complete_or_twice_is_refused() -> None:
    assert 'image.name is "reg:5000/x", but image.tag is not set: say which' in refusal(
        {"image": {"name": "reg:5000/x"}}
    )
    both = refusal({"image": {"name": "x:1", "tag": "2"}})
    assert 'image.tag is "2", but image.name "x:1" has a tag or digest already: leave one of them out' in both


def test_pods_get_the_secrets_annotations_labels_and_priority_that_are_given() -> None:
    objects = render(
        {
            "imagePullSecrets": [{"name": "mine"}],
            "podAnnotations": {"a/b": "1"},
            "podLabels": {"team": "mm"},
            "priorityClassName": "high",
        }
    )
    pod, meta = pod_of(objects), objects["DaemonSet"]["spec"]["template"]["metadata"]
    assert pod["imagePullSecrets"] == [{"name": "mine"}]
    assert pod["priorityClassName"] == "high", "though podPriorityClassNodeCritical is true"
    assert meta["annotations"] == {"a/b": "1"}
    selector = objects["DaemonSet"]["spec"]["selector"]["matchLabels"]
    assert meta["labels"] == {**selector, "team": "mm"}
    assert pod_of(render())["priorityClassName"] == "system-node-critical"


@pytest.mark.parametrize("key", ["app.kubernetes.io/name", "app.kubernetes.io/instance"])
def test_the_labels_that_select_the_pods_are_not_for_users(key: str) -> None:
    """Kubernetes would refuse the DaemonSet, and the selector of an installed one can never be changed."""
    assert f"podLabels: {key} is how the DaemonSet finds its pods" in refusal({"podLabels": {key: "x"}})


def test_how_pods_are_replaced_can_be_said_but_never_two_on_a_node() -> None:
    """The second ends at the start while the first runs, and Kubernetes would keep that until the second is ready."""
    for strategy in ({"type": "OnDelete"}, {"rollingUpdate": {"maxUnavailable": "25%", "maxSurge": 0}}):
        assert render({"updateStrategy": strategy})["DaemonSet"]["spec"]["updateStrategy"] == strategy
    assert "updateStrategy" not in render()["DaemonSet"]["spec"]
    for surge in (1, "10%"):
        said = refusal({"updateStrategy": {"rollingUpdate": {"maxSurge": surge}}})
        assert f"updateStrategy.rollingUpdate.maxSurge is {surge}" in said


def test_resources_are_what_is_given_numbers_too() -> None:
    given = {"cpu": 0.5, "memory": 1 << 33, "limits": {"cpu": 2, "memory": "1e10"}}
    assert container_of(render({"resources": given}))["resources"] == {
        "requests": {"cpu": "0.5", "memory": "8589934592"},
        "limits": {"cpu": "2", "memory": "1e10"},
    }


@pytest.mark.parametrize(
    ("small", "large", "factor"),
    [
        *(("m", "", 1000), ("", "k", 1000), ("k", "M", 1000), ("M", "G", 1000), ("G", "T", 1000), ("T", "P", 1000)),
        *(("P", "E", 1000), ("", "Ki", 1024), ("Ki", "Mi", 1024), ("Mi", "Gi", 1024), ("Gi", "Ti", 1024)),
        *(("Ti", "Pi", 1024), ("Pi", "Ei", 1024), ("e3", "e6", 1000)),
    ],
)
def test_quantities_are_compared_by_what_they_mean(small: str, large: str, factor: int) -> None:
    equal, more = f"{factor}{small}", f"{factor + 1}{small}"
    given = {"cpu": equal, "memory": more, "limits": {"cpu": f"1{large}", "memory": f"1{large}"}}
    assert container_of(render({"resources": given}))["resources"]["limits"] == {"cpu": f"1{large}", "memory": more}


@pytest.mark.parametrize(
    ("request_", "limit", "rendered"),
    [
        ("1Gi", "512Mi", "1Gi"),
        ("513Mi", "512Mi", "513Mi"),
        ("512Mi", "512Mi", "512Mi"),
        ("600M", "0.5Gi", "600M"),
        ("1E", "1Ei", "1Ei"),
        (1 << 33, "1e9", "8589934592"),
        ("1500m", "2", "2"),
        ("2500m", 2, "2500m"),
    ],
)
def test_a_limit_is_never_less_than_what_is_requested(request_: str | int, limit: str | int, rendered: str) -> None:
    """The reference has no limits: who asked for much there would get a DaemonSet that Kubernetes refuses."""
    for what in ("cpu", "memory"):
        found = container_of(render({"resources": {what: request_, "limits": {what: limit}}}))["resources"]
        assert found["limits"][what] == rendered


@pytest.mark.parametrize(
    ("kubernetes", "is_a_field"),
    [
        ("1.26.0", False),
        ("1.29.0", False),
        ("1.30.0", True),
        ("1.34.0", True),
        ("1.36.0", True),
    ],
)
def test_apparmor_is_a_field_from_kubernetes_1_30_on_and_an_annotation_before(
    kubernetes: str, is_a_field: bool
) -> None:
    """The schemas of old releases refuse the field. seccomp has been one in all of them."""
    for value, field, annotation in (
        ("Unconfined", {"type": "Unconfined"}, "unconfined"),
        ("RuntimeDefault", {"type": "RuntimeDefault"}, "runtime/default"),
        ("", None, None),
    ):
        objects = render({"appArmorProfile": value, "podAnnotations": {"a": "b"}}, kubernetes=kubernetes)
        context = container_of(objects)["securityContext"]
        annotations = objects["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
        assert context.get("appArmorProfile") == (field if is_a_field else None)
        assert annotations.get(APPARMOR) == (None if is_a_field else annotation)
        assert annotations["a"] == "b"
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for value, profile in (("Unconfined", {"type": "Unconfined"}), ("", None)):
        context = container_of(render({"seccompProfile": value}, kubernetes=kubernetes))["securityContext"]
        assert context.get("seccompProfile") == profile


@pytest.mark.parametrize(
    ("kubernetes", "is_a_field"), [("v1.29.6-gke.1000", False), ("v1.30.0-eks-1", True), ("v1.30.2+k3s1", True)]
)
def test_versions_as_vendors_write_them_are_understood(kubernetes: str, is_a_field: bool) -> None:
    done = template(kubernetes=kubernetes)
    assert ("appArmorProfile" in done.stdout) == is_a_field, done.stderr
    assert (APPARMOR in done.stdout) != is_a_field


def test_a_users_own_apparmor_annotation_beats_the_charts() -> None:
    objects = render({"podAnnotations": {APPARMOR: "localhost/mine"}}, kubernetes="1.29.0")
    assert objects["DaemonSet"]["spec"]["template"]["metadata"]["annotations"] == {APPARMOR: "localhost/mine"}


def test_the_chart_can_use_the_nodes_own_seccomp_profile() -> None:
    context = container_of(render({"seccompLocalhostProfile": "nri-memtierd.json"}))["securityContext"]
    assert context["seccompProfile"] == {"type": "Localhost", "localhostProfile": "nri-memtierd.json"}


def test_privileged_is_there_as_a_fallback() -> None:
    for kubernetes in ("1.29.0", "1.34.0"):
        objects = render({"privileged": True}, kubernetes=kubernetes)
        assert container_of(objects)["securityContext"] == {"privileged": True, "readOnlyRootFilesystem": True}
        assert "annotations" not in objects["DaemonSet"]["spec"]["template"]["metadata"]


def test_the_charts_own_values_reach_the_program() -> None:
    watcher = {"name": "cgroups", "config": {"cgroups": ["$CGROUP2_ABS_PATH"]}}
    policy = {"name": "age", "config": {"pidwatcher": watcher, "tracker": {"name": "auto"}}}
    objects = render(
        {
            "classes": [{"name": "mine", "memtierdconfig": {"policy": policy}}],
            "config": {"grace": "30s", "bandwidth": 2000000, "scancpu": "3%", "allowannotations": ["memory.high"]},
            "onUnknownClass": "ignore",
            "adopt": False,
            "engine": "process",
            "logFormat": "json",
            "verbosity": 2,
        }
    )
    words = container_of(objects)["command"]
    for word in ("-vv", "--on-unknown-class=ignore", "--no-adopt", "--engine=process", "--log-format=json"):
        assert word in words
    config = load(objects["ConfigMap"]["data"]["config.yaml"], check_template)
    assert config.scan_cpu_share == 0.03
    assert (config.grace_s, config.bandwidth_mib_per_s, config.allow_annotations) == (30, 2000000, ("memory.high",))
    assert config.classes[0].name == "mine"


@pytest.mark.parametrize(
    ("given", "on_the_node"),
    [
        ("/var/lib/memtierd", "/var/lib/memtierd/nri-memtierd"),
        ("/var/log/nri-memtierd", "/var/log/nri-memtierd"),
        ("/var/log/nri-memtierd/", "/var/log/nri-memtierd"),
        ("/opt/x/../y//", "/opt/y/nri-memtierd"),
        ("/data", "/data/nri-memtierd"),
        ("/nri-memtierd", "/nri-memtierd"),
    ],
)
def test_the_output_directory_is_one_of_the_plugins_own_name(given: str, on_the_node: str) -> None:
    objects = render({"outputDir": given})
    assert run_directory(container_of(objects)) == "/run-dir"
    assert run_volume(objects)["hostPath"] == {"path": on_the_node, "type": "DirectoryOrCreate"}


@pytest.mark.parametrize(
    ("given", "mounted", "run_dir"),
    [
        ("/tmp/memtierd", "/tmp", "/run-dir/memtierd/nri-memtierd"),
        ("/tmp/nri-memtierd", "/tmp", "/run-dir/nri-memtierd"),
        ("/var/tmp/a/b", "/var/tmp", "/run-dir/a/b/nri-memtierd"),
        ("/dev/shm/a", "/dev/shm", "/run-dir/a/nri-memtierd"),
        ("/var/run/lock/a", "/var/run/lock", "/run-dir/a/nri-memtierd"),
        ("/tmp/$(HOME)", "/tmp", "/run-dir/$$(HOME)/nri-memtierd"),
    ],
)
def test_an_output_directory_where_everyone_can_write_is_made_by_the_program_itself(
    given: str, mounted: str, run_dir: str
) -> None:
    """The kubelet would follow a link that somebody put there. (Kubernetes reads `$$(` as `$(`.)"""
    objects = render({"outputDir": given})
    assert run_directory(container_of(objects)) == run_dir
    assert run_volume(objects)["hostPath"] == {"path": mounted, "type": "Directory"}


def test_probes_look_where_the_chart_puts_the_run_directory() -> None:
    for given in ("", "/tmp/memtierd", "/opt/memtierd"):
        container = container_of(render({"outputDir": given}))
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["exec"]["command"][-1] == run_directory(container)


SYSTEM = sorted({*SYSTEM_DIRECTORIES, *SYSTEM_TREES, "/proc/1/root", "/sys/fs/cgroup", "/dev/disk", "/usr/bin"})


FORMS = ("{}", "{}/", "/{}/x/..", "/opt/x/../..{}")


@pytest.mark.parametrize(("path", "form"), [(path, FORMS[at % len(FORMS)]) for at, path in enumerate(SYSTEM)])
def test_chart_and_program_refuse_the_same_directories_of_the_system(path: str, form: str) -> None:
    """However they are written."""
    written = form.format(path)
    said = refusal({"outputDir": written})
    assert f'outputDir is "{written}", which is' in said
    assert "the system: give one" in said or "the system's: give one" in said
    with pytest.raises(RunDirError, match="the system"):
        checked_path(Path(written))


@pytest.mark.parametrize("path", ["/varia", "/etcetera/x", "/var/log/x", "/dev/shm/x", "/usr2", "/home/x", "/root/x"])
def test_chart_and_program_take_the_same_directories(path: str) -> None:
    render({"outputDir": path})
    assert checked_path(Path(path)) == Path(path)


def test_a_relative_output_directory_is_refused() -> None:
    for path in ("x", "./var", "~/x", " /var/log/x"):
        assert f'outputDir is "{path}": give an absolute path of the node' in refusal({"outputDir": path})


def test_the_notes_say_which_pod_security_level_is_needed_and_how_to_set_it(tmp_path: Path) -> None:
    said = notes({}, tmp_path, namespace="mine")
    assert 'level "privileged" of the Pod Security Standards' in said
    assert "kubectl label --overwrite namespace mine" in said
    for mode in ("enforce", "audit", "warn"):
        assert f"pod-security.kubernetes.io/{mode}=privileged" in said
    assert "  swap-idle-data\n  track-working-set-size\n" in said
    assert "WARNING" not in said


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({"image": {"name": GO_PLUGIN}}, f"the Go plugin's image, which is another program. The pods run\n{OWN}:devel"),
        ({"nri": {"runtime": {"patchConfig": True}}}, "nri.runtime and the init container's image have no effect"),
        ({"nri": {"patchRuntimeConfig": True}}, "nri.runtime and the init container's image have no effect"),
        ({"nri": None, "privileged": True}, "far more than it needs"),
        ({"classes": []}, "there are no classes: every pod that names one in class.memtierd.nri.io fails"),
        ({"classes": None, "onUnknownClass": "ignore"}, "there are no classes: every pod that names one in"),
    ],
)
def test_the_notes_warn_of_what_will_surprise(values: dict[str, Any], warning: str, tmp_path: Path) -> None:
    said = notes(values, tmp_path)
    assert said.count("WARNING") == 1
    assert warning in said


def test_the_notes_name_the_directory_that_an_uninstallation_leaves(tmp_path: Path) -> None:
    assert "files are in /opt/x/nri-memtierd of each node" in notes({"outputDir": "/opt/x"}, tmp_path)


@pytest.mark.parametrize("name", ["123", "true", "1e3", "0x1", "null", "a" * 53])
def test_any_name_of_a_release_or_namespace_is_a_string(name: str) -> None:
    objects = render(release=name, namespace=name)
    daemon_set = objects["DaemonSet"]
    assert {each["metadata"]["namespace"] for each in objects.values()} == {name}
    labels = daemon_set["spec"]["template"]["metadata"]["labels"]
    assert labels == daemon_set["spec"]["selector"]["matchLabels"]
    assert labels["app.kubernetes.io/instance"] == name


def test_the_selector_is_the_one_of_the_references_chart() -> None:
    """A selector cannot be changed: another one would make `helm upgrade` from that chart fail."""
    assert render(release="mine")["DaemonSet"]["spec"]["selector"]["matchLabels"] == {
        "app.kubernetes.io/name": "nri-memtierd",
        "app.kubernetes.io/instance": "mine",
    }


def test_another_class_changes_the_config_map_only() -> None:
    """The program reads it again by itself; a restart would stop every engine of the node."""
    before, after = render(), render({"classes": [{"name": "other", "allowswap": True}]})
    assert after["DaemonSet"] == before["DaemonSet"]
    assert yaml.safe_load(after["ConfigMap"]["data"]["config.yaml"])["classes"] == [
        {"name": "other", "allowswap": True}
    ]


def test_the_images_own_name_is_said_once() -> None:
    """In the values, for people, and in a template, for `image: null`."""
    assert yaml.safe_load((CHART / "values.yaml").read_text())["image"]["name"] == OWN
    assert f'IMAGE = "{OWN}"' in (REPO / "deploy/image/build.py").read_text()
