"""One observer per process: among programs, among engines of one program, whatever way one of them ends."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.errors import KernelCallError
from memtier_engine.hostfs.bytelocks import ByteLocks
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.observers import ASKING_S, ASKING_SHARE, PID_END, Claim, Holder, Observers, program_words
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
        layout = b"the layout" if "alike" in pids else b""
        claims[pids[0]] = observers.claim(*(ProcessId(int(pid), 5) for pid in pids if pid != "alike"), layout=layout)
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


LAYOUT = b"the layout"


def of_one_mm(*pids: int) -> Callable[[int, int], int]:
    """A kcmp(2) of which only `pids`, and a process with itself, have one address space."""
    return lambda one, other: int(one != other and not {one, other} <= set(pids))


class Living(Host):
    """A host where every process has memory."""

    def read_proc(self, pid: int, name: str) -> bytes:
        return b"100 10 5 1 0 20 0\n"


def test_who_shares_an_address_space_is_found_among_the_engines_of_a_program(directory: Path) -> None:
    compare = of_one_mm(1001, 1002)
    first = Observers(Living(), directory=directory, compare=compare)
    second = Observers(Living(), directory=directory, compare=compare)
    with first, second:
        claim = first.claim(ONE, layout=LAYOUT)
        assert isinstance(claim, Claim)
        held = second.claim(TWO, layout=LAYOUT)
        assert isinstance(held, Holder)
        assert str(held) == (
            "process 1002 has the address space of process 1001, which is observed already by another engine "
            "of this program"
        )
        assert isinstance(second.claim(THREE, layout=LAYOUT), Claim), "a fork has its own"
        assert isinstance(first.claim(TWO, layout=LAYOUT), Claim), "what one engine knows as one is one to it"
        claim.release()
        first.close()
        assert isinstance(second.claim(TWO, layout=LAYOUT), Claim)


def test_who_shares_an_address_space_is_found_among_programs(directory: Path) -> None:
    with (
        Observers(Living(), directory=directory, compare=of_one_mm(1001, 1002)) as ours,
        other_program(directory) as other,
    ):
        for pid in (1000, 1001, 1005):  # neighbours are one lock to the kernel
            assert other.ask(f"claim {pid} alike").startswith("Claim")
        held = ours.claim(TWO, layout=LAYOUT)
        assert isinstance(held, Holder)
        assert held.through == 1001
        assert held.pid == other.popen.pid
        assert str(held).startswith("process 1002 has the address space of process 1001, which is observed already by")
        assert isinstance(ours.claim(TWO, layout=b"another"), Claim), "it executed a program: it has its own now"
        assert isinstance(ours.claim(THREE, layout=LAYOUT), Claim)
        other.ask("release 1001")
        assert isinstance(ours.claim(ONE, layout=LAYOUT), Claim)


def test_a_refused_claim_holds_nothing(directory: Path) -> None:
    with (
        Observers(Living(), directory=directory, compare=of_one_mm(1001, 1002)) as ours,
        other_program(directory) as other,
    ):
        other.ask("claim 1001 alike")
        assert isinstance(ours.claim(TWO, layout=LAYOUT), Holder)
        assert other.ask("claim 1002 alike").startswith("Claim")
        other.ask("release 1001")
        other.ask("release 1002")
        assert not locked_by_others(directory)


def test_what_is_released_leaves_no_lock(directory: Path) -> None:
    with Observers(HOST, directory=directory), other_program(directory) as other:
        other.ask("claim 1001 alike")
        other.ask("claim 1002 alike")
        for pid in (1001, 1002):
            assert locked_by_others(directory)
            other.ask(f"release {pid}")
        assert not locked_by_others(directory)


def locked_by_others(directory: Path) -> bool:
    """Whether any byte of the list is; asked with a file of its own, which closes no lock of ours but in a child."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            with open(directory / "by-pid", "r+b") as file:
                asked = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
                status = int(struct.unpack("@hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
        finally:
            os._exit(status)
    answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert answer in (0, 1)
    return answer == 1


def test_a_list_that_was_removed_and_made_anew_still_tells_who_shares(directory: Path) -> None:
    with (
        Observers(Living(), directory=directory, compare=of_one_mm(1001, 1002)) as ours,
        other_program(directory) as other,
    ):
        other.ask("claim 1001 alike")
        (directory / "by-pid").unlink()
        other.ask("claim 1005")  # it notices
        assert isinstance(ours.claim(TWO, layout=LAYOUT), Holder)


def test_a_process_without_memory_shares_with_nobody(directory: Path) -> None:
    """Only its first thread has ended: to the kernel all such have the same, which is none."""

    class Ended(Living):
        def read_proc(self, pid: int, name: str) -> bytes:
            return b"0 0 0 0 0 0 0\n"

    compare = of_one_mm(1001, 1002)
    first, second = (Observers(Ended(), directory=directory, compare=compare) for _ in range(2))
    with first, second:
        assert isinstance(first.claim(ONE, layout=LAYOUT), Claim)
        assert isinstance(second.claim(TWO, layout=LAYOUT), Claim)


def test_all_that_others_have_locked_is_listed_whatever_the_order_that_the_kernel_tells_it_in(directory: Path) -> None:
    with other_program(directory) as one, other_program(directory) as two:
        for other, pids in ((one, (1010, 1030)), (two, (1005, 1020, 1021, 1040))):
            for pid in pids:
                other.ask(f"claim {pid}")
        with ByteLocks(directory / "by-pid") as locks:
            found = sorted(locks.others(0, PID_END))
            assert found == sorted(
                [(pid, one.popen.pid) for pid in (1010, 1030)]
                + [(pid, two.popen.pid) for pid in (1005, 1020, 1021, 1040)]
            )
            assert sorted(pid for pid, _ in locks.others(1010, 1021)) == [1010, 1020]


def test_thousands_that_look_alike_take_no_more_than_their_share_of_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever forks in two containers would have a core busy with asking; the lock of each is taken all the same."""
    clock = FakeClock(1000.0)
    monkeypatch.setattr("memtier_engine.hostfs.observers.time.monotonic", clock.now_s)
    asked: list[int] = []

    def compare(one: int, other: int) -> int:
        asked.append(other)
        clock.advance(0.001)
        return 1

    first, second = (Observers(Living(), directory=directory, compare=compare) for _ in range(2))
    with first, second:
        for pid in range(1000, 1500):
            assert isinstance(first.claim(ProcessId(pid, 5), layout=LAYOUT), Claim)
        assert asked == [], "its own it knows"
        for pid in range(2000, 2100):
            assert isinstance(second.claim(ProcessId(pid, 5), layout=LAYOUT), Claim)
        assert 1000 * ASKING_S <= len(asked) <= 1000 * ASKING_S + 110
        asked.clear()
        clock.advance(1.0)
        second.claim(ProcessId(3000, 5), layout=LAYOUT)
        assert 1000 * ASKING_SHARE <= len(asked) <= 1000 * ASKING_SHARE + 10
        asked.clear()
        clock.advance(1000 * ASKING_S)
        second.claim(ProcessId(3001, 5), layout=LAYOUT)
        assert len(asked) == pytest.approx(1000 * ASKING_S, abs=2)
        with other_program(directory) as other:
            assert "(pid" in other.ask("claim 2099 alike"), "claimed, though nobody was asked about it"
    assert not locked_by_others(directory)


def test_where_the_kernel_does_not_tell_nobody_is_taken_to_share(directory: Path) -> None:
    def refused(one: int, other: int) -> int:
        raise KernelCallError(f"kcmp({one}, {other})", errno.EPERM)

    first, second = (Observers(Living(), directory=directory, compare=refused) for _ in range(2))
    with first, second:
        assert isinstance(first.claim(ONE, layout=LAYOUT), Claim)
        assert isinstance(second.claim(TWO, layout=LAYOUT), Claim)


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


def test_claims_of_processes_whose_pids_were_recycled_leave_no_layout_locked(directory: Path) -> None:
    with Observers(HOST, directory=directory) as ours:
        for start_ticks in range(300):
            assert isinstance(ours.claim(ProcessId(1001, start_ticks), layout=b"%d" % start_ticks), Claim)
        assert locked_by_others(directory)
    assert not locked_by_others(directory)


def test_threads_may_claim_while_old_claims_are_forgotten(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Observers(HOST, directory=directory) as ours:
        held = ours._table.has
        claimed: list[Claim | Holder] = []

        def meanwhile(claim: Claim) -> bool:
            if ours._table.has is not held:
                monkeypatch.setattr(ours._table, "has", held)
                thread = threading.Thread(target=lambda: claimed.append(ours.claim(TWO)))
                thread.start()
                thread.join()
            return held(claim)

        for start_ticks in range(128):
            ours.claim(ProcessId(1001, start_ticks))
        monkeypatch.setattr(ours._table, "has", meanwhile)
        assert isinstance(ours.claim(ProcessId(1001, 128)), Claim)
        assert isinstance(claimed[0], Claim)
        assert isinstance(ours.claim(TWO), Holder)
    with other_program(directory) as other:
        assert other.ask("claim 1002").startswith("Claim"), "closing released it"


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


def test_what_was_claimed_before_the_list_could_be_opened_is_on_it_from_then_on(directory: Path) -> None:
    """Else another program takes it, while nobody says any more that others cannot be seen."""
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    with Observers(HOST, directory=directory) as alone:
        assert isinstance(alone.claim(ONE), Claim)
        directory.chmod(0o700)
        with Observers(HOST, directory=directory) as later, other_program(directory) as other:
            assert later.why_alone is None
            assert other.ask("claim 1001").startswith("Holder")


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
