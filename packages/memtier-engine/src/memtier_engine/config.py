"""The reference daemon's configuration files, decoded and checked as a whole before anything starts.

A file is one mapping with `policy` and `routines`; every pluggable part is a `name` and a `config`, the latter
text that is YAML or JSON again. A part that may stand in a file has a decoder in one of the tables below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from memtier_engine.config_reader import Place, Section, compose
from memtier_engine.config_routines import RoutineSpec, decode_routines
from memtier_engine.engine import Engine, EngineConfig
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.targets.base import Target
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.targets.pids import PidsTarget

PID_MAX = 1 << 22
"""Source: include/linux/threads.h PID_MAX_LIMIT on 64-bit."""
INTERVAL_MAX_MS = 24 * 3600 * 1000
NODE_MAX = 1023
AGE_KEYS = (
    "pidwatcher",
    "tracker",
    "mover",
    "cgroups",
    "pids",
    "intervalms",
    "swapoutms",
    "idledurationms",
    "idlenumas",
    "activedurationms",
    "activenumas",
)
PAGED_KEYS = ("pagesinregion", "maxcountperregion", "scanintervalms", "regionsupdatems", "pagemapreadahead")


@dataclass(frozen=True, slots=True)
class TrackerSpec:
    """A `tracker` block."""

    name: str
    scan_interval_ms: int = 5000
    pages_in_region: int = 512
    """Taken for compatibility: ages are kept per page, whatever the region."""


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A `pidwatcher` block."""

    name: str
    pids: tuple[int, ...] = ()
    cgroups: tuple[str, ...] = ()
    interval_ms: int = 5000

    def build(self, host: Host) -> Target:
        """The target on this machine."""
        return PidsTarget(host, self.pids) if self.name == "pidlist" else CgroupsTarget(host, self.cgroups)


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole file."""

    policy: AgePolicyConfig
    tracker: TrackerSpec
    target: TargetSpec
    mover: MoverConfig
    routines: tuple[RoutineSpec, ...] = ()

    def build(self, host: Host | None = None, *, dry_run: bool = False) -> Engine:
        """The engine on this machine.

        Raises:
            TrackerUnavailable: the tracker does not work here.
        """
        host = host or Host()
        config = EngineConfig(
            tracker=self.tracker.name,
            scan_interval_ms=self.tracker.scan_interval_ms,
            policy=self.policy,
            mover=self.mover,
            dry_run=dry_run,
        )
        return Engine(self.target.build(host), config, host=host)


def load(path: str | Path) -> Spec:
    """Read and check the file at `path`.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=str(path)) from None
    return parse(text, file=str(path))


def parse(text: str, *, file: str | None = None, first_line: int = 1) -> Spec:
    """Decode and check configuration text.

    Args:
        text: the whole document.
        file: what errors call it.
        first_line: line of `file` on which the text begins, if it stands within another.
    Raises:
        ConfigError: something is wrong; nothing was started.
    """
    place = Place(file, first_line)
    root = compose(text, place, "")
    if root is None:
        raise ConfigError("is empty", file=file, hint="write a `policy` mapping with `name` and `config`")
    section = Section(root, "", place)
    section.allow("policy", "routines")
    policy = section.section("policy")
    routines = decode_routines(section)
    if policy is None:
        raise ConfigError("is missing", key_path="policy", file=file, hint="a mapping with `name` and `config`")
    return replace(POLICIES[policy.choice("name", tuple(POLICIES))](policy), routines=routines)


def _age(block: Section) -> Spec:
    section = _required_config(block)
    section.allow(*AGE_KEYS)
    _refuse_deprecated(section)
    interval_ms = section.integer("intervalms", 5000, least=1, most=INTERVAL_MAX_MS)
    durations = {
        name: section.integer(key, None, most=1000 * INTERVAL_MAX_MS) or None
        for name, key in (
            ("swap_out_ms", "swapoutms"),
            ("idle_duration_ms", "idledurationms"),
            ("active_duration_ms", "activedurationms"),
        )
    }
    policy = AgePolicyConfig(
        interval_ms=interval_ms or 5000,
        idle_numas=section.integers("idlenumas", least=-1, most=NODE_MAX),
        active_numas=section.integers("activenumas", least=-1, most=NODE_MAX),
        **durations,
    )
    return Spec(policy, _tracker(section), _target(section), _mover(section))


def _refuse_deprecated(section: Section) -> None:
    for key, watcher in (("cgroups", "cgroups"), ("pids", "pidlist")):
        if section.has(key):
            raise section.error(
                key, "this key is gone", f"use pidwatcher: {{name: {watcher}, config: '{key}: [...]'}} instead"
            )


