"""How the container image is built: from made-up packages and folders, without the network."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from imagebuild import common, debian, oci, sbom, wheels

REPO = Path(__file__).resolve().parents[2]
DOCKERFILE = REPO / "deploy/image/Dockerfile"
LABELS = {f"org.opencontainers.image.{name}": f"a {name}" for name in ("title", "version")}
CREATED = "org.opencontainers.image.created"

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed: Debian's dpkg")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_image", REPO / "deploy/image/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_image"] = module
    spec.loader.exec_module(module)
    return module


build = script()


def test_there_is_a_debian_package_for_every_dependency_and_no_compiler_by_default() -> None:
    names = {"pyyaml": "python3-yaml"}
    wanted = set()
    for package in ("nri-core", "memtier-engine", "cli"):
        project = tomllib.loads((REPO / f"packages/{package}/pyproject.toml").read_text())["project"]
        for requirement in project["dependencies"]:
            name = re.split(r"[^A-Za-z0-9-]", requirement)[0].lower()
            if name not in ("nri-core", "memtier-engine"):
                wanted.add(names.get(name, f"python3-{name}"))
    slim = debian.package_names("slim")
    assert wanted <= set(slim)
    assert "libbpf1" in slim
    assert not {"python3-bpfcc", "dash", "tar"}.intersection(slim)
    assert debian.package_names("bcc") == [*slim, "python3-bpfcc", "dash", "tar", "xz-utils"]


def test_a_change_of_any_table_or_list_makes_the_layer_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [debian.parameters("slim", "amd64")]
    for variant, architecture in (("bcc", "amd64"), ("slim", "arm64")):
        seen.append(debian.parameters(variant, architecture))
    for name, value in (
        ("LEFT_OUT", ()),
        ("NOT_NEEDED", {}),
        ("MIRROR", "http://x"),
        ("FILES", {}),
        ("SECURITY_MIRROR", ""),
        ("SUITE", "sid"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(debian, name, value)
            seen.append(debian.parameters("slim", "amd64"))
    assert len({tuple(each) for each in seen}) == len(seen)


@pytest.mark.parametrize(
    ("path", "stays_out"),
    [
        ("/usr/share/doc/libc6/copyright", False),
        ("/usr/share/doc/libc6/changelog.gz", True),
        ("/usr/bin/python3.13", False),
        ("/usr/bin/py3compile", True),
        ("/usr/sbin/ldconfig", True),
        ("/usr/lib/python3/dist-packages/numpy/_core/tests/data/x.txt", True),
        ("/usr/lib/python3/dist-packages/numpy/_core/_multiarray_umath.cpython-313-x86_64-linux-gnu.so", False),
        ("/usr/lib/python3.13/unittest/case.py", False),
        ("/usr/lib/python3.13/test/support/__init__.py", True),
        ("/usr/lib/x86_64-linux-gnu/libbpf.so.1.5.0", False),
    ],
)
def test_what_only_people_and_builders_need_stays_out_and_licences_stay_in(path: str, stays_out: bool) -> None:
    assert debian.is_left_out(path) is stays_out


def write(path: Path, text: str = "", mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


FREE = (
    "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: *\nLicense: {}\n all of it\n"
)


def make_deb(folder: Path, name: str, fields: str, files: dict[str, tuple[str, int]]) -> Path:
    tree = folder / name
    write(tree / "DEBIAN/control", f"Package: {name}\nMaintainer: x\nDescription: x\n{fields}")
    for path, (text, mode) in files.items():
        write(tree / path, text, mode)
    tree.chmod(0o755)
    command: list[str | Path] = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, folder / f"{name}.deb"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / f"{name}.deb"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small image: two Debian packages, one of them with files that must not stay, and a Python package of ours."""
    packages = [
        make_deb(
            tmp_path,
            "base-files",
            "Version: 1:13.8+deb13u1\nArchitecture: amd64\n",
            {
                "usr/lib/os-release": ('ID=debian\nVERSION_ID="13"\n', 0o644),
                "usr/bin/su": ("su", 0o6755),
                "usr/sbin/adduser": ("#!/usr/bin/perl", 0o755),
                "usr/share/doc/base-files/copyright": (FREE.format("GPL-2+"), 0o644),
                "usr/share/doc/base-files/README": ("read", 0o644),
            },
        ),
        make_deb(
            tmp_path,
            "libfree1",
            "Version: 2~rc1\nArchitecture: amd64\nMulti-Arch: same\nSource: free (2)\n",
            {
                "usr/lib/x86_64-linux-gnu/libfree.so.1": ("free", 0o644),
                "usr/lib/x86_64-linux-gnu/blas/libblas.so.3": ("blas", 0o644),
                "usr/share/doc/libfree1/copyright": ("It is free, in prose.\n", 0o644),
            },
        ),
    ]
    made = tmp_path / "root"
    made.mkdir()
    stanzas = {}
    for package in packages:
        stanza = common.run(["dpkg-deb", "--field", package])
        stanzas[debian.field(stanza, "Package")] = stanza
        debian.unpack(package, stanza, made)
    debian.finish(made, stanzas, "amd64")
    write(
        made / debian.SITE / "ours_x-0.1.dist-info/METADATA",
        "Metadata-Version: 2.4\nName: Ours_X\nVersion: 0.1\nLicense-Expression: Apache-2.0\n\nLong text\n",
    )
    return made


