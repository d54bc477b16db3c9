"""Engine of whole cgroups on a dressed machine whose memory.reclaim does what the test says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from memtier_engine.clock import FakeClock
from memtier_engine.config.files import parse
from memtier_engine.engine.loop import EngineConfig, StepReport
from memtier_engine.engine.node import Node, NodeConfig
from memtier_engine.errors import TrackerUnavailable, Unavailable
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.goals import Goal
from memtier_engine.reclaim.engine import ReclaimEngine, reclaim_engine
from memtier_engine.reclaim.policy import ReclaimPolicyConfig
from support.hostfolder import HostFolder

MIB = 1 << 20
PAGES_OF_MIB = 256
STAT = "anon {}\nfile 0\nworkingset_refault_anon {}\nworkingset_refault_file 0\npgscan 1\n"
CALM = "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


class Machine:
    """One cgroup `a` of 100 MiB, of which 60 MiB have been idle for 100 s."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, mglru: bool) -> None:
        self.folder = HostFolder(root)
        self.folder.cgroup2()
        (root / "sys/fs/cgroup/memory.reclaim").write_text("")
        self.folder.process(77)
        self.asked: list[int] = []
        self.aged = 0
        self.make()
        if mglru:
            self.folder.write("sys/kernel/mm/lru_gen/enabled", "0x0007\n")
            self.ages(old_mib=60)
        monkeypatch.setattr(Host, "write", lambda host, path, text: self._write(path, text))
        self.clock = FakeClock(1000.0)

    def make(self) -> None:
        self.path = self.folder.cgroup("sys/fs/cgroup/a", [77], memory_current=str(100 * MIB), memory_reclaim="")
        self.set("memory.swap.current", 0)
        self.happened(refaults=0, stall_us=0)

    def set(self, name: str, value: int | str) -> None:
        (self.path / name).write_text(str(value))

    def happened(self, *, refaults: int, stall_us: int) -> None:
        self.set("memory.stat", STAT.format(100 * MIB, refaults))
        self.set("memory.pressure", CALM.format(stall_us))

    def ages(self, *, old_mib: int) -> None:
        rows = (
            f" {1:10} {200000:10} {old_mib * PAGES_OF_MIB:10} {0:10} \n"
            f" {2:10} {100000:10} {10 * PAGES_OF_MIB:10} {0:10} \n"
            f" {3:10} {1000:10} {20 * PAGES_OF_MIB:10} {0:10} \n"
        )
        self.folder.write(
            "sys/kernel/debug/lru_gen", f"memcg     1 /\n node     0\nmemcg     5 /a\n node     0\n{rows}"
        )

    def current(self) -> int:
        return int((self.path / "memory.current").read_text())

    def _write(self, path: Path, text: str) -> None:
        if path.name == "lru_gen":
            self.aged += 1
            return
        assert path.name == "memory.reclaim", path
        size = int(text)
        if not size:  # the probe
            return
        self.asked.append(size)
        current = int((path.parent / "memory.current").read_text())
        (path.parent / "memory.current").write_text(str(current - size))
        swap = path.parent / "memory.swap.current"
        swap.write_text(str(int(swap.read_text()) + size))

    def engine(self, ages: str = "auto", bandwidth: float | None = None, *, dry_run: bool = False) -> ReclaimEngine:
        policy = ReclaimPolicyConfig(goal=Goal("refaults", 2.0), idle_least_s=50.0, ages=ages)
        config = EngineConfig(
            mover=MoverConfig(interval_ms=100, bandwidth_mib_per_s=bandwidth),
            guards=GuardsConfig(start_grace_s=0),
            dry_run=dry_run,
        )
        return reclaim_engine(["/a"], policy, config, host=self.folder.host, clock=self.clock)

    def run(self, engine: ReclaimEngine, seconds: float) -> StepReport:
        """The last report of that time."""
        end_s = self.clock.now_s() + seconds
        last: StepReport | None = None
        while self.clock.now_s() < end_s:
            report, due_s = engine.advance(self.clock.now_s())
            last = report or last
            self.clock.advance(max(0.001, due_s - self.clock.now_s()))
        assert last is not None
        return last


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch, mglru=True)


@pytest.fixture
def ageless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch, mglru=False)


def test_by_ages_what_is_idle_goes_and_the_report_tells_how_much(machine: Machine) -> None:
    """60 MiB have been idle for the 100 s since the next generation began; the other 30 for a second or less."""
    engine = machine.engine()
    first = machine.run(engine, 5)
    assert first.tracker == "mglru"
    assert first.processes == 1
    assert first.resident_bytes == 100 * MIB
    assert first.idle_bytes(50.0) == 60 * MIB
    assert first.idle_bytes(1.0) == 70 * MIB
    assert not machine.asked
    report = machine.run(engine, 4.9)
    assert report.candidate_bytes == 60 * MIB
    assert sum(machine.asked) == 60 * MIB
    machine.ages(old_mib=0)
    last = machine.run(engine, 10)
    assert machine.current() == 40 * MIB
    assert last.paged_out_bytes == last.moved_bytes_total == 60 * MIB
    assert last.errors == ()
    engine.close()


