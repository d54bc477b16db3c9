"""The guest's root filesystem: a list of Debian packages -> a folder, and a disk image of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vm.harness import host
from vm.harness.cache import Cache, digest
from vm.harness.debian import KEYRING, MIRROR, SUITE
from vm.harness.errors import VmError

RECIPE = "1"

TOOLS = ("busybox-static", "iproute2", "kmod", "procps", "util-linux", "xz-utils")
"""xz-utils: bcc unpacks /sys/kernel/kheaders.tar.xz with it."""

RUNTIMES = ("containerd", "runc", "crun")

PYTHON = (
    "python3",
    "python3-bpfcc",
    "libbpf1",
    "python3-pytest",
    "python3-pytest-timeout",
    "python3-hypothesis",
)

DEPENDENCIES = {
    "click": "python3-click",
    "grpcio": "python3-grpcio",
    "loguru": "python3-loguru",
    "msgspec": "python3-msgspec",
    "numpy": "python3-numpy",
    "prometheus-client": "python3-prometheus-client",
    "protobuf": "python3-protobuf",
    "pyroute2": "python3-pyroute2",
    "pyyaml": "python3-yaml",
    "rich": "python3-rich",
}
"""What our packages depend on, by PyPI name. Debian has it all, so the wheels go in with --no-deps."""

PACKAGES = tuple(sorted({*TOOLS, *RUNTIMES, *PYTHON, *DEPENDENCIES.values()}))

LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


def rootfs_key() -> str:
    """Cache key: what is asked for. Package versions are those of the day it was built."""
    return digest(RECIPE, SUITE, *PACKAGES, *LEFT_OUT)


def ensure_rootfs(cache: Cache) -> Path:
    """Path of the unpacked root filesystem (about 600 MB), built in one to two minutes if need be."""
    return cache.entry("rootfs", rootfs_key(), _build) / "root"


def _build(into: Path) -> None:
    if os.geteuid() != 0:
        raise VmError("the root filesystem of the test VM is built by root", hint="run the same command with sudo")
    host.require({"mmdebstrap": "mmdebstrap"})
    if not KEYRING.exists():
        host.apt_install(["debian-archive-keyring"])
    host.say(f"making the root filesystem from Debian {SUITE}: one to two minutes")
    log = into / "build.log"
    root = into / "root"
    command: list[str | Path] = ["mmdebstrap", "--mode=root", "--variant=minbase", "--architectures=amd64"]
    command += [f"--include={','.join(PACKAGES)}", '--aptopt=APT::Install-Recommends "false"']
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    command += ["--keyring=/usr/share/keyrings", SUITE, root, MIRROR]
    host.run(command, log=log)
    for mounted in ("proc", "sys", "dev"):  # a leftover mount would be removed file by file with the folder
        if os.path.ismount(root / mounted):
            raise VmError(f"mmdebstrap left {root / mounted} mounted")


def guest_python(rootfs: Path) -> str:
    """Version of the guest's Python as in folder names, such as "3.13"."""
    found = sorted((rootfs / "usr/bin").glob("python3.[0-9]*"))
    versions = [path.name.removeprefix("python") for path in found if path.name[7:].replace(".", "").isdigit()]
    if not versions:
        raise VmError(f"no Python in {rootfs}", hint="rebuild it: tests/vm/build --fresh")
    return versions[-1]


def run_guest_python(rootfs: Path, *arguments: str | Path) -> None:
    """Run the guest's Python on this host through the guest's own loader: no chroot, no emulation.

    Used to compile our modules for the guest's Python version, which is slow under emulation.
    """
    loader = rootfs / "usr/lib64/ld-linux-x86-64.so.2"
    libraries = rootfs / "usr/lib/x86_64-linux-gnu"
    binary = rootfs / f"usr/bin/python{guest_python(rootfs)}"
    command = [loader, "--library-path", libraries, binary, "-s", "-S", *arguments]
    done = subprocess.run(
        [str(word) for word in command],
        env={"PYTHONHOME": str(rootfs / "usr"), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        raise VmError(f"the guest's Python failed on the host:\n{done.stdout.decode(errors='replace')[-2000:]}")
