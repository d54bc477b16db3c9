"""Packages of the Debian release that the guest is made of, downloaded and not installed."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from vm.harness import host
from vm.harness.errors import VmError

SUITE = "trixie"
MIRROR = "http://deb.debian.org/debian"
SECURITY_MIRROR = "http://deb.debian.org/debian-security"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Archive:
    """Debian's archive as apt sees it with a configuration of its own.

    So it works on every release of Debian and Ubuntu and touches nothing of the host's package state; signatures are
    checked against the Debian archive keyring.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        """`folder` holds apt's state; it must be empty. Downloads the package lists.

        Raises: VmError.
        """
        if not KEYRING.exists():
            host.apt_install(["debian-archive-keyring"])
        self._log = log
        for name in ("lists/partial", "archives/partial", "parts"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        signed = f"[signed-by={KEYRING}]"
        (folder / "sources.list").write_text(
            f"deb {signed} {MIRROR} {SUITE} main\n"
            f"deb {signed} {MIRROR} {SUITE}-updates main\n"
            f"deb {signed} {SECURITY_MIRROR} {SUITE}-security main\n"
        )
        options = {
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": folder / "parts",
            "Dir::State": folder,
            "Dir::State::Lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "APT::Sandbox::User": "root",  # the cache folder may be closed to the user _apt
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "Acquire::Languages": "none",
        }
        self._options = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        host.run(["apt-get", *self._options, "update"], log=log, cwd=folder)

    def unpack(self, package: str, into: Path) -> str:
        """Download `package` and unpack its files below `into`. Returns what it depends on, as the package says.

        Raises: VmError.
        """
        with tempfile.TemporaryDirectory(prefix="deb.", dir=into.parent) as scratch:
            host.run(["apt-get", *self._options, "download", package], log=self._log, cwd=Path(scratch))
            found = list(Path(scratch).glob("*.deb"))
            if len(found) != 1:
                raise VmError(f"apt-get downloaded {len(found)} packages instead of {package}")
            host.run(["dpkg-deb", "-x", found[0], into], log=self._log)
            return subprocess.check_output(["dpkg-deb", "-f", str(found[0]), "Depends"], text=True).strip()
