"""One observer per process: among programs, among engines of one program, whatever way one of them ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.observers import Claim, Holder, Observers, program_words
from memtier_engine.model import ProcessId

HOST = Host()
ONE, TWO, THREE = ProcessId(1001, 5), ProcessId(1002, 5), ProcessId(1003, 5)

OTHER_PROGRAM = """
import sys
from pathlib import Path
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.observers import Observers
from memtier_engine.model import ProcessId
observers = Observers(Host(), directory=Path(sys.argv[1]))
print(observers.why_alone or "ready", flush=True)
claims = {}
for line in sys.stdin:
    verb, *pids = line.split()
    if verb == "claim":
        claims[pids[0]] = observers.claim(*(ProcessId(int(pid), 5) for pid in pids))
    else:
        claims[pids[0]].release()
    print(type(claims[pids[0]]).__name__, claims[pids[0]] if verb == "claim" else "", flush=True)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "memtier" / "observers"


class Other:
    """Another program with a list of its own."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self.popen = popen

    def ask(self, line: str) -> str:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        return self.popen.stdout.readline().strip()


@contextmanager
def other_program(directory: Path, *, setup: tuple[str, ...] = ()) -> Iterator[Other]:
    command = [*setup, sys.executable, "-c", OTHER_PROGRAM, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == "ready\n"
        try:
            yield Other(popen)
        finally:
            popen.kill()


def test_a_second_program_is_told_who_is_there(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours, other_program(directory) as other:
        assert other.ask("claim 1001").startswith("Claim")
        held = ours.claim(ONE)
        assert isinstance(held, Holder)
        assert held.process == ONE
        assert held.pid == other.popen.pid
        assert "python" in held.program
        assert str(held).startswith("process 1001 is observed already by `python")
        assert f"(pid {other.popen.pid})" in str(held)
        assert "\n" not in str(held), "a program's arguments may hold any bytes"
        claim = ours.claim(TWO)
        assert isinstance(claim, Claim), "others are free"
        assert f"(pid {os.getpid()})" in other.ask("claim 1002")
        claim.release()
        assert other.ask("claim 1002").startswith("Claim")


def test_what_is_released_or_whose_observer_was_killed_is_free(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours:
        with other_program(directory) as other:
            other.ask("claim 1001")
            other.ask("claim 1002")
            other.ask("release 1001")
            assert isinstance(ours.claim(ONE), Claim)
            assert isinstance(ours.claim(TWO), Holder)
            other.popen.kill()
            other.popen.wait()
        assert isinstance(ours.claim(TWO), Claim)


def test_a_lock_of_no_process_that_can_be_named_is_somebodys_all_the_same(directory: Path) -> None:
    """F_GETLK gives -1 for a lock that belongs to an open file, and 0 for one of another pid namespace."""
    with Observers(HOST, directory=directory) as ours:
        with open(directory / "by-pid", "r+b") as file:
            lock = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, ONE.pid, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            holder = ours.claim(ONE)
            assert isinstance(holder, Holder)
            assert holder.pid is None
            assert str(holder) == "process 1001 is observed already by a program of another pid namespace"
        assert isinstance(ours.claim(ONE), Claim)


def test_two_engines_of_one_program_do_not_share_a_process(directory: Path) -> None:
    """The kernel gives a program a lock twice; the list in the program does not."""
    with Observers(HOST, directory=directory) as first, Observers(HOST, directory=directory) as second:
        claim = first.claim(ONE)
        assert isinstance(claim, Claim)
        held = second.claim(ONE)
        assert isinstance(held, Holder)
        assert str(held) == "process 1001 is observed already by another engine of this program"
        assert isinstance(first.claim(ONE), Holder), "not by itself either: a claim is made once"
        first.close()
        assert isinstance(second.claim(ONE), Claim)


def test_that_one_engine_closes_does_not_lose_the_others_locks(directory: Path) -> None:
    """Closing any descriptor of a file drops all of a program's locks on it. Source: fcntl(2)."""
    with Observers(HOST, directory=directory) as first, other_program(directory) as other:
        assert isinstance(first.claim(ONE), Claim)
        with Observers(HOST, directory=directory) as second:
            assert isinstance(second.claim(TWO), Claim)
        assert other.ask("claim 1002").startswith("Claim")
        assert other.ask("claim 1001").startswith("Holder")