def test_what_memory_min_guarantees_is_approached_by_halves(machine: Machine) -> None:
    """100 MiB, 52 guaranteed: of the 48 above, no more than half is asked for between two looks."""
    machine.set("memory.min", 52 * MIB)
    engine = machine.engine()
    machine.run(engine, 9.9)
    assert sum(machine.asked) == 24 * MIB
    machine.run(engine, 5)
    assert sum(machine.asked) == 36 * MIB
    machine.run(engine, 60)
    assert 52 * MIB <= machine.current() <= 53 * MIB
    engine.close()


def test_a_new_generation_begins_twice_per_threshold(machine: Machine) -> None:
    """The threshold is 50 s: looks come each 5 s, generations each 25 s."""
    engine = machine.engine(dry_run=True)
    machine.run(engine, 100)
    assert machine.aged == 4
    engine.close()


def test_without_ages_a_share_goes_and_what_comes_back_stops_it(ageless: Machine) -> None:
    engine = ageless.engine()
    ageless.run(engine, 60)
    assert 0 < sum(ageless.asked) <= 1.01 * 100 * MIB / 100  # a percent per minute
    assert ageless.aged == 0
    asked = len(ageless.asked)
    ageless.happened(refaults=100 * PAGES_OF_MIB, stall_us=0)
    report = ageless.run(engine, 60)
    assert report.refault_bytes_total == 100 * MIB
    assert len(ageless.asked) <= asked + 1
    assert report.tracker == "none"
    engine.close()


def test_a_closed_guard_stops_it_and_forgets_what_is_pending(machine: Machine) -> None:
    engine = machine.engine(bandwidth=1.0)
    machine.run(engine, 7)
    begun = len(machine.asked)
    assert begun
    machine.set("memory.pressure", CALM.format(0).replace("avg10=0.00", "avg10=50.00"))
    machine.run(engine, 5)
    stopped = len(machine.asked)
    machine.run(engine, 20)
    assert len(machine.asked) == stopped
    assert not engine.guards.verdict.swap_allowed
    engine.close()


def test_its_mover_s_ceiling_holds_and_a_node_s_too(machine: Machine) -> None:
    for node_limit, expected in ((None, 2.0), (0.5, 0.5)):
        machine.make()
        machine.asked.clear()
        engine = machine.engine(bandwidth=2.0)
        node = Node(NodeConfig(bandwidth_mib_per_s=node_limit), host=machine.folder.host, clock=machine.clock)
        node.adopt(engine)
        machine.run(engine, 5)
        machine.run(engine, 10)
        assert sum(machine.asked) / MIB / 10 == pytest.approx(expected, rel=0.25)
        engine.close()
        node.close()


def test_a_dry_run_asks_for_nothing(machine: Machine) -> None:
    engine = machine.engine(dry_run=True)
    report = machine.run(engine, 20)
    assert report.candidate_bytes == 60 * MIB
    assert not machine.asked
    engine.close()


def test_a_cgroup_may_go_and_one_of_the_same_name_begins_anew(machine: Machine) -> None:
    engine = machine.engine(dry_run=True)
    machine.run(engine, 20)
    shutil.rmtree(machine.path)
    gone = machine.run(engine, 10)
    assert (gone.resident_bytes, gone.candidate_bytes, gone.processes) == (0, 0, 0)
    machine.make()
    back = machine.run(engine, 10.1)
    assert back.resident_bytes == 100 * MIB
    assert back.errors == ()
    engine.close()


def test_without_the_memory_controller_it_says_what_to_do(tmp_path: Path) -> None:
    folder = HostFolder(tmp_path)
    folder.cgroup2(controllers="cpu")
    with pytest.raises(Unavailable, match=r"policy reclaim: .*memory controller") as raised:
        reclaim_engine(["/a"], ReclaimPolicyConfig(), host=folder.host)
    assert raised.value.hint


def test_ages_that_are_demanded_and_not_there_are_an_error(ageless: Machine) -> None:
    with pytest.raises(TrackerUnavailable, match="policy reclaim"):
        ageless.engine(ages="mglru")


def test_a_configuration_file_gives_it(machine: Machine) -> None:
    text = "goal: 'psi: 0.2%'\ncgroups: [/sys/fs/cgroup/a]\nages: none\nidleleastms: 7000\nmover: {bandwidth: 7}\n"
    spec = parse("policy:\n  name: reclaim\n  config: |\n" + "".join(f"    {line}\n" for line in text.splitlines()))
    assert spec.swaps
    engine = spec.build(machine.folder.host, clock=machine.clock)
    assert isinstance(engine, ReclaimEngine)
    assert engine.reclaim.config == ReclaimPolicyConfig(goal=Goal("psi", 0.2), ages="none", idle_least_s=7.0)
    assert engine.mover.config.bandwidth_mib_per_s == 7
    assert machine.run(engine, 5).resident_bytes == 100 * MIB
    engine.close()
