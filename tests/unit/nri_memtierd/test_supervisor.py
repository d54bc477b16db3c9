"""Is it well: what is fresh, what is stuck, whether the runtime is there; one status for probes, systemd and people."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from memtier_cli.nri_memtierd import health, supervisor
from memtier_cli.nri_memtierd.health import probe
from memtier_cli.nri_memtierd.notify import notify
from memtier_cli.nri_memtierd.rundir import RunDirectory
from memtier_cli.nri_memtierd.supervisor import LOST_S, STUCK_TOLD_FROM, Supervisor
from memtier_engine.clock import FakeClock


class Scene:
    def __init__(self, base: Path) -> None:
        self.clock = FakeClock(1000.0)
        self.run_directory = RunDirectory(base / "run")
        self.run_directory.claim()
        self.steps: list[tuple[Mapping[str, str], float]] = []
        self.containers: list[dict[str, object]] = []
        self.fatal: list[str] = []
        self.made = Supervisor(
            self.run_directory,
            now_s=self.clock.now_s,
            steps=lambda: self.steps,
            containers=lambda: self.containers,
            lines_lost=lambda: 7,
            fatal=self.fatal.append,
        )
        self.beats = [self.made.part("fleet", 60.0), self.made.part("event loop", 10.0)]

    def turn(self) -> dict[str, Any]:
        """One look, and what the file says then."""
        self.made._turn(self.made.look())
        found: dict[str, Any] = json.loads((self.run_directory.path / "status.json").read_text())
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_it_is_well_as_long_as_every_part_shows_a_sign_of_life(scene: Scene) -> None:
    scene.made.connection.connected()
    for _ in range(20):
        scene.clock.advance(9.0)
        for beat in scene.beats:
            beat()
        assert scene.made.look().ready
    scene.clock.advance(11.0)
    scene.beats[0]()
    status = scene.made.look()
    assert not status.healthy
    assert not status.ready
    assert status.problems == ("event loop: no sign of life for 11 s",)


def test_what_hangs_is_named_with_the_container_it_is_at(scene: Scene) -> None:
    scene.beats[0]("container ns/pod:c0")
    scene.clock.advance(61.0)
    scene.beats[1]()
    assert scene.made.look().problems[0] == "fleet (container ns/pod:c0): no sign of life for 61 s"


def test_without_the_runtime_it_is_healthy_and_not_ready_and_says_why(scene: Scene) -> None:
    """A restart would not bring NRI back."""
    scene.made._listener.emit(logging.makeLogRecord({"msg": "nri.sock: No such file or directory", "levelno": 30}))
    status = scene.made.look()
    assert status.healthy
    assert not status.ready
    assert status.problems == ("connecting: nri.sock: No such file or directory",)


def test_a_runtime_that_restarts_is_waited_for(scene: Scene) -> None:
    connection = scene.made.connection
    connection.connected()
    connection.lost("connection reset")
    connection.lost("still nobody there")
    scene.beats[0].limit_s = scene.beats[1].limit_s = 1e9
    assert scene.made.look().ready
    scene.clock.advance(LOST_S - 1)
    assert scene.made.look().ready
    connection.lost("still nobody there")
    scene.clock.advance(2)
    assert not scene.made.look().ready
    assert scene.made.look().problems == ("retrying: still nobody there",)
    connection.connected()
    assert scene.made.look().ready


def test_stuck_steps_are_named_and_no_reason_to_restart_however_many(scene: Scene) -> None:
    """What the kernel keeps, it keeps also from the next process; and a tenant's processes decide how long that is."""
    scene.made.connection.connected()
    context = {"container": "ns/pod:c0", "engine": "age/refs"}
    scene.steps = [(context, 500.0), ({"container": "quick"}, 0.1)]
    status = scene.made.look()
    assert status.healthy
    assert status.details["steps"] == [{**context, "seconds": 500.0}]
    assert status.problems == ()
    scene.steps = [(context, 500.0)] * STUCK_TOLD_FROM
    status = scene.made.look()
    assert (status.healthy, status.ready) == (True, True)
    assert status.problems == (f"many engines are in steps that do not return: {STUCK_TOLD_FROM}",)


