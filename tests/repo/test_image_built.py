"""The container image as it is built for nodes: how large, what is in it and what is not, and that its programs work.

Built once, from Debian's mirror (half a minute), and then from ~/.cache/memtier as long as nothing about it changes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from memtier_engine.hostfs.host import Host
from memtier_engine.trackers.registry import why_not
from support.toucher import toucher

REPO = Path(__file__).resolve().parents[2]
PACKED_BYTES_MAX = 60 * 10**6
PAGES = 1000

# Names of programs, and of what belongs to a compiler or a package manager.
FORBIDDEN = re.compile(
    r"(.*/)?(sh|bash|dash|busybox|perl[\d.]*|apt(-\w+)?|dpkg(-\w+)?|debconf\w*|pip[\d.]*|su|mount|gcc[\w.-]*|cc|ld|clang[\w.-]*"
    r"|libLLVM[\w.-]*|libclang[\w.-]*|libapt[\w.-]*|libbcc[\w.-]*)"
)


@dataclass(frozen=True)
class Built:
    """The image, unpacked."""

    root: Path
    members: Sequence[tarfile.TarInfo]
    packed_bytes: int
    labels: dict[str, str]
    parts: list[dict[str, Any]]
    document: str

    def start(self, *words: str) -> list[str]:
        """Words that run a program in the image, without a container runtime."""
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        return ["unshare", *own, "--mount", "--", sys.executable, "-c", _ENTER, str(self.root), *words]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the image to its end."""
        told = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **environment}
        return subprocess.run(self.start(*words), stdin=subprocess.DEVNULL, capture_output=True, text=True, env=told)


_ENTER = """
import os, subprocess, sys
root, *words = sys.argv[1:]
for name in ("proc", "sys", "dev"):
    subprocess.run(["mount", "--rbind", f"/{name}", f"{root}/{name}"], check=True)
os.chroot(root)
os.chdir("/")
os.execvp(words[0], words)
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: the image is built on Debian or Ubuntu")
    folder = tmp_path_factory.mktemp("image")
    command = [sys.executable, str(REPO / "deploy/image/build.py"), "--out", str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if re.search(r"Could not (resolve|connect)|Unable to connect|Connection (timed out|refused)", done.stderr):
        pytest.skip(f"Debian's mirror cannot be reached (DEBIAN_MIRROR names another): {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    archive = Path(done.stdout.strip())
    root = folder / "root"
    members: list[tarfile.TarInfo] = []
    with tarfile.open(archive) as outer:

        def blob(digest: str) -> Any:
            return outer.extractfile(f"blobs/sha256/{digest.removeprefix('sha256:')}")

        index = json.load(outer.extractfile("index.json"))  # type: ignore[arg-type]
        manifest = json.load(blob(index["manifests"][0]["digest"]))
        labels = json.load(blob(manifest["config"]["digest"]))["config"]["Labels"]
        for layer in manifest["layers"]:
            with tarfile.open(fileobj=blob(layer["digest"])) as tar:
                members += tar.getmembers()
                tar.extractall(root, **({"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}))  # type: ignore[arg-type]
    document = archive.with_suffix(".cdx.json").read_text()
    packed_bytes = sum(layer["size"] for layer in manifest["layers"])
    yield Built(root, members, packed_bytes, labels, json.loads(document)["components"], document)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def entered(image: Built) -> Built:
    """The same, where this machine lets us run its programs."""
    done = image.run("python3", "-c", "")
    if done.returncode != 0 and os.geteuid() != 0:
        pytest.skip(f"no user namespaces here; run as root: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return image


def test_it_is_small(image: Built) -> None:
    assert image.packed_bytes <= PACKED_BYTES_MAX


def test_no_compiler_shell_package_manager_or_setuid_file_is_in_it(image: Built) -> None:
    assert [each.name for each in image.members if not each.isdir() and FORBIDDEN.fullmatch(each.name)] == []
    assert [each.name for each in image.members if each.mode & 0o6000] == []
    assert [each.name for each in image.members if each.isdev() or (each.mode & 0o002 and not each.issym())] == ["tmp"]
    # A program of a name that nobody thought of. Links are to one of these.
    programs = {each.name for each in image.members if each.isfile() and re.fullmatch(r"usr/s?bin/.*", each.name)}
    ours = {"memtier", "memtierd", "memtier-meme", "nri-memtierd", "nri-ping"}
    assert {Path(name).name for name in programs} - ours == {next(n for n in map(_name, programs) if "python3." in n)}


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def test_the_list_of_what_is_inside_names_every_package(image: Built) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(image.document) is None
    status = (image.root / "var/lib/dpkg/status").read_text()
    debian = set(re.findall(r"^Package: (.+)$", status, re.M))
    assert len(debian) > 40
    listed = {part["name"] for part in image.parts if part.get("purl", "").startswith("pkg:deb/")}
    assert listed == debian
    python = {part["name"] for part in image.parts if part.get("purl", "").startswith("pkg:pypi/")}
    assert python >= {"nri-core", "memtier-engine", "memtier-cli", "numpy", "protobuf", "pyyaml", "loguru", "grpcio"}
    for part in image.parts[1:]:
        assert part["version"], part
    assert re.search(r"^ID=debian$", (image.root / "etc/os-release").read_text(), re.M)


def test_every_debian_package_has_its_licence_with_it(image: Built) -> None:
    names = re.findall(r"^Package: (.+)$", (image.root / "var/lib/dpkg/status").read_text(), re.M)
    assert [name for name in names if not (image.root / f"usr/share/doc/{name}/copyright").exists()] == []


def test_the_labels_are_there(image: Built) -> None:
    names = {name.removeprefix("org.opencontainers.image.") for name in image.labels}
    assert names >= {"title", "description", "version", "licenses"}
    if (REPO / ".git").exists():
        assert names >= {"revision", "created"}


def test_all_that_is_imported_at_start_has_byte_code_there(image: Built) -> None:
    """The file system is read-only: what has none is compiled at every start, and by every probe."""
    for place in ("usr/lib/python3/dist-packages", *(str(path) for path in image.root.glob("usr/lib/python3.*"))):
        for source in (image.root / place).rglob("*.py"):
            compiled = list((source.parent / "__pycache__").glob(f"{source.stem}.cpython-*.pyc"))
            assert len(compiled) == 1, source


def test_every_program_starts(entered: Built) -> None:
    for words in (
        ("/usr/bin/nri-memtierd", "--version"),
        ("memtierd", "--version"),
        ("memtier", "--version"),
        ("memtier-meme", "--help"),
        ("nri-ping", "--help"),
    ):
        done = entered.run(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout + done.stderr
    assert "version: 0.1.0" in entered.run("nri-memtierd", "--version").stdout


_IMPORTS = """
import importlib, pkgutil
import ctypes, grpc, numpy, prometheus_client, pyroute2, readline, rich.console, ssl

