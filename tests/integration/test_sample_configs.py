"""Every sample configuration: run on this kernel where it can, else parsed and built up to what the kernel lacks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memtier_engine.config.parts import TRACKERS, TrackerSpec
from memtier_engine.config.policies import POLICIES
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.model import Tracker
from memtier_engine.trackers.finder import FinderTracker
from memtier_engine.trackers.multi import MultiTracker
from memtier_engine.trackers.registry import why_not as tracker_why_not
from support.cgroups import temporary_cgroup
from support.samples import Run, Sample, run_sample, sample_configs_for, samples, text_for
from support.swap import temporary_zram_swap
from support.toucher import Toucher, toucher
from support.waiting import WAIT_S, until

ALL = samples()
PAGES = 2048
EXACT = ("bpf", "idlepage", "refs")
"""Trackers with which all memory of a process that does nothing looks idle."""
NO_SAMPLE = {"userfault"}
"""Trackers that see the engine's own process only, which no configuration file means."""
MIB = 1 << 20


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Toucher, Path]]:
    """A process with 8 MiB, its cgroup, and swap."""
    folder = tmp_path_factory.mktemp("samples")
    with (
        temporary_zram_swap(256 * MIB),
        temporary_cgroup("samples") as cgroup,
        toucher("anonymous", PAGES, folder) as process,
    ):
        (cgroup / "cgroup.procs").write_text(str(process.process.pid))
        process.write(range(PAGES))
        time.sleep(1.1)  # the engine leaves processes alone that are younger than a second
        yield process, cgroup


def test_the_reference_s_four_and_every_policy_and_tracker_have_a_sample() -> None:
    names = {sample.name for sample in ALL}
    assert names >= {"age-idlepage-trackonly", "age-softdirty", "heat-damon", "heat-idlepage"}
    assert {sample.policy for sample in ALL} == set(POLICIES)
    assert {tracker for sample in ALL for tracker in (*sample.trackers, sample.spec.tracker.name)} == set(
        TRACKERS
    ) - NO_SAMPLE
    for sample in ALL:
        parts = sample.name.split("-")
        assert sample.name.startswith(sample.policy), sample.name
        assert sample.path.read_text().startswith("# "), f"{sample.name}: say what it does"
        assert len(parts) > 1 or sample.policy in ("demote-idle", "avoid-oom")


