"""One plugin of a kind per node: who can claim, against whom, and that nobody else can keep it out."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nri_core import Backoff, Plugin, PluginAlreadyRunning, Stub
from nri_core.aio import claim as claims
from nri_core.aio.claim import LOCK_FILE, Claim, claim
from nri_core.aio.rivals import RivalLook, connected, find_rival
from nri_core.testing import FakeRuntime, PluginConnection

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to play another user: run the tests as root")
QUICK = Backoff(least_s=0.01, most_s=0.05)


@pytest.fixture(params=[0o700, 0o755], ids=["0700", "0755"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A socket's path in a directory as runtimes make it, and as kubelet does."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "nri"
    folder.mkdir()
    folder.chmod(request.param)
    return folder / "nri.sock"


def test_index_and_name_can_be_claimed_once_and_again_when_let_go(path: Path) -> None:
    with claim(path, "50", "a"):
        for _ in range(2):
            with pytest.raises(PluginAlreadyRunning, match=r"plugin 50-a is already.*another name or index"):
                Claim(path, "50", "a").take()
        with claim(path, "51", "a"), claim(path, "50", "b"), claim(path.parent / "other.sock", "50", "a"):
            pass
    with claim(path, "50", "a"):
        pass


def test_one_of_a_kind_whatever_index_and_name(path: Path) -> None:
    with claim(path, "45", "memtierd", "memtierd"):
        with pytest.raises(PluginAlreadyRunning, match=r"another memtierd plugin, whatever its index and name"):
            Claim(path, "90", "nri-memtierd", "memtierd").take()
        with claim(path, "90", "nri-memtierd", "another kind"), claim(path, "91", "x"):
            pass
        with claim(path, "90", "nri-memtierd"):  # nothing is held of the claim that failed
            pass


def test_a_claim_is_kept_when_it_is_taken_again_and_lost_with_its_process(path: Path) -> None:
    code = (
        "import sys, time; from nri_core.aio.claim import Claim; c = Claim(sys.argv[1], '50', 'a'); c.take(); c.take();"
        "print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(PluginAlreadyRunning):
            Claim(path, "50", "a").take()
    finally:
        process.kill()
        process.communicate()
    with claim(path, "50", "a"):
        pass


def test_a_claim_follows_the_directory_when_it_is_made_anew(path: Path) -> None:
    """/run is empty after a boot, and the runtime may start after us."""
    held = Claim(path, "50", "a")
    folder, mode = path.parent, path.parent.stat().st_mode & 0o777
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()
    held.take()  # there is nothing to claim yet
    for _ in range(2):
        folder.mkdir()
        folder.chmod(mode)
        held.take()
        with pytest.raises(PluginAlreadyRunning):
            Claim(path, "50", "a").take()
        folder.rename(folder.with_name(f"old{_}"))
        held.take()  # for a moment it is not there
    held.release()
    held.release()


def test_a_lock_file_that_somebody_removed_is_made_anew(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    held = Claim(tmp_path / "nri.sock", "50", "a")
    held.take()
    (tmp_path / LOCK_FILE).unlink()
    held.take()
    with pytest.raises(PluginAlreadyRunning):
        Claim(tmp_path / "nri.sock", "50", "a").take()
    held.release()


@contextmanager
def as_nobody(code: str, *words: str) -> Iterator[None]:
    """A process of another user that says when it is done with `code`, and then waits."""
    before = "import os, sys, fcntl, struct, time\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    after = "\nprint('there', flush=True); time.sleep(60)"
    command = ["/usr/bin/python3", "-c", before + code + after, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n", process.communicate()[1]
        yield
    finally:
        process.kill()
        process.communicate()


LOCK_ALL = """
for name in os.listdir(sys.argv[1]) + ["."]:
    try:
        fd = os.open(os.path.join(sys.argv[1], name), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        continue
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqixxxx", fcntl.F_RDLCK, 0, 0, 0, 0))
    fcntl.flock(os.open(os.path.join(sys.argv[1], name), os.O_RDONLY | os.O_NONBLOCK), fcntl.LOCK_EX)
"""


@as_root
@pytest.mark.parametrize("used_before", [False, True])
def test_another_user_who_locks_all_that_can_be_read_keeps_nobody_out(used_before: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own cannot be reached by others
        Path(folder).chmod(0o755)
        path = Path(folder) / "nri.sock"
        if used_before:
            with claim(path, "50", "a"):
                pass
        with as_nobody(LOCK_ALL, folder), claim(path, "50", "a", "kind"), pytest.raises(PluginAlreadyRunning):
            Claim(path, "50", "a").take()


@as_root
@pytest.mark.parametrize("trap", ["file", "readable", "symlink", "fifo", "directory"])
def test_a_lock_file_of_another_user_is_not_used_and_not_followed(
    tmp_path: Path, trap: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where others can write: we go on without a claim, and say so once."""
    tmp_path.chmod(0o777)
    lock, victim = tmp_path / LOCK_FILE, tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)
    if trap == "fifo":
        os.mkfifo(lock)
    elif trap == "symlink":
        lock.symlink_to(victim)
    elif trap == "directory":
        lock.mkdir()
    else:
        lock.touch(0o600)
        lock.chmod(0o644 if trap == "readable" else 0o600)
    if trap == "file":
        os.chown(lock, 65534, 65534)
    held = Claim(tmp_path / "nri.sock", "50", "a")
    with caplog.at_level(logging.WARNING):
        held.take()
        held.take()
    held.release()
    assert len([record for record in caplog.records if "nothing keeps out a second plugin" in record.message]) == 1
    assert victim.read_text() == "precious"


