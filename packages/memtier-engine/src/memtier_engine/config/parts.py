"""Trackers and targets of a configuration file: blocks of `name` and `config`, decoded and built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memtier_engine.clock import SystemClock
from memtier_engine.config.reader import Section
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.cgroup import check_cgroup_name
from memtier_engine.hostfs.host import Host
from memtier_engine.model import Tracker
from memtier_engine.pages.regions import RegionCounters
from memtier_engine.targets.base import Target
from memtier_engine.targets.cgroups import CgroupsTarget
from memtier_engine.targets.events import EventsTarget
from memtier_engine.targets.filter import FilterTarget, ProcessFilter
from memtier_engine.targets.paced import PacedTarget
from memtier_engine.targets.pids import PidsTarget
from memtier_engine.targets.poi import PagesOfInterestTarget
from memtier_engine.targets.proc import ProcTarget
from memtier_engine.targets.regexp import compile_re2
from memtier_engine.trackers.finder import FinderConfig, FinderTracker
from memtier_engine.trackers.registry import create_softdirty_with_reads, create_tracker
from memtier_engine.trackers.softdirty import SoftDirtyConfig

if TYPE_CHECKING:
    from memtier_engine.trackers.damon import DamonConfig

_WRITES_ONLY = ("softdirty", "userfault")


@dataclass(frozen=True, slots=True)
class TrackerSpec:
    """A `tracker` block."""

    name: str
    scan_interval_ms: int | None = None
    """None: once per decision of the policy."""
    pages_in_region: int = 512
    """For policies that decide by regions; ages are kept per page."""
    max_count_per_region: int = 1
    options: FinderConfig | DamonConfig | SoftDirtyConfig | None = None
    parts: tuple[TrackerSpec, ...] = ()
    """Of `multi`."""

    def build(self, host: Host) -> Tracker:
        """The tracker on this machine.

        Raises:
            TrackerUnavailable: it does not work here.
        """
        if self.name == "multi":
            from memtier_engine.trackers.multi import MultiTracker

            with ExitStack() as made:  # a part that does not work must not leave the others open
                parts = []
                for part in self.parts:
                    parts.append(part.build(host))
                    made.callback(parts[-1].close)
                tracker = MultiTracker(parts)
                made.pop_all()
                return tracker
        match self.options:
            case FinderConfig():
                return FinderTracker(host, self.options)
            case SoftDirtyConfig(track_referenced=True):
                return create_softdirty_with_reads(host)
            case None | SoftDirtyConfig():
                return create_tracker(self.name, host).tracker
        from memtier_engine.trackers.damon_shared import SharedDamonTracker

        return SharedDamonTracker(host, self.options)

    @property
    def clears_referenced(self) -> bool:
        """Whether this is `softdirty` with `trackreferenced`, which clears what `refs` would look at."""
        return isinstance(self.options, SoftDirtyConfig) and self.options.track_referenced

    def regions(self) -> RegionCounters:
        """How a policy that decides by regions counts what this tracker sees."""
        sampled = self.name in ("damon", "finder")  # theirs are counts already, not pages
        return RegionCounters(
            self.pages_in_region,
            0 if sampled else self.max_count_per_region,
            writes_only=self.name in _WRITES_ONLY,
        )


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A `pidwatcher` block, or what takes its place."""

    name: str
    pids: tuple[int, ...] = ()
    cgroups: tuple[str, ...] = ()
    interval_ms: int = 5000
    source: TargetSpec | None = None
    filters: tuple[ProcessFilter, ...] = ()
    directory: str = ""

    def build(self, host: Host, *, events: bool = False) -> Target:
        """The target on this machine.

        Args:
            host: the machine.
            events: let the kernel tell of new processes, and only ask at `interval_ms` beside that. The target is
                then a `TellingTarget`, with a thread of its own until it is closed.
        Raises:
            ConfigError: a directory is not there.
        """
        if events and self.name in ("cgroups", "proc", "filter"):
            return EventsTarget(self._asked(host), refresh_s=self._refresh_s())
        if self.name == "proc":
            return PacedTarget(ProcTarget(host), self.interval_ms / 1000, SystemClock())
        if self.name == "filter":
            assert self.source is not None
            return FilterTarget(host, self.source.build(host), self.filters)
        return self._asked(host)

    def _asked(self, host: Host) -> Target:
        """The target that looks each time it is asked."""
        if self.name == "cgroups":
            return CgroupsTarget(host, self.cgroups)
        if self.name == "proc":
            return ProcTarget(host)
        if self.name == "filter":
            assert self.source is not None
            return FilterTarget(host, self.source._asked(host), self.filters)
        if self.name == "pagesofinterest":
            return PagesOfInterestTarget(host, self.directory)
        return PidsTarget(host, self.pids)

    def _refresh_s(self) -> float:
        return self.interval_ms / 1000 if self.source is None else self.source._refresh_s()