@pytest.mark.parametrize("sample", ALL, ids=[sample.name for sample in ALL])
def test_a_sample_runs_here_or_says_what_the_kernel_lacks(
    sample: Sample, machine: tuple[Toucher, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel lacks is then pretended, so that every policy, target and mover of a file is built and runs."""
    process, cgroup = machine
    host = Host()
    process.write(range(PAGES))
    failure: MemtierError | None = None
    try:
        run = run_sample(sample, cgroup, tmp_path, host, scans=_scans(sample))
    except MemtierError as raised:
        failure = raised
    if failure is not None:
        # DAMON may be in use by others at any time; every other tracker that works alone works here too.
        lacking = {name for name in sample.trackers if name != "auto" and tracker_why_not(name, host) is not None}
        assert lacking or "damon" in sample.trackers or sample.policy == "reclaim", failure
        assert failure.hint, failure
        if sample.policy == "reclaim":
            return  # it has no tracker: a cgroup is what it needs
        monkeypatch.setattr(TrackerSpec, "build", pretended)
        run = run_sample(sample, cgroup, tmp_path, host, scans=5)
        assert len(run.reports) == 5
        assert run.engine.tracker.name == sample.spec.tracker.name
        assert run.reports[-1].processes == (0 if "pages-of-interest" in sample.name else 1)
        return
    assert len(run.reports) == _scans(sample)
    check(sample, run)


class Pretended(FinderTracker):
    """Has another's name and sees all memory as untouched."""

    def __init__(self, name: str, host: Host) -> None:
        super().__init__(host)
        self.name = name


def pretended(spec: TrackerSpec, host: Host) -> Tracker:
    """As `TrackerSpec.build`, on a kernel that has everything."""
    if spec.parts:
        return MultiTracker([pretended(part, host) for part in spec.parts])
    return Pretended(spec.name, host)


def _scans(sample: Sample) -> int:
    """Enough for its limits, some of which are minutes; the intervals pass at once."""
    if sample.spec.target.name == "filter":
        return 3  # every large process of the machine
    return 45 if sample.policy == "auto" else 30


def check(sample: Sample, run: Run) -> None:
    last = run.reports[-1]
    allowed = ["ENODEV"]  # other nodes
    if sample.spec.target.name == "filter":  # all large processes of the machine: one may have an observer
        allowed.append("is observed already by")
    assert not [error for error in run.errors if not any(text in error for text in allowed)]
    assert last.tracker == run.engine.tracker.name
    if sample.policy in ("stub", "avoid-oom") or "pages-of-interest" in sample.name:
        assert last.processes == 0, "it looks at no process by itself"
        return
    if sample.spec.target.name == "filter":
        return  # which processes are that large differs by machine
    assert last.processes == 1
    if sample.policy == "reclaim":
        return  # whose memory a page is on is settled when it is first touched, maybe in another cgroup
    assert last.tracked_bytes >= PAGES * 4096
    out = run.paged_out_bytes / 4096
    if "save" in sample.name:
        assert 0.2 * PAGES <= out <= 0.4 * PAGES + 300, f"{out} of {PAGES} pages out"
    elif sample.policy in ("age", "demote-idle") and sample.spec.swaps and last.tracker in EXACT:
        assert out >= 0.9 * PAGES, f"{out} of {PAGES} pages out, though nobody touched them"
    elif not sample.spec.swaps:
        assert out == 0


def test_what_cannot_run_here_is_listed_for_another_kernel() -> None:
    runs, reasons = sample_configs_for(Host())
    assert len(runs) + len(reasons) == len(ALL)
    assert len(runs) >= 10, reasons
    assert all(reasons.values())


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts `memtierd -config` on a text; it is ended after the test."""
    running: list[subprocess.Popen[str]] = []

    def start(text: str) -> subprocess.Popen[str]:
        path = tmp_path / "memtierd.yaml"
        path.write_text(text)
        with (tmp_path / "output").open("wb") as output:
            command = [str(Path(sys.executable).parent / "memtierd"), "-config", str(path)]
            running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True))
        return running[-1]

    yield start
    for each in running:
        each.kill()
        each.wait()


def changed(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def test_the_sample_of_routines_runs_in_memtierd(
    started: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    sample = next(sample for sample in ALL if sample.name == "stub-statactions")
    daemon = started(changed(sample.path.read_text(), ("intervalms: 5000", "intervalms: 200")))
    output = tmp_path / "output"
    until(lambda: output.read_text().count("table: events") >= 2, "the interval command runs")
    assert "RoutineStatActions.command.memtier: stats... status: 0" in output.read_text()
    daemon.terminate()
    assert daemon.wait(WAIT_S) == 0


def test_the_sample_that_runs_programs_does_so_only_where_allowed(
    started: Callable[[str], subprocess.Popen[str]], machine: tuple[Toucher, Path], tmp_path: Path
) -> None:
    sample = next(sample for sample in ALL if sample.name == "age-statactions-programs")
    told = tmp_path / "told"
    text = changed(
        text_for(sample, machine[1], tmp_path),
        ("intervalms: 5000\n      pageoutmb: 3000", "intervalms: 200\n      pageoutmb: 0"),
        ("echo 1 > /proc/sys/vm/drop_caches", f"echo done > {told}"),
    )
    refused = started(changed(text, ("allowprograms: true\n", "")))
    assert refused.wait(WAIT_S) == 1
    error = (tmp_path / "output").read_text()
    assert error.count("\n") == 1
    # The switch comes first, then what it is for.
    wanted = "routines[0].config.pageoutcommand: start memtierd with -allow-programs: this runs the program 'sh' ("
    assert wanted in error
    assert "`allowprograms: true`" in error
    assert not told.exists()
    daemon = started(text)
    until(told.exists, "the program runs")
    daemon.terminate()
    assert daemon.wait(WAIT_S) == 0
