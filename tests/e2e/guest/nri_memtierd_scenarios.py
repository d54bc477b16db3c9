"""Scenarios of nri-memtierd with real containerd and pods made through CRI. The test on the host judges them.

python3 nri_memtierd_scenarios.py NAME
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from nri_node import (
    CLASS,
    FILL,
    CriError,
    Pod,
    cgroup_of,
    memory_value,
    node,
    orphans,
    quick_config,
    sample_config,
    swapped_kib,
    wait_for,
)
from saying import say

from vm.guest import cri_pb2 as cri

HIGH = "memory.high.memtierd.nri.io"
SWAP_MAX = "memory.swap.max.memtierd.nri.io"
TEST_POD = {CLASS: "swap-idle-data", f"{CLASS}/c1": "track-working-set-size", f"{CLASS}/c2": ""}


def treatment(containers: dict[str, str]) -> dict[str, dict[str, object]]:
    """What became of each container."""
    return {
        name: {"swap_max": memory_value(each, "memory.swap.max"), "swapped_kib": swapped_kib(each)}
        for name, each in containers.items()
    }


def test_pod() -> None:
    """The sample configuration and the test pod, unchanged: idle page bitmap, 10 s scans."""
    with node(sample_config()) as (runtime, plugin):
        pod = Pod(runtime, "test", TEST_POD)
        plain = Pod(runtime, "plain", {})
        began_s = time.monotonic()
        containers = {name: pod.run(name, FILL) for name in ("c0", "c1", "c2")}
        untouched = plain.run("c0", FILL)
        out_s = wait_for(lambda: swapped_kib(containers["c0"]) > 60_000, 90, 1)
        table_s = wait_for(lambda: "lastaccs>=[s]" in plugin.output("c1"), 120, 1)
        say(
            kind="test-pod",
            out_s=out_s and round(time.monotonic() - began_s, 1),
            took_s=out_s,
            table_s=table_s,
            table=plugin.output("c1"),
            containers=treatment(containers),
            plain=treatment({"plain": untouched})["plain"],
            files=plugin.containers(),
        )
        pod.remove()
        gone_s = wait_for(lambda: plugin.containers() == [], 20)
        say(kind="test-pod-removed", gone_s=gone_s, runs=plugin.namespaces())


CASES: dict[str, tuple[dict[str, str], str]] = {
    # name: annotations; container
    "class-true": ({CLASS: "swap"}, "c0"),
    "class-false": ({CLASS: "track"}, "c0"),
    "class-absent": ({CLASS: "plain"}, "c0"),
    "none": ({}, "c0"),
    "container-beats-pod": ({CLASS: "swap", f"{CLASS}/c0": "track"}, "c0"),
    "long-form": ({CLASS: "swap", f"{CLASS}/container.c0": "track"}, "c0"),
    "both-forms": ({f"{CLASS}/container.c0": "track", f"{CLASS}/c0": "swap"}, "c0"),
    "other-container": ({CLASS: "swap", f"{CLASS}/c1": "track"}, "c0"),
    "class-emptied": ({CLASS: "swap", f"{CLASS}/c0": ""}, "c0"),
    "swap-annotation-beats-class": ({CLASS: "track", SWAP_MAX: "4194304"}, "c0"),
    "swap-annotation-of-container": ({SWAP_MAX: "0", f"{SWAP_MAX}/c0": "8M"}, "c0"),
    "swap-annotation-emptied": ({CLASS: "track", f"{SWAP_MAX}/c0": ""}, "c0"),
    "keys-are-apart": ({SWAP_MAX: "4096", f"{CLASS}/c0": "swap", HIGH: "64M"}, "c0"),
    "high-long-form": ({f"{HIGH}/container.c0": "33554432"}, "c0"),
}
REFUSED: dict[str, dict[str, str]] = {
    "unknown-class": {CLASS: "gold"},
    "unknown-class-of-container": {CLASS: "swap", f"{CLASS}/c0": "gold"},
    "bad-value": {HIGH: "lots"},
}


def every_form() -> None:
    """Every form and precedence case, as cgroup files show it; refusals as the CRI error says it."""
    config = quick_config(swap="true", track="false", plain="")
    with node(config) as (runtime, plugin):
        for name, (values, container) in CASES.items():
            pod = Pod(runtime, name, values)
            created = pod.run(container)
            say(
                kind="case",
                name=name,
                swap_max=memory_value(created, "memory.swap.max"),
                high=memory_value(created, "memory.high"),
                engine=wait_for(lambda name=container: name in plugin.containers(), 1) is not None,  # type: ignore[misc]
            )
            pod.remove()
        for name, values in REFUSED.items():
            say(kind="refused", name=name, error=refusal(Pod(runtime, name, values)))
        plugin.stop()
        plugin.start("--on-unknown-class=ignore")
        for name in ("unknown-class", "bad-value"):
            say(kind="ignored", name=name, error=refusal(Pod(runtime, f"ignore-{name}", REFUSED[name])))
        say(kind="annotations", remarks=plugin.log.count("is not configured"))


def refusal(pod: Pod) -> str | None:
    """The error of creating and starting a container; None if it went well."""
    try:
        pod.run("c0")
    except CriError as error:
        return str(error)
    finally:
        with contextlib.suppress(CriError):
            pod.remove()
    return None


def adopt() -> None:
    """Containers before the plugin; the plugin killed; containerd restarted; the kubelet's update."""
    config = quick_config(swap="true", track="false")
    with node(config, start=False) as (runtime, plugin):
        pod = Pod(runtime, "early", {CLASS: "swap", f"{CLASS}/c1": "track"})
        # As a kubelet that keeps pods out of swap would have made it.
        before = {name: pod.run(name, FILL, resources={"unified": {"memory.swap.max": "0"}}) for name in ("c0", "c1")}
        plugin.start()
        adopted_s = wait_for(lambda: plugin.log.count("engine started") == 2, 30)
        swap_max = wait_for(lambda: memory_value(before["c0"], "memory.swap.max") == "max", 10)
        out_s = wait_for(lambda: swapped_kib(before["c0"]) > 60_000, 60, 1)
        say(kind="first-install", adopted_s=adopted_s, swap_max_s=swap_max, out_s=out_s, containers=treatment(before))

        plugin.kill(signal.SIGKILL)
        gone = pod.run("while-away")
        left = plugin.containers()
        pod.end(before["c1"])
        plugin.start()
        again_s = wait_for(lambda: plugin.log.count("engine started") == 4, 30)
        say(
            kind="killed",
            left=left,
            again_s=again_s,
            containers=plugin.containers(),
            orphans=orphans(),
            started=plugin.log.count("engine started"),
        )

        runtime.stop()
        time.sleep(1)
        runtime.start()
        plugin.wait_connected(plugin.starts + 1)
        plugin.starts += 1
        started = plugin.log.count("engine started")
        after = pod.run("after-restart")
        new_s = wait_for(lambda: "after-restart" in plugin.containers(), 20)
        say(
            kind="runtime-restarted",
            started_again=started - 4,
            new_s=new_s,
            containers=plugin.containers(),
            alive=plugin.alive(),
        )

        update = cri.UpdateContainerResourcesRequest(
            container_id=after,
            linux=cri.LinuxContainerResources(
                memory_limit_in_bytes=64 << 20, unified={"memory.swap.max": "0"}, cpu_shares=100
            ),
        )
        runtime.call("UpdateContainerResources", update)
        say(
            kind="updated",
            swap_max=memory_value(after, "memory.swap.max"),
            limit=memory_value(after, "memory.max"),
        )
        pod.end(gone)
        pod.end(after)
        say(kind="adopt", gone_s=wait_for(lambda: plugin.containers() == ["c0"], 20), left=plugin.containers())


