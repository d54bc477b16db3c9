#!/usr/bin/env python3
"""Build the container image of nri-memtierd from Debian packages, without an image registry and without docker.

Makes an OCI image archive with two layers: Debian packages (made by mmdebstrap, kept in a cache) and this
repository's Python packages. `ctr -n k8s.io images import FILE` and `docker load -i FILE` read it.
"""

from __future__ import annotations

import argparse
import configparser
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
SUITE = "trixie"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
IMAGE = "localhost/memtier/nri-memtierd"
PACKAGES = ("nri-core", "memtier-engine", "cli")
FOLDERS = ("etc/nri/memtierd", "run/nri", "run/nri-memtierd", "run-dir", "host/tmp")
LEFT_OUT = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
)
KEPT = ("/usr/share/doc/*/copyright",)
ENTRYPOINT = ("/usr/bin/nri-memtierd", "--idx", "90")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_OCI = "application/vnd.oci.image"
RECIPE = "1"


class BuildError(Exception):
    """The image cannot be built; the text says what to do."""


def main() -> int:
    """Build, print the path of the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="devel", help="tag of the image, default devel")
    parser.add_argument("--name", default=IMAGE, help=f"name of the image, default {IMAGE}")
    parser.add_argument("--out", type=Path, default=REPO / "build/images", help="folder for the archive")
    parser.add_argument("--compress", choices=("gzip", "none"), default="gzip", help="of the layers, default gzip")
    given = parser.parse_args()
    try:
        print(build(given.name, given.version, given.out, compress=given.compress == "gzip"))
    except (BuildError, OSError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


def build(name: str, version: str, out: Path, *, compress: bool) -> Path:
    """Write the archive, named after its content. Raises: BuildError."""
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        raise BuildError(f"no image for {platform.machine()}: amd64 and arm64 only")
    debian = debian_layer(architecture)
    with tempfile.TemporaryDirectory(prefix="nri-memtierd-image.") as scratch:
        ours = python_layer(debian, Path(scratch))
        return write_archive(out, f"{name}:{version}", [debian, ours], architecture, compress=compress)


def debian_packages() -> list[str]:
    """The names in packages.txt."""
    lines = (REPO / "deploy/image/packages.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def debian_layer(architecture: str) -> Path:
    """Tar of the Debian packages and what they need; from the cache if the list did not change."""
    packages = debian_packages()
    key = hashlib.sha256("\0".join([RECIPE, SUITE, MIRROR, architecture, *packages, *LEFT_OUT]).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memtier/image"
    layer = cache / f"debian-{key[:16]}.tar"
    if layer.exists():
        return layer
    if shutil.which("mmdebstrap") is None:
        raise BuildError("mmdebstrap is not installed: apt-get install mmdebstrap debian-archive-keyring")
    cache.mkdir(parents=True, exist_ok=True)
    print(f"making the Debian layer from {MIRROR} {SUITE}: one to three minutes", file=sys.stderr)
    partial = cache / f"partial-{os.getpid()}.tar"
    command: list[str | Path] = ["mmdebstrap", "--variant=minbase", f"--architectures={architecture}"]
    command += [f"--include={','.join(packages)}", '--aptopt=APT::Install-Recommends "false"']
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in KEPT]
    # Only what runs: no package manager state beyond the list of what is inside.
    command += ['--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/* "$1"/var/log/* "$1"/tmp/*']
    command += ['--customize-hook=find "$1"/usr/lib/python3/dist-packages -name tests -type d -prune -exec rm -rf {} +']
    command += ["--keyring=/usr/share/keyrings", SUITE, partial, MIRROR]
    try:
        done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode != 0:
            raise BuildError(f"mmdebstrap failed:\n{done.stderr.decode(errors='replace')[-3000:]}")
        partial.rename(layer)
    finally:
        partial.unlink(missing_ok=True)
    return layer


def python_layer(debian: Path, scratch: Path) -> Path:
    """Tar of this repository's packages, byte-compiled by the image's own Python."""
    root = scratch / "root"
    site = root / "usr/lib/python3/dist-packages"
    scripts = root / "usr/bin"
    for folder in (site, scripts, *(root / name for name in FOLDERS)):
        folder.mkdir(parents=True)
    for package in PACKAGES:
        install(build_wheel(REPO / "packages" / package, scratch), site, scripts)
    licenses = root / "usr/share/doc/memtier"
    licenses.mkdir(parents=True)
    shutil.copyfile(REPO / "LICENSE", licenses / "copyright")
    compile_with(debian, scratch / "debian", site)
    layer = scratch / "python.tar"
    with tarfile.open(layer, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(root.rglob("*")):
            tar.add(path, arcname=str(path.relative_to(root)), recursive=False, filter=anonymous)
    return layer


def build_wheel(package: Path, into: Path) -> Path:
    """Build one wheel with uv or pip; whatever build backends write, they write into a copy."""
    copy = into / "sources" / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "dist", "build"))
    wheels = into / "wheels" / package.name
    uv = REPO / ".venv/bin/uv"
    command: list[str | Path]
    if uv.exists() or shutil.which("uv"):
        command = [uv if uv.exists() else "uv", "build", "--wheel", "--quiet", "--out-dir", wheels, copy]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, copy]
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise BuildError(f"wheel of {package.name}:\n{done.stderr.decode(errors='replace')[-2000:]}")
    return next(wheels.glob("*.whl"))


def install(wheel: Path, site: Path, scripts: Path) -> None:
    """Unpack a pure wheel, and write its console scripts."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if any(".data/" in name for name in names):
            raise BuildError(f"{wheel.name} is not a pure wheel")
        archive.extractall(site)
        entry_points = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        for name in entry_points:
            parser = configparser.ConfigParser(delimiters=("=",))
            parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
            parser.read_string(archive.read(name).decode())
            for script, target in parser.items("console_scripts") if parser.has_section("console_scripts") else ():
                module, _, function = target.partition(":")
                text = f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
                (scripts / script).write_text(text)
                (scripts / script).chmod(0o755)


