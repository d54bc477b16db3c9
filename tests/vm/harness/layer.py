"""What a run lays over the root filesystem: our wheels, the guest's own files, the images, and the initramfs.

One read-only disk per content of the checkout; the guest stacks it over the root filesystem with
overlayfs, so nothing is installed at boot.
"""

from __future__ import annotations

import configparser
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vm.harness import cpio, host, images
from vm.harness.cache import Cache, digest, digest_files, remove_tree
from vm.harness.disks import pack_ext4
from vm.harness.errors import VmError
from vm.harness.rootfs import guest_python, run_guest_python

RECIPE = "2"
PACKAGES = ("nri-core", "memtier-engine", "cli")

GUEST_FILES = {
    # in tests/vm/guest -> in the guest
    "agent": ("usr/lib/memtier-vm/agent", 0o755),
    "containerd.toml": ("etc/containerd/config.toml", 0o644),
}
GUEST_FOLDERS = ("etc/nri/conf.d", "opt/nri/plugins", "host", "out", "scratch")


def package_files(repo: Path) -> dict[str, Path]:
    """All files that go into the wheels, by their path in the checkout."""
    files: dict[str, Path] = {}
    for package in PACKAGES:
        base = repo / "packages" / package
        for path in [base / "pyproject.toml", base / "README.md", *(base / "src").rglob("*")]:
            if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith(".egg-info"):
                files[str(path.relative_to(repo))] = path
    return files


def ensure_wheels(cache: Cache, repo: Path) -> Path:
    """Folder with the wheels of our packages, built when one of their files changed."""

    def build(into: Path) -> None:
        for package in PACKAGES:
            build_wheel(repo / "packages" / package, into)

    found = cache.entry("wheels", digest(RECIPE, digest_files(repo, package_files(repo))), build)
    cache.prune("wheels")
    return found


def build_wheel(package: Path, into: Path) -> None:
    """Build one wheel with uv (from the checkout's .venv or PATH), else with this Python's pip."""
    uv = package.parents[1] / ".venv/bin/uv"
    command: list[str | Path]
    if uv.exists() or host.which("uv"):
        command = [uv if uv.exists() else "uv", "build", "--wheel", "--quiet", "--out-dir", into, package]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", into, package]
    # A copy: build backends write into the source folder, and the checkout may be read-only.
    with tempfile.TemporaryDirectory(prefix="memtier-wheel.") as scratch:
        copy = Path(scratch) / package.name
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "dist", "build"))
        command[-1] = copy
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0:
        raise VmError(f"wheel of {package.name}:\n{done.stdout.decode(errors='replace')[-2000:]}")


def install_wheel(wheel: Path, root: Path, python: str) -> None:
    """Unpack a pure wheel below `root` as pip would for the guest's Python, and write its console scripts."""
    packages = root / f"usr/local/lib/python{python}/dist-packages"
    scripts = root / "usr/local/bin"
    packages.mkdir(parents=True, exist_ok=True)
    scripts.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        if odd := [name for name in archive.namelist() if ".data/" in name]:
            raise VmError(f"{wheel.name} is not a pure wheel: {odd[0]}")
        archive.extractall(packages)
        for name in archive.namelist():
            if name.endswith(".dist-info/entry_points.txt"):
                _write_scripts(archive.read(name).decode(), scripts)


def _write_scripts(entry_points: str, scripts: Path) -> None:
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(entry_points)
    if not parser.has_section("console_scripts"):
        return
    for name, target in parser.items("console_scripts"):
        module, _, function = target.partition(":")
        text = f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        (scripts / name).write_text(text)
        (scripts / name).chmod(0o755)


def ensure_layer(cache: Cache, repo: Path, rootfs: Path) -> Path:
    """Folder with `layer.img` (stacked over the root filesystem) and `initramfs`."""
    guest = repo / "tests/vm/guest"
    wheels = ensure_wheels(cache, repo)
    image_folder = images.ensure_images(cache, rootfs, repo / "tests/vm/images/pause.c")
    sources = {name: guest / name for name in ("init", *GUEST_FILES)}
    key = digest(RECIPE, rootfs.parent.name, wheels.name, image_folder.name, digest_files(guest, sources))

    def build(into: Path) -> None:
        root = into / "root"
        python = guest_python(rootfs)
        for wheel in sorted(wheels.glob("*.whl")):
            install_wheel(wheel, root, python)
        for name, (place, mode) in GUEST_FILES.items():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(guest / name, root / place)
            (root / place).chmod(mode)
        for name in GUEST_FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "opt/images").mkdir(parents=True)
        for tar in image_folder.glob("*.tar"):
            shutil.copyfile(tar, root / "opt/images" / tar.name)
        _open_to_all(root)
        # Byte code that is never checked against its source: the layer does not change.
        code = root / f"usr/local/lib/python{python}/dist-packages"
        run_guest_python(
            rootfs,
            "-m",
            "compileall",
            "-q",
            "--invalidation-mode=unchecked-hash",
            "-s",
            root,
            "-p",
            "/",
            code,
        )
        pack_ext4(root, into / "layer.img", into / "build.log")
        remove_tree(root)
        (into / "initramfs").write_bytes(initramfs(rootfs, guest / "init"))

    found = cache.entry("layer", key, build)
    cache.prune("layer")
    return found


def _open_to_all(root: Path) -> None:
    # The umask of whoever builds must not decide what the guest's unprivileged users may read.
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if executable else 0o644)


def initramfs(rootfs: Path, init: Path) -> bytes:
    """busybox and our /init: all that is needed to mount the real root."""
    busybox = (rootfs / "usr/bin/busybox").read_bytes()
    return cpio.pack(
        [
            *map(cpio.folder, ("bin", "dev", "proc", "sys", "lower", "layer", "rw", "new")),
            cpio.char_device("dev/console", 5, 1),  # the kernel opens it for /init before devtmpfs is there
            cpio.program("bin/busybox", busybox),
            cpio.program("init", init.read_bytes()),
        ]
    )
