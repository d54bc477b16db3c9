"""The program nri-memtierd, as a process, with a runtime at its socket and real processes in real cgroups."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memtier_engine.hostfs.host import Host
from nri_core import Container, ContainerState, Pod
from nri_core.testing import FakeRuntime, PluginConnection
from support.cgroups import temporary_cgroup
from support.nri_program import PROGRAM, NriMemtierd, swap_class
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S
from support.workload import workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root")

CLASS = "class.memtierd.nri.io"
CONFIG = (
    swap_class(interval_ms=300, swap_out_ms=1200, bandwidth=400, anchor="fast")
    + """\
    guards: {psimemorynode: null, psiionode: null}  # what else the machine does is not the matter
- name: track
  allowswap: false
  memtierdconfig:
    policy:
      name: age
      config:
        intervalms: 300
        pidwatcher: {name: cgroups, config: {cgroups: [$CGROUP2_ABS_PATH]}}
        tracker: {name: auto, config: {scanintervalms: 300}}
    routines:
    - name: statactions
      config:
        intervalms: 600
        intervalcommand: [policy, -dump, accessed, "0,1s,1m,0"]
        intervalcommandrunner: memtier
"""
)
POD = Pod("p1", "pod", "default", annotations={CLASS: "swap", f"{CLASS}/c1": "track", f"{CLASS}/c2": ""})


@dataclass
class Scene:
    program: NriMemtierd
    runtime: FakeRuntime
    cgroup: Path

    def container(self, name: str, state: ContainerState = ContainerState.UNKNOWN) -> Container:
        relative = self.cgroup.relative_to(Host().cgroup2_root) / name
        return Container(f"id-{name}", "p1", name, state, cgroups_path=f"/{relative}")

    def fill(self, name: str, pid: int) -> Container:
        """Put a process into the container's cgroup."""
        (self.cgroup / name).mkdir(exist_ok=True)
        (self.cgroup / name / "cgroup.procs").write_text(str(pid))
        return self.container(name)

    async def connected(self) -> PluginConnection:
        try:
            return await self.runtime.connected(WAIT_S)
        except TimeoutError:
            raise AssertionError(f"no plugin; log:\n{self.program.log}") from None

    async def begin(self, *arguments: str) -> PluginConnection:
        self.program.start(*arguments)
        return await self.connected()


def run(tmp_path: Path, body: Callable[[Scene], Coroutine[Any, Any, None]], config: str = CONFIG) -> None:
    @contextlib.asynccontextmanager
    async def made() -> AsyncIterator[Scene]:
        with temporary_cgroup("nri") as cgroup:
            async with FakeRuntime(
                tmp_path / "nri.sock", registration_timeout_s=WAIT_S, request_timeout_s=WAIT_S
            ) as runtime:
                program = NriMemtierd(tmp_path, runtime.path, Host().cgroup2_root)
                program.config.write_text(config)
                try:
                    yield Scene(program, runtime, cgroup)
                finally:
                    program.close()

    async def main() -> None:
        async with made() as scene:
            await body(scene)

    asyncio.run(main())


def test_idle_memory_of_a_started_container_is_paged_out_until_it_stops(tmp_path: Path) -> None:
    with temporary_zram_swap(512 << 20), workload(8, 48, write=True) as idle, workload(8, 32, write=True) as other:

        async def body(scene: Scene) -> None:
            connection = await scene.begin()
            containers = {"c0": scene.fill("c0", idle.pid), "c1": scene.fill("c1", other.pid)}
            for container in containers.values():
                await connection.notify("StartContainer", POD, container)
            await scene.program.until(lambda: idle.swapped_share(idle.cold) > 0.95)
            assert idle.hot_stayed(1.2)
            output = scene.program.runs / "default/pod/c1/memtierd.output"
            await scene.program.until(lambda: output.exists() and "lastaccs>=[s]" in output.read_text())
            assert other.swapped_share(other.cold) == 0.0
            assert scene.program.files() == [
                "default/pod/c0/memtierd.config.yaml",
                "default/pod/c0/memtierd.output",
                "default/pod/c1/memtierd.config.yaml",
                "default/pod/c1/memtierd.output",
            ]
            assert all(
                stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
                for path in [scene.program.runs, *scene.program.runs.rglob("*")]
            )
            for container in containers.values():
                await connection.stop_container(POD, container)
            await scene.program.until(lambda: scene.program.namespaces() == [])
            assert idle.swapped_share(idle.cold) > 0.9, "what is out stays out"

        run(tmp_path, body)


