"""Checks of `probe` that ask the system: NUMA, cgroups, PSI, swap, DAMON, BPF."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path

from memtier_engine.abi import syscalls
from memtier_engine.abi.constants import Capability
from memtier_engine.errors import KernelCallError, Unavailable
from memtier_engine.hostfs import numa as nodes
from memtier_engine.hostfs import proc, swapkind
from memtier_engine.hostfs.cgroup import Cgroup
from memtier_engine.hostfs.probe_base import Failed, Scene
from memtier_engine.hostfs.psi import parse_pressure

_MIB = 1 << 20
_KDAMONDS = "sys/kernel/mm/damon/admin/kdamonds"

# Source: include/uapi/linux/bpf.h.
_BPF_PROG_LOAD = 5
_BPF_PROG_TYPE_RAW_TRACEPOINT = 17
_RETURN_0 = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)  # r0 = 0; exit


def numa(scene: Scene) -> str:
    """More than one node with memory."""
    found = nodes.memory_nodes(scene.host)
    if len(found) < 2:
        raise Failed("only one NUMA node has memory: there is nowhere to move pages to")
    return f"nodes {', '.join(map(str, found))}"


def cgroup2(scene: Scene) -> str:
    """A mounted v2 hierarchy whose processes can be listed."""
    try:
        root = scene.host.cgroup2_root
    except Unavailable as error:
        raise Failed(f"{error.message}: {scene.config.missing('CONFIG_CGROUPS')}", error.hint) from None
    Cgroup(root, scene.host).pids(recursive=False)
    return scene.host.kernel_file(root)


def memory_controller(scene: Scene) -> None:
    """The v2 root must offer the memory controller."""
    cgroup2(scene)
    root = Cgroup(scene.host.cgroup2_root, scene.host)
    if "memory" in root.controllers():
        return
    for mount in scene.host.mounts("cgroup"):
        if Path(mount).name == "memory" or "memory" in Path(mount).name.split(","):
            why = f"the memory controller is on cgroup v1 ({mount})"
            raise Failed(why, "boot with systemd.unified_cgroup_hierarchy=1 or cgroup_no_v1=memory")
    if scene.config.has("CONFIG_MEMCG"):
        why = f"{scene.host.kernel_file(root.path)} does not offer the memory controller"
        raise Failed(why, "boot with cgroup_enable=memory, or delegate the controller to this container")
    raise Failed(f"no memory controller: {scene.config.missing('CONFIG_MEMCG')}", "a kernel with CONFIG_MEMCG=y")


def memory_reclaim(scene: Scene) -> None:
    """Asking to reclaim 0 bytes must be taken."""
    memory_controller(scene)
    root = scene.host.cgroup2_root
    candidates = [root / "memory.reclaim", *sorted(root.glob("*/memory.reclaim"))[:1]]
    path = next((candidate for candidate in candidates if candidate.exists()), None)
    if path is None:
        raise Failed("no cgroup has a memory.reclaim file", "Linux 5.19 or later")
    try:
        scene.host.write(path, "0")
    except KernelCallError as error:
        raise scene.refused(error, fix="run as root, with cgroup v2 mounted read-write") from None


def psi(scene: Scene) -> None:
    """/proc/pressure/memory must hold numbers."""
    path = scene.host.path("proc/pressure/memory")
    fix = "boot with psi=1, on a kernel with CONFIG_PSI=y"
    if not path.exists():
        if scene.config.has("CONFIG_PSI"):
            raise Failed("/proc/pressure does not exist: PSI is built in but switched off", "boot with psi=1")
        raise Failed(f"/proc/pressure does not exist: {scene.config.missing('CONFIG_PSI')}", fix)
    try:
        parse_pressure(scene.host.read_text(path))
    except KernelCallError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise Failed("PSI is built in but switched off", "boot with psi=1") from None
        raise


def swap(scene: Scene) -> str:
    """A swap area with room."""
    areas = proc.read_swaps(scene.host)
    if not areas:
        if scene.config.has("CONFIG_SWAP") is False:
            raise Failed(f"no swap: {scene.config.missing('CONFIG_SWAP')}", "a kernel with CONFIG_SWAP=y")
        raise Failed("no swap area is active", "swapon a partition, a file or a zram device")
    size = sum(area.size_bytes for area in areas)
    free = sum(area.free_bytes for area in areas)
    what = f"{', '.join(area.path for area in areas)}: {free // _MIB} of {size // _MIB} MiB free"
    if free <= 0:
        raise Failed(f"swap is full ({what})", "add a swap area")
    return f"{what}; {swapkind.in_words(scene.host)}"


def zram(scene: Scene) -> str | None:
    """Compressed memory as a block device, present or loadable."""
    host = scene.host
    if host.path("sys/class/zram-control").exists():
        devices = sorted(path.name for path in host.path("sys/block").glob("zram*"))
        if scene.lacks(Capability.CAP_SYS_ADMIN):
            raise Failed("zram is there, but this process lacks CAP_SYS_ADMIN to set one up", "run as root")
        return ", ".join(devices) or "none set up"
    if scene.config.is_module("CONFIG_ZRAM"):
        raise Failed("the zram module is not loaded", "modprobe zram")
    if scene.config.known:
        raise Failed(f"no zram: {scene.config.missing('CONFIG_ZRAM')}", "a kernel with CONFIG_ZRAM=y or m")
    raise Failed("zram is not loaded, or this kernel has none", "modprobe zram, or a kernel with CONFIG_ZRAM=m")


def damon(scene: Scene) -> str:
    """The sysfs interface, writable."""
    scene.need_file(_KDAMONDS, options=("CONFIG_DAMON", "CONFIG_DAMON_SYSFS"))
    count = scene.host.path(_KDAMONDS, "nr_kdamonds")
    running = scene.host.read_int(count)
    if not os.access(count, os.W_OK):
        raise Failed(f"{scene.host.kernel_file(count)} cannot be written", "run as root, with /sys read-write")
    operations = _damon_operations(scene)
    return f"{running} kdamond(s) set up; operations: {', '.join(operations) if operations else 'not known'}"


def damon_vaddr(scene: Scene) -> None:
    """DAMON on a process's virtual addresses."""
    damon(scene)
    operations = _damon_operations(scene)
    fix = "a kernel with CONFIG_DAMON_VADDR=y"
    if operations is None:
        raise Failed("which operations DAMON has is not known while no context is set up", fix)
    if "vaddr" not in operations:
        raise Failed(f"DAMON has no vaddr operations: {scene.config.missing('CONFIG_DAMON_VADDR')}", fix)


