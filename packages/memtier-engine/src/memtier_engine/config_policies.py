"""Policies of a configuration file, decoded and built, with their forecasters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memtier_engine.config_parts import (
    INTERVAL_MAX_MS,
    NO_TARGET,
    TargetSpec,
    TrackerSpec,
    cgroup_names,
    decode_target,
    decode_tracker,
    required_config,
)
from memtier_engine.config_reader import Section
from memtier_engine.errors import ConfigError
from memtier_engine.forecasters.chain import ChainForecaster
from memtier_engine.forecasters.stdio import StdioForecaster
from memtier_engine.forecasters.stub import StubForecaster
from memtier_engine.forecasters.trace import TraceForecaster
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.locate import PageLocator
from memtier_engine.model import SWAP_NODE
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.oom_facts import HostOomFacts
from memtier_engine.policies.age import AgePolicy, AgePolicyConfig
from memtier_engine.policies.avoid_oom import AvoidOomPolicy, AvoidOomPolicyConfig
from memtier_engine.policies.base import Policy
from memtier_engine.policies.demote_idle import DemoteIdlePolicy, DemoteIdlePolicyConfig
from memtier_engine.policies.heat import Forecaster, HeatPolicy, HeatPolicyConfig
from memtier_engine.policies.heatmap import HeatmapConfig
from memtier_engine.policies.ratio import RatioPolicy, RatioPolicyConfig
from memtier_engine.policies.stub import StubPolicy
from memtier_engine.units import parse_size

NODE_MAX = 1023
_COMMON = ("pidwatcher", "tracker", "mover", "cgroups", "pids", "intervalms")


@dataclass(frozen=True, slots=True)
class ForecasterSpec:
    """A `forecaster` block."""

    name: str
    file: str = ""
    hide_heat_zero: bool = False
    command: tuple[str, ...] = ()
    stderr: str = ""
    retry: int = 0
    deadline_ms: int = 5000
    links: tuple[ForecasterSpec, ...] = ()

    def build(self, on_event: Callable[[str], None] | None = None) -> Forecaster:
        """Start it. Raises ConfigError or KernelCallError: a program or file that is not there."""
        if self.name == "chain":
            return ChainForecaster([link.build(on_event) for link in self.links], on_event=on_event)
        if self.name == "trace":
            return TraceForecaster(self.file, hide_heat_zero=self.hide_heat_zero)
        if self.name == "stdio":
            return StdioForecaster(
                self.command, stderr=self.stderr, retry=self.retry, deadline_s=self.deadline_ms / 1000
            )
        return StubForecaster()


PolicyConfig = AgePolicyConfig | HeatPolicyConfig | RatioPolicyConfig | DemoteIdlePolicyConfig | AvoidOomPolicyConfig


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A `policy` block with the parts in it."""

    name: str
    policy: PolicyConfig | None
    """None: the stub."""
    tracker: TrackerSpec
    target: TargetSpec
    mover: MoverConfig
    cgroups: tuple[str, ...] = ()
    """Of avoid-oom."""
    forecaster: ForecasterSpec | None = None


def build_policy(
    config: PolicyConfig | None,
    tracker: TrackerSpec,
    host: Host,
    *,
    scan_interval_ms: int,
    cgroups: tuple[str, ...] = (),
    forecaster: ForecasterSpec | None = None,
    on_event: Callable[[str], None] | None = None,
) -> Policy:
    """The policy on this machine; for the arguments see `PolicySpec`."""
    match config:
        case None:
            return StubPolicy()
        case AgePolicyConfig():
            return AgePolicy(config, scan_interval_ms=scan_interval_ms)
        case HeatPolicyConfig():
            return HeatPolicy(
                config,
                PageLocator(host),
                regions=tracker.regions(),
                forecaster=None if forecaster is None else forecaster.build(on_event),
                unix_offset_s=time.time() - time.monotonic(),
                on_event=on_event,
            )
        case RatioPolicyConfig():
            return RatioPolicy(config, PageLocator(host), regions=tracker.regions())
        case DemoteIdlePolicyConfig():
            return DemoteIdlePolicy(config)
        case AvoidOomPolicyConfig():
            return AvoidOomPolicy(config, HostOomFacts(host, cgroups))


def swaps(config: PolicyConfig | None) -> bool:
    """Whether a policy of this configuration pages memory out."""
    match config:
        case AgePolicyConfig():
            return bool(config.swap_out_ms) or SWAP_NODE in (*config.idle_numas[:1], *config.active_numas[:1])
        case HeatPolicyConfig():
            return any(SWAP_NODE in nodes for nodes in config.heat_numas.values())
        case RatioPolicyConfig():
            return config.ratio_targets[0] == SWAP_NODE
        case DemoteIdlePolicyConfig():
            return config.idle_numas[0] == SWAP_NODE
        case _:
            return False