@pytest.mark.parametrize(
    ("cgroups_path", "directory"),
    [
        ("kubepods-burstable-pod1_2.slice:cri-containerd:{id}", "{slices}/cri-containerd-{id}.scope/container"),
        ("kubepods-burstable-pod1_2.slice:crio:{id}", "{slices}/crio-{id}.scope"),
        ("/kubepods/burstable/pod1-2/crio-{id}", "kubepods/burstable/pod1-2/crio-{id}"),
    ],
)
def test_a_path_of_either_cgroup_driver_leads_to_the_process(tmp_path: Path, cgroups_path: str, directory: str) -> None:
    """crun under systemd puts the process one level below the scope. A monitor beside it is not the container's."""
    with temporary_zram_swap(256 << 20), workload(1, 24, write=True) as load, workload(1, 24, write=True) as monitor:

        async def body(scene: Scene) -> None:
            # A tree of its own, in place of the node's: slices are made at its root.
            scene.program.arguments[scene.program.arguments.index("-cgroups-dir") + 1] = str(scene.cgroup)
            slices = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
            inner = scene.cgroup / directory.format(id="dada", slices=slices)
            beside = (inner.parent if inner.name == "container" else inner).parent / "crio-conmon-dada"
            for path, pid in ((inner, load.pid), (beside, monitor.pid)):
                path.mkdir(parents=True)
                (path / "cgroup.procs").write_text(str(pid))
            connection = await scene.begin()
            container = Container("dada", "p1", "c0", cgroups_path=cgroups_path.format(id="dada"))
            await connection.notify("StartContainer", POD, container)
            await scene.program.until(lambda: load.swapped_share(load.cold) > 0.95)
            assert monitor.swapped_share(monitor.cold) == 0.0
            await connection.stop_container(POD, container)

        run(tmp_path, body)


def test_a_run_directory_that_others_use_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """Such as /var/log given by mistake: pods' logs are three levels down, as our files are."""

    async def body(scene: Scene) -> None:
        logs = scene.program.runs / "pods/default_web_1234/nginx"
        logs.mkdir(parents=True)
        (logs / "0.log").write_text("a pod's log")
        scene.program.runs.chmod(0o755)
        scene.program.start()
        assert await scene.program.ended() == 1
        assert "is not empty (it has 'pods') and not ours" in scene.program.log
        assert [path.name for path in scene.program.runs.rglob("*")] == ["pods", "default_web_1234", "nginx", "0.log"]
        assert stat.S_IMODE(scene.program.runs.stat().st_mode) == 0o755

    run(tmp_path, body)


def test_sigterm_ends_it_and_leaves_the_containers_alone(tmp_path: Path) -> None:
    with temporary_zram_swap(512 << 20), workload(8, 64, write=True) as load:

        async def body(scene: Scene) -> None:
            connection = await scene.begin()
            await connection.notify("StartContainer", POD, scene.fill("c0", load.pid))
            await scene.program.until(lambda: load.swapped_share(load.cold) > 0)
            scene.program.signal(signal.SIGTERM)
            assert await scene.program.ended() == 0, scene.program.log
            assert list(scene.program.runs.iterdir()) == []
            assert load.popen.poll() is None

        run(tmp_path, body)


def test_after_kill_9_the_next_start_adopts_and_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    with workload(1, 1) as load:

        async def body(scene: Scene) -> None:
            connection = await scene.begin()
            await connection.notify("StartContainer", POD, scene.fill("c0", load.pid))
            await connection.notify("StartContainer", POD, scene.fill("gone", load.pid))
            config = scene.program.runs / "default/pod/{}/memtierd.config.yaml"
            await scene.program.until(lambda: Path(str(config).format("gone")).exists())
            scene.program.signal(signal.SIGKILL)
            await scene.program.ended()
            scene.fill("c0", load.pid)
            scene.runtime.pods = [POD]
            scene.runtime.containers = [scene.container("c0", ContainerState.RUNNING)]
            await scene.begin()
            await scene.program.until(lambda: scene.program.log.count("pod:c0: engine started") == 2)
            assert {Path(name).parts[2] for name in scene.program.files()} == {"c0"}

        run(tmp_path, body)


def test_a_process_per_container_is_supervised_and_never_doubled(tmp_path: Path) -> None:
    """--engine=process: killed, it comes back; orphaned by a crash, it is ended before another one is started."""
    with workload(1, 1) as load:

        async def body(scene: Scene) -> None:
            connection = await scene.begin("--engine=process")
            container = scene.fill("c0", load.pid)
            await connection.notify("StartContainer", POD, container)
            await scene.program.until(lambda: len(scene.program.children()) == 1)
            (first,) = scene.program.children()
            directory = scene.program.runs / "default/pod/c0"
            pid_file = directory / "memtierd.pid"  # written once the process runs
            await scene.program.until(lambda: pid_file.exists() and pid_file.read_text() == f"{first}\n")
            assert stat.S_IMODE(pid_file.stat().st_mode) == 0o400
            assert os.getsid(first) == first
            os.kill(first, signal.SIGKILL)
            await scene.program.until(lambda: scene.program.children() not in ([], [first]))
            await scene.program.until(lambda: "memtierd ended with signal SIGKILL" in scene.program.log)
            (second,) = scene.program.children()
            await scene.program.until(lambda: "policy age" in (directory / "memtierd.output").read_text())

            scene.program.signal(signal.SIGKILL)
            await scene.program.ended()
            assert scene.program.children() == [second], "an orphan"
            scene.runtime.pods = [POD]
            scene.runtime.containers = [scene.container("c0", ContainerState.RUNNING)]
            connection = await scene.begin("--engine=process")
            await scene.program.until(lambda: scene.program.children() not in ([], [second]))
            assert len(scene.program.children()) == 1
            await connection.stop_container(POD, container)
            await scene.program.until(lambda: scene.program.children() == [])
            await scene.program.until(lambda: scene.program.namespaces() == [])

        run(tmp_path, body)