NO_TARGET = TargetSpec("stub")
"""No process at all."""


def required_config(block: Section, component: str) -> Section:
    """The decoded `config` of a `name` and `config` block, taken for `component`."""
    block.use("block")
    config = block.config()
    if config is None:
        raise block.error("config", "is missing", "text in YAML, as `config: |` and indented lines")
    return config.use(component)


def decode_target(section: Section, key: str = "pidwatcher") -> TargetSpec:
    """The block under `key`."""
    block = section.section(key)
    if block is None:
        raise section.error(key, "is missing", "a mapping with `name` and `config`")
    return TARGETS[block.choice("name", tuple(TARGETS))](block)


def _pidlist(block: Section) -> TargetSpec:
    section = required_config(block, "pidwatcher.pidlist")
    if not section.has("pids"):
        raise section.error("pids", "is missing", "a list of process ids, which may be empty")
    return TargetSpec("pidlist", pids=section.integers("pids"))


def _cgroups(block: Section) -> TargetSpec:
    section = required_config(block, "pidwatcher.cgroups")
    return TargetSpec("cgroups", cgroups=cgroup_names(section), interval_ms=section.integer("intervalms"))


def cgroup_names(section: Section) -> tuple[str, ...]:
    """The list under `cgroups`: absolute directories, at least one."""
    cgroups = section.texts("cgroups")
    if not cgroups:
        raise section.error("cgroups", "is empty", "a list of cgroup directories")
    for index, cgroup in enumerate(cgroups):
        if not cgroup.startswith("/"):
            raise section.error(f"cgroups[{index}]", f"{cgroup!r} is not absolute", "start it with /sys/fs/cgroup/")
        try:
            check_cgroup_name(cgroup)
        except ConfigError as failure:
            raise section.located(failure, f"cgroups[{index}]") from None
    return cgroups


def _proc(block: Section) -> TargetSpec:
    block.use("block")
    if block.text_or_none("config") == "":  # the reference takes an empty text here
        return TargetSpec("proc")
    section = block.config()
    if section is None:
        return TargetSpec("proc")
    return TargetSpec("proc", interval_ms=section.use("pidwatcher.proc").integer("intervalms"))


def _filter(block: Section) -> TargetSpec:
    section = required_config(block, "pidwatcher.filter")
    source = decode_target(section, "source")
    filters = tuple(map(_process_filter, section.sections("filters")))
    if not filters:
        raise section.error("filters", "is empty, which lets no process pass", "a list; `- {}` lets all pass")
    return TargetSpec("filter", source=source, filters=filters)


def _process_filter(section: Section) -> ProcessFilter:
    section.use("filter")
    pattern = section.text("procexeregexp")
    compiled = None
    if pattern:
        try:
            compiled = compile_re2(pattern)
        except ConfigError as failure:
            raise section.located(failure, "procexeregexp") from None
    other = section.section("not")
    return ProcessFilter(
        exe_regexp=compiled,
        min_vm_size_kib=max(0, section.integer("minvmsizekb")),  # negative ones ask for nothing, as in the reference
        min_vm_rss_kib=max(0, section.integer("minvmrsskb")),
        min_private_dirty_kib=max(0, section.integer("minprivatedirtykb")),
        and_filters=tuple(map(_process_filter, section.sections("and"))),
        or_filters=tuple(map(_process_filter, section.sections("or"))),
        not_filter=None if other is None else _process_filter(other),
    )


def _no_target(block: Section) -> TargetSpec:
    block.use("block")
    return NO_TARGET


def decode_tracker(section: Section, default: TrackerSpec | None = None) -> TrackerSpec:
    """The block under `tracker`; `default` if it is missing."""
    block = section.section("tracker")
    if block is None or (default is not None and not block.text_or_none("name")):
        if default is not None:
            return default
        raise section.error("tracker", "is missing", f"a mapping with `name`: one of {', '.join(sorted(TRACKERS))}")
    return _tracker(block)