def _interval(section: Section, default: int, *, zero_is_default: bool = False) -> int:
    found = section.integer("intervalms", default, least=0 if zero_is_default else 1, most=INTERVAL_MAX_MS)
    return found or default


def _nodes(section: Section, key: str) -> tuple[int, ...]:
    return section.integers(key, least=SWAP_NODE, most=NODE_MAX)


def _refuse_deprecated(section: Section) -> None:
    for key, watcher in (("cgroups", "cgroups"), ("pids", "pidlist")):
        if section.has(key):
            raise section.error(
                key, "this key is gone", f"use pidwatcher: {{name: {watcher}, config: '{key}: [...]'}} instead"
            )


def _mover(section: Section) -> MoverConfig:
    mover = section.section("mover")
    if mover is None:
        return MoverConfig()
    mover.allow("intervalms", "bandwidth")
    interval_ms = mover.integer("intervalms", 10, least=1, most=60_000)
    bandwidth = mover.integer("bandwidth", 100, least=1, most=1 << 20)
    return MoverConfig(interval_ms=interval_ms or 10, bandwidth_mib_per_s=bandwidth)


def _age(block: Section) -> PolicySpec:
    section = required_config(block)
    section.allow(*_COMMON, "swapoutms", "idledurationms", "idlenumas", "activedurationms", "activenumas")
    _refuse_deprecated(section)
    durations = {
        name: section.integer(key, None, most=1000 * INTERVAL_MAX_MS) or None
        for name, key in (
            ("swap_out_ms", "swapoutms"),
            ("idle_duration_ms", "idledurationms"),
            ("active_duration_ms", "activedurationms"),
        )
    }
    policy = AgePolicyConfig(
        interval_ms=_interval(section, 5000),
        idle_numas=_nodes(section, "idlenumas"),
        active_numas=_nodes(section, "activenumas"),
        **durations,
    )
    return PolicySpec("age", policy, decode_tracker(section), decode_target(section), _mover(section))


def _heat(block: Section) -> PolicySpec:
    section = required_config(block)
    section.allow(*_COMMON, "heatmap", "forecaster", "heatnumas", "numasize")
    _refuse_deprecated(section)
    heatmap = _heatmap(section)
    policy = HeatPolicyConfig(
        interval_ms=_interval(section, 10_000),
        heatmap=heatmap,
        heat_numas=_heat_numas(section, heatmap.heat_classes),
        numa_size_bytes=_numa_sizes(section),
    )
    return PolicySpec(
        "heat",
        policy,
        decode_tracker(section),
        decode_target(section),
        _mover(section),
        forecaster=_forecaster(section.section("forecaster")),
    )


def _heatmap(section: Section) -> HeatmapConfig:
    heatmap = section.section("heatmap")
    if heatmap is None:
        return HeatmapConfig()
    heatmap.allow("heatmax", "heatretention", "heatclasses")
    default = HeatmapConfig()
    most = heatmap.number("heatmax", default.heat_max, least=0, most=1e300)
    retention = heatmap.number("heatretention", default.heat_retention, least=0, most=1)
    classes = heatmap.integer("heatclasses", default.heat_classes, least=1, most=1000)
    return HeatmapConfig(
        heat_max=default.heat_max if most is None else most,
        heat_retention=default.heat_retention if retention is None else retention,
        heat_classes=default.heat_classes if classes is None else classes,
    )


def _numbered(section: Section, key: str, least: int, most: int) -> list[tuple[int, str, Section]]:
    """(number, key as written, table) of a table whose keys are numbers."""
    table = section.section(key)
    found = []
    for name in table.keys() if table is not None else ():
        assert table is not None
        try:
            number = int(name, 0)
        except ValueError:
            raise table.error(name, f"{name!r} is no number", f"from {least} to {most}") from None
        if not least <= number <= most:
            raise table.error(name, f"{number} is out of range", f"from {least} to {most}")
        found.append((number, name, table))
    return found


def _heat_numas(section: Section, classes: int) -> dict[int, tuple[int, ...]]:
    found = {}
    for number, name, table in _numbered(section, "heatnumas", 0, classes - 1):
        nodes = _nodes(table, name)
        if nodes:
            found[number] = nodes
    return found


def _numa_sizes(section: Section) -> dict[int, int]:
    found = {}
    for number, name, table in _numbered(section, "numasize", SWAP_NODE, NODE_MAX):
        text = table.text(name, None)
        if text is not None:
            try:
                found[number] = parse_size(text)
            except ConfigError as failure:
                raise table.error(name, failure.message, failure.hint) from None
    return found