def test_a_new_configuration_updates_adds_and_stops_engines(tmp_path: Path) -> None:
    with workload(1, 1) as load:

        async def body(scene: Scene) -> None:
            connection = await scene.begin()
            for name in ("c0", "c1"):
                await connection.notify("StartContainer", POD, scene.fill(name, load.pid))
            await scene.program.until(lambda: scene.program.log.count("engine started") == 2)
            changed = CONFIG.replace("swapoutms: 1200", "swapoutms: 2400").replace("name: track", "name: other")
            scene.program.config.write_text(changed)
            scene.program.signal(signal.SIGHUP)
            await scene.program.until(lambda: scene.program.log.count("engine started") == 3)
            await scene.program.until(lambda: scene.program.log.count("engine stopped") == 2)
            text = (scene.program.runs / "default/pod/c0/memtierd.config.yaml").read_text()
            assert "swapoutms: 2400" in text
            assert not (scene.program.runs / "default/pod/c1").exists()

            scene.program.config.write_text(changed.replace("name: age", "name: agge", 1))
            await scene.program.until(lambda: "the configuration in force stays" in scene.program.log)
            await scene.program.until(lambda: "did you mean age?" in scene.program.log)
            assert (scene.program.runs / "default/pod/c0").exists()

            scene.program.config.write_text(CONFIG)  # nobody says so: it is noticed
            await scene.program.until(lambda: scene.program.log.count("engine started") == 5)

        run(tmp_path, body)


def test_fifty_containers_in_a_burst_leave_nothing(tmp_path: Path) -> None:
    """Each hook is answered. How soon, `make bench` shows; that none waits for an engine, the tests of the fleet."""
    with workload(1, 1) as load:

        async def body(scene: Scene) -> None:
            connection = await scene.begin()
            containers = [scene.fill(f"n{number}", load.pid) for number in range(50)]
            for container in containers:
                await connection.create_container(POD, container)
                await connection.notify("StartContainer", POD, container)
            for container in reversed(containers):
                await connection.stop_container(POD, container)
                await connection.notify("RemoveContainer", POD, container)
            await scene.program.until(lambda: scene.program.namespaces() == [])

            def all_stopped() -> bool:
                text = scene.program.log
                return text.count("engine started") == text.count("engine stopped")

            await scene.program.until(all_stopped)

        run(tmp_path, body)


def test_the_runtime_may_launch_it_with_a_connection_and_a_name(tmp_path: Path) -> None:
    """Pre-launched: identity from the environment, end with the connection."""

    async def body(scene: Scene) -> None:
        given = socket.socket(socket.AF_UNIX)
        given.connect(str(scene.runtime.path))
        scene.program.arguments = scene.program.arguments[4:]
        scene.program.start(
            env={
                "NRI_PLUGIN_NAME": "tiering",
                "NRI_PLUGIN_IDX": "07",
                "NRI_PLUGIN_SOCKET": str(given.fileno()),
            },
            pass_fds=[given.fileno()],
        )
        given.close()
        connection = await scene.connected()
        assert (connection.index, connection.name) == ("07", "tiering")
        connection.close()
        assert await scene.program.ended() == 0

    run(tmp_path, body)


def test_only_one_program_uses_a_run_directory(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        await scene.begin()
        second = await asyncio.to_thread(
            subprocess.run, [*PROGRAM, *scene.program.arguments], capture_output=True, text=True, timeout=WAIT_S
        )
        assert second.returncode == 1
        assert "is in use by another process" in second.stderr

    run(tmp_path, body)


def test_without_a_socket_it_waits_for_the_runtime(tmp_path: Path) -> None:
    async def body(scene: Scene) -> None:
        await scene.runtime.stop()
        scene.runtime.path.unlink()
        scene.program.start()
        await scene.program.until(lambda: "trying again" in scene.program.log)
        scene.runtime.start()
        await scene.connected()

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-config", "{tmp}/absent.yaml"], 1, "absent.yaml: cannot be read: No such file or directory"),
        (["-config", "{tmp}/bad.yaml"], 1, "bad.yaml:4: classes[0].memtierdconfig.policy.name: 'agge' is not known"),
        (["-cgroups-dir", "{tmp}"], 1, "is not a cgroup v2 directory"),
        (["-run-dir", "{tmp}/bad.yaml"], 1, "cannot use"),
    ],
)
def test_a_mistake_at_the_start_is_one_line_and_nothing_is_touched(
    tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    (tmp_path / "bad.yaml").write_text(
        "classes:\n- name: a\n  memtierdconfig: |\n    policy: {name: agge, config: 'x: 1'}\n"
    )
    words = [word.format(tmp=tmp_path) for word in arguments]
    defaults = ["-idx", "45", "-run-dir", str(tmp_path / "run"), "--socket", str(tmp_path / "no.sock")]
    done = subprocess.run([*PROGRAM, *defaults, *words], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("nri-memtierd: ")
    assert message in done.stderr
