"""The files of each container: safe against hostile names and links, bounded, and gone when it is over."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_cli.nri_memtierd import safefiles
from memtier_cli.nri_memtierd.health import STATUS_NAME
from memtier_cli.nri_memtierd.rundir import (
    CONFIG_NAME,
    MARKER_NAME,
    MARKER_TEXT,
    OLD_OUTPUT_NAME,
    OUTPUT_BYTES_LEAST,
    OUTPUT_BYTES_MAX,
    OUTPUT_NAME,
    OUTPUTS_BYTES_MAX,
    PID_NAME,
    Place,
    RunDirectory,
)
from memtier_cli.nri_memtierd.runpath import SYSTEM_DIRECTORIES, SYSTEM_TREES, RunDirError, checked_path

PLACE = Place("default", "pod", "c0")


@pytest.fixture
def run_directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.claim()
    return made


def content(run_directory: RunDirectory) -> list[str]:
    return [path.name for path in run_directory.path.iterdir() if path.name != MARKER_NAME]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_have_the_references_names_places_and_modes(run_directory: RunDirectory) -> None:
    previous = os.umask(0)
    try:
        made = run_directory.create(PLACE)
        made.write(CONFIG_NAME, "policy: {}\n", 0o600)
        made.write(PID_NAME, "1\n", 0o400)
        made.append_output("hello\n")
    finally:
        os.umask(previous)
    assert made.path == run_directory.path / "default/pod/c0"
    assert {path.name: mode(path) for path in made.path.iterdir()} == {
        "memtierd.config.yaml": 0o600,
        "memtierd.pid": 0o400,
        "memtierd.output": 0o600,
    }
    assert {mode(path) for path in (run_directory.path, *list(made.path.parents)[:2], made.path)} == {0o700}
    assert made.read(CONFIG_NAME) == b"policy: {}\n"
    assert made.stats_path == made.path / "memtierd.stats"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_directory_that_others_can_write_to_is_refused_and_keeps_its_mode(
    run_directory: RunDirectory, depth: int
) -> None:
    """No mode is changed but that of what was made here."""
    planted = run_directory.path.joinpath(*PLACE.names[: depth + 1])
    planted.mkdir(parents=True, mode=0o700)
    planted.chmod(0o777)
    with pytest.raises(RunDirError, match="others can write to it"):
        run_directory.create(PLACE)
    assert mode(planted) == 0o777


@pytest.mark.parametrize("bits", [0o755, 0o777, 0o1777, 0o700])
def test_an_empty_directory_of_any_mode_is_taken_and_keeps_it(tmp_path: Path, bits: int) -> None:
    """The kubelet makes emptyDir volumes 0777, a file system made for it has lost+found."""
    path = tmp_path / "volume"
    (path / "lost+found").mkdir(parents=True)
    path.chmod(bits)
    made = RunDirectory(path)
    made.claim()
    made.create(PLACE)
    assert mode(path) == bits
    made.remove(PLACE)
    made.release()
    assert [each.name for each in path.iterdir()] == ["lost+found"]


def everything(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(each.relative_to(path)): (each.lstat().st_mode, each.read_bytes() if each.is_file() else b"")
        for each in [path, *sorted(path.rglob("*"))]
    }


def plant(path: Path, kind: str) -> None:
    """What may be in a directory that somebody gives us by mistake."""
    inner = path / "pods" / "default_web" / "nginx"
    inner.mkdir(parents=True)
    if kind == "logs":
        (inner / "0.log").write_text("a pod's log")
    elif kind == "our names":  # files of the Go plugin, or somebody's copy of ours
        (inner / OUTPUT_NAME).write_text("x")
        (inner / CONFIG_NAME).write_text("x")
    elif kind == "marker of others":
        (path / MARKER_NAME).write_text("something else")
    elif kind == "marker is a link":
        (path / "elsewhere").write_text(MARKER_TEXT)
        (path / MARKER_NAME).symlink_to("elsewhere")
    elif kind == "marker is a directory":
        (path / MARKER_NAME).mkdir()
    elif kind == "marker is a fifo":
        os.mkfifo(path / MARKER_NAME)
    elif kind == "marker that others can write":
        (path / MARKER_NAME).write_text(MARKER_TEXT)
        (path / MARKER_NAME).chmod(0o666)
    path.chmod(0o755)


KINDS = [
    "logs",
    "directories",
    "our names",
    "marker of others",
    "marker is a link",
    "marker is a directory",
    "marker is a fifo",
    "marker that others can write",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_is_neither_empty_nor_ours_is_refused_untouched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    plant(path, kind)
    before = everything(path) if "fifo" not in kind else {}
    made = RunDirectory(path)
    assert made.leftovers() == []
    with pytest.raises(RunDirError, match=r"is not empty|Is a directory"):
        made.claim()
    assert made.leftovers() == [], "nothing to clean up without the claim"
    made.release()
    if before:
        assert everything(path) == before


def test_what_others_put_into_our_directory_stays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = RunDirectory(path)
    first.claim()
    ours = first.create(PLACE)
    ours.append_output("x")
    (ours.path / "core.123").write_text("a core file")
    (ours.path / PID_NAME).mkdir()
    for name in ("backup/2026/monday", "notes", "a/b/c/d"):
        (path / name).mkdir(parents=True)
        (path / name / "kept").write_text("x")
    (path / "notes.txt").write_text("x")
    (path / "default" / "pod" / "link").symlink_to(path / "notes")
    (path / "x/y/empty").mkdir(parents=True)
    first.close()  # as if it was killed
    second = RunDirectory(path)
    second.claim()
    assert second.leftovers() == [PLACE]
    second.remove(PLACE)
    second.release()
    left = {str(each.relative_to(path)) for each in path.rglob("*") if each.is_symlink() or each.is_file()}
    assert left == {
        MARKER_NAME, "a/b/c/d/kept", "backup/2026/monday/kept", "default/pod/c0/core.123", "default/pod/link",
        "notes.txt", "notes/kept",
    }  # fmt: skip
    assert (path / "x/y/empty").is_dir()
    RunDirectory(path).claim()


def test_a_relative_path_in_a_directory_that_is_gone_is_an_error_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDirectory(Path("run")).path == tmp_path / "run"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RunDirError, match="No such file"):
        RunDirectory(Path("run"))


def test_only_one_process_has_the_directory(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.claim()
    first.create(PLACE).append_output("x")
    with pytest.raises(RunDirError, match="in use by another process"):
        second.claim()
    assert second.leftovers() == []
    first.close()
    second.claim()
    assert second.leftovers() == [PLACE]


def test_a_start_on_a_full_volume_leaves_no_half_a_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> None:
        os.write(file, data[:5])
        raise OSError(errno.ENOSPC, "full")

    made = RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(safefiles, "write_all", full)
        with pytest.raises(RunDirError, match="No space left"):
            made.claim()
    assert list(made.path.iterdir()) == []
    made.claim()


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "/", "a\0b", "x" * 256, "\ud800"])
def test_a_name_that_is_not_one_directory_entry_is_refused(bad: str) -> None:
    for names in ((bad, "p", "c"), ("n", bad, "c"), ("n", "p", bad)):
        with pytest.raises(RunDirError, match="cannot be the name"):
            Place(*names)


@pytest.mark.parametrize("taken", [STATUS_NAME, f"{STATUS_NAME}.tmp", MARKER_NAME, "lost+found"])
def test_no_namespace_takes_the_place_of_the_programs_own_files(run_directory: RunDirectory, taken: str) -> None:
    with pytest.raises(RunDirError, match="other use for"):
        run_directory.create(Place(taken, "pod", "c0"))
    run_directory.write_status("{}")
    assert content(run_directory) == [STATUS_NAME]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=3, max_size=3))
def test_whatever_the_names_nothing_is_made_outside_and_nothing_is_left(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base:
        run_directory = RunDirectory(Path(base) / "run")
        run_directory.claim()
        try:
            place = Place(*names)
            made = run_directory.create(place)
        except RunDirError:
            pass
        else:
            made.append_output("x")
            assert run_directory.leftovers() == [place]
            assert os.path.realpath(made.path).startswith(os.path.realpath(run_directory.path) + "/")
            run_directory.remove(place)
        assert list(Path(base).iterdir()) == [run_directory.path]
        assert [each.name for each in run_directory.path.iterdir()] == [MARKER_NAME]
        run_directory.release()
        assert list(run_directory.path.iterdir()) == []


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_link_in_place_of_a_directory_is_refused(run_directory: RunDirectory, tmp_path: Path, depth: int) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    link = run_directory.path.joinpath(*PLACE.names[: depth + 1])
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(RunDirError, match="symbolic link"):
        run_directory.create(PLACE)
    with pytest.raises(RunDirError):
        run_directory.remove(PLACE)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert mode(outside) != 0o700
    assert run_directory.leftovers() == []


def test_a_link_in_place_of_the_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError, match="symbolic link"):
        RunDirectory(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user: run as root")
def test_a_run_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """In /tmp somebody else may have made it first."""
    path = tmp_path / "run"
    path.mkdir()
    os.chown(path, 12345, 12345)
    with pytest.raises(RunDirError, match="belongs to user 12345"):
        RunDirectory(path)


@pytest.mark.parametrize(
    "path", sorted({*SYSTEM_DIRECTORIES, *SYSTEM_TREES, "/proc/1", "/dev/x", "/usr/bin/nri-memtierd"})
)
def test_a_directory_of_the_system_is_refused_however_it_is_written(path: str) -> None:
    for written in (path, f"{path}/", f"/{path}", f"/var/tmp/x/../../..{path}", f"{path}/x/..", f"{path}/."):
        with pytest.raises(RunDirError, match="system"):
            checked_path(Path(written))


def test_a_run_directory_of_the_system_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(RunDirError, match="/tmp is a directory of the system"):
        RunDirectory(Path("/tmp"))


@pytest.mark.parametrize(
    "path", ["/var/log/x", "/dev/shm/x", "/tmp/x/y", "/opt/x", "/usrx", "/run/nri-memtierd", "/run-dir"]
)
def test_directories_below_those_of_the_system_are_taken(path: str) -> None:
    assert checked_path(Path(f"/{path}/../{Path(path).name}/")) == Path(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user: run as root")
@pytest.mark.parametrize("kind", ["directory", "link"])
def test_where_everyone_can_write_what_is_above_must_be_roots_or_ours(tmp_path: Path, kind: str) -> None:
    """Else its owner could exchange what is below it, or lead us elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    planted = tmp_path / "public" / "planted"
    planted.parent.mkdir()
    planted.parent.chmod(0o1777)
    if kind == "link":
        planted.symlink_to(tmp_path / "elsewhere")
    else:
        planted.mkdir()
    os.lchown(planted, 12345, 12345)
    with pytest.raises(RunDirError, match=f"{planted} belongs to user 12345"):
        RunDirectory(planted / "a/run")
    assert not list((tmp_path / "elsewhere").iterdir())
    planted.parent.chmod(0o755)
    RunDirectory(planted / "a/run").claim()  # nobody but root can have put it there
    assert mode(planted.resolve() / "a") == 0o755
    assert mode(planted.resolve() / "a/run") == 0o700


