"""The reference daemon's configuration files, decoded and checked as a whole before anything starts.

A file is one mapping with `policy` and `routines`, and `guards`, `allowprograms` and `countswapins` of ours; every
pluggable part is a `name` and a `config`, the latter text that is YAML or JSON again. `config_keys` lists all keys,
the tables `POLICIES`, `TRACKERS`, `TARGETS`, `FORECASTERS` and `ROUTINES` all names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from memtier_engine.clock import Clock
from memtier_engine.config.guards import decode_guards
from memtier_engine.config.parts import TargetSpec, TrackerSpec, decode_target, decode_tracker
from memtier_engine.config.policies import POLICIES, ForecasterSpec, PolicyConfig, build_policy, swaps
from memtier_engine.config.reader import Place, Section, compose
from memtier_engine.config.routines import RoutineSpec, decode_routine, decode_routines
from memtier_engine.engine.loop import Engine, EngineConfig
from memtier_engine.errors import ConfigError
from memtier_engine.guards.config import GuardsConfig
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.policies.auto import AutoPolicyConfig
from memtier_engine.reclaim.policy import ReclaimPolicyConfig
from memtier_engine.stats.observer import Observer
from memtier_engine.targets.base import TellingTarget

_STUB_INTERVAL_MS = 5000


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole file."""

    policy: PolicyConfig | None
    """None: the stub, which moves nothing."""
    tracker: TrackerSpec
    target: TargetSpec
    mover: MoverConfig
    routines: tuple[RoutineSpec, ...] = ()
    cgroups: tuple[str, ...] = ()
    """Of policy avoid-oom."""
    forecaster: ForecasterSpec | None = None
    """Of policy heat."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """When to move nothing."""
    count_swap_ins: bool = True
    """See `EngineConfig`."""

    @property
    def scan_interval_ms(self) -> int:
        """How often memory is looked at: as the tracker says, else once per decision."""
        decision_ms = _STUB_INTERVAL_MS if self.policy is None else self.policy.interval_ms
        return self.tracker.scan_interval_ms or decision_ms

    @property
    def swaps(self) -> bool:
        """Whether it pages memory out."""
        return swaps(self.policy)

    def build(
        self,
        host: Host | None = None,
        *,
        clock: Clock | None = None,
        dry_run: bool = False,
        observers: Sequence[Observer] = (),
        events: bool = False,
    ) -> Engine:
        """The engine on this machine. If that fails, nothing of it stays open.

        Args:
            host: the machine; None: this one.
            clock: None: the system's.
            dry_run: see `EngineConfig`.
            observers: see `Engine`.
            events: see `TargetSpec.build`; the engine closes the target.
        Raises:
            TrackerUnavailable: the tracker does not work here.
            ConfigError: a directory or program that the file names is not there.
        """
        host = host or Host()

        def on_event(name: str) -> None:
            for observer in observers:
                observer.event(name)

        config = EngineConfig(
            tracker=self.tracker.name,
            scan_interval_ms=self.scan_interval_ms,
            policy=self.policy if isinstance(self.policy, AgePolicyConfig) else AgePolicyConfig(),
            mover=self.mover,
            guards=self.guards,
            dry_run=dry_run,
            count_swap_ins=self.count_swap_ins,
        )
        if isinstance(self.policy, ReclaimPolicyConfig):
            from memtier_engine.reclaim.engine import reclaim_engine

            cgroups = self.target.cgroups
            return reclaim_engine(cgroups, self.policy, config, host=host, clock=clock, observers=observers)
        with ExitStack() as made:
            target = self.target.build(host, events=events)
            if isinstance(target, TellingTarget):
                made.callback(target.close)
            tracker = self.tracker.build(host)
            made.callback(tracker.close)
            if isinstance(self.policy, AutoPolicyConfig):
                from memtier_engine.engine.auto import auto_engine

                engine = auto_engine(
                    target, self.policy, config, host=host, clock=clock, tracker=tracker, observers=observers
                )
            else:
                policy = build_policy(
                    self.policy,
                    self.tracker,
                    host,
                    scan_interval_ms=self.scan_interval_ms,
                    cgroups=self.cgroups,
                    forecaster=self.forecaster,
                    on_event=on_event,
                )
                made.callback(policy.close)
                engine = Engine(
                    target, config, host=host, clock=clock, tracker=tracker, policy=policy, observers=observers
                )
            made.pop_all()
            return engine


def load(path: str | Path, *, allow_programs: bool = False) -> Spec:
    """Read and check the file at `path`; `allow_programs` as in `parse`.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is no UTF-8 text: {error.reason} at byte {error.start}", file=str(path)) from None
    return parse(text, file=str(path), allow_programs=allow_programs)


