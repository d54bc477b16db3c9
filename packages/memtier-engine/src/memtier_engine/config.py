"""The reference daemon's configuration files, decoded and checked as a whole before anything starts.

A file is one mapping with `policy` and `routines`; every pluggable part is a `name` and a `config`, the latter
text that is YAML or JSON again. A part that may stand in a file has a decoder in one of the tables below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memtier_engine.config_parts import TargetSpec, TrackerSpec
from memtier_engine.config_policies import POLICIES, ForecasterSpec, PolicyConfig, build_policy, swaps
from memtier_engine.config_reader import Place, Section, compose
from memtier_engine.config_routines import RoutineSpec, decode_routines
from memtier_engine.engine import Engine, EngineConfig
from memtier_engine.errors import ConfigError
from memtier_engine.hostfs.host import Host
from memtier_engine.mover.mover import MoverConfig
from memtier_engine.policies.age import AgePolicyConfig
from memtier_engine.stats.observer import Observer

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

    @property
    def scan_interval_ms(self) -> int:
        """How often memory is looked at: as the tracker says, else once per decision."""
        decision_ms = _STUB_INTERVAL_MS if self.policy is None else self.policy.interval_ms
        return self.tracker.scan_interval_ms or decision_ms

    @property
    def swaps(self) -> bool:
        """Whether it pages memory out."""
        return swaps(self.policy)

    def build(self, host: Host | None = None, *, dry_run: bool = False, observers: Sequence[Observer] = ()) -> Engine:
        """The engine on this machine.

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
            dry_run=dry_run,
        )
        target = self.target.build(host)
        tracker = self.tracker.build(host)
        try:
            policy = build_policy(
                self.policy,
                self.tracker,
                host,
                scan_interval_ms=self.scan_interval_ms,
                cgroups=self.cgroups,
                forecaster=self.forecaster,
                on_event=on_event,
            )
        except BaseException:
            tracker.close()
            raise
        return Engine(target, config, host=host, tracker=tracker, policy=policy, observers=observers)


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
    found = POLICIES[policy.choice("name", tuple(POLICIES))](policy)
    return Spec(found.policy, found.tracker, found.target, found.mover, routines, found.cgroups, found.forecaster)
