"""nri-memtierd with the powers that the manifests give it, and no other: capabilities and system calls."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.privileges import PLUGIN
from nri_core import Container, Pod
from nri_core.testing import FakeRuntime, PluginConnection
from support.cgroups import temporary_cgroup
from support.confine import seccomp_is_here
from support.nri_program import PROGRAM, NriMemtierd, swap_class
from support.swap import temporary_zram_swap
from support.waiting import WAIT_S
from support.workload import Workload, workload

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root"),
    pytest.mark.skipif(not seccomp_is_here(), reason="needs libseccomp: apt install libseccomp2"),
]

REPO = Path(__file__).resolve().parents[2]
PROFILE = REPO / "deploy/seccomp/nri-memtierd.json"
CONFIG = swap_class(interval_ms=300, swap_out_ms=1200, bandwidth=400)
CONFIG += "    guards: {psimemorynode: null, psiionode: null}  # what else the machine does is not the matter\n"

POD = Pod("p1", "pod", "default", annotations={"class.memtierd.nri.io": "swap"})
_NO_PROGRAMS = """
import json, sys
from support.confine import load_seccomp
profile = json.load(open(sys.argv.pop(1)))
for rule in profile["syscalls"]:
    rule["names"] = [name for name in rule["names"] if name not in ("execve", "execveat", "vfork")]
load_seccomp(profile)
from memtier_cli.nri_memtierd.program import main
sys.exit(main())
"""
"""Loads the profile in the process that becomes the program: an exec would be needed otherwise."""


def confined(capabilities: Sequence[str]) -> tuple[str, ...]:
    """The program as a runtime would start it."""
    limits = ("--capabilities", ",".join(capabilities), "--seccomp", str(PROFILE))
    return (sys.executable, "-m", "support.confine", *limits, "--", *PROGRAM)


def run(
    tmp_path: Path,
    program: Sequence[str],
    load: Workload,
    body: Callable[[NriMemtierd, PluginConnection, Container], Coroutine[Any, Any, None]],
    *arguments: str,
) -> None:
    """`body` with the connected program and one container, which holds the workload."""

    async def main() -> None:
        with temporary_cgroup("confined") as cgroup:
            (cgroup / "cgroup.procs").write_text(str(load.pid))
            root = Host().cgroup2_root
            async with FakeRuntime(
                tmp_path / "nri.sock", registration_timeout_s=WAIT_S, request_timeout_s=WAIT_S
            ) as runtime:
                nri = NriMemtierd(tmp_path, runtime.path, root, program=program)
                nri.config.write_text(CONFIG)
                try:
                    nri.start("-vv", *arguments, env={"PYTHONPATH": str(REPO / "tests")})
                    connection = await runtime.connected(WAIT_S)
                    container = Container("id-c0", "p1", "c0", cgroups_path=f"/{cgroup.relative_to(root)}")
                    await connection.notify("StartContainer", POD, container)
                    await body(nri, connection, container)
                finally:
                    nri.close()

    asyncio.run(main())


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.parametrize("engine", ["in-process", "process"])
def test_it_pages_out_with_the_powers_that_the_manifests_give_it(tmp_path: Path, engine: str) -> None:
    """Also memory of another user, who has no capability; nothing is ambient, so no child would inherit more."""
    with temporary_zram_swap(256 << 20), workload(1, 24, write=True, user=65534) as load:

        async def body(nri: NriMemtierd, connection: PluginConnection, container: Container) -> None:
            await nri.until(lambda: load.swapped_share(load.cold) > 0.9)
            held = sum(1 << each for each in PLUGIN)
            for pid in (nri.pid, *nri.children()):
                status = status_of(pid)
                assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == held
                assert int(status["CapAmb"], 16) == 0
                assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
            await connection.stop_container(POD, container)
            await nri.until(lambda: nri.namespaces() == [])
            nri.signal(signal.SIGTERM)
            assert await nri.ended() == 0

        run(tmp_path, confined([each.name for each in PLUGIN]), load, body, f"--engine={engine}")


def test_it_executes_no_program_and_so_no_shell(tmp_path: Path) -> None:
    """From its first line on it cannot execute anything, and does all it does."""
    with temporary_zram_swap(256 << 20), workload(1, 24, write=True) as load:

        async def body(nri: NriMemtierd, connection: PluginConnection, container: Container) -> None:
            await nri.until(lambda: load.swapped_share(load.cold) > 0.9)
            assert "Traceback" not in nri.log
            nri.signal(signal.SIGTERM)
            assert await nri.ended() == 0

        run(tmp_path, (sys.executable, "-c", _NO_PROGRAMS, str(PROFILE)), load, body)


def test_without_the_right_to_page_out_the_containers_output_names_it(tmp_path: Path) -> None:
    with temporary_zram_swap(256 << 20), workload(1, 24, write=True) as load:

        async def body(nri: NriMemtierd, connection: PluginConnection, container: Container) -> None:
            output = nri.runs / "default/pod/c0/memtierd.output"
            await nri.until(lambda: output.exists() and "this process lacks CAP_SYS_NICE" in output.read_text())
            assert load.swapped_share(load.cold) == 0.0

        run(tmp_path, confined([each.name for each in PLUGIN if each.name != "CAP_SYS_NICE"]), load, body)


_ATTEMPTS = """
import ctypes, json, os, socket, sys
from support.confine import load_seccomp
load_seccomp(json.load(open(sys.argv[1])))
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(call):
    try:
        return 0 if call() != -1 else ctypes.get_errno()
    except OSError as error:
        return error.errno
print(json.dumps({
    "ptrace": errno_of(lambda: libc.ptrace(16, os.getppid(), 0, 0)),
    "mount": errno_of(lambda: libc.mount(b"none", b"/nowhere", b"tmpfs", 0, 0)),
    "unshare": errno_of(lambda: libc.unshare(0)),
    "chroot": errno_of(lambda: os.chroot("/")),
    "process_vm_writev": errno_of(lambda: libc.process_vm_writev(os.getpid(), None, 0, None, 0, 0)),
    "internet": errno_of(lambda: socket.socket(socket.AF_INET).close()),
    "packet": errno_of(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
    "unix": errno_of(lambda: socket.socket(socket.AF_UNIX).close()),
}))
"""


def test_what_it_has_no_business_with_is_refused() -> None:
    """Root without the profile gets other answers than EPERM."""
    done = subprocess.run(
        [sys.executable, "-c", _ATTEMPTS, str(PROFILE)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPO / "tests")},
    )
    found = json.loads(done.stdout)
    assert found.pop("unix") == 0
    assert set(found.values()) == {1}, found  # EPERM
