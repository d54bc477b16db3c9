"""nri-memtierd on a node: real containerd, pods made through CRI, cgroup files and swap of the real kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.vm import VmResult, VmSession

pytestmark = pytest.mark.timeout(1500)

REPO = Path(__file__).resolve().parents[2]
IMAGES = REPO / "build/e2e-images"


def scenario(vm: VmSession, *words: str, timeout_s: float = 600) -> VmResult:
    return vm.run_script("nri_memtierd_scenarios.py", *words, timeout_s=timeout_s).check()


def named(result: VmResult, kind: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in result.records() if each.get("kind") == kind}


def test_the_test_pod_swaps_tracks_and_leaves_alone(vm: VmSession) -> None:
    """The sample configuration and the sample pod as they are; a container without any class beside them."""
    result = scenario(vm, "test-pod")
    found = result.record("test-pod")
    assert found["took_s"] is not None
    assert found["took_s"] <= 60
    assert found["containers"]["c0"]["swapped_kib"] > 60_000
    assert found["containers"]["c0"]["swap_max"] == "max"
    assert found["containers"]["c1"] == {"swap_max": "0", "swapped_kib": 0}
    assert found["containers"]["c2"] == found["plain"], "untouched: as a container without annotations"
    assert found["containers"]["c2"]["swapped_kib"] == 0
    rows = [line.split() for line in found["table"].splitlines() if line.split()[-1:] != ["pidmem[%]"]]
    all_rows = [row for row in rows if row[:1] == ["all"]]
    assert len(all_rows) >= 5
    assert sum(int(row[3]) for row in all_rows[:5]) * 4096 >= 80_000_000, "the 80 MB are in the table"
    removed = result.record("test-pod-removed")
    assert removed["gone_s"] is not None
    assert removed["runs"] == []


EXPECTED = {
    # name: (memory.swap.max, memory.high, has an engine)
    "class-true": ("max", "max", True),
    "class-false": ("0", "max", True),
    "class-absent": ("max", "max", True),
    "none": ("max", "max", False),
    "container-beats-pod": ("0", "max", True),
    "long-form": ("0", "max", True),
    "both-forms": ("max", "max", True),
    "other-container": ("max", "max", True),
    "class-emptied": ("max", "max", False),
    "swap-annotation-beats-class": ("4194304", "max", True),
    "swap-annotation-of-container": (str(8 << 20), "max", False),
    "swap-annotation-emptied": ("max", "max", True),
    "keys-are-apart": ("4096", str(64 << 20), True),
    "high-long-form": ("max", "33554432", False),
}


def test_every_form_of_annotation_reaches_the_cgroup_with_its_precedence(vm: VmSession) -> None:
    result = scenario(vm, "annotations")
    found = {name: (each["swap_max"], each["high"], each["engine"]) for name, each in named(result, "case").items()}
    assert found == EXPECTED
    refused = named(result, "refused")
    for name in ("unknown-class", "unknown-class-of-container"):
        assert "class 'gold'" in refused[name]["error"]
        assert "is not configured (configured classes: plain, swap, track)" in refused[name]["error"]
    assert "has value 'lots' (use max, or bytes such as 268435456 or 256M)" in refused["bad-value"]["error"]
    ignored = named(result, "ignored")
    assert ignored["unknown-class"]["error"] is None
    assert ignored["bad-value"]["error"] is not None


def test_containers_are_adopted_after_whatever_restarts(vm: VmSession) -> None:
    result = scenario(vm, "adopt")
    first = result.record("first-install")
    assert first["adopted_s"] is not None
    assert first["swap_max_s"] is not None, "it was 0 before the plugin came"
    assert first["out_s"] is not None
    assert first["containers"]["c1"] == {"swap_max": "0", "swapped_kib": 0}
    killed = result.record("killed")
    assert killed["left"] == ["c0", "c1"]
    assert killed["again_s"] is not None
    assert killed["containers"] == ["c0", "while-away"], "what stopped meanwhile is gone"
    assert killed["orphans"] == []
    restarted = result.record("runtime-restarted")
    assert restarted["started_again"] == 0, "engines went on without a break, and no one twice"
    assert restarted["new_s"] is not None
    assert restarted["alive"]
    updated = result.record("updated")
    assert updated == {"kind": "updated", "swap_max": "max", "limit": str(64 << 20)}
    assert result.record("adopt")["gone_s"] is not None


def test_fifty_containers_in_a_burst_none_is_missed_nothing_is_left(vm: VmSession) -> None:
    found = scenario(vm, "burst").record("burst")
    assert found["started"] == found["stopped"] == found["most"] == 50
    assert found["gone_s"] is not None
    assert found["left"] == []
    assert found["hooks"] >= 150
    assert found["slowest_ms"] < 100


def test_short_lives_same_names_and_odd_paths(vm: VmSession) -> None:
    result = scenario(vm, "lifecycle")
    short = result.record("short")
    assert short["ended_s"] is not None
    assert short["alive"]
    same = result.record("same-name")
    assert same["out_s"] is not None
    assert same["of_second"]
    assert not same["of_first"]
    slices = result.record("slices")
    assert slices["out_s"] is not None
    assert slices["cgroup"] in slices["config"]
    assert result.record("lifecycle")["gone_s"] is not None


def test_a_new_configuration_takes_effect_and_a_bad_one_does_not(vm: VmSession) -> None:
    found = scenario(vm, "reload").record("reload")
    assert found["before_kib"] == 0
    assert found["kept_s"] is not None
    assert "did you mean policy?" in found["log"]
    assert found["out_s"] is not None


@pytest.fixture(scope="module")
def image() -> tuple[str, str]:
    """The archive (layers not compressed: the guest is slow) and the e2e manifest, as the guest sees them."""
    command = [REPO / "deploy/image/build.py", "--compress", "none", "--out", IMAGES]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archive = Path(done.stdout.strip())
    name = "localhost/memtier/nri-memtierd:devel"
    render = [REPO / "deploy/image/manifests.py", "--image", name, "--out", IMAGES]
    subprocess.run([sys.executable, *map(str, render)], check=True, capture_output=True)
    inside = Path("/host") / IMAGES.relative_to(REPO)
    return str(inside / archive.name), str(inside / "nri-memtierd-deployment-e2e.yaml")


def test_the_image_runs_unprivileged_with_the_manifests_security_context(vm: VmSession, image: tuple[str, str]) -> None:
    result = scenario(vm, "image", *image, timeout_s=900)
    assert result.record("image-started")["connected_s"] is not None
    found = result.record("image")
    assert found["out_s"] is not None, found["log"]
    assert found["out_s"] <= 60
    assert found["containers"]["c0"]["swap_max"] == "max"
    assert found["containers"]["c1"] == {"swap_max": "0", "swapped_kib": 0}
    assert found["containers"]["c2"]["swapped_kib"] == 0
    assert found["table_s"] is not None
    # DAC_OVERRIDE 1, SYS_PTRACE 19, SYS_ADMIN 21, SYS_NICE 23. Source: include/uapi/linux/capability.h
    assert int(found["capabilities"], 16) == 1 << 1 | 1 << 19 | 1 << 21 | 1 << 23
    assert found["seccomp"] == "2", "a filter is on"
    assert found["trackers"] == ["bpf"], "it comes without a compiler"
    assert found["probe"][0] == 0, found["probe"]
    assert "executable file" in str(found["shell"]), "there is no shell in the image"
    assert found["outputs"] == [f"/tmp/memtierd/default/test/{name}/memtierd.output" for name in ("c0", "c1")]
    assert result.record("image-removed")["gone_s"] is not None
