"""What is true of a node after a storm, seen from outside: the runtime's lists, cgroup files, the run directory.

Nothing is asked of the plugin but its status file, for the reasons it gives.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nri_node import CGROUPS, CLASS, orphans
from storm_node import SHARED, VOLUME, Configs, Instance, Runtime, plugins

from vm.guest import cri_pb2 as cri

FRESH_S = 90.0
"""An engine has said something since: it scans every 2 or 3 s, more seldom where the machine is slow."""
RSS_MIB_MAX = 110
FDS_MAX, FDS_PER_ENGINE = 32, 12
"""Four for each process, of which a container here has one or three. What is left at the end is looked at exactly."""
THREADS_MAX = 24
DEFECTS = ("Traceback", "a defect", "never retrieved", "Exception ignored", "| CRITICAL")
_SCAN = re.compile(r"DEBUG: scan \d+: (\d+) processes")


@dataclass
class Look:
    """What one look found."""

    running: int = 0
    """Containers, as the runtime says."""
    managed: int = 0
    named: dict[str, str] = field(default_factory=dict)
    """Of containers without the engine that their class has, the reason in the status."""
    complaints: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Seen:
    """One container that runs."""

    id: str
    label: str
    annotations: Mapping[str, str]
    cgroup: Path | None

    @property
    def named_class(self) -> str:
        """By its annotations; empty: none."""
        name = self.label.rpartition(":")[2]
        keys = (f"{CLASS}/{name}", f"{CLASS}/container.{name}", CLASS)
        return next((self.annotations[key] for key in keys if key in self.annotations), "")


def look(runtime: Runtime, instance: Instance, configs: Configs) -> Look:
    """Compare what is with what should be."""
    found = Look()
    status = instance.status()
    if status is None or not status["ready"]:
        found.complaints.append(f"not ready: {'no status' if status is None else status['problems']}")
        return found
    entries = {each["id"]: each for each in status["containers"]}
    if len(entries) != len(status["containers"]):
        found.complaints.append("the status has a container twice")
    seen = _containers(runtime)
    found.running = len(seen)
    directories = _directories(instance.runs)
    used = set()
    for each in seen:
        wanted = configs.classes().get(each.named_class)
        entry = entries.pop(each.id, None)
        mine = [path for path, text in directories.items() if each.id in text]
        used.update(mine)
        _judge_swap(found, each, wanted)
        if wanted is not None and wanted[1]:
            _judge_managed(found, each, entry, mine)
        elif mine or (entry is not None and entry["engine"] != "none"):
            found.complaints.append(f"{each.label} is managed and should not be: {entry}, {mine}")
        elif wanted is None and each.named_class and (entry is None or not entry.get("why")):
            found.complaints.append(f"{each.label} has an unknown class and no reason is given: {entry}")
    found.complaints += [f"does not run and is in the status: {each}" for each in entries.values()]
    found.complaints += [f"left behind: {path}" for path in directories.keys() - used]
    found.complaints += [f"left behind: {path}" for path in instance.runs.rglob("*.tmp")]
    return found


def look_around(instance: Instance) -> list[str]:
    """Complaints about the node beside its containers: processes, cgroups, what the plugin takes."""
    assert instance.process is not None
    found = [f"process {pid} is a plugin that nobody wants" for pid in plugins() if pid != instance.process.pid]
    found += [f"left behind: {words}" for words in orphans()]
    found += [f"left behind: {path}" for path in CGROUPS.rglob("*memtier*")]
    found += [f"left behind: {path}" for path in VOLUME.iterdir() if path not in (instance.runs, SHARED)]
    taken = usage(instance)
    engines = (instance.status() or {}).get("engines", 0)
    if taken["rss_mib"] > RSS_MIB_MAX:
        found.append(f"the plugin takes {taken['rss_mib']} MiB")
    if taken["fds"] > FDS_MAX + FDS_PER_ENGINE * engines or taken["threads"] > THREADS_MAX:
        files = dict(Counter(open_files(instance)))
        found.append(f"the plugin has {taken['threads']} threads, {engines} engines, descriptors: {files}")
    return found


def usage(instance: Instance) -> dict[str, int]:
    """Memory, descriptors and threads of a plugin."""
    assert instance.process is not None
    process = Path(f"/proc/{instance.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) >> 10,
        "fds": len(list((process / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def open_files(instance: Instance) -> list[str]:
    """What the plugin's descriptors are."""
    assert instance.process is not None
    found = []
    for entry in Path(f"/proc/{instance.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(re.sub(r"\d+", "N", os.readlink(entry)))
    return sorted(found)


def defects(log: str) -> list[str]:
    """Lines of a log that no storm excuses."""
    return [line for line in log.splitlines() if any(word in line for word in DEFECTS)]


def _judge_swap(found: Look, seen: _Seen, wanted: tuple[bool | None, bool] | None) -> None:
    if seen.cgroup is None:
        found.complaints.append(f"{seen.label} runs without a cgroup")
        return
    should = "max" if not seen.named_class else None
    if wanted is not None and wanted[0] is not None:
        should = "max" if wanted[0] else "0"
    with contextlib.suppress(OSError):
        value = (seen.cgroup / "memory.swap.max").read_text().strip()
        if should is not None and value != should:
            found.complaints.append(f"{seen.label}: memory.swap.max is {value}, should be {should}")


def _judge_managed(found: Look, seen: _Seen, entry: Mapping[str, Any] | None, mine: list[Path]) -> None:
    if entry is None:
        found.complaints.append(f"{seen.label} is neither managed nor named")
    elif entry["engine"] != "running":
        found.named[seen.label] = str(entry.get("why", ""))
        if not entry.get("why"):
            found.complaints.append(f"{seen.label} is not managed and no reason is given: {entry}")
    elif entry["class"] != seen.named_class or len(mine) != 1:
        found.complaints.append(f"{seen.label}: class {entry['class']}, directories {mine}")
    else:
        output = mine[0] / "memtierd.output"
        try:
            age_s = time.time() - output.stat().st_mtime
            text = output.read_text()
        except OSError as error:
            found.complaints.append(f"{seen.label}: {error}")
            return
        scans = _SCAN.findall(text)
        if age_s > FRESH_S or not scans:
            found.complaints.append(f"{seen.label}: {len(scans)} scans told, the last thing {age_s:.0f} s ago")
        elif not int(scans[-1]) and _has_old_process(seen):
            found.complaints.append(f"{seen.label}: its engine tracks none of its processes: {text[-300:]}")
        else:
            found.managed += 1


def _has_old_process(seen: _Seen) -> bool:
    """Whether one of its processes lives for so long that an engine must know it."""
    assert seen.cgroup is not None
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    for path in [seen.cgroup / "cgroup.procs", *seen.cgroup.glob("*/cgroup.procs")]:
        with contextlib.suppress(OSError):
            for pid in path.read_text().split():
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK") > FRESH_S:
                    return True
    return False


def _containers(runtime: Runtime) -> list[_Seen]:
    pods = {pod.id: pod for pod in runtime.call("ListPodSandbox", cri.ListPodSandboxRequest()).items}
    cgroups = {path.name: path for path in (CGROUPS / "kubepods").rglob("*") if path.is_dir()}
    found = []
    for each in runtime.call("ListContainers", cri.ListContainersRequest()).containers:
        if each.state == cri.CONTAINER_RUNNING:
            pod = pods[each.pod_sandbox_id]
            label = f"{pod.metadata.namespace}/{pod.metadata.name}:{each.metadata.name}"
            found.append(_Seen(each.id, label, dict(pod.annotations), cgroups.get(each.id)))
    return found


def _directories(runs: Path) -> dict[Path, str]:
    """Each container's directory and its engine's configuration, which names the cgroup."""
    found = {}
    for path in runs.glob("*/*/*"):
        try:
            found[path] = (path / "memtierd.config.yaml").read_text()
        except OSError:
            found[path] = ""
    return found
