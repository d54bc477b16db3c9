"""Every key of a configuration file: its kind, range, default, and its name in the reference's JSON. No IO.

The reader takes ranges and defaults from here, so this table is what a file may hold. Components are named by
kind and name (`policy.age`, `tracker.idlepage`); within each, keys stand in the order in which the reference
prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

PID_MAX = 1 << 22
"""Source: include/linux/threads.h PID_MAX_LIMIT on 64-bit."""
NODE_MAX = 1023
INTERVAL_MAX_MS = 24 * 3600 * 1000
LONG_MAX_MS = 1000 * INTERVAL_MAX_MS
"""Of the reference's intervals, some of which are set so long that they mean never."""
INT64_MAX = (1 << 63) - 1
_US_MAX = 1000 * INTERVAL_MAX_MS
_KIB_MAX = 1 << 53


class Kind(Enum):
    """What a value is."""

    INTEGER = "a number"
    NUMBER = "a number, also with decimals"
    TEXT = "text"
    FLAG = "true or false"
    INTEGERS = "a list of numbers"
    TEXTS = "a list of texts"
    BLOCK = "a mapping with `name` and `config`"
    BLOCKS = "a list of mappings with `name` and `config`"
    SECTION = "a mapping"
    SECTIONS = "a list of mappings"
    TABLE = "a mapping with numbers as keys"
    GOAL = "a goal"
    GONE = "nothing: the reference refuses it too"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of one component."""

    name: str
    kind: Kind
    default: int | float | str | bool | None = None
    """Of a missing key, or null; None: none, see `required` and the decoder."""
    least: float = 0
    most: float = INT64_MAX
    required: bool = False
    zero_is_default: bool = False
    """0 means the default, as in the reference."""
    choices: tuple[str, ...] = ()
    """Of a text: the only ones allowed."""
    off: bool = False
    """null switches off, which is not the default."""
    go: str = ""
    """Its name in the reference's JSON; empty: the key is ours."""


def _integer(
    name: str,
    go: str,
    default: int | None,
    least: int = 0,
    most: int = INT64_MAX,
    *,
    required: bool = False,
    zero_is_default: bool = False,
) -> Key:
    return Key(
        name=name,
        kind=Kind.INTEGER,
        default=default,
        least=least,
        most=most,
        required=required,
        zero_is_default=zero_is_default,
        go=go,
    )


def _number(name: str, go: str, default: float | None, least: float, most: float, *, required: bool = False) -> Key:
    return Key(name=name, kind=Kind.NUMBER, default=default, least=least, most=most, required=required, go=go)


def _of(kind: Kind, name: str, go: str = "", *, required: bool = False) -> Key:
    return Key(name=name, kind=kind, required=required, go=go)


def _text(name: str, go: str = "", default: str | None = None, choices: tuple[str, ...] = ()) -> Key:
    return Key(name=name, kind=Kind.TEXT, default=default, choices=choices, go=go)


def _flag(name: str, go: str = "", default: bool | None = None) -> Key:
    return Key(name=name, kind=Kind.FLAG, default=default, go=go)


def _nodes(name: str, go: str) -> Key:
    return Key(name=name, kind=Kind.INTEGERS, least=-1, most=NODE_MAX, go=go)


_BLOCK = (_text("name", "Name"), _text("config", "Config"))
_PIDWATCHER = _of(Kind.BLOCK, "pidwatcher", "PidWatcher", required=True)
_TRACKER = _of(Kind.BLOCK, "tracker", "Tracker", required=True)
_TRACKER_OPTIONAL = _of(Kind.BLOCK, "tracker", "Tracker")
_TRACKER_OURS = _of(Kind.BLOCK, "tracker")
_MOVER = _of(Kind.SECTION, "mover", "Mover")
_GONE = (_of(Kind.GONE, "cgroups", "Cgroups"), _of(Kind.GONE, "pids", "Pids"))
_SCAN_OURS = _integer("scanintervalms", "", None, 1, INTERVAL_MAX_MS)
_RUNNERS = ("", "exec", "memtier", "memtier-prompt")


