"""Checks of `probe` that try the kernel's interfaces on pages of this process."""

from __future__ import annotations

import errno
import os

import numpy as np

from memtier_engine.abi import constants as c
from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import Capability
from memtier_engine.distinct import distinct
from memtier_engine.errors import AccessDenied, KernelCallError, MemtierError, Unavailable
from memtier_engine.hostfs import pagemap as pm
from memtier_engine.hostfs import proc
from memtier_engine.hostfs.kpageflags import KPAGEFLAGS, KpageFlags
from memtier_engine.hostfs.page_idle import IDLE_BITMAP, IdleBitmap
from memtier_engine.hostfs.probe_base import Failed, Scene, TrialPages
from memtier_engine.model import PAGE_BYTES, U64

_PIDFD_SELF_SIGNAL = 0  # asks, sends nothing


def _words(scene: Scene) -> U64:
    with pm.Pagemap(scene.host, scene.pid) as pages:
        return pages.read(scene.trial.start, scene.trial.end)


def pagemap(scene: Scene) -> None:
    """Our own touched pages must read as present."""
    scene.need_file("proc", str(scene.pid), "pagemap", options=("CONFIG_PROC_PAGE_MONITOR",))
    try:
        words = _words(scene)
    except AccessDenied as error:
        raise scene.refused(error, Capability.CAP_SYS_PTRACE) from None
    if not pm.present(words).any():
        raise Failed("pagemap does not show pages of this process that were just written")


def pagemap_pfns(scene: Scene) -> None:
    """Frame numbers are zeroed without CAP_SYS_ADMIN (since Linux 4.2)."""
    pagemap(scene)
    words = _words(scene)
    if not pm.pfns(words[pm.present(words)]).any():
        lacks = scene.lacks(Capability.CAP_SYS_ADMIN)
        why = "pagemap shows no frame numbers"
        raise Failed(
            f"{why}: this process lacks CAP_SYS_ADMIN" if lacks else f"{why} to this process",
            "run as root" if lacks else "run with CAP_SYS_ADMIN outside a user namespace",
        )


def pagemap_scan(scene: Scene) -> None:
    """PAGEMAP_SCAN must find our touched pages."""
    pagemap(scene)
    trial = scene.trial
    with pm.Pagemap(scene.host, scene.pid) as pages:
        try:
            runs = pages.scan_runs(trial.start, trial.end, mask=c.PAGE_IS_PRESENT)
        except KernelCallError as error:
            raise scene.refused(error) from None
    if not len(runs):
        raise Failed("PAGEMAP_SCAN does not find pages of this process that were just written")


def idle_bitmap(scene: Scene) -> None:
    """Some of our pages, marked idle, must read as idle."""
    scene.need_file(IDLE_BITMAP, options=("CONFIG_IDLE_PAGE_TRACKING",))
    pagemap_pfns(scene)
    words = _words(scene)
    frames = pm.pfns(words[pm.present(words)])
    try:
        with IdleBitmap(scene.host) as bitmap:
            bitmap.set_idle(frames)
            idle = bitmap.is_idle(frames)
    except KernelCallError as error:
        raise scene.refused(error, Capability.CAP_SYS_ADMIN) from None
    if not idle.any():
        raise Failed(f"/{IDLE_BITMAP}: frames marked idle do not read as idle")


def soft_dirty(scene: Scene) -> None:
    """A page must read clean after clear_refs 4, and dirty once written again."""
    pagemap(scene)
    options = ("CONFIG_MEM_SOFT_DIRTY",)
    fix = "a kernel with CONFIG_MEM_SOFT_DIRTY=y (x86_64; not on aarch64)"
    try:
        proc.clear_refs(scene.host, scene.pid, proc.CLEAR_REFS_SOFT_DIRTY)
    except KernelCallError as error:
        if error.errno == errno.EINVAL:
            raise Failed(f"clear_refs 4 is refused: {scene.config.missing(*options)}", fix) from None
        raise scene.refused(error) from None
    before = pm.soft_dirty(_words(scene))
    scene.trial.touch(0, 1)
    after = pm.soft_dirty(_words(scene))
    if before.any() or not after[0] or after[1:].any():
        raise Failed(f"pagemap does not tell written pages: {scene.config.missing(*options)}", fix)


