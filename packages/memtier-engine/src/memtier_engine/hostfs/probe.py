"""What this kernel and this process's rights offer: each feature tried for real, not guessed from a version.

Every check works on memory and files of this process, and leaves the machine as it was. One that does not
work says why, and which CONFIG_ option, mount, capability or sysctl would give it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from memtier_engine.errors import AccessDenied, MemtierError
from memtier_engine.hostfs import probe_memory, probe_system
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.probe_base import Failed, Feature, Scene

__all__ = ["CHECKS", "Feature", "ProbeResult", "probe"]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Every feature, in the order of `CHECKS`."""

    features: tuple[Feature, ...]

    def __iter__(self) -> Iterator[Feature]:
        return iter(self.features)

    def __getitem__(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise KeyError(name)

    def works(self, *names: str) -> bool:
        """Whether all the named features work."""
        return all(self[name].works for name in names)


CHECKS: dict[str, Callable[[Scene], str | None]] = {
    "pagemap": probe_memory.pagemap,
    "pagemap-pfns": probe_memory.pagemap_pfns,
    "pagemap-scan": probe_memory.pagemap_scan,
    "idle-bitmap": probe_memory.idle_bitmap,
    "soft-dirty": probe_memory.soft_dirty,
    "clear-refs": probe_memory.clear_refs,
    "smaps-referenced": probe_memory.smaps_referenced,
    "kpageflags": probe_memory.kpageflags,
    "process-madvise": probe_memory.process_madvise,
    "pidfd": probe_memory.pidfd,
    "move-pages": probe_memory.move_pages,
    "numa": probe_system.numa,
    "userfaultfd-wp-async": probe_memory.userfaultfd_wp_async,
    "cgroup2": probe_system.cgroup2,
    "memory-controller": probe_system.memory_controller,
    "memory-reclaim": probe_system.memory_reclaim,
    "psi": probe_system.psi,
    "swap": probe_system.swap,
    "zram": probe_system.zram,
    "damon": probe_system.damon,
    "damon-vaddr": probe_system.damon_vaddr,
    "mglru": probe_system.mglru,
    "btf": probe_system.btf,
    "bpf": probe_system.bpf,
}
"""Feature name to the check that raises `Failed`, or returns a detail worth showing."""


def probe(host: Host | None = None, names: Iterable[str] | None = None) -> ProbeResult:
    """Try everything, or only the features named. All takes some 50 ms; raises nothing."""
    wanted = CHECKS.keys() if names is None else tuple(names)
    with Scene(host or Host()) as scene:
        return ProbeResult(tuple(_try(name, CHECKS[name], scene) for name in wanted))


def _try(name: str, check: Callable[[Scene], str | None], scene: Scene) -> Feature:
    try:
        return Feature(name, True, None, None, check(scene))
    except Failed as failed:
        return Feature(name, False, failed.why, failed.fix)
    except AccessDenied as error:
        return Feature(name, False, error.message, error.hint or "run as root")
    except MemtierError as error:
        return Feature(name, False, error.message, error.hint)
    except (OSError, ValueError) as error:
        return Feature(name, False, str(error), None)
