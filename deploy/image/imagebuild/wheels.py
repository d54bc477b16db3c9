"""This repository's part of the image: its three packages, their programs, and the folders that get mounts."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shutil
import sys
import zipfile
from pathlib import Path

from imagebuild.common import REPO, BuildError, compile_with, run
from imagebuild.debian import SITE

PACKAGES = ("nri-core", "memtier-engine", "cli")
METADATA_VERSION = "2.4"
"""The first that has all fields in use; build backends write theirs."""
FOLDERS = ("etc/nri/memtierd", "run/nri", "run/nri-memtierd", "run/memtier", "run-dir", "host/tmp")


def make_root(root: Path, debian: Path, scratch: Path) -> None:
    """Fill the folder `root`; the Python of the folder `debian` compiles. Raises: BuildError."""
    site = root / SITE
    scripts = root / "usr/bin"
    for folder in (site, scripts, *(root / name for name in FOLDERS)):
        folder.mkdir(parents=True)
    for package in PACKAGES:
        install(build_wheel(REPO / "packages" / package, scratch), site, scripts)
    licenses = root / "usr/share/doc/memtier"
    licenses.mkdir(parents=True)
    shutil.copyfile(REPO / "LICENSE", licenses / "copyright")
    compile_with(debian, site, f"/{SITE}")


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
        if importlib.util.find_spec("hatchling"):
            command.append("--no-build-isolation")
    run(command)
    return next(wheels.glob("*.whl"))


def install(wheel: Path, site: Path, scripts: Path) -> None:
    """Unpack a pure wheel, and write its console scripts. What tells the version of the build backend is left out."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if any(".data/" in name for name in names):
            raise BuildError(f"{wheel.name} is not a pure wheel")
        archive.extractall(
            site, [name for name in names if not name.endswith((".dist-info/WHEEL", ".dist-info/RECORD"))]
        )
        for name in (name for name in names if name.endswith(".dist-info/METADATA")):
            text = (site / name).read_text()
            (site / name).write_text(re.sub(r"\AMetadata-Version: .*", f"Metadata-Version: {METADATA_VERSION}", text))
        for name in (name for name in names if name.endswith(".dist-info/entry_points.txt")):
            parser = configparser.ConfigParser(delimiters=("=",))
            parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
            parser.read_string(archive.read(name).decode())
            for script, target in parser.items("console_scripts") if parser.has_section("console_scripts") else ():
                module, _, function = target.partition(":")
                text = f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
                (scripts / script).write_text(text)
                (scripts / script).chmod(0o755)