def compile_with(debian: Path, into: Path, site: Path) -> None:
    """Write byte code for the image's Python: the file system is read-only later. No chroot, so no root needed."""
    into.mkdir()
    with tarfile.open(debian) as tar:
        wanted = [member for member in tar if _is_runtime(member.name)]
        # The filter came with Python 3.11.4 and security updates of older ones; the archive is our own.
        safer: dict[str, Any] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
        tar.extractall(into, members=wanted, **safer)
    loader = next(into.glob("usr/lib*/ld-linux-*.so.*"), None) or next(into.glob("usr/lib/*/ld-linux-*.so.*"))
    python = next(path for path in sorted(into.glob("usr/bin/python3.*")) if path.name[8:].isdecimal())
    libraries = next(into.glob("usr/lib/*-linux-gnu"))
    command = [loader, "--library-path", libraries, python, "-s", "-S", "-m", "compileall", "-q"]
    command += ["--invalidation-mode=unchecked-hash", "-s", site, "-p", "/usr/lib/python3/dist-packages", site]
    done = subprocess.run(
        [str(word) for word in command],
        env={"PYTHONHOME": str(into / "usr"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    if done.returncode != 0:
        raise BuildError(f"compiling failed:\n{(done.stdout + done.stderr).decode(errors='replace')[-2000:]}")


def _is_runtime(name: str) -> bool:
    path = name.removeprefix("./")
    return path.startswith(("usr/bin/python3", "usr/lib/python3.", "usr/lib64/")) or (
        path.startswith("usr/lib/") and ".so" in path.rsplit("/", 1)[-1] and path.count("/") == 3
    )


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same for every builder: owner, time, and a umask's traces."""
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    member.mtime = 0
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def write_archive(out: Path, reference: str, layers: Sequence[Path], architecture: str, *, compress: bool) -> Path:
    """Write an OCI image layout as one tar; returns its path, which holds a part of the image's digest."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".blobs.") as folder:
        blobs = Path(folder)
        described = [add_layer(layer, blobs, compress=compress) for layer in layers]
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONDONTWRITEBYTECODE=1", "LANG=C.UTF-8"],
                "Entrypoint": list(ENTRYPOINT),
                "Labels": {"org.opencontainers.image.title": "nri-memtierd"},
            },
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in described]},
            "history": [{"created_by": "deploy/image/build.py"} for _ in described],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_OCI}.manifest.v1+json",
            "config": add_blob(json.dumps(config).encode(), f"{_OCI}.config.v1+json", blobs),
            "layers": [descriptor for descriptor, _ in described],
        }
        described_manifest = add_blob(json.dumps(manifest).encode(), f"{_OCI}.manifest.v1+json", blobs)
        described_manifest["annotations"] = {
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
        }
        described_manifest["platform"] = {"architecture": architecture, "os": "linux"}
        index = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": [described_manifest]}
        digest = str(described_manifest["digest"]).removeprefix("sha256:")
        path = out / f"nri-memtierd-image-{digest[:12]}.tar"
        with tarfile.open(blobs / "archive", "w") as tar:
            for name, data in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
                content = json.dumps(data).encode()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            for blob in sorted(blobs.glob("[0-9a-f]*[0-9a-f]")):
                if len(blob.name) == 64:
                    tar.add(blob, arcname=f"blobs/sha256/{blob.name}", filter=anonymous)
        for old in out.glob("nri-memtierd-image-*.tar"):
            old.unlink()
        (blobs / "archive").rename(path)
    return path


def add_layer(layer: Path, blobs: Path, *, compress: bool) -> tuple[dict[str, object], str]:
    """Put a layer among the blobs; returns its descriptor and the digest of what is in it."""
    plain = hashlib.sha256()
    partial = blobs / "partial"
    with layer.open("rb") as source, partial.open("wb") as raw:
        target = gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0, filename="") if compress else raw
        for piece in pieces(source):
            plain.update(piece)
            target.write(piece)
        if compress:
            target.close()
    digest = hashlib.sha256()
    with partial.open("rb") as packed:
        for piece in pieces(packed):
            digest.update(piece)
    size = partial.stat().st_size
    partial.rename(blobs / digest.hexdigest())
    media_type = f"{_OCI}.layer.v1.tar" + ("+gzip" if compress else "")
    descriptor: dict[str, object] = {
        "mediaType": media_type,
        "digest": f"sha256:{digest.hexdigest()}",
        "size": size,
    }
    return descriptor, f"sha256:{plain.hexdigest()}"


def pieces(file: io.BufferedReader) -> Iterator[bytes]:
    """A file in pieces of a megabyte."""
    while piece := file.read(1 << 20):
        yield piece


def add_blob(data: bytes, media_type: str, blobs: Path) -> dict[str, object]:
    """Put a small blob among the others; returns its descriptor."""
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


if __name__ == "__main__":
    sys.exit(main())