def _damon_operations(scene: Scene) -> tuple[str, ...] | None:
    """What DAMON can monitor: from somebody's context, the kernel's options, or a context of our own."""
    kdamonds = scene.host.path(_KDAMONDS)
    for path in sorted(kdamonds.glob("*/contexts/*/avail_operations")):
        try:
            return tuple(scene.host.read_text(path).split())
        except KernelCallError:
            continue
    if scene.config.known:
        vaddr = ("vaddr", "fvaddr") if scene.config.has("CONFIG_DAMON_VADDR") else ()
        return (*vaddr, *(("paddr",) if scene.config.has("CONFIG_DAMON_PADDR") else ()))
    if scene.host.read_int(kdamonds / "nr_kdamonds") != 0:
        return None  # in use by somebody who has not made a context yet: hands off
    try:
        scene.host.write(kdamonds / "nr_kdamonds", "1")
        try:
            scene.host.write(kdamonds / "0/contexts/nr_contexts", "1")
            return tuple(scene.host.read_text(kdamonds / "0/contexts/0/avail_operations").split())
        finally:
            scene.host.write(kdamonds / "nr_kdamonds", "0")
    except KernelCallError:
        return None


def mglru(scene: Scene) -> str:
    """The multi-generational LRU, switched on."""
    scene.need_file("sys/kernel/mm/lru_gen/enabled", options=("CONFIG_LRU_GEN",))
    enabled = scene.host.read_int(scene.host.path("sys/kernel/mm/lru_gen/enabled"))
    if not enabled & 1:
        raise Failed("MGLRU is built in but switched off", "echo y > /sys/kernel/mm/lru_gen/enabled")
    return f"enabled {enabled:#06x}"


def btf(scene: Scene) -> None:
    """The kernel's own type information, which BPF programs need to run on any kernel."""
    scene.need_file("sys/kernel/btf/vmlinux", options=("CONFIG_DEBUG_INFO_BTF",))
    path = scene.host.path("sys/kernel/btf/vmlinux")
    with path.open("rb") as file:
        if file.read(2) not in (b"\x9f\xeb", b"\xeb\x9f"):  # BTF_MAGIC, either byte order
            raise Failed(f"{scene.host.kernel_file(path)} is not BTF")


def bpf(scene: Scene) -> str | None:
    """A raw tracepoint program that does nothing must load (it is never attached)."""
    instructions = ctypes.create_string_buffer(_RETURN_0, len(_RETURN_0))
    license_text = ctypes.create_string_buffer(b"GPL")
    # prog_type, insn_cnt, insns, license, log_level, log_size, log_buf, kern_version, prog_flags.
    attributes = struct.pack(
        "<IIQQIIQII",
        _BPF_PROG_TYPE_RAW_TRACEPOINT,
        len(_RETURN_0) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(license_text),
        0,
        0,
        0,
        0,
        0,
    )
    try:
        os.close(syscalls.bpf(_BPF_PROG_LOAD, attributes))
    except KernelCallError as error:
        if error.errno == errno.ENOSYS:
            why = f"bpf: {scene.config.missing('CONFIG_BPF_SYSCALL')}"
            raise Failed(why, "a kernel with CONFIG_BPF_SYSCALL=y") from None
        raise scene.refused(error, Capability.CAP_BPF, Capability.CAP_PERFMON) from None
    lockdown = scene.host.path("sys/kernel/security/lockdown")
    if lockdown.exists() and "[confidentiality]" in scene.host.read_text(lockdown):
        raise Failed(
            "the kernel is locked down (confidentiality): programs cannot read kernel memory",
            "boot with lockdown=integrity",
        )
    return None