def burst() -> None:
    """Fifty containers, created and removed as fast as the runtime can."""
    count = 50
    with node(quick_config(track="false")) as (runtime, plugin):
        pod = Pod(runtime, "burst", {CLASS: "track"})
        began_s = time.monotonic()
        containers = [pod.run(f"c{number}") for number in range(count)]
        created_s = time.monotonic() - began_s
        started_s = wait_for(lambda: plugin.log.count("engine started") == count, 60)
        most = len(plugin.containers())
        for container in containers:
            pod.end(container)
        gone_s = wait_for(lambda: plugin.containers() == [], 30)
        left = plugin.namespaces()
        plugin.stop()
        hooks = re.search(r"(\d+) hooks answered, slowest \S+ ([\d.]+) ms, event loop at most ([\d.]+) ms", plugin.log)
        assert hooks is not None
        say(
            kind="burst",
            created_s=round(created_s, 1),
            started_s=started_s,
            most=most,
            gone_s=gone_s,
            left=left,
            started=plugin.log.count("engine started"),
            stopped=plugin.log.count("engine stopped"),
            hooks=int(hooks[1]),
            slowest_ms=float(hooks[2]),
            loop_late_ms=float(hooks[3]),
        )


def lifecycle() -> None:
    """An init that exits at once, a restart under the same name, a path for systemd that nobody expands."""
    with node(quick_config(swap="true")) as (runtime, plugin):
        pod = Pod(runtime, "life", {CLASS: "swap"})
        short = pod.run("short", ("true",))
        ended_s = wait_for(lambda: plugin.containers() == [] and "life:short" in plugin.log, 20)
        pod.end(short)
        say(kind="short", ended_s=ended_s, containers=plugin.containers(), alive=plugin.alive())

        first = pod.run("same", FILL)
        wait_for(lambda: swapped_kib(first) > 60_000, 60, 1)
        runtime.call("StopContainer", cri.StopContainerRequest(container_id=first, timeout=0))
        second = pod.run("same", FILL, attempt=1)
        out_s = wait_for(lambda: swapped_kib(second) > 60_000, 60, 1)
        runtime.call("RemoveContainer", cri.RemoveContainerRequest(container_id=first))
        time.sleep(1)
        config = "".join(path.read_text() for path in plugin.runs.glob("*/*/same/memtierd.config.yaml"))
        say(kind="same-name", out_s=out_s, of_second=second in config, of_first=first in config)
        pod.remove()

        parent = "kubepods-burstable-podlife2.slice"
        slices = Pod(runtime, "slices", {CLASS: "swap"}, cgroup_parent=f"/kubepods.slice/{parent}")
        container = slices.run("c0", FILL)
        out_s = wait_for(lambda: swapped_kib(container) > 60_000, 60, 1)
        say(
            kind="slices",
            out_s=out_s,
            cgroup=str(cgroup_of(container)),
            config="".join(path.read_text() for path in plugin.runs.glob("*/slices/c0/memtierd.config.yaml")),
        )
        slices.remove()
        say(kind="lifecycle", gone_s=wait_for(lambda: plugin.containers() == [], 20), log=plugin.log[-1500:])


