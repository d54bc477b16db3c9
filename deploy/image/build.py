#!/usr/bin/env python3
"""Build the container image of nri-memtierd from Debian packages, without an image registry and without docker.

Makes an OCI image archive with two layers: Debian packages (kept in a cache) and this repository's Python packages.
`ctr -n k8s.io images import FILE` and `docker load -i FILE` read it. Beside it, FILE with the ending .cdx.json is the
list of what is inside (SBOM, CycloneDX). Needs apt, dpkg and debian-archive-keyring; no root.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from imagebuild import debian, oci, sbom, wheels
from imagebuild.common import ARCHITECTURES, REPO, BuildError, extract, own_architecture, pack

IMAGE = "localhost/memtier/nri-memtierd"
DESCRIPTION = "Pages out or moves the idle memory of a Kubernetes node's containers: an NRI plugin"
LABEL = "org.opencontainers.image."


def main() -> int:
    """Build, print the path of the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="devel", help="tag of the image, default devel")
    parser.add_argument("--name", default=IMAGE, help=f"name of the image, default {IMAGE}")
    parser.add_argument(
        "--variant",
        choices=sorted(debian.LISTS),
        default="slim",
        help="bcc: with bcc and its compiler, and the tag's suffix -bcc; default slim",
    )
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES.values()), help="default: this machine's")
    parser.add_argument("--out", type=Path, default=REPO / "build/images", help="folder for the archive")
    parser.add_argument("--compress", choices=("gzip", "none"), default="gzip", help="of the layers, default gzip")
    parser.add_argument("--source", metavar="URL", help="where the sources are, for a label of the image")
    parser.add_argument("--update", action="store_true", help="ask for newer Debian packages than the cached ones")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="fill a folder instead (Dockerfile does this)")
    given = parser.parse_args()
    try:
        architecture = given.architecture or own_architecture()
        if given.root:
            write_root(given.root, given.variant, architecture)
            print(given.root)
            return 0
        suffix = "" if given.variant == "slim" else f"-{given.variant}"
        labels = labels_for(given.version + suffix, given.source)
        with tempfile.TemporaryDirectory(prefix="nri-memtierd-image.") as scratch:
            layers = make_layers(given.variant, architecture, Path(scratch), update=given.update)
            image = oci.Image(f"{given.name}:{given.version}{suffix}", architecture, layers, labels)
            stem = f"nri-memtierd{suffix}-image"
            written = oci.write_archive(image, given.out, stem, compress=given.compress == "gzip")
            listed = json.dumps(sbom.describe(image, written), indent=1)
            written.archive.with_suffix(".cdx.json").write_text(f"{listed}\n")
        print(written.archive)
    except (BuildError, OSError) as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    return 0


def labels_for(version: str, source: str | None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Labels of the image. The date is SOURCE_DATE_EPOCH, or that of the commit: the same sources, the same image."""
    labels = {
        "title": "nri-memtierd",
        "description": DESCRIPTION,
        "version": version,
        "licenses": "Apache-2.0",
    }
    revision, time_s = _git("rev-parse", "HEAD"), _git("log", "-1", "--format=%ct")
    if revision:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "packages", "deploy/image", "LICENSE")
        labels["revision"] = f"{revision}-dirty" if changed else revision
    if source:
        labels["source"] = source
    time_s = environment.get("SOURCE_DATE_EPOCH") or time_s
    if time_s:
        if not time_s.isdecimal():
            raise BuildError(f"SOURCE_DATE_EPOCH is {time_s!r}: seconds since 1970 are wanted")
        labels["created"] = datetime.fromtimestamp(int(time_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {LABEL + name: text for name, text in labels.items()}


def _git(*words: str) -> str:
    """What git says of this repository; empty without git, or outside one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(REPO), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def make_layers(variant: str, architecture: str, scratch: Path, *, update: bool = False) -> list[Path]:
    """Tars of both layers, not compressed. Raises: BuildError."""
    layer = debian_layer(variant, architecture, update=update)
    python = layer if architecture == own_architecture() else debian_layer("slim", own_architecture())
    with tarfile.open(python) as tar:
        extract(tar, scratch / "debian")
    wheels.make_root(scratch / "root", scratch / "debian", scratch)
    pack(scratch / "root", scratch / "ours.tar")
    return [layer, scratch / "ours.tar"]


def debian_layer(variant: str, architecture: str, *, update: bool = False) -> Path:
    """Tar of the Debian packages and what they need; from the cache if nothing changed but Debian."""
    key = hashlib.sha256("\0".join(debian.parameters(variant, architecture)).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "memtier/image"
    layer = cache / f"debian-{variant}-{architecture}-{key[:16]}.tar"
    if layer.exists() and not update:
        return layer
    print(f"making the Debian layer from {debian.MIRROR} {debian.SUITE}: 10 to 60 seconds", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial.") as folder:
        root = Path(folder, "root")
        root.mkdir()
        python = None
        if architecture != own_architecture():
            python = Path(folder, "python")
            with tarfile.open(debian_layer("slim", own_architecture())) as tar:
                extract(tar, python)
        debian.make_root(root, debian.package_names(variant), architecture, python)
        pack(root, Path(folder, "layer.tar"))
        Path(folder, "layer.tar").rename(layer)
    for old in cache.glob(f"debian-{variant}-{architecture}-*.tar"):
        if old != layer:
            old.unlink(missing_ok=True)
    return layer


def write_root(root: Path, variant: str, architecture: str) -> None:
    """Fill an empty folder with what the layers hold. Raises: BuildError."""
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise BuildError(f"{root} is not empty")
    with tempfile.TemporaryDirectory(prefix="nri-memtierd-image.") as scratch:
        for layer in make_layers(variant, architecture, Path(scratch)):
            with tarfile.open(layer) as tar:
                extract(tar, root)


if __name__ == "__main__":
    sys.exit(main())
