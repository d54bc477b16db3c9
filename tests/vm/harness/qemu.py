"""The machine as QEMU arguments: NUMA topology, disks, shared folders, ports. No process is started here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vm.harness.errors import VmError

CPU_DISTANCE = 20
SLOW_DISTANCE = 40
"""ACPI SLIT distances: nodes with CPUs from each other, nodes without (slow memory) from all others."""

KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable psi=1"

ACCELERATORS = {
    # cx16 off: TCG stops all vCPUs for a 16-byte compare-and-exchange, and SLUB uses it where the CPU has it.
    "tcg": ("-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-cx16"),
    "kvm": ("-accel", "kvm", "-cpu", "host"),
}

_NODE = re.compile(r"(\d+):(\d+(?:-\d+)?)?")


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
    """Memory backends, nodes and distances. Memory is a shared memfd: virtiofsd maps it (vhost-user)."""
    words = []
    for number, node in enumerate(nodes):
        words += ["-object", f"memory-backend-memfd,id=m{number},size={node.mib}M,share=on"]
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
    share_fds: dict[str, int] = field(default_factory=dict)
    """vhost-user connections by the name under which the guest mounts them."""
    disks: dict[str, tuple[Path, bool]] = field(default_factory=dict)
    """By serial number: image, and whether writes are thrown away."""
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
        shares_out = " memtier.out" if "out" in self.share_fds else ""
        words += ["-append", f"{KERNEL_ARGUMENTS}{shares_out} {self.append}".strip()]
        words += ["-device", "virtio-serial"]
        for name, fd in (("ctl", self.control_fd), ("out", self.output_fd)):
            words += ["-chardev", f"socket,id={name},fd={fd}"]
            words += ["-device", f"virtserialport,chardev={name},name={name}"]
        if self.terminal:
            words += ["-chardev", "stdio,id=term,signal=off", "-device", "virtconsole,chardev=term"]
        for name, fd in self.share_fds.items():
            words += ["-chardev", f"socket,id=fs-{name},fd={fd}"]
            words += ["-device", f"vhost-user-fs-pci,chardev=fs-{name},tag={name}"]
        for serial, (image, throw_away) in self.disks.items():
            snapshot = ",snapshot=on" if throw_away else ""
            words += [
                "-drive",
                f"file={_escape(image)},format=raw,if=none,id={serial},cache=unsafe{snapshot}",
            ]
            words += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
        return words


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")


def virtiofsd_command(program: str, help_text: str, fd: int, folder: Path, cache: str) -> list[str]:
    """Command line of virtiofsd for a listening socket `fd`, for the C and for the Rust implementation.

    `cache` is "always", "auto" or "never"; `help_text` is what the program prints on --help.
    """
    if "--shared-dir" in help_text:  # Rust, virtiofsd 1.x
        return [
            program,
            f"--fd={fd}",
            f"--shared-dir={folder}",
            f"--cache={cache}",
            "--sandbox=chroot",
            "--log-level=warn",
        ]
    mode = {"never": "none"}.get(cache, cache)  # C, part of QEMU until 7.2
    options = (f"source={folder}", f"cache={mode}", "sandbox=chroot", "log_level=warn")
    return [program, f"--fd={fd}", *(word for option in options for word in ("-o", option)), "-f"]
