"""What is stopped is freed at once, without waiting for the garbage collector: a node's containers come and go."""

from __future__ import annotations

import gc
import os
import subprocess
import weakref
from pathlib import Path

import pytest

from memtier_cli.nri_memtierd.container_cgroup import ContainerCgroup
from memtier_cli.nri_memtierd.launch.base import Job
from memtier_cli.nri_memtierd.launch.inprocess import InProcessLauncher
from memtier_cli.nri_memtierd.rundir import Place, RunDirectory
from memtier_engine.hostfs.host import Host
from support.cgroups import temporary_cgroup
from support.waiting import until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")

CONFIG = """
policy:
  name: age
  config:
    intervalms: 100
    swapoutms: 200
    pidwatcher: {{name: cgroups, config: {{cgroups: [{cgroup}]}}}}
    tracker: {{name: {tracker}, config: {{scanintervalms: 100}}}}
routines:
- name: statactions
  config:
    intervalms: 100
    intervalcommand: [policy, -dump, accessed, "0,1s,0"]
    intervalcommandrunner: memtier
"""


@pytest.mark.parametrize("tracker", ["auto", "refs"])
def test_a_stopped_engine_leaves_no_reference_cycle(tmp_path: Path, tracker: str) -> None:
    """Held by a cycle, its tables stayed until Python collected garbage, which grew the program by 7 MiB a minute."""
    directory = RunDirectory(tmp_path / "run")
    launcher = InProcessLauncher(Host())
    with temporary_cgroup("lets-go") as cgroup, subprocess.Popen(["sleep", "1000"]) as process:
        (cgroup / "cgroup.procs").write_text(str(process.pid))
        files = directory.create(Place("a", "b", "c"))
        text = CONFIG.format(cgroup=cgroup, tracker=tracker)
        job = Job("a/b:c", text, ContainerCgroup(cgroup, cgroup.stat().st_ino), files)
        gc.collect()
        gc.disable()
        try:
            running = launcher.launch(job)
            engine = weakref.ref(running._engine)
            until(lambda: "lastaccs" in (files.path / "memtierd.output").read_text())
            running.stop()
            del running
            until(lambda: engine() is None)
        finally:
            gc.enable()
            launcher.close(5)
            process.kill()
    directory.close()