def parse(text: str, *, file: str | None = None, first_line: int = 1, allow_programs: bool = False) -> Spec:
    """Decode and check configuration text.

    Args:
        text: the whole document.
        file: what errors call it.
        first_line: line of `file` on which the text begins, if it stands within another.
        allow_programs: let routines run programs; the text may do so itself (`allowprograms: true`).
    Raises:
        ConfigError: something is wrong; nothing was started.
    """
    place = Place(file, first_line)
    root = compose(text, place, "")
    if root is None:
        raise ConfigError("is empty", file=file, hint="write a `policy` mapping with `name` and `config`")
    section = Section(root, "", place).use("file")
    policy = section.section("policy")
    allowed = section.flag("allowprograms") or allow_programs
    routines = decode_routines(section, allow_programs=allowed)
    guards = decode_guards(section)
    if policy is None:
        raise ConfigError("is missing", key_path="policy", file=file, hint="a mapping with `name` and `config`")
    found = POLICIES[policy.choice("name", tuple(POLICIES))](policy)
    return Spec(
        found.policy,
        found.tracker,
        found.target,
        found.mover,
        routines,
        found.cgroups,
        found.forecaster,
        guards,
        section.flag("countswapins"),
    )


def read(source: str | Path, *, allow_programs: bool = False) -> Spec:
    """A file by its path, or configuration text: a `str` of several lines, or one that begins with a brace."""
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return parse(source, allow_programs=allow_programs)
    return load(source, allow_programs=allow_programs)


def from_yaml(
    source: str | Path, *, host: Host | None = None, dry_run: bool = False, observers: Sequence[Observer] = ()
) -> Engine:
    """The engine of a configuration file as `memtierd -config` takes it, given as a path or as its text.

    `str` of several lines is text. Routines are not run: `read(source).routines` has them.

    Raises:
        ConfigError: something in it is wrong; nothing was started.
        TrackerUnavailable: its tracker does not work here.
    """
    return read(source).build(host, dry_run=dry_run, observers=observers)


def parse_policy(name: str, config: str, *, file: str | None = None) -> Spec:
    """One policy given by name and configuration text, as the prompt has them. Raises ConfigError."""
    block = _block("policy", name, config, file)
    found = POLICIES[block.choice("name", tuple(POLICIES))](block)
    return Spec(found.policy, found.tracker, found.target, found.mover, (), found.cgroups, found.forecaster)


def parse_tracker(name: str, config: str, *, file: str | None = None) -> TrackerSpec:
    """One tracker given by name and configuration text; empty text: its defaults. Raises ConfigError."""
    return decode_tracker(_wrapped("tracker", name, config, file))


def parse_target(name: str, config: str, *, file: str | None = None) -> TargetSpec:
    """One pid watcher given by name and configuration text. Raises ConfigError."""
    return decode_target(_wrapped("pidwatcher", name, config, file))


def parse_routine(name: str, config: str, *, file: str | None = None, allow_programs: bool = False) -> RoutineSpec:
    """One routine given by name and configuration text. Raises ConfigError."""
    return decode_routine(_block("routine", name, config, file), allow_programs=allow_programs)


def _wrapped(key: str, name: str, config: str, file: str | None) -> Section:
    """The block as it would stand in a file, so that line 1 of `config` is line 1 in errors."""
    head = f"{key}:\n  name: {json.dumps(name)}\n  config: "
    body = "|2+\n" + "".join(f"    {line}\n" for line in config.split("\n")) if config else "''\n"
    place = Place(file, 1 - head.count("\n") - 1)
    root = compose(head + body, place, "")
    assert root is not None
    return Section(root, "", place)


def _block(key: str, name: str, config: str, file: str | None) -> Section:
    block = _wrapped(key, name, config, file).section(key)
    assert block is not None
    return block