def test_the_status_has_every_container_those_without_engine_first(scene: Scene) -> None:
    running: list[dict[str, object]] = [
        {"container": f"ns/pod:r{number}", "engine": "running"} for number in range(1500)
    ]
    waiting: dict[str, object] = {"container": "ns/pod:w", "engine": "waiting", "why": "full"}
    scene.containers = [*running, waiting]
    found = scene.turn()
    assert found["containers"][0] == waiting
    assert len(found["containers"]) == 1000
    assert found["engines"] == 1500
    assert found["log_lines_lost"] == 7


def test_a_dead_thread_ends_the_program_with_the_reason_once(scene: Scene) -> None:
    alive = True
    scene.made.needs("the fleet's thread", lambda: alive)
    scene.turn()
    assert scene.fatal == []
    alive = False
    scene.turn()
    scene.turn()
    assert scene.fatal == ["the fleet's thread has died; connecting: no answer yet"]


def test_each_problem_is_told_once_and_so_is_its_end(scene: Scene) -> None:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{message}", level="INFO")
    try:
        for _ in range(3):
            scene.clock.advance(30.0)
            scene.beats[0]()
            scene.turn()
        scene.beats[1]()
        scene.turn()
    finally:
        logger.remove(sink)
    assert lines == ["event loop: no sign of life for 30 s\n", "event loop: it goes on\n"]


def test_the_file_is_written_at_each_change_and_now_and_then(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(scene.run_directory, "write_status", written.append)
    for beat in scene.beats:
        beat.limit_s = 1e9

    def turns(seconds: int) -> int:
        before = len(written)
        for _ in range(seconds):
            scene.clock.advance(1.0)
            scene.made._turn(scene.made.look())
        return len(written) - before

    assert turns(1) == 1
    assert turns(20) == 4
    scene.made.connection.connected()
    assert turns(1) == 1


def test_a_status_that_cannot_be_written_does_not_end_the_looking(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.run_directory.close()
    scene.made._turn(scene.made.look())


def test_the_thread_looks_and_ends(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOOK_S", 0.01)
    told: list[str] = []
    monkeypatch.setattr(supervisor, "notify", told.append)
    scene.made.start()
    path = scene.run_directory.path / "status.json"
    for _ in range(3000):
        if path.exists():
            break
        scene.made._ended.wait(0.01)
    scene.made.stop()
    assert path.exists()
    assert told[0] == "READY=1"
    assert told[-1] == "STOPPING=1"
    assert any(line.startswith("WATCHDOG=1\nSTATUS=connecting") for line in told)
    assert scene.made._listener not in logging.getLogger("nri_core").handlers


def test_no_watchdog_message_is_sent_while_something_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(supervisor, "notify", told.append)
    scene.clock.advance(11.0)
    scene.turn()
    assert told == ["STATUS=event loop: no sign of life for 11 s; connecting: no answer yet"]


def test_the_probe_says_what_the_status_says(scene: Scene) -> None:
    scene.turn()
    assert probe(scene.run_directory.path, ready=False) == (True, "connecting: no answer yet")
    assert probe(scene.run_directory.path, ready=True) == (False, "connecting: no answer yet")
    scene.made.connection.runtime = "containerd 2.0"
    scene.made.connection.connected()
    scene.turn()
    assert probe(scene.run_directory.path, ready=True) == (True, "connected to containerd 2.0, 0 engines")


def test_an_old_status_is_none(scene: Scene) -> None:
    """The program is dead, or the thread that looks hangs itself."""
    scene.turn()
    well, words = probe(scene.run_directory.path, ready=False, now_s=health.boot_s() + 100)
    assert not well
    assert "100 s old" in words
    well, _ = probe(scene.run_directory.path, ready=False, now_s=health.boot_s() - 1000)  # of before a reboot
    assert not well


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"boot_s": "x"}', '{"boot_s": 1, "healthy": true}'])
def test_a_status_that_is_none_is_not_well(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    well, words = probe(tmp_path, ready=False)
    assert not well
    assert "is no status" in words
    well, words = probe(tmp_path / "missing", ready=False)
    assert not well
    assert "No such file" in words


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield made


def test_systemd_is_told(listening: socket.socket) -> None:
    assert notify("READY=1")
    assert listening.recv(100) == b"READY=1"


def test_a_systemd_that_does_not_listen_holds_nothing_up(listening: socket.socket) -> None:
    sent = 0
    while notify("WATCHDOG=1") and sent < 100_000:
        sent += 1
    assert 0 < sent < 100_000
    os.environ["NOTIFY_SOCKET"] = "/nowhere/at/all"
    assert not notify("WATCHDOG=1")


def test_without_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
