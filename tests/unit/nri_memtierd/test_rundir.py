"""The files of each container: safe against hostile names and links, bounded, and gone when it is over."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_cli.nri_memtierd.rundir import (
    CONFIG_NAME,
    OLD_OUTPUT_NAME,
    OUTPUT_NAME,
    PID_NAME,
    Place,
    RunDirectory,
    RunDirError,
)

PLACE = Place("default", "pod", "c0")


@pytest.fixture
def run_directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


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


def test_a_directory_open_to_others_is_tightened(run_directory: RunDirectory) -> None:
    (run_directory.path / "default").mkdir(mode=0o777)
    (run_directory.path / "default").chmod(0o777)
    run_directory.create(PLACE)
    assert mode(run_directory.path / "default") == 0o700
    run_directory.path.chmod(0o777)
    RunDirectory(run_directory.path).close()
    assert mode(run_directory.path) == 0o700


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "/", "a\0b", "x" * 256, "\ud800"])
def test_a_name_that_is_not_one_directory_entry_is_refused(bad: str) -> None:
    for names in ((bad, "p", "c"), ("n", bad, "c"), ("n", "p", bad)):
        with pytest.raises(RunDirError, match="cannot be the name"):
            Place(*names)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=3, max_size=3))
def test_whatever_the_names_nothing_is_made_outside_and_nothing_is_left(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as base:
        run_directory = RunDirectory(Path(base) / "run")
        try:
            place = Place(*names)
            made = run_directory.create(place)
        except RunDirError:
            pass
        else:
            made.append_output("x")
            assert run_directory.places() == [place]
            assert os.path.realpath(made.path).startswith(os.path.realpath(run_directory.path) + "/")
            run_directory.remove(place)
        assert list(Path(base).iterdir()) == [run_directory.path]
        assert list(run_directory.path.iterdir()) == []
        run_directory.close()


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
    assert run_directory.places() == []


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
    assert run_directory.places() == [other]
    run_directory.remove(other)
    assert list(run_directory.path.iterdir()) == []
    run_directory.remove(other)  # again: nothing to do


def test_a_container_of_the_same_name_begins_with_an_empty_directory(run_directory: RunDirectory) -> None:
    run_directory.create(PLACE).append_output("of the one before")
    (run_directory.directory(PLACE) / "inner").mkdir()
    made = run_directory.create(PLACE)
    assert list(made.path.iterdir()) == []


def test_writing_after_the_removal_is_an_error_and_makes_nothing(run_directory: RunDirectory) -> None:
    made = run_directory.create(PLACE)
    run_directory.remove(PLACE)
    with pytest.raises(RunDirError):
        made.append_output("late")
    assert list(run_directory.path.iterdir()) == []