def _interval(default: int, *, go: str = "IntervalMs", zero_is_default: bool = False) -> Key:
    least, most = 0 if zero_is_default else 1, LONG_MAX_MS if go else INTERVAL_MAX_MS
    return _integer("intervalms", go, default, least, most, zero_is_default=zero_is_default)


def _duration(name: str, go: str) -> Key:
    return _integer(name, go, None, 0, LONG_MAX_MS)


_PAGED = (
    _integer("pagesinregion", "PagesInRegion", 512, 1, 1 << 30),
    _integer("maxcountperregion", "MaxCountPerRegion", 1, 0, 1 << 30),
    _integer("scanintervalms", "ScanIntervalMs", 5000, 1, LONG_MAX_MS),
    _integer("regionsupdatems", "RegionsUpdateMs", 10_000, 0, LONG_MAX_MS),
)
_OWN_TRACKER = (
    _integer("pagesinregion", "", 512, 1, 1 << 30),
    _integer("maxcountperregion", "", 1, 0, 1 << 30),
    _integer("scanintervalms", "", 5000, 1, INTERVAL_MAX_MS),
)


def _readahead(name: str, go: str) -> Key:
    return _integer(name, go, 0, -1, 1 << 20)


def _us(name: str, go: str, default: int | None) -> Key:
    return _integer(name, go, default, 0, _US_MAX, zero_is_default=True)


def _threshold(name: str) -> Key:
    return Key(name=name, kind=Kind.SECTION, off=True)


