"""Trackers by name, and `auto`: the best that works here, with the reasons why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from loguru import logger

from memtier_engine.errors import ConfigError, MemtierError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.model import Tracker

AUTO_REASONS: Mapping[str, str] = {
    "bpf": "reads and writes of each page, at a tenth of the bitmap's cost and without holding up its process, on any "
    "kernel with BPF",
    "idlepage": "reads and writes of each page; dear, and pages that several processes map are left out",
    "damon": "reads and writes at a cost that does not grow with the memory; it samples, so pages used rarely among "
    "many idle ones may look idle, and the guard `refaults` has to stop that",
    "softdirty": "writes of each page; with `trackreferenced`, without which memory that is only read would look idle: "
    "a mapping that is read counts as in use as a whole",
    "refs": "any kernel; by whole mappings only, so a large heap never looks idle while any of it is used",
}
AUTO_ORDER = tuple(AUTO_REASONS)
"""`auto` tries these in turn; the reasons say why each is where it is."""


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
        "bpf-hardware": load("bpf.hardware", "HardwareTracker"),
        "bpf-sampled": load("bpf.sampling", "SampledBpfTracker"),
        "damon": load("damon_shared", "SharedDamonTracker"),
        "finder": load("finder", "FinderTracker"),
        "idlepage": load("idlepage", "IdlePageTracker"),
        "refs": load("refs", "RefsTracker"),
        "softdirty": load("softdirty", "SoftDirtyTracker"),
        "stub": load("stub", "StubTracker"),
        "userfault": load("userfault", "UserfaultTracker"),
    }


def _softdirty_that_sees_reads(host: Host) -> Tracker:
    from memtier_engine.trackers.softdirty import SoftDirtyConfig, SoftDirtyTracker

    return SoftDirtyTracker(host, SoftDirtyConfig(track_referenced=True))


TRACKERS = _modules()
_IN_AUTO: Mapping[str, Callable[[Host], Tracker]] = {"softdirty": _softdirty_that_sees_reads}
"""What `auto` makes where that is not what the name alone stands for."""
_NEEDS = {
    "bpf": ("pagemap-pfns", "clear-refs", "btf", "bpf"),
    "bpf-hardware": ("pagemap", "btf", "bpf"),
    "bpf-sampled": ("pagemap-pfns", "process-madvise", "btf", "bpf"),
    "finder": ("pagemap",),
    "idlepage": ("pagemap-pfns", "idle-bitmap", "kpageflags"),
    "softdirty": ("pagemap", "soft-dirty"),
    "refs": ("clear-refs", "smaps-referenced"),
    "userfault": ("userfaultfd-wp-async",),
}
"""Probe features that each tracker cannot do without."""
_NEEDS_IN_AUTO = {"softdirty": ("clear-refs", "smaps-referenced")}
"""Those that `auto` needs besides."""
_TRIED = ("bpf", "bpf-hardware", "bpf-sampled", "damon")
"""Trackers that verify themselves when made: the features alone do not promise that they work."""


_worked: ContextVar[set[tuple[str, bool]] | None] = ContextVar("worked", default=None)


@contextmanager
def remembering(worked: set[tuple[str, bool]]) -> Iterator[None]:
    """Within the block, what was found to work once is not tried again; `worked` is what is known, and grows.

    Trying reads and clears accessed bits of this very process: some 30 ms for each of a node's many engines.
    """
    token = _worked.set(worked)
    try:
        yield
    finally:
        _worked.reset(token)


def create_tracker(name: str, host: Host, *, without: Collection[str] = ()) -> TrackerChoice:
    """The tracker of that name, or with `auto` the first of `AUTO_ORDER` that works and is not one of `without`.

    Raises:
        ConfigError: no tracker has that name.
        TrackerUnavailable: it does not work here; the hint says what is missing.
    """
    if name == "auto":
        return _choose(host, without)
    if name not in TRACKERS:
        raise ConfigError(
            f"no tracker is named {name!r}",
            key_path="tracker.name",
            hint=f"use one of: auto, {', '.join(sorted(TRACKERS))}",
        )
    return TrackerChoice(_made(name, host, TRACKERS[name]), ())


def create_softdirty_with_reads(host: Host) -> Tracker:
    """Tracker `softdirty` with `track_referenced`, as `auto` takes it.

    Raises:
        TrackerUnavailable: it does not work here; the hint says what is missing.
    """
    return _made("softdirty", host, _IN_AUTO["softdirty"], in_auto=True)


def _made(name: str, host: Host, make: Callable[[Host], Tracker], *, in_auto: bool = False) -> Tracker:
    why = _lacking(name, host, in_auto=in_auto)
    if why is not None:
        raise TrackerUnavailable(f"tracker {name}: {why[0]}", hint=why[1])
    try:
        return make(host)
    except MemtierError as failure:
        if name in _TRIED:
            raise TrackerUnavailable(f"tracker {name}: {failure.message}", hint=failure.hint) from None
        raise


def why_not(name: str, host: Host, *, in_auto: bool = False) -> tuple[str, str | None] | None:
    """(reason, what to do) why the tracker does not work here, or not as `auto` makes it; None if it does."""
    why = _lacking(name, host, in_auto=in_auto)
    if why is not None:
        return why
    if name in _TRIED:
        try:
            TRACKERS[name](host).close()
        except MemtierError as failure:
            return failure.message, failure.hint
    return None


def _lacking(name: str, host: Host, *, in_auto: bool) -> tuple[str, str | None] | None:
    """The first feature of the kernel, or right, that the tracker needs and does not find."""
    from memtier_engine.hostfs.probe import probe

    worked = _worked.get()
    if worked is not None and (name, in_auto) in worked:
        return None
    needs = (*_NEEDS.get(name, ()), *(_NEEDS_IN_AUTO.get(name, ()) if in_auto else ()))
    for feature in probe(host, needs):
        if not feature.works:
            return feature.why or f"{feature.name} does not work", feature.fix
    if worked is not None:
        worked.add((name, in_auto))
    return None


def _choose(host: Host, without: Collection[str]) -> TrackerChoice:
    rejected: list[tuple[str, str]] = []
    for name in AUTO_ORDER:
        if name in without:
            rejected.append((name, "not wanted here"))
            continue
        try:
            chosen = _made(name, host, _IN_AUTO.get(name, TRACKERS[name]), in_auto=True)
        except MemtierError as failure:
            rejected.append((name, str(failure)))
            logger.info("tracker {} is out: {}", name, failure)
            continue
        logger.info("tracker {} chosen", name)
        return TrackerChoice(chosen, tuple(rejected))
    reasons = "; ".join(f"{name}: {why}" for name, why in rejected)
    raise TrackerUnavailable(f"no tracker works here: {reasons}", hint="`memtier check` shows how to get one")