READ_ONLY = """
mount --bind "$1/host" "$1/pod" && mount -o remount,bind,ro "$1/pod" && exec "$2" -c '
import sys
from nri_core import PluginAlreadyRunning
from nri_core.aio.claim import Claim
def take(folder):
    held = Claim(f"{sys.argv[1]}/{folder}/nri.sock", "50", "a")
    try:
        held.take()
    except PluginAlreadyRunning:
        return None
    return held
for first, second in (("pod", "host"), ("host", "pod"), ("pod", "pod")):
    claims = [take(first), take(second)]
    print(first, claims[0] is not None, second, claims[1] is not None)
    for claim in filter(None, claims):
        claim.release()
' "$1"
"""


@as_root
def test_a_claim_that_could_not_be_had_is_tried_again(tmp_path: Path) -> None:
    """At the next connection, say, when somebody has made the lock file."""
    tmp_path.chmod(0o755)
    (tmp_path / LOCK_FILE).mkdir()
    held = Claim(tmp_path / "nri.sock", "50", "a")
    held.take()
    (tmp_path / LOCK_FILE).rmdir()
    held.take()
    with pytest.raises(PluginAlreadyRunning):
        Claim(tmp_path / "nri.sock", "50", "a").take()
    held.release()


@as_root
@pytest.mark.parametrize("kind", ["0700", "0755 with the file", "0755 without"])
def test_a_read_only_mount_of_the_directory_will_do_where_there_is_something_to_lock(tmp_path: Path, kind: str) -> None:
    """As pods have it. Only where others can read the directory, and nobody has made the file yet, is there nothing."""
    (tmp_path / "host").mkdir()
    (tmp_path / "pod").mkdir()
    (tmp_path / "host").chmod(int(kind[:4], 8))
    if "with the" in kind:
        (tmp_path / "host" / LOCK_FILE).touch(0o600)
    command = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("no mount namespace can be made here: needs CAP_SYS_ADMIN")
    said = done.stdout.splitlines()
    if "without" in kind:
        assert said[0] == "pod True host True"
        assert said[1:] == ["host True pod False", "pod True pod False"]  # the host has made the file
    else:
        assert said == ["pod True host False", "host True pod False", "pod True pod False"], done.stderr


