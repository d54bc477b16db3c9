"""Scenarios of nri-core with real containerd; the test on the host judges what they print.

python3 nri_containerd_scenarios.py NAME
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nri_node import Containerd as NodeContainerd
from nri_node import CriError, Pod, memory_value, pids_of, wait_for
from nri_node import node as bare_node
from saying import say

from vm.guest import cri_pb2 as cri

PLUGIN = Path(__file__).with_name("nri_test_plugin.py")
RECORDS = Path("/run/nri-test-plugin.jsonl")
SWAP_MAX = "20971520"
LIMITED = {"memory_limit_in_bytes": 64 << 20}


class TestPlugin:
    """nri_test_plugin.py as a process."""

    def __init__(self) -> None:
        RECORDS.unlink(missing_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with Path("/run/nri-test-plugin.log").open("ab") as log:
            self._process = subprocess.Popen([sys.executable, str(PLUGIN), str(RECORDS)], stdout=log, stderr=log)

    def records(self, what: str | None = None) -> list[dict[str, Any]]:
        text = RECORDS.read_text() if RECORDS.exists() else ""
        found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [record for record in found if what in (None, record["what"])]

    def wait(self, what: str, times: int = 1, timeout_s: float = 90) -> dict[str, Any]:
        """The last record of a kind, when there are so many."""
        held = wait_for(lambda: len(self.records(what)) >= times, timeout_s)
        assert held is not None, f"not {times} of {what!r}: {self.records()}"
        return self.records(what)[-1]

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(20)

    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


def kill(runtime: NodeContainerd) -> None:
    """End containerd as a crash does: nothing is cleaned up, its socket files stay."""
    process = runtime._process
    assert process is not None
    process.kill()
    process.wait(30)


@contextlib.contextmanager
def node() -> Iterator[tuple[NodeContainerd, TestPlugin]]:
    plugin = TestPlugin()
    with bare_node(start=False) as (runtime, _):
        try:
            yield runtime, plugin
        except BaseException:
            print(Path("/run/nri-test-plugin.log").read_text()[-4000:], flush=True)
            raise
        finally:
            plugin.end()


def life() -> None:
    """A pod is there before the plugin; another is made, adjusted, updated and removed under it."""
    with node() as (runtime, plugin):
        early_pod = Pod(runtime, "early", {})
        early = early_pod.run("c0", resources=LIMITED)
        plugin.start()
        configured, synchronized = plugin.wait("configure"), plugin.wait("synchronize")
        pod = Pod(runtime, "adjusted", {"swap-max.test": SWAP_MAX})
        adjusted = pod.run("c0", resources=LIMITED)
        plain = early_pod.run("c1", resources=LIMITED)
        swap_max = {name: memory_value(each, "memory.swap.max") for name, each in (("a", adjusted), ("p", plain))}
        plugin.send(signal.SIGUSR1)
        updated = plugin.wait("updated")
        high = memory_value(early, "memory.high")
        pod.end(adjusted)
        pod.remove()
        plugin.wait("RemovePodSandbox")
        heard = [
            record["what"]
            for record in plugin.records()
            if record.get("container") == adjusted or record.get("pod") == pod.id
        ]
        version = runtime.call("Version", cri.VersionRequest(version="v1")).runtime_version
        say(
            kind="life",
            runtime=configured["runtime"],
            version=configured["version"],
            containerd_version=version,
            synchronized_containers=synchronized["containers"],
            synchronized_pods=synchronized["pods"],
            early=early,
            early_pod=early_pod.id,
            swap_max=swap_max,
            failed=updated["failed"],
            high=high,
            heard=heard,
        )


def runtime_restart() -> None:
    """containerd is terminated once and killed once while two containers run."""
    with node() as (runtime, plugin):
        pod = Pod(runtime, "stays", {"swap-max.test": SWAP_MAX})
        plugin.start()
        plugin.wait("synchronize")
        containers = [pod.run(name, resources=LIMITED) for name in ("c0", "c1")]
        before = {each: pids_of(each) for each in containers}
        rounds = []
        for number, how in enumerate(("term", "kill"), start=1):
            runtime.stop() if how == "term" else kill(runtime)
            plugin.wait("disconnected", number)
            runtime.start()
            synchronized = plugin.wait("synchronize", number + 1)
            another = pod.run(f"after-{how}", resources=LIMITED)
            rounds.append(
                {
                    "how": how,
                    "missing": [each for each in containers if each not in synchronized["containers"]],
                    "states": sorted({synchronized["containers"].get(each, "lost") for each in containers}),
                    "same_processes": {each: pids_of(each) for each in before} == before,
                    "swap_max": memory_value(another, "memory.swap.max"),
                }
            )
            containers.append(another)
        heard = [record["container"] for record in plugin.records("StopContainer")]
        os.kill(plugin.pid(), 0)
        say(kind="runtime-restart", rounds=rounds, stopped=heard)


def plugin_restart() -> None:
    """The plugin is killed; a container comes into being without it; it starts again."""
    with node() as (runtime, plugin):
        pod = Pod(runtime, "stays", {"swap-max.test": SWAP_MAX})
        plugin.start()
        plugin.wait("synchronize")
        first = pod.run("first", resources=LIMITED)
        plugin.end(signal.SIGKILL)
        without = pod.run("without", resources=LIMITED)
        plugin.start()
        synchronized = plugin.wait("synchronize", 2)
        after = pod.run("after", resources=LIMITED)
        say(
            kind="plugin-restart",
            swap_max=[memory_value(each, "memory.swap.max") for each in (first, without, after)],
            synchronized=sorted(synchronized["containers"]) == sorted([first, without]),
            states=sorted(set(synchronized["containers"].values())),
        )


def ping() -> None:
    """What nri-ping says of this node: while containerd runs, and when it does not."""
    with node() as (runtime, _):
        pod = Pod(runtime, "seen", {"a": "b"})
        container = pod.run("c0")
        listed = subprocess.run(["nri-ping", "--once"], capture_output=True, text=True, timeout=120, check=False)
        records = [json.loads(line) for line in listed.stdout.splitlines()]
        kill(runtime)
        refused = subprocess.run(["nri-ping", "--once"], capture_output=True, text=True, timeout=120, check=False)
        runtime.start()
        with contextlib.suppress(CriError):
            pod.remove()
        say(
            kind="ping",
            status=listed.returncode,
            errors=listed.stderr,
            pods=[record["pod"] for record in records if "namespace" in record],
            found=any(record.get("id") == container for record in records),
            refused_status=refused.returncode,
            refused=refused.stderr,
        )


SCENARIOS = {
    "life": life,
    "runtime-restart": runtime_restart,
    "plugin-restart": plugin_restart,
    "ping": ping,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