def clear_refs(scene: Scene) -> None:
    """The kernel must take "1"."""
    scene.need_file("proc", str(scene.pid), "clear_refs", options=("CONFIG_PROC_PAGE_MONITOR",))
    try:
        proc.clear_refs(scene.host, scene.pid, proc.CLEAR_REFS_REFERENCED)
    except KernelCallError as error:
        raise scene.refused(error) from None


def smaps_referenced(scene: Scene) -> None:
    """After clear_refs 1, smaps must count as referenced what was touched since."""
    scene.need_file("proc", str(scene.pid), "smaps", options=("CONFIG_PROC_PAGE_MONITOR",))
    # Only growth is judged: the kernel may have joined our pages and neighbours in use into one mapping.
    touched_pages = scene.trial.pages // 2

    def referenced_bytes() -> int:
        table = proc.read_smaps(scene.host, scene.pid)
        at = int(np.searchsorted(table.starts, np.uint64(scene.trial.start), side="right")) - 1
        if at < 0 or table.ends[at] < scene.trial.end:
            raise Failed("smaps does not show a mapping of this process")
        return int(table.referenced_bytes[at])

    neighbours = TrialPages()
    clear_refs(scene)
    # A page in the CPU's TLB would not be marked again. Unmapping more than 33 pages flushes all of it.
    # Source: arch/x86/mm/tlb.c, tlb_single_page_flush_ceiling.
    neighbours.close()
    before = referenced_bytes()
    scene.trial.touch(0, touched_pages)
    grown = referenced_bytes() - before
    # A neighbour page counted before may be reclaimed or freed in between: most is enough.
    if grown < touched_pages * PAGE_BYTES // 2:
        raise Failed(f"{touched_pages} pages were touched, smaps counts {grown // PAGE_BYTES} more as referenced")


def kpageflags(scene: Scene) -> None:
    """The flags of our pages' frames must say something."""
    scene.need_file(KPAGEFLAGS, options=("CONFIG_PROC_PAGE_MONITOR",))
    pagemap_pfns(scene)
    words = _words(scene)
    try:
        with KpageFlags(scene.host) as flags:
            found = flags.read(distinct(pm.pfns(words[pm.present(words)])))
    except KernelCallError as error:
        raise scene.refused(error, Capability.CAP_SYS_ADMIN) from None
    if not found.any():
        raise Failed("/proc/kpageflags is all zero for pages of this process")


def pidfd(scene: Scene) -> None:
    """A pidfd of this process must be there to signal."""
    try:
        fd = syscalls.pidfd_open(os.getpid())
    except KernelCallError as error:
        raise scene.refused(error, fix="Linux 5.3 or later") from None
    try:
        syscalls.pidfd_send_signal(fd, _PIDFD_SELF_SIGNAL)
    finally:
        os.close(fd)


