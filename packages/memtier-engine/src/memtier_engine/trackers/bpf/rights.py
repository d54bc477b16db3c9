"""Why something was refused, and which capabilities, or which kernel, would allow it."""

from __future__ import annotations

from collections.abc import Iterable

from memtier_engine.abi.constants import Capability
from memtier_engine.errors import AccessDenied, KernelCallError, MemtierError, TrackerUnavailable
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.proc import effective_capabilities

FOR_LOADING = (Capability.CAP_BPF, Capability.CAP_PERFMON)
FOR_FRAMES = (Capability.CAP_SYS_ADMIN,)
FOR_OTHERS = (Capability.CAP_DAC_OVERRIDE, Capability.CAP_SYS_PTRACE)
"""For processes of other users: pagemap and clear_refs belong to them. Newer kernels let CAP_PERFMON look at their
memory, so that CAP_SYS_PTRACE is not needed. Source: kernel/fork.c, may_access_mm()."""
FOR_COLD = (Capability.CAP_SYS_NICE,)
"""For process_madvise(MADV_COLD) on another process. Source: mm/madvise.c."""

_ADMIN_STANDS_FOR = frozenset(FOR_LOADING)
"""Source: include/linux/capability.h, bpf_capable(), perfmon_capable()."""
_LOCKDOWN = "sys/kernel/security/lockdown"
LOCKED_DOWN = "the kernel is locked down (confidentiality): BPF programs cannot read kernel memory"


def absent(host: Host, wanted: Iterable[Capability]) -> list[str]:
    """Names of those of `wanted` that this process is known not to have."""
    held = effective_capabilities(host)
    if held is None:
        return []
    admin = held >> Capability.CAP_SYS_ADMIN & 1
    return [each.name for each in wanted if not (held >> each & 1 or (admin and each in _ADMIN_STANDS_FOR))]


def lacking(host: Host, message: str, wanted: Iterable[Capability]) -> TrackerUnavailable:
    """A refusal with the names of the capabilities that are missing."""
    missing = absent(host, wanted)
    if missing:
        return TrackerUnavailable(f"{message}: this process lacks {', '.join(missing)}", hint="run as root")
    return TrackerUnavailable(message, hint="allow bpf(2) in the seccomp profile, outside a user namespace")


def denied(host: Host, failure: AccessDenied, wanted: Iterable[Capability]) -> AccessDenied:
    """The refusal of one process's files, with the names of the capabilities that are missing."""
    missing = absent(host, wanted)
    if not missing:
        return failure
    return AccessDenied(
        f"{failure.message}: this process lacks {', '.join(missing)}", failure.errno, hint="run as root"
    )


def explained(host: Host, failure: MemtierError) -> TrackerUnavailable:
    """`failure` as the reason why something cannot be loaded, with what would allow it."""
    if isinstance(failure, TrackerUnavailable):
        return failure
    if isinstance(failure, AccessDenied) and (absent(host, FOR_LOADING) or not is_locked_down(host)):
        return lacking(host, failure.message, FOR_LOADING)
    if is_locked_down(host):  # the verifier then knows no bpf_probe_read_kernel, whatever loads the program
        return TrackerUnavailable(LOCKED_DOWN, hint="boot with lockdown=integrity")
    if isinstance(failure, KernelCallError):
        return TrackerUnavailable(failure.message, hint=failure.hint or "Linux 5.10 or later with CONFIG_BPF_SYSCALL=y")
    return TrackerUnavailable(failure.message, hint=failure.hint)


def is_locked_down(host: Host) -> bool:
    """Whether the kernel keeps its memory from BPF programs (lockdown=confidentiality)."""
    path = host.path(_LOCKDOWN)
    return path.exists() and "[confidentiality]" in host.read_text(path)
