"""Which capabilities each tracker, mover and program needs, why, and by which kernel source. The only such list.

What is deployed, `memtier check` and the error messages follow it, and tests run each part with exactly these and
with each of them taken away. All is for user 0, who owns the kernel's files below /sys and the cgroups; it says what
it takes to work on processes of any user. What works only on this process itself needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memtier_engine.abi.constants import Capability
from memtier_engine.errors import AccessDenied, KernelCallError
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import effective_capabilities

_LACKS = "this process lacks"


@dataclass(frozen=True, slots=True)
class Need:
    """One capability and what it is for."""

    capability: Capability
    why: str
    source: str
    """Where the kernel asks for it."""
    instead: tuple[Capability, ...] = ()
    """Broader ones of which any does as well, on every kernel."""
    newer_instead: tuple[Capability, ...] = ()
    """The same, but only on newer kernels."""

    def met_by(self, held: int) -> bool:
        """Whether the capabilities in the bit mask `held` are enough on every kernel."""
        return any(held >> each & 1 for each in (self.capability, *self.instead))


_MAPS = Need(
    Capability.CAP_SYS_PTRACE,
    "memory maps and pagemap of other processes",
    "fs/proc/base.c proc_mem_open(), kernel/ptrace.c __ptrace_may_access()",
    # "mm,procfs: allow read-only remote mm access under CAP_PERFMON", Linux 6.15: kernel/fork.c may_access_mm()
    newer_instead=(Capability.CAP_PERFMON, Capability.CAP_SYS_ADMIN),
)
_READ = Need(
    Capability.CAP_DAC_READ_SEARCH,
    "opening /proc/PID/pagemap (0400) of other users",
    "fs/proc/base.c tgid_base_stuff, fs/namei.c generic_permission()",
    instead=(Capability.CAP_DAC_OVERRIDE,),
)
_WRITE = Need(
    Capability.CAP_DAC_OVERRIDE,
    "opening /proc/PID/pagemap (0400) and clear_refs (0200) of other users",
    "fs/proc/base.c tgid_base_stuff, fs/namei.c generic_permission()",
)
_FRAMES = Need(
    Capability.CAP_SYS_ADMIN,
    "frame numbers in pagemap",
    "fs/proc/task_mmu.c pagemap_open()",
)
_ADVISE = Need(
    Capability.CAP_SYS_NICE,
    "process_madvise on other processes",
    "mm/madvise.c process_madvise()",
)
_TRACE = Need(
    Capability.CAP_SYS_PTRACE,
    "process_madvise and move_pages on other processes, and their pagemap",
    "mm/madvise.c process_madvise(), mm/migrate.c find_mm_struct()",
)
_LOAD = Need(
    Capability.CAP_BPF,
    "loading BPF programs",
    "kernel/bpf/syscall.c bpf_prog_load()",
    instead=(Capability.CAP_SYS_ADMIN,),
)
_LOOK = Need(
    Capability.CAP_PERFMON,
    "BPF programs that read kernel memory, perf events of all processes",
    "kernel/bpf/syscall.c bpf_prog_load(), kernel/events/core.c perf_event_open()",
    instead=(Capability.CAP_SYS_ADMIN,),
)

TRACKERS: Mapping[str, tuple[Need, ...]] = {
    "bpf": (_WRITE, _MAPS, _FRAMES, _LOAD, _LOOK),
    "bpf-hardware": (_READ, _MAPS, _LOAD, _LOOK),
    "bpf-sampled": (_READ, _MAPS, _FRAMES, _ADVISE, _LOAD, _LOOK),
    "damon": (_READ, _MAPS),
    "finder": (_READ, _MAPS),
    "idlepage": (_READ, _MAPS, _FRAMES),
    "mglru": (),
    "refs": (_WRITE, _MAPS),
    "softdirty": (_WRITE, _MAPS),
    "stub": (_MAPS,),
    "userfault": (),
}
"""By the trackers' names; the maps that the engine itself reads are in it."""

MOVERS: Mapping[str, tuple[Need, ...]] = {
    "page-out": (_READ, _TRACE, _ADVISE),
    "move-pages": (_TRACE,),
    "memory-reclaim": (),
}
"""Swap out by process_madvise, to another node by move_pages, and by a cgroup's memory.reclaim."""

EXTRAS: Mapping[str, tuple[Need, ...]] = {
    "damon-physical": (_READ, _MAPS, _FRAMES),
    "pressure-1s": (
        Need(
            Capability.CAP_SYS_RESOURCE,
            "pressure triggers with a window below 2 s; without, totals are compared and the window is 2 s",
            "kernel/sched/psi.c psi_trigger_create()",
        ),
    ),
    "process-events": (
        Need(
            Capability.CAP_NET_ADMIN,
            "the kernel's events of forks and exits; without, /proc and cgroups are polled",
            "drivers/connector/cn_proc.c cn_proc_mcast_ctl()",
        ),
    ),
    "swap-in-counts": (_LOAD, _LOOK),
}
"""What makes something better, and is done without where it is refused; damon watches physical memory only where the
kernel cannot watch processes."""


def least(*parts: Iterable[Need]) -> tuple[Capability, ...]:
    """The fewest capabilities that meet the needs of all `parts`, in the order of their numbers."""
    needs = [need for part in parts for need in part]
    chosen = {need.capability for need in needs if not need.instead}
    chosen |= {need.capability for need in needs if not chosen.intersection(need.instead)}
    return tuple(sorted(chosen))


PLUGIN_NEEDS = (
    _WRITE,
    Need(Capability.CAP_SYS_ADMIN, f"{_FRAMES.why}, tracking with BPF", f"{_FRAMES.source}, {_LOAD.source}"),
    _ADVISE,
    _TRACE,
)
"""Of nri-memtierd, with every tracker and mover and no extra."""
PLUGIN = least(PLUGIN_NEEDS)
"""What it is deployed with."""


def missing(host: Host, needs: Iterable[Need]) -> tuple[Need, ...]:
    """Those of `needs` that this process is known not to meet."""
    held = effective_capabilities(host)
    return () if held is None else tuple(need for need in needs if not need.met_by(held))


def named(host: Host, failure: KernelCallError, needs: Iterable[Need]) -> KernelCallError:
    """`failure`, if the kernel refused for lack of rights, with the names of the capabilities that are missing."""
    if not isinstance(failure, AccessDenied) or _LACKS in failure.message:
        return failure
    names = [each.name for each in sorted({need.capability for need in missing(host, needs)})]
    if not names:
        return failure
    return AccessDenied(f"{failure.message}: {_LACKS} {', '.join(names)}", failure.errno, hint="run as root")
