"""KVM or TCG: KVM where a guest really boots with it, found out once per host and remembered.

That /dev/kvm exists says little: on some cloud machines it serves paravirtual guests only, and a stock kernel
hangs in it before its first message.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vm.harness import host
from vm.harness.cache import Cache, digest
from vm.harness.errors import VmError
from vm.harness.qemu import ACCELERATORS

PROBE_TIMEOUT_S = 15.0
"""A guest under KVM needs about one second for the probe."""


def choose(cache: Cache, qemu: str, kernel: Path, initramfs: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Returns "kvm" or "tcg". $MEMTIER_VM_ACCEL decides where it is set to one of them."""
    wanted = environ.get("MEMTIER_VM_ACCEL", "auto")
    if wanted in ACCELERATORS:
        return wanted
    if wanted != "auto":
        raise VmError(f"MEMTIER_VM_ACCEL is {wanted!r}", hint="use auto, kvm or tcg")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    facts = (platform.release(), _cpu_model(), str(Path(qemu).stat().st_mtime_ns), kernel.parent.name)
    known = cache.root / f"kvm-{digest(*facts)}.json"
    try:
        works = bool(json.loads(known.read_text())["works"])
    except (OSError, ValueError, KeyError):
        works = probe_kvm(qemu, kernel, initramfs)
        host.say(f"KVM {'works' if works else 'does not work'} here; remembered in {known}")
        known.write_text(json.dumps({"works": works}) + "\n")
    return "kvm" if works else "tcg"


def probe_kvm(qemu: str, kernel: Path, initramfs: Path, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Boot the guest kernel to its first process under KVM. False if that fails or takes too long."""
    with tempfile.TemporaryDirectory(prefix="memtier-vm-probe.") as folder:
        console = Path(folder) / "console.log"
        command = [qemu, *ACCELERATORS["kvm"], "-M", "pc", "-m", "256M", "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-no-reboot", "-serial", f"file:{console}"]
        command += ["-kernel", str(kernel), "-initrd", str(initramfs)]
        command += ["-append", "console=ttyS0 quiet panic=-1 memtier.probe"]
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return False
        return console.exists() and "memtier-vm: probe ok" in console.read_text(errors="replace")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line
    return platform.processor()