COMPONENTS: Mapping[str, tuple[Key, ...]] = {
    "file": (
        _of(Kind.BLOCK, "policy", "Policy", required=True),
        _of(Kind.BLOCKS, "routines", "Routines"),
        _of(Kind.SECTION, "guards"),
        _flag("allowprograms", default=False),
        _flag("countswapins", default=True),
    ),
    "block": _BLOCK,
    "policy.age": (
        _PIDWATCHER,
        _TRACKER,
        _MOVER,
        *_GONE,
        _interval(5000),
        _duration("swapoutms", "SwapOutMs"),
        _duration("idledurationms", "IdleDurationMs"),
        _nodes("idlenumas", "IdleNumas"),
        _duration("activedurationms", "ActiveDurationMs"),
        _nodes("activenumas", "ActiveNumas"),
    ),
    "policy.auto": (
        _PIDWATCHER,
        _TRACKER_OURS,
        _of(Kind.SECTION, "mover"),
        _of(Kind.GOAL, "goal", required=True),
        _interval(5000, go=""),
        _integer("windowms", "", 60_000, 1, INTERVAL_MAX_MS),
        _integer("idleleastms", "", 30_000, 1, INTERVAL_MAX_MS),
    ),
    "policy.avoid-oom": (
        _text("startfreeingmemory", "StartFreeingMemory", "8%"),
        _text("stopfreeingmemory", "StopFreeingMemory", "16%"),
        _of(Kind.TEXTS, "cgroups", "Cgroups", required=True),
        _interval(5000),
        _MOVER,
    ),
    "policy.demote-idle": (
        _of(Kind.BLOCK, "pidwatcher", "PidWatcher"),
        _MOVER,
        _interval(5000),
        Key(name="idlenumas", kind=Kind.INTEGERS, least=-1, most=NODE_MAX, required=True, go="IdleNumas"),
        _text("pagesofinterestdir", "PagesOfInterestDir"),
        _TRACKER_OURS,
    ),
    "policy.heat": (
        _PIDWATCHER,
        _TRACKER,
        _of(Kind.SECTION, "heatmap", "Heatmap"),
        _of(Kind.BLOCK, "forecaster", "Forecaster"),
        _MOVER,
        *_GONE,
        _interval(10_000),
        Key(name="heatnumas", kind=Kind.TABLE, least=-1, most=NODE_MAX, go="HeatNumas"),
        Key(name="numasize", kind=Kind.TABLE, least=-1, most=NODE_MAX, go="NumaSize"),
    ),
    "policy.ratio": (
        _PIDWATCHER,
        _TRACKER_OPTIONAL,
        _MOVER,
        _interval(5000, zero_is_default=True),
        _number("ratio", "Ratio", None, 1e-37, 1, required=True),
        _nodes("ratiotargets", "RatioTargets"),
        *_GONE,
    ),
    "policy.reclaim": (
        _of(Kind.TEXTS, "cgroups", required=True),
        _of(Kind.SECTION, "mover"),
        _of(Kind.GOAL, "goal", required=True),
        _interval(5000, go=""),
        _integer("windowms", "", 60_000, 1, INTERVAL_MAX_MS),
        _integer("idleleastms", "", 30_000, 1, INTERVAL_MAX_MS),
        _text("ages", default="auto", choices=("auto", "mglru", "none")),
    ),
    "mover": (
        _integer("intervalms", "IntervalMs", 10, 1, INTERVAL_MAX_MS),
        _integer("bandwidth", "Bandwidth", 100, 1, 1 << 30),
    ),
    "heatmap": (
        _number("heatmax", "HeatMax", 1.0, 0, 1e300),
        _number("heatretention", "HeatRetention", 0.9513, 0, 1),
        _integer("heatclasses", "HeatClasses", 10, 1, 1000),
    ),
    "pidwatcher.cgroups": (
        _interval(5000, zero_is_default=True),
        _of(Kind.TEXTS, "cgroups", "Cgroups", required=True),
    ),
    "pidwatcher.filter": (
        _of(Kind.BLOCK, "source", "Source", required=True),
        _of(Kind.SECTIONS, "filters", "Filters", required=True),
    ),
    "pidwatcher.pidlist": (Key(name="pids", kind=Kind.INTEGERS, least=1, most=PID_MAX, required=True, go="Pids"),),
    "pidwatcher.proc": (_interval(5000, zero_is_default=True),),
    "filter": (
        _text("procexeregexp", "ProcExeRegexp"),
        _integer("minvmsizekb", "MinVmSizeKb", 0, -_KIB_MAX, _KIB_MAX),
        _integer("minvmrsskb", "MinVmRSSKb", 0, -_KIB_MAX, _KIB_MAX),
        _integer("minprivatedirtykb", "MinPrivateDirtyKb", 0, -_KIB_MAX, _KIB_MAX),
        _of(Kind.SECTIONS, "and", "And"),
        _of(Kind.SECTIONS, "or", "Or"),
        _of(Kind.SECTION, "not", "Not"),
    ),
    "tracker.auto": _OWN_TRACKER,
    "tracker.bpf": _OWN_TRACKER,
    "tracker.bpf-hardware": _OWN_TRACKER,
    "tracker.bpf-sampled": _OWN_TRACKER,
    "tracker.damon": (
        _text("connection", "Connection", "bpftrace"),
        _us("samplingus", "SamplingUs", None),
        _us("aggregationus", "AggregationUs", None),
        _us("regionsupdateus", "RegionsUpdateUs", 1_000_000),
        _integer("mintargetregions", "MinTargetRegions", None, 0, 1 << 20, zero_is_default=True),
        _integer("maxtargetregions", "MaxTargetRegions", 1000, 0, 1 << 20, zero_is_default=True),
        _integer(
            "filteraddressrangesizemax",
            "FilterAddressRangeSizeMax",
            32 << 20,
            -(1 << 62),
            1 << 62,
            zero_is_default=True,
        ),
        _integer("interface", "Interface", 0, 0, 2),
        _integer("sysfsregionsmanager", "SysfsRegionsManager", 0, 0, 1),
        Key(name="kdamondslist", kind=Kind.INTEGERS, least=0, most=1 << 16, go="KdamondsList"),
        _integer("nrkdamonds", "NrKdamonds", 1, 0, 1 << 10, zero_is_default=True),
        _SCAN_OURS,
    ),
    "tracker.finder": (
        # None: as often as the policy decides; the reference's 0, never again, makes no sense for a policy.
        _integer("regionsupdatems", "RegionsUpdateMs", None, 0, LONG_MAX_MS),
        _integer("reportaccesses", "ReportAccesses", 0, 0, (1 << 31) - 1),
        _flag("pagemapbitexclusive", "PagemapBitExclusive"),
        _flag("pagemapbitpresent", "PagemapBitPresent"),
        _flag("pagemapbitsoftdirty", "PagemapBitSoftDirty"),
        _SCAN_OURS,
    ),
    "tracker.idlepage": (
        *_PAGED,
        _readahead("pagemapreadahead", "PagemapReadahead"),
        _readahead("kpageflagsreadahead", "KpageflagsReadahead"),
        _readahead("bitmapreadahead", "BitmapReadahead"),
    ),
    "tracker.multi": (_of(Kind.BLOCKS, "trackers", "Trackers", required=True),),
    "tracker.refs": _OWN_TRACKER,
    "tracker.softdirty": (
        *_PAGED,
        _integer("skippageprob", "SkipPageProb", 0, 0, 1000),
        _readahead("pagemapreadahead", "PagemapReadahead"),
        _flag("trackreferenced", "TrackReferenced", False),
    ),
    "tracker.userfault": _OWN_TRACKER,
    "forecaster.chain": (_of(Kind.BLOCKS, "forecasters", "Forecasters"),),
    "forecaster.stdio": (
        _of(Kind.TEXTS, "command", "Command", required=True),
        _text("stderr", "Stderr", ""),
        _integer("retry", "Retry", 0, 0, 1000),
        _integer("deadlinems", "", 5000, 1, INTERVAL_MAX_MS),
    ),
    "forecaster.trace": (
        Key(name="file", kind=Kind.TEXT, required=True, go="File"),
        _flag("hideheatzero", "HideHeatZero", False),
    ),
    "routine.statactions": (
        _integer("intervalms", "IntervalMs", None, 1, LONG_MAX_MS, required=True),
        _of(Kind.TEXTS, "intervalcommand", "IntervalCommand"),
        _text("intervalcommandrunner", "IntervalCommandRunner", "", _RUNNERS),
        _integer("pageoutmb", "PageOutMB", 0, 0, 1 << 40),
        _of(Kind.TEXTS, "pageoutcommand", "PageOutCommand"),
        _text("pageoutcommandrunner", "PageOutCommandRunner", "", _RUNNERS),
        _text("timestamp", "Timestamp", ""),
        _text("timestampafter", "TimestampAfter", ""),
    ),
    "guards": (
        _threshold("psimemorynode"),
        _threshold("psimemorycgroup"),
        _threshold("psiionode"),
        _threshold("psiiocgroup"),
        _threshold("swapfill"),
        _threshold("compression"),
        _threshold("refaults"),
        Key(name="swapwritesperday", kind=Kind.TEXT, default="84G", off=True),
        _flag("protection", default=True),
        _integer("startgracems", "", None, 0, INTERVAL_MAX_MS),
        _of(Kind.SECTION, "skip"),
    ),
    "guards.threshold": (
        _number("closeat", "", None, 0, 100),
        _number("openat", "", None, 0, 100),
        _integer("holdms", "", 10_000, 0, INTERVAL_MAX_MS),
        _number("fastat", "", None, 0, 100),
    ),
    "guards.skip": (
        _text("rssleast", default="4M"),
        _of(Kind.TEXTS, "names"),
        _flag("realtime", default=True),
        _flag("traced", default=True),
    ),
}
STUBS = ("policy.stub", "pidwatcher.stub", "tracker.stub", "forecaster.stub", "routine.stub")
"""Components that take any configuration and do nothing."""