def test_a_child_of_fork_has_not_its_parents_claims_and_does_not_end_them(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours, other_program(directory) as other:
        claim = ours.claim(ONE)
        assert isinstance(claim, Claim)
        child = os.fork()
        if not child:
            in_child = ours.claim(ONE)
            ours.close()
            os._exit(0 if isinstance(in_child, Holder) and in_child.pid == os.getppid() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert other.ask("claim 1001").startswith("Holder")
        assert isinstance(ours.claim(ONE), Holder)


def test_all_processes_of_an_address_space_or_none(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours, other_program(directory) as other:
        other.ask("claim 1002")
        held = ours.claim(ONE, TWO)
        assert isinstance(held, Holder)
        assert held.process == TWO
        assert other.ask("claim 1001").startswith("Claim"), "the first was given back"
        assert other.ask("claim 1003 1001").startswith("Holder"), "its own, claimed before"
        assert isinstance(ours.claim(THREE), Claim)


def test_a_recycled_pid_is_another_process(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours, other_program(directory) as other:
        old = ours.claim(ONE)
        assert isinstance(old, Claim)
        new = ours.claim(ProcessId(ONE.pid, 6))
        assert isinstance(new, Claim)
        old.release()
        assert other.ask("claim 1001").startswith("Holder"), "the old claim's end is not the new one's"
        new.release()
        new.release()
        assert other.ask("claim 1001").startswith("Claim")


def test_an_observer_in_a_container_is_seen_and_sees(directory: Path) -> None:
    """Each by the number that it has for the other, if it has one."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1) of util-linux: run the tests as root")
    container = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with Observers(HOST, directory=directory) as ours, other_program(directory, setup=container) as other:
        assert other.ask("claim 1001").startswith("Claim")
        held = ours.claim(ONE)
        assert isinstance(held, Holder)
        children = Path(f"/proc/{other.popen.pid}/task/{other.popen.pid}/children").read_text()
        assert held.pid == int(children)
        assert "python" in held.program
        assert isinstance(ours.claim(TWO), Claim)
        assert other.ask("claim 1002") == (
            "Holder process 1002 is observed already by a program of another pid namespace"
        )


def test_thousands_take_one_file(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours:
        ours.claim(ONE)
        before = len(os.listdir("/proc/self/fd"))
        claims = [ours.claim(ProcessId(pid, 5)) for pid in range(2000, 4000)]
        assert all(isinstance(claim, Claim) for claim in claims)
        assert len(os.listdir("/proc/self/fd")) == before


def test_pids_as_large_as_they_get(directory: Path) -> None:
    largest = ProcessId(4194304, 1)
    with Observers(HOST, directory=directory) as ours:
        assert isinstance(ours.claim(largest), Claim)


def test_a_removed_list_is_made_anew_with_what_is_held(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours:
        assert isinstance(ours.claim(ONE), Claim)
        (directory / "by-pid").unlink()
        directory.rmdir()
        assert isinstance(ours.claim(TWO), Claim)
        with other_program(directory) as other:
            assert other.ask("claim 1001").startswith("Holder")
            assert other.ask("claim 1002").startswith("Holder")


def test_only_its_user_can_get_in(directory: Path) -> None:
    Observers(HOST, directory=directory).close()
    assert [path.stat().st_mode & 0o777 for path in (directory.parent, directory, directory / "by-pid")] == [
        *(0o700, 0o700, 0o600)
    ]


@pytest.mark.parametrize("link", ["memtier", "memtier/observers", "memtier/observers/by-pid"])
def test_a_symbolic_link_in_its_place_is_not_followed(tmp_path: Path, link: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(elsewhere / "file")
    if link != "memtier/observers/by-pid":
        (elsewhere / "file").mkdir()
    with Observers(HOST, directory=tmp_path / "memtier" / "observers") as ours:
        assert ours.why_alone is not None
        assert "other observers cannot be seen" in ours.why_alone
        assert isinstance(ours.claim(ONE), Claim), "observed all the same"
        assert isinstance(ours.claim(ONE), Holder), "and once in this program"
    assert [path.name for path in elsewhere.rglob("*")] in ([], ["file"]), "nothing was made behind it"


def test_a_directory_that_others_can_write_to_is_not_used(directory: Path) -> None:
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    with Observers(HOST, directory=directory) as first, Observers(HOST, directory=directory) as second:
        assert first.why_alone is not None
        assert "mode 777" in first.why_alone
        claim = first.claim(ONE)
        assert isinstance(claim, Claim)
        assert isinstance(second.claim(ONE), Holder), "two engines of one program still see each other"
        directory.chmod(0o700)
        with Observers(HOST, directory=directory) as third:
            assert third.why_alone is None, "mended: looked for again"


def test_who_is_not_root_has_a_list_of_his_own() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user: run the tests as root")
    program = """
        import os, sys
        from memtier_engine.hostfs.host import Host
        from memtier_engine.hostfs.observers import Observers
        os.setresuid(65534, 65534, 65534)
        observers = Observers(Host())
        print(observers.directory, observers.why_alone)
    """
    for variable, wanted in (("XDG_RUNTIME_DIR", "memtier/observers"), ("TMPDIR", "memtier-65534/observers")):
        environment = {key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
        with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
            os.chmod(folder, 0o777)
            said = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(program)],
                env={**environment, variable: folder},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
        assert said == f"{folder}/{wanted} None\n"


@pytest.mark.parametrize(
    ("words", "short"),
    [
        (["/usr/bin/python3", "/opt/x/.venv/bin/memtier", "run", "--pid", "7"], "memtier run --pid 7"),
        (["/opt/x/.venv/bin/python3.12", "/opt/x/bin/memtierd", "-prompt"], "memtierd -prompt"),
        (["python3", "-m", "own"], "python3 -m own"),
        (["/usr/bin/python3"], "python3"),
        (["/usr/bin/pythonic", "/bin/x"], "pythonic /bin/x"),
        (["/bin/a\x1b[31m", "b"], "a?[31m b"),
        (["/bin/memtier", "x" * 200], "memtier " + "x" * 89 + "..."),
        ([""], ""),
    ],
)
def test_an_observer_is_named_as_it_was_typed(words: list[str], short: str) -> None:
    assert program_words(words) == short