def _required_config(block: Section) -> Section:
    block.allow("name", "config")
    config = block.config()
    if config is None:
        raise block.error("config", "is missing", "text in YAML, as `config: |` and indented lines")
    return config


def _mover(section: Section) -> MoverConfig:
    mover = section.section("mover")
    if mover is None:
        return MoverConfig()
    mover.allow("intervalms", "bandwidth")
    interval_ms = mover.integer("intervalms", 10, least=1, most=60_000)
    bandwidth = mover.integer("bandwidth", 100, least=1, most=1 << 20)
    return MoverConfig(interval_ms=interval_ms or 10, bandwidth_mib_per_s=bandwidth)


def _target(section: Section) -> TargetSpec:
    block = section.section("pidwatcher")
    if block is None:
        raise section.error("pidwatcher", "is missing", "a mapping with `name` and `config`")
    return TARGETS[block.choice("name", tuple(TARGETS))](block)


def _pidlist(block: Section) -> TargetSpec:
    section = _required_config(block)
    section.allow("pids")
    pids = section.integers("pids", least=1, most=PID_MAX)
    if not pids:
        raise section.error("pids", "is empty", "a list of process ids")
    return TargetSpec("pidlist", pids=pids)


def _cgroups(block: Section) -> TargetSpec:
    section = _required_config(block)
    section.allow("intervalms", "cgroups")
    interval_ms = section.integer("intervalms", 5000, most=INTERVAL_MAX_MS) or 5000
    cgroups = section.texts("cgroups")
    if not cgroups:
        raise section.error("cgroups", "is empty", "a list of cgroup directories")
    for index, cgroup in enumerate(cgroups):
        if not cgroup.startswith("/"):
            raise section.error(f"cgroups[{index}]", f"{cgroup!r} is not absolute", "start it with /sys/fs/cgroup/")
    return TargetSpec("cgroups", cgroups=cgroups, interval_ms=interval_ms)


def _tracker(section: Section) -> TrackerSpec:
    block = section.section("tracker")
    if block is None:
        raise section.error("tracker", "is missing", f"a mapping with `name`: one of {', '.join(sorted(TRACKERS))}")
    name = block.choice("name", tuple(TRACKERS))
    block.allow("name", "config")
    config = block.config()
    return TrackerSpec(name) if config is None else TRACKERS[name](name, config)


def _paged_tracker(name: str, section: Section) -> TrackerSpec:
    interval_ms = section.integer("scanintervalms", 5000, least=1, most=INTERVAL_MAX_MS)
    pages = section.integer("pagesinregion", 512, least=1, most=1 << 30)
    # Checked and without effect: ages are kept per page, maps are read at each scan, reads are as large as useful.
    section.integer("maxcountperregion", 1, most=1 << 30)
    section.integer("regionsupdatems", 10000, most=INTERVAL_MAX_MS)
    section.integer("pagemapreadahead", 0, least=-1, most=1 << 20)
    return TrackerSpec(name, scan_interval_ms=interval_ms or 5000, pages_in_region=pages or 512)


def _idlepage(name: str, section: Section) -> TrackerSpec:
    section.allow(*PAGED_KEYS, "kpageflagsreadahead", "bitmapreadahead")
    spec = _paged_tracker(name, section)
    section.integer("kpageflagsreadahead", 0, least=-1, most=1 << 20)
    section.integer("bitmapreadahead", 0, least=-1, most=1 << 20)
    return spec


def _softdirty(name: str, section: Section) -> TrackerSpec:
    section.allow(*PAGED_KEYS, "skippageprob", "trackreferenced")
    spec = _paged_tracker(name, section)
    section.integer("skippageprob", 0, most=1000)
    if section.flag("trackreferenced", False):
        raise section.error("trackreferenced", "is not supported", "use tracker idlepage to see reads")
    return spec


def _own_tracker(name: str, section: Section) -> TrackerSpec:
    section.allow("scanintervalms")
    return TrackerSpec(name, section.integer("scanintervalms", 5000, least=1, most=INTERVAL_MAX_MS) or 5000)


POLICIES: Mapping[str, Callable[[Section], Spec]] = {"age": _age}
TARGETS: Mapping[str, Callable[[Section], TargetSpec]] = {"cgroups": _cgroups, "pidlist": _pidlist}
TRACKERS: Mapping[str, Callable[[str, Section], TrackerSpec]] = {
    "auto": _own_tracker,
    "idlepage": _idlepage,
    "refs": _own_tracker,
    "softdirty": _softdirty,
    "userfault": _own_tracker,
}