def reload() -> None:
    """A changed class, a ConfigMap's switch of links, a bad configuration."""
    with node(quick_config(swap="false")) as (runtime, plugin):
        pod = Pod(runtime, "reload", {CLASS: "swap", SWAP_MAX: "max"})
        container = pod.run("c0", FILL)
        wait_for(lambda: "c0" in plugin.containers(), 20)
        time.sleep(8)
        before_kib = swapped_kib(container)
        plugin.config.write_text(quick_config(swap="true").replace("policy:", "policcy:", 1))
        plugin.hup()
        kept_s = wait_for(lambda: "the configuration in force stays" in plugin.log, 20)
        plugin.config.write_text(quick_config(swap="true"))
        plugin.hup()
        out_s = wait_for(lambda: swapped_kib(container) > 60_000, 60, 1)
        say(kind="reload", before_kib=before_kib, kept_s=kept_s, out_s=out_s, log=plugin.log[-3000:])
        plugin.stop()


def image() -> None:
    """The image as an unprivileged pod, with the security context and the mounts of the manifest given."""
    manifest = [each for each in yaml.safe_load_all(Path(sys.argv[3]).read_text()) if each]
    by_kind = {each["kind"]: each for each in manifest}
    template = by_kind["DaemonSet"]["spec"]["template"]["spec"]
    spec = template["containers"][0]
    config = Path("/run/image-config")
    shutil.rmtree(config, ignore_errors=True)
    config.mkdir()
    (config / "config.yaml").write_text(by_kind["ConfigMap"]["data"]["config.yaml"])
    with node(start=False) as (runtime, _):
        began_s = time.monotonic()
        runtime.import_image(Path(sys.argv[2]))
        imported_s = time.monotonic() - began_s
        host_paths = {each["name"]: each["hostPath"]["path"] for each in template["volumes"] if "hostPath" in each}
        host_paths["config"] = str(config)
        if "run-dir" not in host_paths:
            Path("/run/image-run-dir").mkdir(exist_ok=True)
            host_paths["run-dir"] = "/run/image-run-dir"
        mounts = [
            cri.Mount(
                container_path=each["mountPath"],
                host_path=host_paths[each["name"]],
                readonly=each.get("readOnly", False),
            )
            for each in spec["volumeMounts"]
        ]
        context = spec["securityContext"]
        security: dict[str, Any] = {
            "privileged": context["privileged"],
            "capabilities": cri.Capability(
                add_capabilities=context["capabilities"]["add"], drop_capabilities=context["capabilities"]["drop"]
            ),
            "readonly_rootfs": context["readOnlyRootFilesystem"],
            "no_new_privs": not context["allowPrivilegeEscalation"],
            "run_as_user": cri.Int64Value(value=context["runAsUser"]),
            "run_as_group": cri.Int64Value(value=context["runAsGroup"]),
            "seccomp": cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault),
        }
        plugin = Pod(runtime, "nri-memtierd", {}, namespace="kube-system", host_pid=template["hostPID"])
        running = plugin.run("nri-memtierd", spec["command"], image=spec["image"], mounts=mounts, security=security)
        connected_s = wait_for(lambda: "running containers" in plugin.log("nri-memtierd"), 90, 0.5)
        say(kind="image-started", imported_s=round(imported_s, 1), connected_s=connected_s)
        if connected_s is None:
            print(plugin.log("nri-memtierd"))
        pod = Pod(runtime, "test", TEST_POD)
        containers = {name: pod.run(name, FILL) for name in ("c0", "c1", "c2")}
        out_s = wait_for(lambda: swapped_kib(containers["c0"]) > 60_000, 90, 1)
        outputs = Path("/tmp/memtierd/default/test")
        table_s = wait_for(
            lambda: any("lastaccs>=[s]" in path.read_text() for path in outputs.glob("c1/*.output")), 120, 1
        )
        texts = [path.read_text() for path in outputs.rglob("*.output")]
        began_s = time.monotonic()
        probe = runtime.execute(running, spec["livenessProbe"]["exec"]["command"])
        probe_s = time.monotonic() - began_s
        try:
            shell = runtime.execute(running, ["sh", "-c", "exit 0"]).exit_code
        except CriError as error:
            shell = str(error)
        (pid,) = [int(line) for line in (cgroup_of(running) / "cgroup.procs").read_text().split()][:1]
        status = Path(f"/proc/{pid}/status").read_text()
        say(
            kind="image",
            out_s=out_s,
            table_s=table_s,
            containers=treatment(containers),
            capabilities=re.search(r"^CapEff:\s+(\w+)", status, re.M)[1],  # type: ignore[index]
            trackers=sorted({name for text in texts for name in re.findall(r"^INFO: tracker ([^,]+),", text, re.M)}),
            probe=[probe.exit_code, probe.stdout.decode()],
            probe_s=round(probe_s, 1),
            shell=shell,
            seccomp=re.search(r"^Seccomp:\s+(\w+)", status, re.M)[1],  # type: ignore[index]
            rss_mib=int(re.search(r"^VmRSS:\s+(\d+)", status, re.M)[1]) >> 10,  # type: ignore[index]
            log=plugin.log("nri-memtierd")[-3000:],
            outputs=sorted(str(path) for path in outputs.rglob("*.output")),
        )
        pod.remove()
        gone_s = wait_for(lambda: not outputs.exists(), 20)
        say(kind="image-removed", gone_s=gone_s)


SCENARIOS: dict[str, Callable[[], None]] = {
    "test-pod": test_pod,
    "annotations": every_form,
    "adopt": adopt,
    "burst": burst,
    "lifecycle": lifecycle,
    "reload": reload,
    "image": image,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