def _tracker(block: Section) -> TrackerSpec:
    name = block.choice("name", tuple(TRACKERS))
    block.use("block")
    if name == "stub":
        return TrackerSpec("stub")
    # Empty text leaves a tracker its defaults, as in the reference.
    config = None if block.text_or_none("config") == "" else block.config()
    if config is None:
        if name == "multi":
            raise block.error("config", "is missing", "`trackers:` and a list of trackers")
        options: FinderConfig | DamonConfig | None = None
        if name == "finder":
            options = FinderConfig()
        elif name == "damon":
            from memtier_engine.trackers.damon import DamonConfig

            options = DamonConfig()
        return TrackerSpec(name, None if options else 5000, options=options)
    return TRACKERS[name](name, config.use(f"tracker.{name}"))


def _idlepage(name: str, section: Section) -> TrackerSpec:
    # The rest is checked and without effect: maps are read at each scan, reads are as large as useful.
    for key in ("regionsupdatems", "pagemapreadahead", "kpageflagsreadahead", "bitmapreadahead"):
        section.integer(key)
    return _own_tracker(name, section)


def _softdirty(name: str, section: Section) -> TrackerSpec:
    for key in ("regionsupdatems", "pagemapreadahead", "skippageprob"):
        section.integer(key)
    options = SoftDirtyConfig(track_referenced=section.flag("trackreferenced"))
    return replace(_own_tracker(name, section), options=options)


def _own_tracker(name: str, section: Section) -> TrackerSpec:
    return TrackerSpec(
        name,
        section.integer("scanintervalms"),
        section.integer("pagesinregion"),
        section.integer("maxcountperregion"),
    )


def _finder(name: str, section: Section) -> TrackerSpec:
    options = FinderConfig(
        report_accesses=section.integer("reportaccesses"),
        exclusive=section.flag_or_none("pagemapbitexclusive"),
        present=section.flag_or_none("pagemapbitpresent"),
        soft_dirty=section.flag_or_none("pagemapbitsoftdirty"),
    )
    # Mappings are read at each scan, so how often to read them is how often to scan.
    update_ms = section.integer_or_none("regionsupdatems")
    return TrackerSpec(name, section.integer_or_none("scanintervalms") or update_ms or None, options=options)


def _damon(name: str, section: Section) -> TrackerSpec:
    connection = section.text("connection") or "bpftrace"
    if connection != "bpftrace" and not connection.startswith("perf"):
        raise section.error("connection", f"{connection!r} is not known", "leave it out: results come through sysfs")
    if section.integer("interface") == 2:
        raise section.error("interface", "2, debugfs, is not supported", "leave it out: sysfs is used")
    section.integer("sysfsregionsmanager")  # the kernel finds the regions itself
    filter_bytes = section.integer("filteraddressrangesizemax")
    from memtier_engine.trackers.damon import DamonConfig

    try:
        options = DamonConfig(
            sample_us=section.integer_or_none("samplingus"),
            aggregation_us=section.integer_or_none("aggregationus"),
            update_us=section.integer("regionsupdateus"),
            regions_min=section.integer_or_none("mintargetregions"),
            regions_max=section.integer("maxtargetregions"),
            filter_bytes_max=None if filter_bytes < 0 else filter_bytes,
            kdamonds=section.integers("kdamondslist"),
            create=section.integer("nrkdamonds"),
        )
    except ConfigError as failure:
        raise section.located(failure) from None
    return TrackerSpec(name, section.integer_or_none("scanintervalms"), options=options)


def _multi(name: str, section: Section) -> TrackerSpec:
    from memtier_engine.trackers.multi import check_parts

    parts = tuple(map(_tracker, section.sections("trackers")))
    try:
        check_parts([part.name for part in parts] + ["refs" for part in parts if part.clears_referenced])
    except ConfigError as failure:
        raise section.located(failure, "trackers") from None
    intervals = [part.scan_interval_ms for part in parts if part.scan_interval_ms is not None]
    # All parts are scanned together, so as often as the most frequent one.
    return TrackerSpec(
        name,
        min(intervals, default=None),
        min(part.pages_in_region for part in parts),
        max(part.max_count_per_region for part in parts),
        parts=parts,
    )


TARGETS: Mapping[str, Callable[[Section], TargetSpec]] = {
    "cgroups": _cgroups,
    "filter": _filter,
    "pidlist": _pidlist,
    "proc": _proc,
    "stub": _no_target,
}
TRACKERS: Mapping[str, Callable[[str, Section], TrackerSpec]] = {
    "auto": _own_tracker,
    "bpf": _own_tracker,
    "bpf-hardware": _own_tracker,
    "bpf-sampled": _own_tracker,
    "damon": _damon,
    "finder": _finder,
    "idlepage": _idlepage,
    "multi": _multi,
    "refs": _own_tracker,
    "softdirty": _softdirty,
    "stub": _own_tracker,
    "userfault": _own_tracker,
}