def process_madvise(scene: Scene) -> str | None:
    """MADV_PAGEOUT on our own pages must be taken, and (no spans, so no effect) on another process."""
    pidfd(scene)
    trial = TrialPages(1)
    nothing = np.zeros(0, np.uint64)
    try:
        fd = syscalls.pidfd_open(os.getpid())
        try:
            starts = np.array([trial.start], np.uint64)
            syscalls.process_madvise(fd, starts, np.array([PAGE_BYTES], np.uint64), c.MADV_PAGEOUT)
        finally:
            os.close(fd)
    except KernelCallError as error:
        options = scene.config.missing("CONFIG_ADVISE_SYSCALLS")
        if error.errno == errno.ENOSYS:
            raise Failed(f"process_madvise: {options}", "Linux 5.10 or later") from None
        raise scene.refused(error, Capability.CAP_SYS_NICE) from None
    finally:
        trial.close()
    for other in dict.fromkeys((os.getppid(), 1)):
        if other in (0, os.getpid()):
            continue
        try:
            fd = syscalls.pidfd_open(other)
        except KernelCallError:
            continue
        try:
            syscalls.process_madvise(fd, nothing, nothing, c.MADV_PAGEOUT)
        except AccessDenied as error:
            needed = (Capability.CAP_SYS_NICE, Capability.CAP_SYS_PTRACE)
            raise scene.refused(error, *needed) from None
        except KernelCallError:
            continue
        finally:
            os.close(fd)
        return None
    for needed_capability in (Capability.CAP_SYS_NICE, Capability.CAP_SYS_PTRACE):
        if scene.lacks(needed_capability):
            why = f"only on its own memory: this process lacks {needed_capability.name}"
            raise Failed(why, "run as root")
    return "tried on this process only"


def move_pages(scene: Scene) -> None:
    """Asked for, the node of our touched page must be known."""
    fix = "a kernel with CONFIG_NUMA=y and CONFIG_MIGRATION=y"
    try:
        status = syscalls.move_pages(0, np.array([scene.trial.start], np.uint64), None)
    except KernelCallError as error:
        if error.errno == errno.ENOSYS:
            raise Failed(f"move_pages: {scene.config.missing('CONFIG_NUMA', 'CONFIG_MIGRATION')}", fix) from None
        raise scene.refused(error, Capability.CAP_SYS_NICE) from None
    if status[0] < 0:
        raise Failed(f"move_pages does not find a page of this process: {os.strerror(-int(status[0]))}")


def userfaultfd_wp_async(scene: Scene) -> None:
    """A page write-protected with WP_ASYNC must read as not written, and as written once it is."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | c.UFFD_USER_MODE_ONLY
    try:
        fd = syscalls.userfaultfd(flags)
    except KernelCallError as error:
        if error.errno == errno.ENOSYS:
            why = f"userfaultfd: {scene.config.missing('CONFIG_USERFAULTFD')}"
            raise Failed(why, "a kernel with CONFIG_USERFAULTFD=y") from None
        raise scene.refused(error, Capability.CAP_SYS_PTRACE, fix="sysctl vm.unprivileged_userfaultfd=1") from None
    trial = TrialPages(2)
    length = trial.end - trial.start
    try:
        syscalls.uffdio_api(fd, c.UFFD_FEATURE_WP_ASYNC | c.UFFD_FEATURE_WP_UNPOPULATED)
        syscalls.uffdio_register(fd, trial.start, length, c.UFFDIO_REGISTER_MODE_WP)
        syscalls.uffdio_writeprotect(fd, trial.start, length, c.UFFDIO_WRITEPROTECT_MODE_WP)
        before = _written(scene, trial)
        trial.touch(0, 1)
        after = _written(scene, trial)
    except (KernelCallError, Unavailable) as error:
        why = f"{error.message}: {scene.config.missing('CONFIG_PTE_MARKER_UFFD_WP')}"
        raise Failed(why, "Linux 6.7 or later with userfaultfd write protection (x86_64, aarch64)") from None
    finally:
        os.close(fd)
        trial.close()
    if before != [] or after != [(trial.start, trial.start + PAGE_BYTES)]:
        raise Failed("userfaultfd does not tell written pages from others")


def _written(scene: Scene, trial: TrialPages) -> list[tuple[int, int]]:
    try:
        with pm.Pagemap(scene.host, scene.pid) as pages:
            runs = pages.scan_runs(trial.start, trial.end, mask=c.PAGE_IS_WRITTEN)
    except MemtierError as error:
        raise Failed(error.message, error.hint) from None
    return [(int(start), int(end)) for start, end in runs[:, :2]]
