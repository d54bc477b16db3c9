"""What BPF offers on this machine, source by source and loader by loader, each tried for real, with the reasons."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from memtier_engine.errors import MemtierError
from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.bpf import loaders, rights
from memtier_engine.trackers.bpf.faults import TRACEPOINT, FaultCounter
from memtier_engine.trackers.bpf.hardware import AccessSampler
from memtier_engine.trackers.bpf.sampling import DEFAULT_SHARE, SampledBpfTracker
from memtier_engine.trackers.bpf.tracker import BpfTracker


@dataclass(frozen=True, slots=True)
class Source:
    """One thing that BPF may tell, or one way to load it."""

    name: str
    works: bool
    why: str | None = None  # it does not
    fix: str | None = None
    detail: str | None = None  # worth knowing when it works


def sources(host: Host) -> tuple[Source, ...]:
    """`accessed`, `sampled`, `faults`, `hardware`. Loads each and unloads it again; 0.3 s."""
    return tuple(_tried(name, lambda use=use: use(host)) for name, use in _USES.items())  # type: ignore[misc]


def ways_to_load(host: Host) -> tuple[Source, ...]:
    """`libbpf` and `bcc`: whether what each needs is there. bcc is imported, but compiles nothing here."""
    return tuple(_tried(name, lambda name=name: loaders.need(name, host)) for name in loaders.LOADERS)  # type: ignore[misc]


def _tried(name: str, use: Callable[[], str | None]) -> Source:
    try:
        return Source(name, True, detail=use())
    except MemtierError as failure:
        return Source(name, False, failure.message, failure.hint)


def _accessed(host: Host) -> str:
    with closing(BpfTracker(host)) as tracker:
        flush = "flushes TLBs" if tracker.flushes else "does not flush TLBs (without CAP_SYS_NICE)"
        return _joined(f"loaded by {tracker.loader}", flush, _of_others(host))


def _sampled(host: Host) -> str:
    with closing(SampledBpfTracker(host)):
        return _joined(f"{DEFAULT_SHARE:.0%} of the 2 MiB blocks", _of_others(host))


def _faults(host: Host) -> str:
    with FaultCounter(host) as counter:
        if counter.reads_and_writes:
            return f"tracepoint exceptions:{TRACEPOINT}"
        return f"event page-faults: without tracepoint exceptions:{TRACEPOINT} reads and writes look alike"


def _hardware(host: Host) -> str:
    with AccessSampler(host) as sampler:
        return ", ".join(event.name for event in sampler.events)


_USES: dict[str, Callable[[Host], str]] = {
    "accessed": _accessed,
    "sampled": _sampled,
    "faults": _faults,
    "hardware": _hardware,
}


def _of_others(host: Host) -> str | None:
    missing = rights.absent(host, rights.FOR_OTHERS)
    return f"other users' processes may be refused: this process lacks {', '.join(missing)}" if missing else None


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)
