"""The guest kernel: our option fragment + Debian's linux-source -> one bzImage without modules."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vm.harness import host
from vm.harness.cache import Cache, digest
from vm.harness.debian import Archive
from vm.harness.errors import VmError

SERIES = "6.12"
"""Debian 13's kernel, supported upstream until 2026-12; the package is linux-source-6.12."""

RECIPE = "1"
"""Counts changes of how the kernel is built, beyond its options."""

BUILD_PROGRAMS = {
    "gcc": "gcc",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl",
    "pahole": "dwarves",  # BTF
    "cpio": "cpio",  # IKHEADERS
    "xz": "xz-utils",
    "lz4": "lz4",
    "depmod": "kmod",
    "rsync": "rsync",
}
BUILD_HEADERS = {"/usr/include/gelf.h": "libelf-dev", "/usr/include/openssl/evp.h": "libssl-dev"}

_SET = re.compile(r"CONFIG_([A-Za-z0-9_]+)=(.+)")
_UNSET = re.compile(r"# CONFIG_([A-Za-z0-9_]+) is not set")


def parse_fragment(text: str) -> dict[str, str]:
    """Options of a kernel configuration by name without CONFIG_; "=n" and "is not set" are both "n".

    Raises: VmError for a line that is neither option, comment nor empty, and for two values of one option.
    """
    options: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if found := _SET.fullmatch(line):
            name, value = found[1], found[2]
        elif found := _UNSET.fullmatch(line):
            name, value = found[1], "n"
        elif not line or (line.startswith("#") and "CONFIG_" not in line):
            continue
        else:
            raise VmError(f"kernel configuration, line {number}: {raw!r} is not an option")
        if options.setdefault(name, value) != value:
            raise VmError(f"kernel configuration, line {number}: {name} is {options[name]} above and {value} here")
    return options


def options_key(options: Mapping[str, str]) -> str:
    """Cache key of a kernel: the set of options, in whatever order and grouping they were written."""
    return digest(SERIES, RECIPE, *(f"{name}={value}" for name, value in sorted(options.items())))


def seed_kernel(seed: Path | None, options: Mapping[str, str]) -> Path | None:
    """A ready kernel in the folder `seed`, if its kernel.config asks for exactly our options and series."""
    if seed is None:
        return None
    try:
        theirs = parse_fragment((seed / "kernel.config").read_text())
    except (OSError, VmError):
        return None
    images = sorted(seed.glob(f"vmlinuz-{SERIES}.*"))
    if not images or theirs != dict(options):
        return None
    return images[-1]


def ensure_kernel(cache: Cache, fragment: Path, seed: Path | None) -> Path:
    """Path of the guest kernel image; builds it (about 15 minutes on two cores) if no cache has it."""
    options = parse_fragment(fragment.read_text())

    def build(into: Path) -> None:
        if ready := seed_kernel(seed, options):
            shutil.copyfile(ready, into / "vmlinuz")
            (into / "origin").write_text(f"{ready.name}\n")
        else:
            build_kernel(into, fragment, options)

    return cache.entry("kernel", options_key(options), build) / "vmlinuz"


def fetch_source(into: Path, log: Path) -> Path:
    """Download Debian's linux-source package and unpack it. Returns the root of the source tree."""
    (into / "deb").mkdir()
    Archive(into / "apt", log).unpack(f"linux-source-{SERIES}", into / "deb")
    host.run(["tar", "-xf", into / f"deb/usr/src/linux-source-{SERIES}.tar.xz", "-C", into], log=log)
    return into / f"linux-source-{SERIES}"


def build_kernel(into: Path, fragment: Path, options: Mapping[str, str]) -> None:
    """Configure and compile; leaves `vmlinuz`, the full `config` and `build.log` in `into`."""
    host.require(BUILD_PROGRAMS)
    if missing := [package for header, package in BUILD_HEADERS.items() if not Path(header).exists()]:
        host.apt_install(missing)
    jobs = os.environ.get("MEMTIER_VM_JOBS") or str(os.cpu_count() or 1)
    log = into / "build.log"
    with tempfile.TemporaryDirectory(prefix="kernel.", dir=into) as scratch:
        host.say(f"fetching linux-source-{SERIES}")
        source = fetch_source(Path(scratch), log)
        host.say(f"compiling the guest kernel with {jobs} jobs: about 15 minutes on two cores; log: {log}")
        env = {
            "KCONFIG_ALLCONFIG": str(fragment.absolute()),
            "KBUILD_BUILD_USER": "memtier",
            "KBUILD_BUILD_HOST": "vm",
        }
        host.run(["make", "-s", "allnoconfig"], log=log, cwd=source, env=env)
        check_options(options, parse_dotconfig((source / ".config").read_text()))
        host.run(["make", "-s", f"-j{jobs}", "bzImage"], log=log, cwd=source, env=env)
        shutil.copyfile(source / "arch/x86/boot/bzImage", into / "vmlinuz")
        shutil.copyfile(source / ".config", into / "config")
        (into / "origin").write_text(f"built from linux-source-{SERIES}\n")


def parse_dotconfig(text: str) -> dict[str, str]:
    """Options of a complete .config, which has headings that mention CONFIG_ in free text."""
    lines = (line for line in text.splitlines() if _SET.fullmatch(line) or _UNSET.fullmatch(line))
    return parse_fragment("\n".join(lines))


def check_options(wanted: Mapping[str, str], got: Mapping[str, str]) -> None:
    """Raises: VmError naming each option that kconfig silently dropped or changed.

    An option that is wanted off and on all the same passes: another option or the architecture forces it on
    (as MICROCODE on x86 since 6.6), which costs a little build time and takes no interface away.
    """
    lost = [
        f"{name}: wanted {value}, got {got.get(name, 'n')}"
        for name, value in wanted.items()
        if value != "n" and got.get(name, "n") != value
    ]
    if lost:
        raise VmError("the kernel source does not accept these options: " + "; ".join(lost))