def test_a_link_in_place_of_a_file_is_never_followed(run_directory: RunDirectory, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    made = run_directory.create(PLACE)
    for name in (OUTPUT_NAME, CONFIG_NAME, f"{CONFIG_NAME}.tmp", OLD_OUTPUT_NAME):
        (made.path / name).symlink_to(victim)
    with pytest.raises(RunDirError):
        made.append_output("x")
    assert made.read(CONFIG_NAME) is None
    made.write(CONFIG_NAME, "mine", 0o600)
    assert victim.read_text() == "precious"
    assert not (made.path / CONFIG_NAME).is_symlink()
    run_directory.remove(PLACE)
    assert victim.read_text() == "precious"


def test_a_fifo_in_place_of_the_output_does_not_hang(run_directory: RunDirectory) -> None:
    made = run_directory.create(PLACE)
    os.mkfifo(made.path / OUTPUT_NAME)
    with pytest.raises(RunDirError):
        made.append_output("x")


def test_the_output_is_bounded_and_keeps_its_end(run_directory: RunDirectory) -> None:
    made = run_directory.create(PLACE)
    for number in range(100):
        made.append_output(f"line {number:03}\n", bytes_max=90)
    files = {path.name: path.stat().st_size for path in made.path.iterdir()}
    assert files.keys() == {OUTPUT_NAME, OLD_OUTPUT_NAME}
    assert all(size <= 90 for size in files.values())
    assert (made.read(OUTPUT_NAME) or b"").endswith(b"line 099\n")
    made.append_output("y" * 500, bytes_max=90)
    assert (made.path / OUTPUT_NAME).stat().st_size == 90


def test_an_output_that_a_child_appends_to_is_emptied_under_it(run_directory: RunDirectory) -> None:
    """The child's file descriptor stays good: it appends at the new end."""
    made = run_directory.create(PLACE)
    child = os.open(made.path / OUTPUT_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(child, b"a" * 50)
    assert not made.trim_output(bytes_max=90)
    os.write(child, b"b" * 50)
    assert made.trim_output(bytes_max=90)
    os.write(child, b"after")
    os.close(child)
    assert made.read(OUTPUT_NAME) == b"after"
    assert made.read(OLD_OUTPUT_NAME) == b"a" * 40 + b"b" * 50


def test_removing_takes_empty_parents_and_leaves_the_others(run_directory: RunDirectory) -> None:
    other = Place("default", "pod", "c1")
    for place in (PLACE, other):
        run_directory.create(place).append_output("x")
    run_directory.remove(PLACE)
    assert run_directory.leftovers() == [other]
    run_directory.remove(other)
    assert content(run_directory) == []
    run_directory.remove(other)  # again: nothing to do


def test_a_container_of_the_same_name_begins_without_our_old_files(run_directory: RunDirectory) -> None:
    old = run_directory.create(PLACE)
    old.append_output("of the one before")
    old.write(PID_NAME, "1", 0o400)
    assert list(run_directory.create(PLACE).path.iterdir()) == []


def test_outputs_share_what_the_volume_has(run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def volume(size_bytes: int) -> None:
        found = SimpleNamespace(f_blocks=size_bytes >> 12, f_frsize=4096)
        monkeypatch.setattr(os, "fstatvfs", lambda fd: found)

    seen = {}
    for size_bytes in (1 << 40, 16 << 20, 1 << 20):
        volume(size_bytes)
        for containers in (0, 1, 100, 1000):
            run_directory.share_outputs(containers)
            seen[size_bytes, containers] = run_directory.output_bytes_max
            assert run_directory.output_bytes_max <= OUTPUT_BYTES_MAX
            if run_directory.output_bytes_max > OUTPUT_BYTES_LEAST:
                assert 2 * containers * run_directory.output_bytes_max <= min(size_bytes // 2, OUTPUTS_BYTES_MAX)
    assert seen[1 << 40, 1] == OUTPUT_BYTES_MAX
    assert seen[16 << 20, 100] < seen[1 << 40, 100] < OUTPUT_BYTES_MAX


def test_outputs_that_are_there_are_cut_when_there_is_less_room_for_each(run_directory: RunDirectory) -> None:
    made = run_directory.create(PLACE)
    for number in range(20):
        made.append_output(f"line {number:03}\n", bytes_max=90)
    run_directory.output_bytes_max = 30
    made.trim_output()
    files = {path.name: path.stat().st_size for path in made.path.iterdir()}
    assert files.keys() == {OUTPUT_NAME, OLD_OUTPUT_NAME}
    assert all(size <= 30 for size in files.values())


def test_an_output_is_emptied_also_where_there_is_no_room_for_a_copy(
    run_directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    made = run_directory.create(PLACE)
    (made.path / OUTPUT_NAME).write_bytes(b"x" * 100)
    monkeypatch.setattr(safefiles, "write_all", full)
    with pytest.raises(RunDirError):
        made.trim_output(bytes_max=50)
    assert made.read(OUTPUT_NAME) == b""


def test_the_status_is_a_file_that_is_gone_after_the_end(run_directory: RunDirectory) -> None:
    run_directory.write_status("{}")
    run_directory.write_status('{"healthy": true}')
    assert (run_directory.path / STATUS_NAME).read_text() == '{"healthy": true}'
    assert mode(run_directory.path / STATUS_NAME) == 0o600
    run_directory.release()
    assert list(run_directory.path.iterdir()) == []


def test_writing_after_the_removal_is_an_error_and_makes_nothing(run_directory: RunDirectory) -> None:
    made = run_directory.create(PLACE)
    run_directory.remove(PLACE)
    with pytest.raises(RunDirError):
        made.append_output("late")
    assert content(run_directory) == []