@needs_dpkg
def test_packages_are_unpacked_without_what_stays_out_and_are_listed_as_dpkg_would(root: Path) -> None:
    assert not (root / "usr/sbin/adduser").exists()
    assert not (root / "usr/share/doc/base-files/README").exists()
    assert (root / "usr/share/doc/base-files/copyright").exists()
    assert (root / "usr/lib/x86_64-linux-gnu/libblas.so.3").read_text() == "blas"
    assert (root / "var/run").resolve() == root / "run"
    assert (root / "var/lib/dpkg/info/libfree1:amd64.list").read_text().splitlines() == [
        "/usr/lib/x86_64-linux-gnu/blas/libblas.so.3",
        "/usr/lib/x86_64-linux-gnu/libfree.so.1",
        "/usr/share/doc/libfree1/copyright",
    ]
    assert "/usr/sbin/adduser" not in (root / "var/lib/dpkg/info/base-files.list").read_text()
    command = ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f", "${Package} ${Version} ${Status}\n"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == [
        "base-files 1:13.8+deb13u1 install ok installed",
        "libfree1 2~rc1 install ok installed",
    ]


@needs_dpkg
def test_a_layer_has_no_setuid_file_and_belongs_to_nobody_in_particular(root: Path, tmp_path: Path) -> None:
    (root / "usr/bin/su").chmod(0o6755)
    common.pack(root, tmp_path / "layer.tar")
    with tarfile.open(tmp_path / "layer.tar") as tar:
        members = {member.name: member for member in tar}
    assert {member.mode & 0o6000 for member in members.values()} == {0}
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, 0)}
    assert members["usr/bin/su"].mode == 0o755
    assert members["tmp"].mode == 0o1777
    assert members["etc/passwd"].mode == 0o644


