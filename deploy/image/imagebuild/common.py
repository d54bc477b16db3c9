"""What several steps of the build need."""

from __future__ import annotations

import platform
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[3]
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""By the machine's own name; the values are names of Debian and of OCI."""


class BuildError(Exception):
    """The image cannot be built; the text says what to do."""


def own_architecture() -> str:
    """Of this machine. Raises: BuildError."""
    found = ARCHITECTURES.get(platform.machine())
    if found is None:
        raise BuildError(f"no image for {platform.machine()}: amd64 and arm64 only")
    return found


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    """What a command writes to stdout. Raises: BuildError."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, env=environment)
    except FileNotFoundError:
        hint = "build on Debian or Ubuntu, or with deploy/image/Dockerfile"
        raise BuildError(f"{words[0]} is not installed: {hint}") from None
    if done.returncode != 0:
        said = (done.stdout[-1000:] + done.stderr[-2000:]).decode(errors="replace").strip()
        raise BuildError(f"{' '.join(words[:2])} failed: {said}")
    return done.stdout.decode(errors="replace")


def extract(tar: tarfile.TarFile, root: Path, wanted: Sequence[tarfile.TarInfo] | None = None) -> None:
    """Unpack members of an archive of a verified package, or of our own."""
    # The filter came with Python 3.11.4 and security updates of older ones.
    safer: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
    tar.extractall(root, members=wanted, **safer)


def pack(root: Path, layer: Path) -> None:
    """Write all of a folder as a tar whose bytes depend on names, contents and modes alone."""
    with tarfile.open(layer, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(root.rglob("*")):
            tar.add(path, arcname=str(path.relative_to(root)), recursive=False, filter=anonymous)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same for every builder: owner, time, and a umask's traces; no setuid, no setgid."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = 0
    sticky = member.mode & 0o1002 == 0o1002
    member.mode = 0o1777 if member.isdir() and sticky else 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    if member.issym():
        member.mode = 0o777
    return member


def loader_of(root: Path) -> list[str | Path]:
    """Words that run a program of `root` by its own loader and libraries: no chroot, so no root is needed."""
    loader = next(root.glob("usr/lib*/ld-linux-*.so.*"), None) or next(root.glob("usr/lib/*/ld-linux-*.so.*"))
    return [loader, "--inhibit-cache", "--library-path", next(root.glob("usr/lib/*-linux-gnu"))]


def compile_with(debian: Path, folder: Path, shown: str) -> None:
    """Write byte code of `folder` for the Python in `debian`: the image's file system is read-only.

    Args:
        shown: path of the folder in the image.
    """
    python = next(path for path in sorted(debian.glob("usr/bin/python3.*")) if path.name[8:].isdecimal())
    command = [*loader_of(debian), python, "-B", "-s", "-S", "-m", "compileall", "-q", "-f"]
    command += ["--invalidation-mode=unchecked-hash", "-s", folder, "-p", shown, folder]
    # -B, -f: what compileall imports would otherwise be written before, with its path on this machine.
    run(command, {"PYTHONHOME": str(debian / "usr"), "PATH": "/usr/bin:/bin"})
