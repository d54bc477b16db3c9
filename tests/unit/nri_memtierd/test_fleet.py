"""Container events to engines: what is started, kept, restarted and stopped, in whatever order events come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_cli.nri_memtierd.config import PluginConfig, WorkloadClass
from memtier_cli.nri_memtierd.events import ContainerInfo, Listed, Reconfigured, Started, Stopped
from memtier_cli.nri_memtierd.fleet import Fleet, Job, RunningEngine
from memtier_cli.nri_memtierd.rundir import Place, RunDirectory
from memtier_engine.clock import FakeClock
from memtier_engine.errors import MemtierError

CLASS = "class.memtierd.nri.io"
SWAP = WorkloadClass("swap", True, "cgroup: $CGROUP2_ABS_PATH\nstats: $MEMTIERD_SWAP_STATS_PATH\n")
TRACK = WorkloadClass("track", False, "track: $CGROUP2_ABS_PATH\n")
NO_ENGINE = WorkloadClass("limits-only", True, None)
CONFIG = PluginConfig((SWAP, TRACK, NO_ENGINE))


class FakeEngine:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.stopped = False
        self.why: str | None = None

    def ended(self) -> str | None:
        return self.why

    def stop(self) -> None:
        assert not self.stopped
        self.stopped = True

    def tend(self) -> None:
        pass


class FakeLauncher:
    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.refuse: str | None = None
        self.attempts = 0
        self.configured: list[PluginConfig] = []
        self.gate = threading.Event()
        self.gate.set()

    def clean(self, run_directory: RunDirectory) -> None:
        pass

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
        return False

    def close(self, timeout_s: float) -> None:
        assert all(engine.stopped or engine.why for engine in self.engines)

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
    yield made
    made.fleet.stop()


def test_a_started_container_gets_an_engine_with_the_variables_replaced(scene: Scene) -> None:
    scene.tell(Started(scene.container("a")))
    (engine,) = scene.launcher.engines
    assert engine.job.label == "default/pod:c0"
    assert engine.job.text == f"cgroup: {scene.root}/pods/a\nstats: {scene.runs}/default/pod/c0/memtierd.stats\n"
    assert (scene.runs / "default/pod/c0/memtierd.config.yaml").read_text() == engine.job.text
    assert scene.fleet.managed() == {"a": "swap"}


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


def test_a_restart_under_the_same_name_replaces_the_engine_and_keeps_the_new_directory(scene: Scene) -> None:
    """The stop of the old instance may come after the start of the new one."""
    scene.tell(Started(scene.container("old")), Started(scene.container("new")))
    assert [engine.stopped for engine in scene.launcher.engines] == [True, False]
    scene.tell(Stopped("old"))
    assert scene.fleet.managed() == {"new": "swap"}
    assert scene.files() == ["default/pod/c0/memtierd.config.yaml"]


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


def test_hostile_names_get_no_engine_and_no_file(scene: Scene, tmp_path: Path) -> None:
    (scene.root / "pods/a").mkdir(parents=True)
    for names in (("..", "pod", "c"), ("default", "a/b", "c"), ("default", "pod", "")):
        scene.tell(Started(ContainerInfo("a", *names, {CLASS: "swap"}, "/pods/a")))
    assert scene.launcher.attempts == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cgroup", "run"]


def test_the_end_stops_everything_and_leaves_no_files(scene: Scene) -> None:
    scene.tell(*(Started(scene.container(key, key)) for key in "abc"))
    assert scene.fleet.stop()
    assert scene.launcher.live() == []
    assert scene.namespaces() == []


def test_what_a_crash_left_is_removed_before_anything_is_adopted(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.run_directory.create(Place("old", "pod", "c")).append_output("left")
    scene.fleet.start()
    scene.tell(Listed((scene.container("a"),)))
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
