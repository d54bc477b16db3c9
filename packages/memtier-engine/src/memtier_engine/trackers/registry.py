"""Trackers by name, and `auto`: the best that works here, with the reasons why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from loguru import logger

from memtier_engine.errors import ConfigError, MemtierError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import Tracker

AUTO_ORDER = ("bpf", "idlepage", "refs", "softdirty")
"""`auto` tries these in turn. Exact before coarse, and `bpf` before `idlepage`: a tenth of the cost, and it
sees shared pages. `softdirty` last, because it takes memory that is only read for idle, which the others do not."""


@dataclass(frozen=True, slots=True)
class TrackerChoice:
    """What `auto` decided."""

    tracker: Tracker
    rejected: tuple[tuple[str, str], ...]
    """(name, reason) of each that was tried before and does not work here."""


def _modules() -> Mapping[str, Callable[[Host], Tracker]]:
    # Imported when used: a program that lists trackers should not load numpy for it.
    def load(module: str, name: str) -> Callable[[Host], Tracker]:
        def build(host: Host) -> Tracker:
            kind: Any = getattr(import_module(f"memtier_engine.trackers.{module}"), name)
            tracker: Tracker = kind(host)
            return tracker

        return build

    return {
        "bpf": load("bpf.tracker", "BpfTracker"),
        "damon": load("damon", "DamonTracker"),
        "finder": load("finder", "FinderTracker"),
        "idlepage": load("idlepage", "IdlePageTracker"),
        "refs": load("refs", "RefsTracker"),
        "softdirty": load("softdirty", "SoftDirtyTracker"),
        "stub": load("stub", "StubTracker"),
        "userfault": load("userfault", "UserfaultTracker"),
    }


TRACKERS = _modules()
_NEEDS = {
    "bpf": ("pagemap-pfns", "clear-refs", "btf", "bpf"),
    "finder": ("pagemap",),
    "idlepage": ("pagemap-pfns", "idle-bitmap", "kpageflags"),
    "softdirty": ("pagemap", "soft-dirty"),
    "refs": ("clear-refs", "smaps-referenced"),
    "userfault": ("userfaultfd-wp-async",),
}
"""Probe features that each tracker cannot do without."""
_TRIED = ("bpf", "damon")
"""Trackers that verify themselves when made: the features alone do not promise that they work."""


def create_tracker(name: str, host: Host) -> TrackerChoice:
    """The tracker of that name, or with `auto` the first of `AUTO_ORDER` that works.

    Raises:
        ConfigError: no tracker has that name.
        TrackerUnavailable: it does not work here; the hint says what is missing.
    """
    if name == "auto":
        return _choose(host)
    if name not in TRACKERS:
        raise ConfigError(
            f"no tracker is named {name!r}",
            key_path="tracker.name",
            hint=f"use one of: auto, {', '.join(sorted(TRACKERS))}",
        )
    why = why_not(name, host)
    if why is not None:
        raise TrackerUnavailable(f"tracker {name}: {why[0]}", hint=why[1])
    return TrackerChoice(TRACKERS[name](host), ())


def why_not(name: str, host: Host) -> tuple[str, str | None] | None:
    """(reason, what to do) why the tracker does not work here; None if it does."""
    from memtier_engine.hostfs.probe import probe

    for feature in probe(host, _NEEDS.get(name, ())):
        if not feature.works:
            return feature.why or f"{feature.name} does not work", feature.fix
    if name in _TRIED:
        try:
            TRACKERS[name](host).close()
        except MemtierError as failure:
            return failure.message, failure.hint
    return None


def _choose(host: Host) -> TrackerChoice:
    rejected: list[tuple[str, str]] = []
    for name in AUTO_ORDER:
        try:
            chosen = create_tracker(name, host).tracker
        except MemtierError as failure:
            rejected.append((name, str(failure)))
            logger.info("tracker {} is out: {}", name, failure)
            continue
        logger.info("tracker {} chosen", name)
        return TrackerChoice(chosen, tuple(rejected))
    reasons = "; ".join(f"{name}: {why}" for name, why in rejected)
    raise TrackerUnavailable(f"no tracker works here: {reasons}", hint="`memtier check` shows how to get one")
