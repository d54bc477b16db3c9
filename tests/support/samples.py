"""The sample configurations: which can run on a machine, and a run of each in a minute of made-up time.

Used by the tests on the host and by the guest's script in the test VM; needs no pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from memtier_engine.clock import FakeClock
from memtier_engine.config.files import Spec, load, parse
from memtier_engine.config.parts import TrackerSpec
from memtier_engine.engine.loop import Engine, StepReport
from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.stats.recorder import Statistics

FOLDER = Path(__file__).parents[2] / "sample-configs"
CGROUPS = ("/sys/fs/cgroup/foobar", "/sys/fs/cgroup/track-me", "/sys/fs/cgroup/system.slice")
OOM_CGROUP = "/sys/fs/cgroup/kubepods.slice"
PAGES_OF_INTEREST = "/var/run/poi"
TRACE = "/tmp/memtierd-heats.trace"


@dataclass(frozen=True)
class Sample:
    """One file."""

    path: Path
    spec: Spec

    @property
    def name(self) -> str:
        return self.path.stem.removeprefix("memtierd-")

    @property
    def policy(self) -> str:
        return self.path.read_text().partition("name: ")[2].split()[0]

    @property
    def trackers(self) -> tuple[str, ...]:
        """Those that it needs; of `multi`, its parts."""
        return tuple(part.name for part in _flat(self.spec.tracker))


def _flat(tracker: TrackerSpec) -> Iterator[TrackerSpec]:
    if not tracker.parts:
        yield tracker
    for part in tracker.parts:
        yield from _flat(part)


def samples() -> list[Sample]:
    return [Sample(path, load(path)) for path in sorted(FOLDER.glob("memtierd-*.yaml"))]


def why_not(sample: Sample, host: Host) -> str | None:
    """Why the sample cannot run on this machine; None: it can."""
    try:
        sample.spec.tracker.build(host).close()
    except MemtierError as failure:
        return str(failure)
    return None


def sample_configs_for(host: Host) -> tuple[list[Sample], dict[str, str]]:
    """(those that can run here, for each of the others by its name why not)."""
    reasons = {sample.name: why_not(sample, host) for sample in samples()}
    runs = [sample for sample in samples() if reasons[sample.name] is None]
    return runs, {name: reason for name, reason in reasons.items() if reason is not None}


def text_for(sample: Sample, cgroup: Path, folder: Path) -> str:
    """The file's text with the cgroup, and paths in `folder`, in place of what stands in the file."""
    text = sample.path.read_text()
    for name in (*CGROUPS, OOM_CGROUP):
        text = text.replace(name, str(cgroup))
    (folder / "poi").mkdir(exist_ok=True)
    return text.replace(PAGES_OF_INTEREST, str(folder / "poi")).replace(TRACE, str(folder / "heats.trace"))


@dataclass(frozen=True)
class Run:
    """What a run showed."""

    reports: list[StepReport]
    statistics: Statistics
    engine: Engine

    @property
    def paged_out_bytes(self) -> int:
        return max((report.paged_out_bytes for report in self.reports), default=0)

    @property
    def errors(self) -> list[str]:
        return [error for report in self.reports for error in report.errors]


def run_sample(sample: Sample, cgroup: Path, folder: Path, host: Host, *, scans: int = 12) -> Run:
    """Run the configuration on a cgroup's processes for some scans, whose intervals pass at once.

    Processes from anywhere else are only looked at. Guards on stall times are off: other tests' load shows there.
    """
    spec = parse(text_for(sample, cgroup, folder), file=str(sample.path))
    guards = replace(
        spec.guards, memory_psi_node=None, memory_psi_cgroup=None, io_psi_node=None, io_psi_cgroup=None, refaults=None
    )
    statistics = Statistics()
    elsewhere = spec.target.name == "filter"
    engine = replace(spec, guards=guards).build(host, clock=FakeClock(), dry_run=elsewhere, observers=[statistics])
    reports = []
    for report in engine.run(duration_s=1e9):
        reports.append(report)
        if len(reports) >= scans:
            break
    engine.close()
    return Run(reports, statistics, engine)
