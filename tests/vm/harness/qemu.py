"""The machine as QEMU arguments: NUMA topology, disks, shared folders, ports. No process is started here."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vm.harness.errors import VmError

CPU_DISTANCE = 20
SLOW_DISTANCE = 40
"""ACPI SLIT distances: nodes with CPUs from each other, nodes without (slow memory) from all others."""

KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable psi=1"
DISTRIBUTION_ARGUMENTS = "console=ttyS0 quiet panic=-1 psi=1"

ACCELERATORS = {
    # cx16 off: SLUB uses 16-byte compare-and-exchange where the CPU has it, for which TCG may have to stop all vCPUs.
    # avx2 off: TCG's masked loads touch what the mask leaves out, so numpy's sort faults at the end of a mapping.
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-cx16,-avx2"),
    "kvm": ("-accel", "kvm", "-cpu", "host"),
}

_NODE = re.compile(r"(\d+):(\d+(?:-\d+)?)?")


class Writes(enum.Enum):
    """What becomes of a guest's writes to a disk: the value is QEMU's option for it."""

    KEPT = ""
    DROPPED = ",snapshot=on"
    REFUSED = ",readonly=on"


@dataclass(frozen=True, slots=True)
class Node:
    """One NUMA node: its memory, and its CPUs as "0" or "0-1"; None for a node without CPUs."""

    mib: int
    cpus: str | None = None

    def cpu_numbers(self) -> range:
        """The CPUs of the node."""
        if self.cpus is None:
            return range(0)
        first, _, last = self.cpus.partition("-")
        return range(int(first), int(last or first) + 1)


def default_nodes(smp: int) -> str:
    """Four nodes: two with CPUs (one, when there is one CPU) and the others without."""
    return "1024:0 512: 512: 512:" if smp == 1 else f"1024:0 512:1{f'-{smp - 1}' if smp > 2 else ''} 512: 512:"


def parse_nodes(spec: str, smp: int) -> tuple[Node, ...]:
    """Nodes from "MIB:CPUS ...", such as "1024:0 512:1 512:"; each of the `smp` CPUs belongs to one node.

    Raises: VmError naming the word that is wrong.
    """
    nodes = []
    for word in spec.split():
        found = _NODE.fullmatch(word)
        if found is None or int(found[1]) == 0:
            raise VmError(f"NUMA node {word!r} is not MIB:CPUS", hint="such as 1024:0, 512:1-2, or 512: without CPUs")
        nodes.append(Node(int(found[1]), found[2]))
    placed = sorted(cpu for node in nodes for cpu in node.cpu_numbers())
    if placed != list(range(smp)):
        raise VmError(f"NUMA nodes {spec!r} place the CPUs {placed}, the machine has {list(range(smp))}")
    return tuple(nodes)


def numa_arguments(nodes: Sequence[Node]) -> list[str]:
    """Memory backends, nodes and distances."""
    words = []
    for number, node in enumerate(nodes):
        words += ["-object", f"memory-backend-ram,id=m{number},size={node.mib}M"]
        cpus = f",cpus={node.cpus}" if node.cpus is not None else ""
        words += ["-numa", f"node,nodeid={number},memdev=m{number}{cpus}"]
    for a in range(len(nodes)):
        for b in range(a + 1, len(nodes)):
            slow = nodes[a].cpus is None or nodes[b].cpus is None
            words += ["-numa", f"dist,src={a},dst={b},val={SLOW_DISTANCE if slow else CPU_DISTANCE}"]
    return words


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All that decides QEMU's command line. File descriptors are numbers that QEMU inherits."""

    qemu: str
    accelerator: str
    kernel: Path
    initramfs: Path
    console_log: Path
    smp: int
    nodes: tuple[Node, ...]
    control_fd: int
    output_fd: int
    shares: dict[str, tuple[Path, bool]] = field(default_factory=dict)
    """By the name under which the guest mounts it: folder, and whether the guest may write to it."""
    disks: dict[str, tuple[Path, Writes]] = field(default_factory=dict)
    """By serial number: image, and what becomes of writes."""
    arguments: str = KERNEL_ARGUMENTS
    append: str = ""
    terminal: bool = False
    """Put the guest's hvc0 on QEMU's own standard input and output."""

    def command(self) -> list[str]:
        """The command line."""
        words = [self.qemu, *ACCELERATORS[self.accelerator], "-M", "pc", "-smp", str(self.smp)]
        words += ["-m", f"{sum(node.mib for node in self.nodes)}M", *numa_arguments(self.nodes)]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += [
            "-serial",
            f"file:{self.console_log}",
            "-kernel",
            str(self.kernel),
            "-initrd",
            str(self.initramfs),
        ]
        shares_out = " memtier.out" if "out" in self.shares else ""
        words += ["-append", f"{self.arguments}{shares_out} {self.append}".strip()]
        words += ["-device", "virtio-serial"]
        for name, fd in (("ctl", self.control_fd), ("out", self.output_fd)):
            words += ["-chardev", f"socket,id={name},fd={fd}"]
            words += ["-device", f"virtserialport,chardev={name},name={name}"]
        if self.terminal:
            words += ["-chardev", "stdio,id=term,signal=off", "-device", "virtconsole,chardev=term"]
        for name, (folder, writable) in self.shares.items():
            access = "" if writable else ",readonly=on"
            shared = f"local,id=fs-{name},path={_escape(folder)},security_model=none,multidevs=remap{access}"
            words += ["-fsdev", shared, "-device", f"virtio-9p-pci,fsdev=fs-{name},mount_tag={name}"]
        for serial, (image, writes) in self.disks.items():
            words += ["-drive", f"file={_escape(image)},format=raw,if=none,id={serial},cache=unsafe{writes.value}"]
            words += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
        return words


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")