@as_root
def test_the_lock_file_is_root_s_alone_and_empty(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    before = os.umask(0)
    try:
        with claim(tmp_path / "nri.sock", "50", "a"):
            found = (tmp_path / LOCK_FILE).stat()
    finally:
        os.umask(before)
    assert (found.st_mode & 0o777, found.st_size, found.st_uid) == (0o600, 0, 0)


def test_a_directory_of_root_s_own_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with claim(tmp_path / "nri.sock", "50", "a"):
        assert list(tmp_path.iterdir()) == []


def test_the_second_look_sees_who_took_a_read_lock_between_ours_and_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked, both saw nobody, both took: a directory can only be locked for reading, which several may do."""
    tmp_path.chmod(0o700)
    path = tmp_path / "nri.sock"
    take, others = claims._take, list[int]()

    def take_after_another(descriptor: int | None, offset: int) -> bool:
        other = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        assert take(other, offset)
        others.append(other)
        return take(descriptor, offset)

    with monkeypatch.context() as patch:
        patch.setattr(claims, "_take", take_after_another)
        with pytest.raises(PluginAlreadyRunning):
            Claim(path, "50", "a").take()
    for other in others:
        os.close(other)
    with claim(path, "50", "a"):
        pass


def test_who_sees_another_at_the_first_look_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those who come in vain would make others step back from a claim that is free in a moment."""
    tmp_path.chmod(0o700)
    path = tmp_path / "nri.sock"
    with claim(path, "50", "a"):
        monkeypatch.setattr(claims, "_take", lambda descriptor, offset: pytest.fail("it was to be left alone"))
        with pytest.raises(PluginAlreadyRunning):
            Claim(path, "50", "a").take()


def test_of_two_that_step_back_from_each_other_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one was seen at the second look, and had gone at the next try."""
    tmp_path.chmod(0o700)
    take, tries = claims._take, list[int]()

    def met_once(descriptor: int | None, offset: int) -> bool:
        tries.append(offset)
        if len(tries) > 1:
            return take(descriptor, offset)
        other = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return take(other, offset) and take(descriptor, offset) and not claims._free(descriptor, offset) and False
        finally:
            os.close(other)

    monkeypatch.setattr(claims, "_take", met_once)
    with claim(tmp_path / "nri.sock", "50", "a"):
        assert len(tries) == 2


TAKE_WHEN_TOLD = """
import sys
from nri_core import PluginAlreadyRunning
from nri_core.aio.claim import Claim
held = Claim(sys.argv[1], sys.argv[2], "a", "kind")
print("ready", flush=True)
sys.stdin.readline()
try:
    held.take()
    print("held", flush=True)
except PluginAlreadyRunning:
    print("out", flush=True)
sys.stdin.readline()
"""


def test_many_that_start_together_leave_exactly_one(path: Path) -> None:
    pipe = subprocess.PIPE
    processes = [
        subprocess.Popen([sys.executable, "-c", TAKE_WHEN_TOLD, str(path), str(n)], stdin=pipe, stdout=pipe, text=True)
        for n in range(10, 16)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
    for process in processes:
        process.kill()
        process.communicate()
    assert sorted(said) in (["held"] + ["out"] * 5, ["out"] * 6)
    if path.parent.stat().st_mode & 0o044:  # a write lock: somebody always has it
        assert "held" in said


class Memtierd(Plugin):
    name, index = "one", "45"
    exclusive = "memtierd"
    rivals = ("nri-memtierd",)


def test_a_plugin_keeps_its_claim_while_the_runtime_is_away(path: Path) -> None:
    """What it does to containers goes on meanwhile."""

    async def main() -> None:
        other = Memtierd()
        other.name, other.index = "two", "90"
        async with FakeRuntime(path, request_timeout_s=60, registration_timeout_s=60) as runtime:
            stub = Stub(Memtierd(), socket_path=path, backoff=QUICK)
            task = asyncio.create_task(stub.run())
            await runtime.connected(120)
            await runtime.stop()
            for _ in range(5):
                with pytest.raises(PluginAlreadyRunning, match="memtierd"):
                    await Stub(other, socket_path=path, backoff=QUICK).run()
                await asyncio.sleep(0.02)
            runtime.start()
            await runtime.connected(120)
            stub.stop()
            await task
            second = Stub(other, socket_path=path, backoff=QUICK)
            task = asyncio.create_task(second.run())
            assert (await runtime.connected(120)).index == "90"
            second.stop()
            await task

    asyncio.run(main())


def test_a_pre_launched_plugin_claims_its_kind_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    theirs.setblocking(False)
    monkeypatch.setenv("NRI_PLUGIN_SOCKET", str(ours.detach()))

    async def main() -> None:
        launched = Stub(Memtierd(), socket_path=path)
        task = asyncio.create_task(launched.run())
        connection = PluginConnection(FakeRuntime(path.parent / "unused"))
        await connection.start(theirs)
        monkeypatch.delenv("NRI_PLUGIN_SOCKET")
        with pytest.raises(PluginAlreadyRunning):
            await Stub(Memtierd(), socket_path=path).run()
        connection.close()
        await asyncio.wait_for(task, 120)

    asyncio.run(main())


CONNECT = """
import socket, sys, time
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
print(flush=True)
time.sleep(60)
"""


@as_root
def test_a_process_that_takes_no_claim_is_seen_by_its_name_and_its_connection(tmp_path: Path) -> None:
    """As a plugin in Go is."""
    path = tmp_path / "nri.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            ["/opt/45-nri-memtierd", "-c", CONNECT, str(path)],
            executable=sys.executable,
            stdout=subprocess.PIPE,
            env={"PYTHONHOME": sys.base_prefix},
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            accepted, _ = listener.accept()
            if not connected(path):
                pytest.skip("the kernel has no CONFIG_UNIX_DIAG")
            assert len(connected(path)) == 1
            assert find_rival(path, ["nri-memtierd"]) == f"45-nri-memtierd, process {process.pid},"
            assert find_rival(path, ["memtierd"]) is None
            assert find_rival(path, []) is None
            assert find_rival(tmp_path / "other.sock", ["nri-memtierd"]) is None
            (tmp_path / "link.sock").symlink_to(path)
            assert find_rival(tmp_path / "link.sock", ["nri-memtierd"]) is not None

            async def main() -> None:
                with pytest.raises(PluginAlreadyRunning, match=rf"45-nri-memtierd, process {process.pid}, is already"):
                    await Stub(Memtierd(), socket_path=path).run()

            asyncio.run(main())
            accepted.close()
        finally:
            process.kill()
            process.communicate()
        assert find_rival(path, ["nri-memtierd"]) is None


@as_root
def test_a_process_that_the_runtime_launched_is_seen_by_its_environment() -> None:
    process = subprocess.Popen(
        ["nri-memtierd", "-c", "print(flush=True); import time; time.sleep(60)"],
        executable=sys.executable,
        stdout=subprocess.PIPE,
        env={"NRI_PLUGIN_SOCKET": "3", "PYTHONHOME": sys.base_prefix},
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert find_rival("/nonexistent", ["nri-memtierd"]) == (
            f"nri-memtierd, process {process.pid}, launched by the runtime,"
        )
    finally:
        process.kill()
        process.communicate()


SEEMS_LAUNCHED = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
if sys.argv[1] == "container":
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
else:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    libc.prctl(4, 0 if sys.argv[1] == "untraceable" else 1, 0, 0, 0)  # PR_SET_DUMPABLE: who owns /proc/PID
print(flush=True)
time.sleep(60)
"""


@as_root
@pytest.mark.parametrize("who", ["container", "user", "untraceable"])
def test_nobody_keeps_a_plugin_out_by_what_he_calls_himself(who: str) -> None:
    """A pod's process may have any name and environment."""
    process = subprocess.Popen(
        ["nri-memtierd", "-c", SEEMS_LAUNCHED, who],
        executable="/usr/bin/python3",  # our own environment's may be out of others' reach
        stdout=subprocess.PIPE,
        env={"NRI_PLUGIN_SOCKET": "3"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert find_rival("/nonexistent", ["nri-memtierd"]) is None
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_cannot_be_read_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its command line lies in memory that it serves itself, and does not. Nor is a thread lost at each try."""
    looks, let_go = 0, threading.Event()

    def wait(path: object, programs: object) -> str:
        nonlocal looks
        looks += 1
        let_go.wait()
        return "nri-memtierd, process 7,"

    monkeypatch.setattr("nri_core.aio.rivals.find_rival", wait)
    look = RivalLook()

    async def main() -> None:
        for _ in range(3):
            assert await look.find("/nonexistent", ["nri-memtierd"], timeout_s=0.01) is None
        assert looks == 1
        assert caplog.text.count("are not looked for") == 3
        let_go.set()
        assert look._thread is not None
        await asyncio.to_thread(look._thread.join)
        assert await look.find("/nonexistent", ["nri-memtierd"], timeout_s=120) == "nri-memtierd, process 7,"

    asyncio.run(main())


def test_what_goes_wrong_while_looking_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object, programs: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("nri_core.aio.rivals.find_rival", fail)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(RivalLook().find("/nonexistent", ["nri-memtierd"], timeout_s=120))


def test_nothing_is_seen_where_nothing_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a sandbox without netlink, or without /proc."""
    from nri_core.aio import rivals

    def refuse(*arguments: object) -> None:
        raise PermissionError

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        monkeypatch.setattr("nri_core.aio.rivals.socket.socket", refuse)
        assert connected(tmp_path / "s") == frozenset()
    monkeypatch.setattr(rivals, "PROC", tmp_path / "absent")
    assert find_rival(tmp_path / "s", ["nri-memtierd"]) is None


def test_a_lock_is_of_the_layout_that_64_bit_linux_has() -> None:
    assert claims._FLOCK.size == 32
    assert struct.calcsize("P") == 8
    assert fcntl.F_OFD_SETLK == 37


def test_a_command_line_or_environment_of_terabytes_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As any process can have one: prctl(PR_SET_MM_MAP) says where it lies, and the kernel reads it out of there."""
    from nri_core.aio import rivals

    own = tmp_path / "7"
    own.mkdir()
    for name in ("cmdline", "environ"):
        with (own / name).open("wb") as file:
            if name == "cmdline":
                file.write(b"/bin/nri-memtierd\0")
            file.truncate(1 << 42)
    (own / "status").write_text("Name:\tx\nUid:\t0\t0\t0\t0\n")
    for pid in ("1", "7"):
        (tmp_path / pid / "ns").mkdir(parents=True)
        (tmp_path / pid / "ns/mnt").symlink_to("mnt:[1]")
    monkeypatch.setattr(rivals, "PROC", tmp_path)
    assert find_rival(tmp_path / "socket", ["nri-memtierd"]) is None
