"""Container events to engines: what is started, kept, restarted and stopped, in whatever order events come."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from memtier_cli.nri_memtierd.care import HEALTHY_S, RETRY_MOST_S, retry_s
from memtier_cli.nri_memtierd.config import PluginConfig, WorkloadClass
from memtier_cli.nri_memtierd.events import ContainerInfo, Listed, Reconfigured, Started, Stopped
from memtier_cli.nri_memtierd.fleet import CHECK_S, Fleet
from memtier_cli.nri_memtierd.launch.base import Job, RunningEngine
from memtier_cli.nri_memtierd.rundir import OUTPUTS_BYTES_MAX, Place, RunDirectory
from memtier_cli.nri_memtierd.runpath import RunDirError
from memtier_engine.clock import FakeClock
from memtier_engine.errors import MemtierError

CLASS = "class.memtierd.nri.io"
SWAP = WorkloadClass("swap", True, "cgroup: $CGROUP2_ABS_PATH\nstats: $MEMTIERD_SWAP_STATS_PATH\n")
TRACK = WorkloadClass("track", False, "track: $CGROUP2_ABS_PATH\n")
NO_ENGINE = WorkloadClass("limits-only", True, None)
NO_PROCESS = 1 << 30
"""More than the kernel's PID_MAX_LIMIT."""
CONFIG = PluginConfig((SWAP, TRACK, NO_ENGINE))


class FakeEngine:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.stopped = False
        self.had_files_at_stop = False
        self.why: str | None = None
        self.is_stuck = False

    def ended(self) -> str | None:
        return self.why

    def stop(self) -> None:
        assert not self.stopped
        self.stopped = True
        self.had_files_at_stop = self.job.files.config_path.exists()

    def tend(self) -> None:
        pass

    def stuck(self) -> bool:
        return self.is_stuck


class FakeLauncher:
    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.refuse: str | None = None
        self.attempts = 0
        self.configured: list[PluginConfig] = []
        self.leaving = 0
        """How many more times it wants to be called for what was stopped."""
        self.left_at_clean: list[Place] = []
        self.left_at_close: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def clean(self, run_directory: RunDirectory) -> None:
        self.left_at_clean += run_directory.leftovers()

    def configure(self, config: PluginConfig) -> None:
        self.configured.append(config)

    def launch(self, job: Job) -> RunningEngine:
        self.gate.wait(5)
        self.attempts += 1
        if self.refuse:
            raise MemtierError(self.refuse)
        self.engines.append(FakeEngine(job))
        return self.engines[-1]

    def tend(self) -> bool:
        self.leaving = max(0, self.leaving - 1)
        return self.leaving > 0

    def close(self, timeout_s: float) -> None:
        self.left_at_close.append(self.live())

    def live(self) -> list[str]:
        return [engine.job.label for engine in self.engines if not engine.stopped and engine.why is None]


class Scene:
    """A fleet over folders and a fake launcher; time only moves when told."""

    def __init__(self, base: Path) -> None:
        self.root = base / "cgroup"
        self.root.mkdir()
        self.runs = base / "run"
        self.launcher = FakeLauncher()
        self.clock = FakeClock(1000.0)
        self.wall_s = 5000.0
        self.fleet = self.make(CONFIG)

    def make(self, config: PluginConfig | None) -> Fleet:
        self.run_directory = RunDirectory(self.runs)
        self.run_directory.claim()
        self.fleet = Fleet(
            config,
            self.run_directory,
            self.launcher,
            cgroup_root=self.root,
            now_s=self.clock.now_s,
            wall_s=lambda: self.wall_s,
        )
        return self.fleet

    def container(self, key: str, name: str = "c0", *, exists: bool = True, **annotations: str) -> ContainerInfo:
        if exists:
            (self.root / f"pods/{key}").mkdir(parents=True, exist_ok=True)
        values = {CLASS: annotations.get("cls", "swap")}
        return ContainerInfo(key, "default", "pod", name, values, f"/pods/{key}")

    def tell(self, *events: Started | Stopped | Listed | Reconfigured) -> None:
        for event in events:
            self.fleet.report(event)
        assert self.fleet.settle()

    def later(self, seconds: float) -> None:
        self.clock.advance(seconds)
        assert self.fleet.settle()

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.runs)) for path in self.runs.glob("*/**/*") if path.is_file())

    def namespaces(self) -> list[str]:
        return sorted(path.name for path in self.runs.iterdir() if path.is_dir())


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    made.fleet.start()
    assert made.fleet.settle(), "what a test puts into the run directory is not of an earlier run"
    yield made
    made.fleet.stop()