assert numpy.linalg.inv(numpy.eye(3)).sum() == 3
for name in ("nri_core", "memtier_engine", "memtier_cli"):
    for each in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        if not each.name.endswith("__main__"):
            importlib.import_module(each.name)
"""


def test_all_our_modules_can_be_imported(entered: Built) -> None:
    """And what they import, and their dependencies' compiled parts."""
    done = entered.run("python3", "-c", _IMPORTS)
    assert done.returncode == 0, done.stderr


def test_bcc_is_said_to_be_in_the_other_variant(entered: Built) -> None:
    program = (
        "from memtier_engine.errors import Unavailable\nfrom memtier_engine.trackers.bpf.loaders import import_bcc\n"
        "try:\n    import_bcc()\nexcept Unavailable as failure:\n    print(failure.hint)\n"
    )
    assert "of the container image, the variant -bcc" in entered.run("python3", "-c", program).stdout


_SCAN = """
import json, sys
from contextlib import closing
import numpy as np
from memtier_engine.hostfs.host import Host
from memtier_engine.hostfs.maps import process_id
from memtier_engine.model import PAGE_BYTES, Spans
from memtier_engine.trackers.bpf.tracker import BpfTracker

pid, start, pages = map(int, sys.argv[1:])
process = process_id(Host(), pid)
spans = Spans(np.array([start], np.uint64), np.array([start + pages * PAGE_BYTES], np.uint64))
with closing(BpfTracker(Host())) as tracker:
    tracker.watch(frozenset({process}))
    print(json.dumps(tracker.loader), flush=True)
    for _ in sys.stdin:
        parts = [part for chunk in tracker.scan(process, spans) for part in chunk.parts()]
        first = [(part.start - start) // PAGE_BYTES for part in parts]
        touched = [one + n for one, part in zip(first, parts) for n in np.flatnonzero(part.accessed).tolist()]
        print(json.dumps(touched), flush=True)
"""


def test_tracker_bpf_sees_the_touched_pages_without_a_compiler(entered: Built, tmp_path: Path) -> None:
    if (why := why_not("bpf", Host())) is not None:
        pytest.skip(f"tracker bpf does not work here: {why}; run as root, or `make e2e` in the test VM")
    with toucher("anonymous", PAGES, tmp_path) as load:
        words = entered.start("python3", "-c", _SCAN, *map(str, (load.popen.pid, load.address, PAGES)))
        tracker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert tracker.stdin is not None
        assert tracker.stdout is not None

        def scan() -> Any:
            print("scan", file=tracker.stdin, flush=True)
            return json.loads(tracker.stdout.readline())  # type: ignore[union-attr]

        try:
            assert json.loads(tracker.stdout.readline()) == "libbpf"
            load.write(range(PAGES))
            scan()
            scan()
            load.write((3, 500, 999))
            seen = scan()
            assert {3, 500, 999} <= set(seen)
            assert len(seen) < PAGES // 10, "a page that the kernel moves meanwhile counts as in use"
            load.read((7,))
            assert 7 in scan()
        finally:
            tracker.kill()
            tracker.communicate()