def _forecaster(block: Section | None) -> ForecasterSpec | None:
    if block is None or not block.has("name"):
        return None
    return _forecaster_block(block)


def _forecaster_block(block: Section) -> ForecasterSpec:
    name = block.choice("name", tuple(FORECASTERS))
    block.allow("name", "config")
    if name == "stub":
        return ForecasterSpec("stub")
    return FORECASTERS[name](required_config(block))


def _chain(section: Section) -> ForecasterSpec:
    section.allow("forecasters")
    return ForecasterSpec("chain", links=tuple(map(_forecaster_block, section.sections("forecasters"))))


def _stdio(section: Section) -> ForecasterSpec:
    section.allow("command", "stderr", "retry", "deadlinems")
    command = section.texts("command")
    if not command:
        raise section.error("command", "is missing or empty", "a list of the program and its arguments")
    stderr = section.text("stderr", "") or ""
    if stderr and not stderr.startswith("file:"):
        raise section.error("stderr", f"{stderr!r} is not known", "leave it out, or file:PATH")
    return ForecasterSpec(
        "stdio",
        command=command,
        stderr=stderr,
        retry=section.integer("retry", 0, most=1000) or 0,
        deadline_ms=section.integer("deadlinems", 5000, least=1, most=INTERVAL_MAX_MS) or 5000,
    )


def _trace(section: Section) -> ForecasterSpec:
    section.allow("file", "hideheatzero")
    file = section.text("file", None)
    if not file:
        raise section.error("file", "is missing", "the path of a file to append to")
    return ForecasterSpec("trace", file=file, hide_heat_zero=bool(section.flag("hideheatzero", False)))


def _ratio(block: Section) -> PolicySpec:
    section = required_config(block)
    section.allow(*_COMMON, "ratio", "ratiotargets")
    _refuse_deprecated(section)
    ratio = section.number("ratio", None, least=0, most=1)
    if not ratio:
        raise section.error("ratio", "is missing or 0", "a share above 0, up to 1")
    policy = RatioPolicyConfig(
        interval_ms=_interval(section, 5000, zero_is_default=True),
        ratio=ratio,
        ratio_targets=_nodes(section, "ratiotargets") or (SWAP_NODE,),
    )
    tracker = decode_tracker(section, TrackerSpec("idlepage", 5000))
    return PolicySpec("ratio", policy, tracker, decode_target(section), _mover(section))


def _demote_idle(block: Section) -> PolicySpec:
    section = required_config(block)
    section.allow("pidwatcher", "mover", "intervalms", "idlenumas", "pagesofinterestdir", "tracker")
    nodes = _nodes(section, "idlenumas")
    if not nodes:
        raise section.error("idlenumas", "is missing or empty", "a list; its first node is where idle memory goes")
    directory = section.text("pagesofinterestdir", None)
    target = TargetSpec("pagesofinterest", directory=directory) if directory else decode_target(section)
    policy = DemoteIdlePolicyConfig(interval_ms=_interval(section, 5000), idle_numas=nodes)
    # The reference has no tracker here, it reads the idle bits itself; any of ours that sees reads will do.
    return PolicySpec("demote-idle", policy, decode_tracker(section, TrackerSpec("idlepage")), target, _mover(section))


def _avoid_oom(block: Section) -> PolicySpec:
    section = required_config(block)
    section.allow("startfreeingmemory", "stopfreeingmemory", "cgroups", "intervalms", "mover")
    default = AvoidOomPolicyConfig()
    try:
        policy = AvoidOomPolicyConfig(
            interval_ms=_interval(section, default.interval_ms),
            start_freeing_memory=section.text("startfreeingmemory", None) or default.start_freeing_memory,
            stop_freeing_memory=section.text("stopfreeingmemory", None) or default.stop_freeing_memory,
        )
    except ConfigError as failure:
        raise section.error(failure.key_path or "", failure.message, failure.hint) from None
    cgroups = cgroup_names(section)
    return PolicySpec("avoid-oom", policy, TrackerSpec("stub"), NO_TARGET, _mover(section), cgroups=cgroups)


def _stub(block: Section) -> PolicySpec:
    block.allow("name", "config")
    return PolicySpec("stub", None, TrackerSpec("stub"), NO_TARGET, MoverConfig())


FORECASTERS: Mapping[str, Callable[[Section], ForecasterSpec]] = {
    "chain": _chain,
    "stdio": _stdio,
    "stub": lambda section: ForecasterSpec("stub"),
    "trace": _trace,
}
POLICIES: Mapping[str, Callable[[Section], PolicySpec]] = {
    "age": _age,
    "avoid-oom": _avoid_oom,
    "demote-idle": _demote_idle,
    "heat": _heat,
    "ratio": _ratio,
    "stub": _stub,
}