def test_a_started_container_gets_an_engine_with_the_variables_replaced(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")))
    (engine,) = scene.launcher.engines
    assert engine.job.label == "default/pod:c0"
    assert engine.job.text == f"cgroup: {scene.root}/pods/a\nstats: {scene.runs}/default/pod/c0/memtierd.stats\n"
    assert (scene.runs / "default/pod/c0/memtierd.config.yaml").read_text() == engine.job.text
    assert scene.fleet.managed() == {"a": "swap"}
    assert scene.launcher.configured == [CONFIG], "before the first engine: its ceiling holds from the start"


def test_a_stopped_container_leaves_neither_engine_nor_directory(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")), Stopped("a"), Stopped("a"))
    assert scene.launcher.live() == []
    assert scene.namespaces() == []
    assert scene.fleet.managed() == {}


@pytest.mark.parametrize("cls", ["", "limits-only", "gone"])
def test_without_a_class_that_has_a_template_there_is_no_engine(scene: Scene, cls: str) -> None:
    """An unknown class was refused at creation or is ignored: it is no reason to fail the start."""
    scene.tell(Started(scene.container("a", cls=cls)))
    assert scene.launcher.attempts == 0
    assert scene.files() == []


def test_an_engine_is_never_started_without_a_cgroup(scene: Scene) -> None:
    """A container whose process exits at once has none any more."""
    scene.tell(Started(scene.container("a", exists=False)))
    assert scene.launcher.attempts == 0
    assert scene.files() == []


def test_a_stop_that_overtakes_the_start_wins(scene: Scene) -> None:
    scene.launcher.gate.clear()
    scene.fleet.report(Started(scene.container("a")))  # the fleet's thread is busy with this one
    for number in range(50):
        scene.fleet.report(Started(scene.container(f"b{number}", f"n{number}")))
        scene.fleet.report(Stopped(f"b{number}"))
    scene.launcher.gate.set()
    assert scene.fleet.settle()
    assert scene.launcher.attempts == 1


def test_reported_twice_a_container_has_one_engine(scene: Scene) -> None:
    container = scene.container("a")
    scene.tell(Started(container), Started(container), Listed((container,)))
    assert scene.launcher.attempts == 1


def test_two_live_containers_of_one_name_have_an_engine_each_and_the_younger_the_plain_path(scene: Scene) -> None:
    """A restart whose stop comes late; or two pods of one name, one of which is being deleted."""
    scene.tell(Started(scene.container("old")), Started(scene.container("new")))
    assert [engine.stopped for engine in scene.launcher.engines] == [False, False], "neither loses what it has learnt"
    assert scene.files() == ["default/pod/c0.old/memtierd.config.yaml", "default/pod/c0/memtierd.config.yaml"]
    assert "pods/new" in (scene.runs / "default/pod/c0/memtierd.config.yaml").read_text()
    old = scene.launcher.engines[0].job.files
    old.append_output("of the old one")
    assert (scene.runs / "default/pod/c0.old/memtierd.output").read_text() == "of the old one"
    scene.tell(Stopped("old"))
    assert scene.fleet.managed() == {"new": "swap"}
    assert scene.files() == ["default/pod/c0/memtierd.config.yaml"]


def test_the_survivor_of_two_keeps_its_engine(scene: Scene) -> None:
    scene.tell(Started(scene.container("old")), Started(scene.container("new")))
    scene.tell(Stopped("new"))
    assert [engine.stopped for engine in scene.launcher.engines] == [False, True]
    assert scene.files() == ["default/pod/c0.old/memtierd.config.yaml"]
    scene.tell(Started(scene.container("newest")))
    assert scene.files() == ["default/pod/c0.old/memtierd.config.yaml", "default/pod/c0/memtierd.config.yaml"]


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_which_of_two_is_older_does_not_hang_on_the_order_of_the_list(scene: Scene, order: tuple[str, str]) -> None:
    ages_s = {"old": 3000.0, "new": 20.0}
    both = [
        replace(scene.container(key), started_at_s=scene.wall_s - ages_s[key]) for key in order
    ]  # fmt: skip
    scene.tell(Listed(tuple(both)))
    assert scene.fleet.running() == {"old", "new"}
    assert "pods/new" in (scene.runs / "default/pod/c0/memtierd.config.yaml").read_text()
    assert "pods/old" in (scene.runs / "default/pod/c0.old/memtierd.config.yaml").read_text()


def test_an_earlier_instance_whose_cgroup_is_gone_makes_way_as_a_whole(scene: Scene) -> None:
    scene.tell(Started(scene.container("old")))
    (scene.root / "pods/old").rmdir()
    scene.tell(Started(scene.container("new")))
    assert [engine.stopped for engine in scene.launcher.engines] == [True, False]
    assert scene.files() == ["default/pod/c0/memtierd.config.yaml"]
    assert scene.fleet.managed() == {"new": "swap"}


def test_an_older_one_that_cannot_be_renamed_starts_anew_beside(scene: Scene) -> None:
    blocking = scene.runs / "default/pod/c0.old"
    blocking.mkdir(parents=True, mode=0o700)
    (blocking / "core").write_text("not ours")
    scene.tell(Started(scene.container("old")), Started(scene.container("new")))
    scene.later(1.0)
    assert scene.fleet.running() == {"old", "new"}
    assert [engine.stopped for engine in scene.launcher.engines] == [True, False, False]


def test_listed_containers_are_adopted_and_absent_ones_dropped(scene: Scene) -> None:
    a, b, c = (scene.container(key, key) for key in "abc")
    scene.tell(Started(a), Started(b))
    scene.tell(Listed((b, c)))
    assert scene.launcher.live() == ["default/pod:b", "default/pod:c"]
    assert scene.launcher.attempts == 3, "what ran goes on without a break"


def test_without_adoption_only_absent_ones_are_dropped(scene: Scene) -> None:
    a, b = scene.container("a", "a"), scene.container("b", "b")
    scene.tell(Started(a), Listed((b,), adopt=False))
    assert scene.launcher.live() == []


def test_a_container_that_is_only_created_is_neither_adopted_nor_dropped(scene: Scene) -> None:
    a = scene.container("a")
    scene.tell(Listed((), created=frozenset({"a"})))
    assert scene.launcher.attempts == 0
    scene.tell(Started(a), Listed((), created=frozenset({"a"})))
    assert scene.launcher.live() == ["default/pod:c0"]


def test_an_engine_that_ends_is_started_again_less_and_less_often(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")))
    starts = []
    for second in range(1, 40):
        if scene.launcher.engines[-1].why is None:
            starts.append(second)
            scene.launcher.engines[-1].why = "exit status 1"
        scene.later(1.0)
    assert starts == [1, 3, 6, 11, 20, 37]
    assert "exit status 1" in (scene.runs / "default/pod/c0/memtierd.output").read_text()


def test_an_engine_that_cannot_start_is_tried_again_until_the_container_stops(scene: Scene) -> None:
    scene.launcher.refuse = "no tracker works here"
    scene.tell(Started(scene.container("a")))
    scene.later(1.5)
    scene.later(2.5)
    assert scene.launcher.attempts == 3
    scene.tell(Stopped("a"))
    scene.later(100)
    assert scene.launcher.attempts == 3
    assert scene.namespaces() == []


def test_a_new_container_is_left_alone_for_the_grace_time(scene: Scene) -> None:
    scene.tell(Reconfigured(PluginConfig((SWAP,), grace_s=30)))
    scene.tell(Started(scene.container("a")))
    scene.later(29)
    assert scene.launcher.attempts == 0
    scene.later(2)
    assert scene.launcher.attempts == 1


def test_the_grace_of_an_adopted_container_counts_from_its_own_start(scene: Scene) -> None:
    scene.tell(Reconfigured(PluginConfig((SWAP,), grace_s=30)))
    young, old = (
        ContainerInfo(key, "default", "pod", key, {CLASS: "swap"}, f"/pods/{key}", started_at_s=scene.wall_s - age_s)
        for key, age_s in (("young", 20), ("old", 3000))
    )
    for container in (young, old):
        scene.container(container.id)
    scene.tell(Listed((young, old)))
    assert scene.launcher.live() == ["default/pod:old"]
    scene.later(11)
    assert scene.launcher.live() == ["default/pod:old", "default/pod:young"]


def test_a_reload_updates_adds_and_stops_engines(scene: Scene) -> None:
    changed = WorkloadClass("swap", True, "changed: $CGROUP2_ABS_PATH\n")
    fresh = WorkloadClass("fresh", None, "fresh: 1\n")
    names = {"a": "swap", "b": "track", "c": "fresh", "d": "limits-only"}
    scene.tell(*(Started(scene.container(key, key, cls=cls)) for key, cls in names.items()))
    assert scene.launcher.live() == ["default/pod:a", "default/pod:b"]
    scene.tell(Reconfigured(PluginConfig((changed, fresh, NO_ENGINE), bandwidth_mib_per_s=9)))
    live = {engine.job.label: engine.job.text for engine in scene.launcher.engines if not engine.stopped}
    assert live == {"default/pod:a": f"changed: {scene.root}/pods/a\n", "default/pod:c": "fresh: 1\n"}
    assert scene.launcher.configured[-1].bandwidth_mib_per_s == 9


def test_a_reload_that_changes_nothing_for_an_engine_leaves_it_running(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")), Reconfigured(PluginConfig((TRACK, SWAP), grace_s=5)))
    assert [engine.stopped for engine in scene.launcher.engines] == [False]


def test_a_container_whose_cgroup_is_gone_is_dropped_even_if_nobody_says_so(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")))
    (scene.root / "pods/a").rmdir()
    scene.later(60)
    assert scene.fleet.managed() == {}
    assert scene.namespaces() == []


def test_a_container_whose_cgroup_is_gone_is_forgotten(scene: Scene) -> None:
    """Not only its engine: nothing brings it back."""
    scene.tell(Started(scene.container("a")))
    (scene.root / "pods/a").rmdir()
    scene.later(60)
    scene.container("a")  # a cgroup of the same name, somebody else's
    scene.tell(Reconfigured(PluginConfig((WorkloadClass("swap", True, "changed: 1\n"),))))
    scene.later(600)
    assert scene.launcher.attempts == 1
    assert scene.fleet.status() == []


def test_a_container_without_an_engine_is_forgotten_too_when_its_cgroup_is_gone(scene: Scene) -> None:
    """What ends while a plugin connects is told to nobody: its name would stay for ever."""
    scene.tell(Started(scene.container("a", cls="gold")), Started(scene.container("b", "c1", cls="gold")))
    scene.later(60)
    assert [each["id"] for each in scene.fleet.status()] == ["a", "b"]
    (scene.root / "pods/a").rmdir()
    scene.later(60)
    assert [each["id"] for each in scene.fleet.status()] == ["b"]


def test_a_container_that_ended_before_anybody_looked_is_forgotten(scene: Scene) -> None:
    """Its cgroup was never seen; that of one whose processes are not seen either may only be elsewhere."""
    dead = replace(scene.container("a", exists=False), pid=NO_PROCESS)
    scene.tell(Started(dead), Started(scene.container("b", "c1", exists=False)))
    scene.later(60)
    sees_all = Path("/proc/self/ns/pid").stat().st_ino == 0xEFFFFFFC
    assert [each["id"] for each in scene.fleet.status()] == (["b"] if sees_all else ["a", "b"])


def test_a_cgroup_that_appears_late_is_found(scene: Scene) -> None:
    scene.tell(Started(scene.container("a", exists=False)))
    (found,) = scene.fleet.status()
    assert found["engine"] == "waiting"
    assert "does not exist" in str(found["why"])
    scene.container("a")
    scene.later(1.1)
    assert scene.fleet.running() == {"a"}


def test_after_the_end_of_a_container_nothing_of_it_is_remembered(scene: Scene) -> None:
    """A node sees millions of them."""
    fleet = scene.fleet
    for number in range(100):
        container = scene.container(f"b{number}", f"n{number}")
        if number % 2:  # else the stop overtakes the start
            scene.tell(Started(container))
            assert fleet._cares._by_names
        scene.tell(Started(container), Stopped(container.id), Stopped(container.id))
        scene.tell(Stopped(f"never heard of {number}"))
    assert not fleet._gone
    assert not fleet._cares._by_id
    assert not fleet._cares._by_names
    assert not fleet._litter._left
    assert not fleet._stuck


def test_a_stuck_engine_of_a_container_that_is_gone_is_remembered_until_its_step_returns(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")))
    (engine,) = scene.launcher.engines
    engine.is_stuck = True
    scene.tell(Stopped("a"))
    scene.later(60)
    assert list(scene.fleet._stuck) == ["a"]
    engine.is_stuck = False
    scene.later(60)
    assert not scene.fleet._stuck


def test_what_was_stopped_is_looked_after_until_it_has_ended(scene: Scene) -> None:
    """Though no container is left: a process that has ended would be a zombie until somebody waits for it."""
    scene.tell(Started(scene.container("a")))
    scene.later(1.0)
    scene.launcher.leaving = 3
    scene.tell(Stopped("a"))
    for left in (2, 1, 0):
        assert scene.fleet._wait_s() <= CHECK_S, "it comes back soon by itself"
        scene.later(1.0)
        assert scene.launcher.leaving == left
    assert scene.fleet._wait_s() > CHECK_S


def test_waits_grow_to_a_limit_and_no_further(scene: Scene) -> None:
    scene.launcher.refuse = "no tracker works here"
    scene.tell(Started(scene.container("a")))
    tries = []
    for second in range(4000):
        before = scene.launcher.attempts
        scene.later(1.0)
        if scene.launcher.attempts > before:
            tries.append(second)
    waits = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert waits[:4] == [2, 4, 8, 16]
    assert max(waits) == RETRY_MOST_S
    assert waits[-3:] == [RETRY_MOST_S] * 3
    assert retry_s(1_000_000) == RETRY_MOST_S, "also after as many as a float cannot count in powers of two"


def test_failures_are_forgotten_after_a_healthy_while(scene: Scene) -> None:
    """An engine that worked for days does not wait minutes after the ninth hiccup of a lifetime."""
    scene.tell(Started(scene.container("a")))
    for _ in range(12):
        scene.later(HEALTHY_S)
        scene.launcher.engines[-1].why = "a hiccup"
        scene.later(1.0)
        scene.later(1.0)
        assert scene.launcher.engines[-1].why is None, "the first wait is the short one"
    assert scene.launcher.attempts == 13


def test_failures_within_a_short_while_are_not_forgotten(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")))
    for _ in range(6):
        scene.launcher.engines[-1].why = "again"
        scene.later(1.0)
        scene.later(HEALTHY_S / 2)
    scene.launcher.engines[-1].why = "again"
    scene.later(1.0)
    assert scene.fleet.status()[0]["next_try_s"] == 64


class Refusing:
    """A file system that refuses, for one container or all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, whose: str = "") -> None:
        self.on, self.refused = True, 0
        real = getattr(RunDirectory, call)

        def refuse(own: RunDirectory, place: Place) -> object:
            if self.on and whose in str(place):
                self.refused += 1
                raise RunDirError(f"cannot {call}: No space left on device")
            return real(own, place)

        monkeypatch.setattr(RunDirectory, call, refuse)


def test_a_full_volume_is_tried_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Refusing(monkeypatch, "create")
    scene.tell(Started(scene.container("a")))
    scene.later(2.0)
    assert scene.launcher.attempts == 0
    assert scene.fleet.managed() == {"a": "swap"}
    assert "No space left" in str(scene.fleet.status()[0]["why"])
    full.on = False
    scene.later(10.0)
    assert scene.fleet.running() == {"a"}


def test_a_directory_that_cannot_be_removed_hurts_nobody_else(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stubborn = Refusing(monkeypatch, "remove", ":a")
    a, b, c, d = (scene.container(key, key) for key in "abcd")
    scene.tell(Started(a), Started(d), Listed((b, c)))
    assert scene.fleet.running() == {"b", "c"}
    assert scene.launcher.live() == ["default/pod:b", "default/pod:c"]
    scene.tell(Reconfigured(PluginConfig((WorkloadClass("swap", True, "changed: 1\n"),))))
    assert scene.fleet.running() == {"b", "c"}
    for _ in range(2000):
        scene.later(1.0)
    assert 8 < stubborn.refused < 20, "tried again, less and less often"
    stubborn.on = False
    scene.later(RETRY_MOST_S)
    assert {name.split("/")[2] for name in scene.files()} == {"b", "c"}


def test_a_container_that_comes_back_to_a_directory_that_was_to_go_keeps_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = Refusing(monkeypatch, "remove")
    scene.tell(Started(scene.container("a")), Stopped("a"), Started(scene.container("b")))
    stubborn.on = False
    scene.later(RETRY_MOST_S)
    assert scene.files() == ["default/pod/c0/memtierd.config.yaml"]


@pytest.mark.parametrize("call", ["configure", "clean", "tend"])
def test_a_launcher_that_fails_at_one_thing_still_does_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("a defect")

    scene = Scene(tmp_path)
    monkeypatch.setattr(scene.launcher, call, fail)
    scene.fleet.start()
    scene.tell(Started(scene.container("a")), Reconfigured(PluginConfig((TRACK, SWAP))))
    assert scene.fleet.running() == {"a"}
    scene.fleet.stop()


def test_an_engine_that_fails_to_stop_does_not_keep_the_others(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: FakeEngine) -> None:
        engine.stopped = True
        raise RuntimeError("a defect")

    scene.tell(*(Started(scene.container(key, key)) for key in "abc"))
    monkeypatch.setattr(FakeEngine, "stop", fail)
    scene.tell(Listed((scene.container("c", "c"),)))
    assert scene.fleet.running() == {"c"}
    assert {name.split("/")[2] for name in scene.files()} == {"c"}
    assert scene.fleet.stop()
    assert scene.namespaces() == []


def test_a_container_whose_engine_is_stuck_waits_for_it_whatever_happens(scene: Scene) -> None:
    """Another engine for it would only take one more thread."""
    scene.tell(Started(scene.container("a")), Started(scene.container("b", "c1")))
    engine = scene.launcher.engines[0]
    engine.is_stuck, engine.why = True, "a step has not returned for 30 s"
    scene.later(400)
    assert scene.launcher.attempts == 2
    scene.tell(Reconfigured(PluginConfig((WorkloadClass("swap", True, "changed: 1\n"),))))
    scene.later(400)
    assert [each.job.label for each in scene.launcher.engines] == ["default/pod:c0", "default/pod:c1", "default/pod:c1"]
    assert "does not return" in str({each["id"]: each for each in scene.fleet.status()}["a"]["why"])
    engine.is_stuck = False
    scene.later(400)
    assert scene.fleet.running() == {"a", "b"}


def test_the_status_names_every_container_and_why_it_has_no_engine(scene: Scene) -> None:
    scene.tell(Reconfigured(PluginConfig((SWAP, NO_ENGINE), grace_s=100)))
    scene.tell(*(Started(scene.container(key, key, cls=cls)) for key, cls in
                 {"a": "swap", "b": "limits-only", "c": "gone", "d": ""}.items()))  # fmt: skip
    found = {str(each["id"]): each for each in scene.fleet.status()}
    assert found["a"] == {
        "container": "default/pod:a", "id": "a", "class": "swap", "engine": "waiting",
        "why": "left alone after its start", "next_try_s": 100,
    }  # fmt: skip
    assert found["b"]["why"] == "class limits-only has no engine"
    assert "not configured" in str(found["c"]["why"])
    assert found["d"]["why"] == "it names no class"
    scene.later(101)
    assert scene.fleet.status()[0]["engine"] == "running"


def test_a_round_over_many_containers_lets_events_come_in_between(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of engines take minutes to start: a stop, or the end of the program, does not wait for all of them."""
    launch, names = scene.launcher.launch, [f"c{number:02}" for number in range(40)]

    def slow(job: Job) -> RunningEngine:
        scene.clock.advance(0.02)
        if scene.launcher.attempts == 10:
            scene.fleet.report(Stopped("c39"))
            scene.fleet.report(Started(scene.container("late", "late")))
        return launch(job)

    monkeypatch.setattr(scene.launcher, "launch", slow)
    scene.tell(Listed(tuple(scene.container(name, name) for name in names)))
    scene.later(0.1)
    assert scene.fleet.running() == {*names, "late"} - {"c39"}
    labels = [engine.job.label for engine in scene.launcher.engines]
    assert "default/pod:c39" not in labels, "its stop was heard before its turn came"
    assert labels[:39] == [f"default/pod:{name}" for name in names[:39]], "nobody's turn is lost"


def test_outputs_are_bounded_together(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.tell(*(Started(scene.container(f"k{number}", f"c{number}")) for number in range(200)))
    scene.later(60)
    assert 2 * 200 * scene.run_directory.output_bytes_max <= OUTPUTS_BYTES_MAX


def test_hostile_names_get_no_engine_and_no_file(scene: Scene, tmp_path: Path) -> None:
    (scene.root / "pods/a").mkdir(parents=True)
    for names in (("..", "pod", "c"), ("default", "a/b", "c"), ("default", "pod", "")):
        scene.tell(Started(ContainerInfo("a", *names, {CLASS: "swap"}, "/pods/a")))
    assert scene.launcher.attempts == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cgroup", "run"]


def test_the_end_stops_everything_and_leaves_no_files(scene: Scene) -> None:
    scene.tell(*(Started(scene.container(key, key)) for key in "abc"))
    assert scene.fleet.stop()
    assert scene.launcher.left_at_close == [[]], "asked to end first, then waited for"
    assert scene.namespaces() == []


@pytest.mark.parametrize("how", ["stop", "reload", "list", "no cgroup", "end"])
def test_an_engine_is_stopped_before_its_directory_goes(scene: Scene, how: str) -> None:
    """Else it could write into that of the next container of its names."""
    scene.tell(Started(scene.container("a")))
    if how == "stop":
        scene.tell(Stopped("a"))
    elif how == "reload":
        scene.tell(Reconfigured(PluginConfig((TRACK,))))
    elif how == "list":
        scene.tell(Listed(()))
    elif how == "no cgroup":
        (scene.root / "pods/a").rmdir()
        scene.later(60)
    else:
        assert scene.fleet.stop()
    (engine,) = scene.launcher.engines
    assert engine.stopped
    assert engine.had_files_at_stop
    assert scene.namespaces() == []


def test_what_a_crash_left_is_removed_before_anything_is_adopted(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    left = Place("old", "pod", "c")
    scene.run_directory.create(left).append_output("left")
    scene.fleet.start()
    scene.tell(Listed((scene.container("a"),)))
    assert scene.launcher.left_at_clean == [left], "its engine was ended while its directory was there"
    assert scene.files() == ["default/pod/c0/memtierd.config.yaml"]
    scene.fleet.stop()


def test_a_defect_in_one_container_does_not_stop_the_others(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = scene.launcher.launch

    def defective(job: Job) -> RunningEngine:
        if job.label.endswith(":bad"):
            raise RuntimeError("a defect")
        return launch(job)

    monkeypatch.setattr(scene.launcher, "launch", defective)
    scene.tell(Started(scene.container("bad", "bad")), Started(scene.container("good", "good")))
    assert scene.launcher.live() == ["default/pod:good"]