def test_a_layer_is_the_same_whoever_packs_it_and_when(tmp_path: Path) -> None:
    digests = set()
    for number, umask in enumerate((0o022, 0o077)):
        before = os.umask(umask)
        try:
            folder = tmp_path / str(number)
            for name in ("b", "a") if number else ("a", "b"):
                (folder / name).mkdir(parents=True)
                (folder / name / "file").write_text(name)
                os.utime(folder / name / "file", (number, number))
        finally:
            os.umask(before)
        common.pack(folder, tmp_path / "layer.tar")
        digests.add(hashlib.sha256((tmp_path / "layer.tar").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_byte_code_does_not_depend_on_where_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of this machine stands for the image's."""
    seen = []
    for name in ("short", "a-much-longer-name"):
        root = tmp_path / name
        folder = root / "usr/lib/python3"
        write(folder / "enum_like.py", "WORDS = {'a', 'b', 'c', 'd'}\ndef f(x): return x in {'e', 'f', 'g', 'h'}\n")
        write(root / "usr/bin/python3.99")
        monkeypatch.setattr(common, "loader_of", lambda root: ["env", "-u", "PYTHONHOME", sys.executable, "-c", _RUN])
        common.compile_with(root, folder, "/usr/lib/python3")
        (compiled,) = folder.rglob("*.pyc")
        seen.append(compiled.read_bytes())
    assert seen[0] == seen[1]
    assert b"/usr/lib/python3/enum_like.py" in seen[0]


_RUN = """
import os, sys
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])  # without the made-up program
"""


def test_our_packages_are_the_same_whatever_version_of_the_backend_built_them(tmp_path: Path) -> None:
    digests = set()
    for number in ("1.27", "1.33"):
        wheel = tmp_path / number / "x-1-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("x/__init__.py", "")
            archive.writestr("x-1.dist-info/METADATA", f"Metadata-Version: {number}\nName: x\nVersion: 1\n")
            archive.writestr("x-1.dist-info/WHEEL", f"Generator: hatchling {number}\n")
            archive.writestr("x-1.dist-info/RECORD", number)
            archive.writestr("x-1.dist-info/entry_points.txt", "[console_scripts]\nx = x.y:main\n")
        root = wheel.parent / "root"
        (root / "bin").mkdir(parents=True)
        wheels.install(wheel, root / "site", root / "bin")
        common.pack(root, tmp_path / "layer.tar")
        digests.add(hashlib.sha256((tmp_path / "layer.tar").read_bytes()).hexdigest())
        assert "from x.y import main" in (root / "bin/x").read_text()
        assert (root / "site/x-1.dist-info/METADATA").read_text().endswith("\nName: x\nVersion: 1\n")
    assert len(digests) == 1


def test_a_library_that_was_left_out_but_is_needed_is_named(tmp_path: Path) -> None:
    """With a program of this machine that needs more than libc."""
    program = next((Path(path) for path in ("/usr/bin/ls", "/bin/tar", "/usr/bin/bash") if Path(path).exists()), None)
    loader = next(iter(Path("/lib64").glob("ld-linux-*.so.2")), next(iter(Path("/lib").glob("ld-linux-*.so.1")), None))
    if program is None or loader is None:
        pytest.skip("no known program, or no glibc, on this machine")
    said = subprocess.run([loader, "--list", program], capture_output=True, text=True, check=True).stdout
    libraries = [Path(line.split(" => ")[1].split(" (")[0]) for line in said.splitlines() if " => " in line]
    libc = next(path for path in libraries if path.name.startswith("libc.so"))
    others = [path for path in libraries if path != libc]
    if not others:
        pytest.skip(f"{program} needs libc only")
    folder = tmp_path / "usr/lib/any-linux-gnu"
    folder.mkdir(parents=True)
    (tmp_path / "usr/lib64").mkdir()
    shutil.copy(loader.resolve(), tmp_path / "usr/lib64" / loader.name)
    shutil.copy(libc.resolve(), folder / libc.name)
    shutil.copy(program, tmp_path / "program")
    assert f"/program: {others[0].name}" in debian.missing_libraries(tmp_path)
    for path in others:
        shutil.copy(path.resolve(), folder / path.name)
    assert not [line for line in debian.missing_libraries(tmp_path) if line.startswith("/program")]


def make_image(layers: list[Path], labels: dict[str, str] = LABELS) -> oci.Image:
    return oci.Image("localhost/memtier/nri-memtierd:devel", "amd64", layers, labels)


@contextmanager
def opened(archive: Path) -> Iterator[dict[str, bytes]]:
    """The files of an archive, by name."""
    with tarfile.open(archive) as tar:
        yield {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def config_of(files: dict[str, bytes]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Descriptor, manifest and configuration of the only image."""
    (descriptor,) = json.loads(files["index.json"])["manifests"]
    manifest = json.loads(files["blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")])
    config = json.loads(files["blobs/sha256/" + manifest["config"]["digest"].removeprefix("sha256:")])
    return descriptor, manifest, config


def test_an_archive_is_an_oci_layout_whose_digests_are_true(tmp_path: Path) -> None:
    layers = []
    for name in ("first", "second"):
        write(tmp_path / name / "file", name)
        common.pack(tmp_path / name, tmp_path / f"{name}.tar")
        layers.append(tmp_path / f"{name}.tar")
    image = make_image(layers, {**LABELS, CREATED: "2026-01-02T03:04:05Z"})
    out = tmp_path / "out"
    written = [oci.write_archive(image, out, "nri-memtierd-image", compress=False)]
    with opened(written[0].archive) as files:
        _, manifest, _ = config_of(files)
        for layer, described in zip(layers, manifest["layers"], strict=True):
            assert described["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
            assert files["blobs/sha256/" + described["digest"].removeprefix("sha256:")] == layer.read_bytes()
    written.append(oci.write_archive(image, out, "nri-memtierd-image"))
    again = oci.write_archive(image, tmp_path / "again", "nri-memtierd-image")
    assert again.archive.read_bytes() == written[1].archive.read_bytes(), "the same content, the same bytes"
    assert [path.name for path in out.iterdir()] == [written[1].archive.name], "an older archive is replaced"
    assert written[1].archive.name == f"nri-memtierd-image-{written[1].digest[7:19]}.tar"
    other = oci.write_archive(image, out, "nri-memtierd-bcc-image")
    assert {path.name for path in out.iterdir()} == {written[1].archive.name, other.archive.name}, "not its own stem"
    with opened(again.archive) as files:
        for name, data in files.items():
            if name.startswith("blobs/sha256/"):
                assert hashlib.sha256(data).hexdigest() == name.rsplit("/", 1)[1]
        descriptor, manifest, config = config_of(files)
    assert descriptor["annotations"]["io.containerd.image.name"] == image.reference
    assert descriptor["digest"] == again.digest
    assert config["rootfs"]["diff_ids"] == [
        f"sha256:{hashlib.sha256(layer.read_bytes()).hexdigest()}" for layer in layers
    ]
    assert config["config"]["Entrypoint"] == ["/usr/bin/nri-memtierd", "--idx", "90"]
    assert config["config"]["Labels"] == manifest["annotations"] == image.labels
    assert config["created"] == "2026-01-02T03:04:05Z"
    assert sum(layer["size"] for layer in manifest["layers"]) == again.packed_bytes
    for layer, described in zip(layers, manifest["layers"], strict=True):
        assert described["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
        packed = files["blobs/sha256/" + described["digest"].removeprefix("sha256:")]
        assert gzip.decompress(packed) == layer.read_bytes()
        assert packed[3:8] == bytes(5), "without a name and without a time. Source: RFC 1952"


def test_the_labels_say_what_it_is_and_from_when_and_the_date_is_not_todays() -> None:
    labels = build.labels_for("v1-bcc", "https://example.org/x", {"SOURCE_DATE_EPOCH": "86400"})
    short = {name.removeprefix("org.opencontainers.image."): text for name, text in labels.items()}
    assert short["created"] == "1970-01-02T00:00:00Z"
    assert short["version"] == "v1-bcc"
    assert short["source"] == "https://example.org/x"
    assert short["licenses"] == "Apache-2.0"
    assert short.keys() - {"revision"} == {"title", "description", "version", "licenses", "source", "created"}
    with pytest.raises(common.BuildError, match="SOURCE_DATE_EPOCH is 'yesterday': seconds since 1970 are wanted"):
        build.labels_for("v1", None, {"SOURCE_DATE_EPOCH": "yesterday"})


def test_without_a_date_given_it_is_that_of_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "c0ffee", "log": "1700000000", "status": ""}
    monkeypatch.setattr(build, "_git", lambda *words: answers[words[0]])
    labels = build.labels_for("v1", None, {})
    assert labels[CREATED] == "2023-11-14T22:13:20Z"
    assert labels["org.opencontainers.image.revision"] == "c0ffee"
    answers["status"] = " M packages/x"
    assert build.labels_for("v1", None, {})["org.opencontainers.image.revision"] == "c0ffee-dirty"
    monkeypatch.setattr(build, "_git", lambda *words: "")
    assert build.labels_for("v1", None, {}).keys().isdisjoint({CREATED, "org.opencontainers.image.revision"})


@needs_dpkg
def test_the_list_of_what_is_inside_names_every_package_with_its_licence(root: Path, tmp_path: Path) -> None:
    common.pack(root, tmp_path / "layer.tar")
    image = make_image([tmp_path / "layer.tar"], {**LABELS, CREATED: "2026-01-02T03:04:05Z"})
    written = oci.write_archive(image, tmp_path / "out", "x")
    document: dict[str, Any] = sbom.describe(image, written)
    assert sbom.describe(image, written) == document
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(document)) is None
    assert validator.validate_str(json.dumps({**document, "serialNumber": "x"})) is not None, "the validator works"
    parts = {each["name"]: each for each in document["components"]}
    assert parts.keys() == {"debian", "base-files", "libfree1", "ours-x"}
    assert parts["base-files"]["licenses"] == [{"license": {"name": "GPL-2+"}}]
    assert parts["ours-x"]["licenses"] == [{"license": {"name": "Apache-2.0"}}]
    assert "licenses" not in parts["libfree1"], "prose is not guessed at"
    found = PackageURL.from_string(parts["libfree1"]["purl"])
    assert (found.type, found.namespace, found.name, found.version) == ("deb", "debian", "libfree1", "2~rc1")
    assert found.qualifiers == {"arch": "amd64", "distro": "debian-13", "upstream": "free"}
    assert "@1%3A13.8%2Bdeb13u1?" in parts["base-files"]["purl"], "colon and plus have meanings of their own in URLs"
    about = document["metadata"]["component"]
    assert (about["name"], about["version"]) == ("localhost/memtier/nri-memtierd", written.digest)
    assert document["metadata"]["timestamp"] == "2026-01-02T03:04:05Z"


def test_licences_of_a_folder_that_is_a_link_are_found(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "usr/share/doc/gcc-14-base/copyright", FREE.format("GPL-3"))
    (root / "usr/share/doc/libgcc-s1").symlink_to("gcc-14-base")
    common.pack(root, tmp_path / "layer.tar")
    files = sbom.read([tmp_path / "layer.tar"])
    assert sbom.licenses_in(files["usr/share/doc/libgcc-s1/copyright"]) == ["GPL-3"]


def test_the_dockerfile_has_the_same_tree_labels_and_program() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r'^RUN python3 /src/deploy/image/build\.py --variant "\$VARIANT" --root /tree$', text, re.M)
    assert re.search(r"^FROM scratch\nCOPY --from=tree /tree /$", text, re.M), "nothing but what build.py made"
    labels = dict(re.findall(r'^(?:LABEL|     ) (org\.opencontainers\.image\.\w+)="([^"]*)"', text, re.M))
    made = build.labels_for("$VERSION", None, {"SOURCE_DATE_EPOCH": "0"})
    given = {f"org.opencontainers.image.{name}" for name in ("created", "revision")}
    assert labels == {name: made[name] for name in made.keys() - given} | {
        name: f"${name.rpartition('.')[2].upper()}" for name in given
    }
    assert re.search(r"^ENV (.*)$", text, re.M)[1].split() == list(oci.ENVIRONMENT)  # type: ignore[index]
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1]) == list(oci.ENTRYPOINT)  # type: ignore[index]
    copied = set(re.findall(r"^COPY (?!--from)(\S+) /src/\1$", text, re.M))
    assert copied == {"LICENSE", "packages", "deploy/image"}


def test_a_machine_that_cannot_build_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "KEYRINGS", (tmp_path / "absent.gpg",))
    with pytest.raises(common.BuildError, match=r"absent.gpg does not exist: apt-get install debian-archive-keyring"):
        debian.apt_install(["x"], "amd64", tmp_path, "--simulate")
    with pytest.raises(common.BuildError, match="surely-not-a-program is not installed: build on Debian"):
        common.run(["surely-not-a-program"])
    with pytest.raises(common.BuildError, match="sh -c failed: no such thing"):
        common.run(["sh", "-c", "echo no such thing >&2; exit 3"])
    write(tmp_path / "full/file")
    with pytest.raises(common.BuildError, match="full is not empty"):
        build.write_root(tmp_path / "full", "slim", "amd64")
