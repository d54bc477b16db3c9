"""Policies of a configuration file, decoded and built, with their forecasters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypedDict

from loguru import logger

from memtier_engine.config.keys import NODE_MAX
from memtier_engine.config.parts import (
    NO_TARGET,
    TargetSpec,
    TrackerSpec,
    cgroup_names,
    decode_target,
    decode_tracker,
    required_config,
)
from memtier_engine.config.reader import Section
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.locate import PageLocator
from memtier_engine.model import SWAP_NODE
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicy, AgePolicyConfig
from memtier_engine.policies.auto import AutoPolicyConfig
from memtier_engine.policies.avoid_oom import AvoidOomPolicy, AvoidOomPolicyConfig
from memtier_engine.policies.base import Policy
from memtier_engine.policies.demote_idle import DemoteIdlePolicy, DemoteIdlePolicyConfig
from memtier_engine.policies.goals import KINDS, Goal, parse_goal
from memtier_engine.policies.heat import Forecaster, HeatPolicy, HeatPolicyConfig
from memtier_engine.policies.heatmap import HeatmapConfig
from memtier_engine.policies.ratio import RatioPolicy, RatioPolicyConfig
from memtier_engine.policies.stub import StubPolicy
from memtier_engine.reclaim.policy import ReclaimPolicyConfig
from memtier_engine.units import parse_size

_CLASS_MOST = 1 << 31
"""Classes above those that there are have no effect, as in the reference."""
_GOALS = "write it like psi: 0.1%, refaults: 0.2%/min, free: 2GiB or save: 30%"


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
            from memtier_engine.forecasters.chain import ChainForecaster

            with ExitStack() as made:  # a link that cannot start must not leave the others running
                links = []
                for link in self.links:
                    links.append(link.build(on_event))
                    made.callback(links[-1].close)
                chain = ChainForecaster(links, on_event=on_event)
                made.pop_all()
                return chain
        if self.name == "trace":
            from memtier_engine.forecasters.trace import TraceForecaster

            return TraceForecaster(self.file, hide_heat_zero=self.hide_heat_zero)
        if self.name == "stdio":
            from memtier_engine.forecasters.stdio import StdioForecaster

            return StdioForecaster(
                self.command, stderr=self.stderr, retry=self.retry, deadline_s=self.deadline_ms / 1000
            )
        from memtier_engine.forecasters.stub import StubForecaster

        return StubForecaster()


ReferencePolicyConfig = (
    AgePolicyConfig | HeatPolicyConfig | RatioPolicyConfig | DemoteIdlePolicyConfig | AvoidOomPolicyConfig
)
PolicyConfig = ReferencePolicyConfig | AutoPolicyConfig | ReclaimPolicyConfig


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
    config: ReferencePolicyConfig | None,
    tracker: TrackerSpec,
    host: Host,
    *,
    scan_interval_ms: int,
    cgroups: tuple[str, ...] = (),
    forecaster: ForecasterSpec | None = None,
    on_event: Callable[[str], None] | None = None,
) -> Policy:
    """The policy on this machine; for the arguments see `PolicySpec`. Policy auto comes with `auto.auto_engine`."""
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
            from memtier_engine.engine.oom_facts import HostOomFacts

            return AvoidOomPolicy(config, HostOomFacts(host, cgroups), on_event=on_event)


def swaps(config: PolicyConfig | None) -> bool:
    """Whether a policy of this configuration pages memory out."""
    match config:
        case AutoPolicyConfig() | ReclaimPolicyConfig():
            return True
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


def _refuse_deprecated(section: Section) -> None:
    for key, watcher in (("cgroups", "cgroups"), ("pids", "pidlist")):
        section.gone(key, f"use pidwatcher: {{name: {watcher}, config: '{key}: [...]'}} instead")


def _mover(section: Section) -> MoverConfig:
    mover = section.section("mover")
    if mover is None:
        return MoverConfig()
    mover.use("mover")
    return MoverConfig(interval_ms=mover.integer("intervalms"), bandwidth_mib_per_s=mover.integer("bandwidth"))


def _age(block: Section) -> PolicySpec:
    section = required_config(block, "policy.age")
    _refuse_deprecated(section)
    policy = AgePolicyConfig(
        interval_ms=section.integer("intervalms"),
        swap_out_ms=section.integer_or_none("swapoutms") or None,
        idle_duration_ms=section.integer_or_none("idledurationms") or None,
        idle_numas=section.integers("idlenumas"),
        active_duration_ms=section.integer_or_none("activedurationms") or None,
        active_numas=section.integers("activenumas"),
    )
    return PolicySpec("age", policy, decode_tracker(section), decode_target(section), _mover(section))


class _GoalValues(TypedDict):
    goal: Goal
    interval_ms: int
    window_ms: int
    idle_least_s: float


def _goal_values(section: Section) -> _GoalValues:
    return {
        "goal": _goal(section),
        "interval_ms": section.integer("intervalms"),
        "window_ms": section.integer("windowms"),
        "idle_least_s": section.integer("idleleastms") / 1000,
    }


def _auto(block: Section) -> PolicySpec:
    section = required_config(block, "policy.auto")
    try:
        policy = AutoPolicyConfig(**_goal_values(section))
    except ConfigError as failure:
        raise section.located(failure) from None
    tracker = decode_tracker(section, TrackerSpec("auto", 5000))
    return PolicySpec("auto", policy, tracker, decode_target(section), _mover(section))


def _reclaim(block: Section) -> PolicySpec:
    section = required_config(block, "policy.reclaim")
    try:
        policy = ReclaimPolicyConfig(**_goal_values(section), ages=section.text("ages"))
    except ConfigError as failure:
        raise section.located(failure) from None
    target = TargetSpec("cgroups", cgroups=cgroup_names(section))
    return PolicySpec("reclaim", policy, TrackerSpec("stub"), target, _mover(section))


def _goal(section: Section) -> Goal:
    """`goal: "psi: 0.1%"`, or a mapping with that one key."""
    text = section.text_or_none("goal")
    table = None if text is not None else section.section("goal")
    if table is not None:
        keys = table.keys()
        if len(keys) != 1:
            raise section.error("goal", f"has {len(keys)} keys", f"give one: {_GOALS}")
        kind, value = keys[0], table.text(keys[0])
    elif text is not None:
        kind, _, value = text.partition(":")
    else:
        raise section.error("goal", "is missing", _GOALS)
    kind, path = kind.strip(), "goal" if table is None else f"goal.{kind.strip()}"
    try:
        if kind not in KINDS or not value.strip():
            raise ConfigError(f"{text or kind!r} is no goal", hint=_GOALS)
        return parse_goal(kind, value.strip())
    except ConfigError as failure:
        raise section.located(failure, path) from None


def _heat(block: Section) -> PolicySpec:
    section = required_config(block, "policy.heat")
    _refuse_deprecated(section)
    heatmap = _heatmap(section)
    policy = HeatPolicyConfig(
        interval_ms=section.integer("intervalms"),
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
    heatmap.use("heatmap")
    return HeatmapConfig(
        heat_max=heatmap.number("heatmax"),
        heat_retention=heatmap.number("heatretention"),
        heat_classes=heatmap.integer("heatclasses"),
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
    for number, name, table in _numbered(section, "heatnumas", -_CLASS_MOST, _CLASS_MOST):
        nodes = table.integers(name, least=SWAP_NODE, most=NODE_MAX)
        if not 0 <= number < classes:
            logger.warning("{}: no memory has this heat class, they go from 0 to {}", table.at(name), classes - 1)
        elif nodes:
            found[number] = nodes
    return found


def _numa_sizes(section: Section) -> dict[int, int]:
    found = {}
    for number, name, table in _numbered(section, "numasize", SWAP_NODE, NODE_MAX):
        text = table.text(name)
        if text:
            try:
                found[number] = parse_size(text)
            except ConfigError as failure:
                raise table.located(failure, name) from None
    return found


def _forecaster(block: Section | None) -> ForecasterSpec | None:
    if block is None or not block.text_or_none("name"):
        return None
    return _forecaster_block(block)


def _forecaster_block(block: Section) -> ForecasterSpec:
    name = block.choice("name", tuple(FORECASTERS))
    if name == "stub":
        block.use("block")
        return ForecasterSpec("stub")
    return FORECASTERS[name](required_config(block, f"forecaster.{name}"))


def _chain(section: Section) -> ForecasterSpec:
    return ForecasterSpec("chain", links=tuple(map(_forecaster_block, section.sections("forecasters"))))


def _stdio(section: Section) -> ForecasterSpec:
    command = section.texts("command")
    if not command or not command[0]:
        raise section.error("command", "is missing or empty", "a list of the program and its arguments")
    stderr = section.text("stderr")
    if stderr and not stderr.startswith("file:"):
        raise section.error("stderr", f"{stderr!r} is not known", "leave it out, or file:PATH")
    return ForecasterSpec(
        "stdio",
        command=command,
        stderr=stderr,
        retry=section.integer("retry"),
        deadline_ms=section.integer("deadlinems"),
    )


def _trace(section: Section) -> ForecasterSpec:
    file = section.text("file")
    if not file:
        raise section.error("file", "is missing", "the path of a file to append to")
    return ForecasterSpec("trace", file=file, hide_heat_zero=section.flag("hideheatzero"))


def _ratio(block: Section) -> PolicySpec:
    section = required_config(block, "policy.ratio")
    _refuse_deprecated(section)
    policy = RatioPolicyConfig(
        interval_ms=section.integer("intervalms"),
        ratio=section.number("ratio"),
        ratio_targets=section.integers("ratiotargets") or (SWAP_NODE,),
    )
    tracker = decode_tracker(section, TrackerSpec("idlepage", 5000))
    return PolicySpec("ratio", policy, tracker, decode_target(section), _mover(section))


def _demote_idle(block: Section) -> PolicySpec:
    section = required_config(block, "policy.demote-idle")
    nodes = section.integers("idlenumas")
    if not nodes:
        raise section.error("idlenumas", "is missing or empty", "a list; its first node is where idle memory goes")
    directory = section.text("pagesofinterestdir")
    target = TargetSpec("pagesofinterest", directory=directory) if directory else decode_target(section)
    policy = DemoteIdlePolicyConfig(interval_ms=section.integer("intervalms"), idle_numas=nodes)
    # The reference has no tracker here, it reads the idle bits itself; any of ours that sees reads will do.
    return PolicySpec("demote-idle", policy, decode_tracker(section, TrackerSpec("idlepage")), target, _mover(section))


def _avoid_oom(block: Section) -> PolicySpec:
    section = required_config(block, "policy.avoid-oom")
    try:
        policy = AvoidOomPolicyConfig(
            interval_ms=section.integer("intervalms"),
            start_freeing_memory=section.text("startfreeingmemory") or "8%",
            stop_freeing_memory=section.text("stopfreeingmemory") or "16%",
        )
    except ConfigError as failure:
        raise section.located(failure) from None
    cgroups = cgroup_names(section)
    return PolicySpec("avoid-oom", policy, TrackerSpec("stub"), NO_TARGET, _mover(section), cgroups=cgroups)


def _stub(block: Section) -> PolicySpec:
    block.use("block")
    return PolicySpec("stub", None, TrackerSpec("stub"), NO_TARGET, MoverConfig())


FORECASTERS: Mapping[str, Callable[[Section], ForecasterSpec]] = {
    "chain": _chain,
    "stdio": _stdio,
    "stub": lambda section: ForecasterSpec("stub"),
    "trace": _trace,
}
POLICIES: Mapping[str, Callable[[Section], PolicySpec]] = {
    "age": _age,
    "auto": _auto,
    "avoid-oom": _avoid_oom,
    "demote-idle": _demote_idle,
    "heat": _heat,
    "ratio": _ratio,
    "reclaim": _reclaim,
    "stub": _stub,
}
