"""The Debian part of the image: packages and what they need, unpacked. None of their scripts runs, no root is needed.

apt finds, fetches and verifies the packages; dpkg-deb opens them. What their scripts would have done and the program
needs is done here: names of BLAS and LAPACK, byte code, users, and the list of what is inside.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from imagebuild.common import BuildError, compile_with, extract, loader_of, run

FOLDER = Path(__file__).resolve().parents[1]
SUITE = "trixie"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
SECURITY_MIRROR = os.environ.get("DEBIAN_SECURITY_MIRROR", "http://deb.debian.org/debian-security")
"""Empty: without security updates."""
KEYRINGS = tuple(Path(f"/usr/share/keyrings/debian-archive-keyring.{end}") for end in ("pgp", "gpg"))
TRIPLETS = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
LISTS = {"slim": ("packages.txt",), "bcc": ("packages.txt", "packages-bcc.txt")}
"""Files with the packages of each variant of the image."""

NOT_NEEDED = {
    "dpkg": "python3-minimal calls it when it is installed",
    "debconf": "tzdata asks by it when it is installed; it would bring perl",
    "debianutils": "dash calls it when it is installed",
    "mawk": "base-files calls it when it is installed",
    "media-types": "Python's mimetypes",
    "netbase": "names of network services",
    "libdb5.3t64": "Python's dbm",
    "libncursesw6": "Python's curses",
    "python3-psutil": "pyroute2's ss",
}
"""Packages that others ask for, and what for: the program does without. What these alone need is not there either."""

PROVIDED = {"debconf": "debconf-2.0", "mawk": "awk"}
"""Other names by which packages ask for them."""

LEFT_OUT = (
    "/usr/share/doc/*",
    "/usr/share/doc-base/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
    "/usr/share/bug/*",
    "/usr/share/gcc/*",
    "/usr/share/gdb/*",
    "/usr/share/perl5/*",
    # For those who build with it, or install it.
    "/usr/include/*",
    "*.a",
    "*.pc",
    "*.pyi",
    "*.pxd",
    "/etc/cron*",
    "/etc/init.d/*",
    "/etc/python3*",
    "/etc/update-motd.d/*",
    "/usr/share/base-files/*",
    "/usr/share/binfmts/*",
    "/usr/share/debhelper/*",
    "/usr/share/numpy3/*",
    "/usr/share/python3/*",
    "/usr/bin/*_numpy3",
    "/usr/bin/*2to3*",
    "/usr/bin/f2py*",
    "/usr/bin/markdown-it*",
    "/usr/bin/numpy-config*",
    "/usr/bin/pdb*",
    "/usr/bin/pr*-cli",
    "/usr/bin/py3*",
    "/usr/bin/pydoc*",
    "/usr/bin/pygettext*",
    "/usr/bin/pygmentize*",
    "/usr/bin/pyroute2*",
    "/usr/bin/ss2",
    "/usr/bin/lzmainfo",
    "/usr/bin/xz?*",
    "/usr/sbin/*",
    # Tables of iconv: Python has its own.
    "/usr/lib/*/gconv/*",
    # Parts of Python that need what is not here, or that its own tests need.
    "/usr/lib/python3.*/lib-dynload/_curses*",
    "/usr/lib/python3.*/lib-dynload/_dbm*",
    "/usr/lib/python3.*/lib-dynload/*test*",
    "/usr/lib/python3.*/lib-dynload/xx*",
    "/usr/lib/python3.*/curses/*",
    "/usr/lib/python3.*/pydoc_data/*",
    "/usr/lib/python3.*/sitecustomize.py",
    "/usr/lib/python3.*/test/*",
    "/usr/lib/python3/dist-packages/*/tests/*",
    "/usr/lib/python3/dist-packages/numpy/f2py/*",
    "/usr/lib/python3/dist-packages/numpy/_core/_simd.*",
    "/usr/lib/python3/dist-packages/numpy/_core/*_tests.*",
    "/usr/lib/python3/dist-packages/numpy/_core/include/*",
    "/usr/lib/*/python3-numpy/*",
)
KEPT = ("/usr/share/doc/*/copyright",)
_DOCUMENTS = "/usr/share/doc/"

LINKS = {
    "var/run": "../run",  # where the manifests mount the sockets' and the run directory
    # What update-alternatives does for libblas3 and liblapack3.
    "usr/lib/{triplet}/libblas.so.3": "blas/libblas.so.3",
    "usr/lib/{triplet}/liblapack.so.3": "lapack/liblapack.so.3",
}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
FOLDERS = ("dev", "proc", "root", "run", "sys", "tmp")
SITE = "usr/lib/python3/dist-packages"
RECIPE = "1"
"""Counts changes of this file that are not in its tables: layers in caches are made anew."""


def package_names(variant: str) -> list[str]:
    """The packages that are asked for, in the order of the files."""
    lines = [line.strip() for name in LISTS[variant] for line in (FOLDER / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def parameters(variant: str, architecture: str) -> list[str]:
    """All that the content depends on, besides the packages' versions."""
    tables = [NOT_NEEDED, PROVIDED, LEFT_OUT, KEPT, LINKS, FILES, FOLDERS]
    return [RECIPE, SUITE, MIRROR, SECURITY_MIRROR, architecture, *package_names(variant), repr(tables)]


def make_root(root: Path, names: Sequence[str], architecture: str, python: Path | None = None) -> None:
    """Fill the empty folder `root`.

    Args:
        python: another root, whose Python runs on this machine; needed if that of `root` does not.
    Raises:
        BuildError: why it cannot be built.
    """
    stanzas = {}
    with tempfile.TemporaryDirectory(prefix="memtier-debs.") as scratch:
        for package in fetch(names, architecture, Path(scratch)):
            stanza = run(["dpkg-deb", "--field", package])
            stanzas[field(stanza, "Package")] = stanza
            unpack(package, stanza, root)
    finish(root, stanzas, architecture)
    for folder in (*root.glob("usr/lib/python3.*"), root / SITE):
        compile_with(python or root, folder, f"/{folder.relative_to(root)}")
    if python is None and (missing := missing_libraries(root)):
        raise BuildError(f"files need libraries that NOT_NEEDED or LEFT_OUT keep out: {'; '.join(missing)}")


def fetch(names: Sequence[str], architecture: str, scratch: Path) -> list[Path]:
    """Package files of `names` and of what they need, verified by Debian's signatures. Raises: BuildError."""
    apt_install(names, architecture, scratch, "--download-only")
    return sorted((scratch / "var/cache/apt/archives").glob("*.deb"))


def apt_install(names: Sequence[str], architecture: str, scratch: Path, option: str) -> str:
    """`apt-get install OPTION` with an empty machine below `scratch`; returns what apt said. Raises: BuildError."""
    keyring = next((path for path in KEYRINGS if path.exists()), None)
    if keyring is None:
        raise BuildError(f"{KEYRINGS[-1]} does not exist: apt-get install debian-archive-keyring")
    status = scratch / "var/lib/dpkg/status"
    archives = scratch / "var/cache/apt/archives/partial"
    lists = scratch / "var/lib/apt/lists/partial"
    for folder in (scratch / "etc/apt/apt.conf.d", scratch / "etc/apt/preferences.d", lists, archives, status.parent):
        folder.mkdir(parents=True)
    places = [f"{MIRROR} {SUITE}", f"{MIRROR} {SUITE}-updates"]
    places += [f"{SECURITY_MIRROR} {SUITE}-security"] if SECURITY_MIRROR else []
    sources = [f"deb [arch={architecture} signed-by={keyring}] {place} main\n" for place in places]
    (scratch / "etc/apt/sources.list").write_text("".join(sources))
    status.write_text("\n".join(_as_if_installed(name, architecture) for name in NOT_NEEDED))
    settings = [
        f'Dir "{scratch}";',
        f'Dir::State::status "{status}";',
        f'APT::Architecture "{architecture}";',
        f'APT::Architectures "{architecture}";',
        'APT::Install-Recommends "false";',
        'APT::Sandbox::User "root";',
        'Acquire::Languages "none";',
        'Acquire::Retries "3";',
        # The machine's proxies; nothing else of its settings.
        run(["apt-config", "dump", "--format", '%F "%v";%n', "Acquire::http", "Acquire::https"]),
    ]
    (scratch / "apt.conf").write_text("\n".join(settings))
    environment = {**os.environ, "APT_CONFIG": str(scratch / "apt.conf"), "LC_ALL": "C"}
    run(["apt-get", "update", "-qq", "--error-on=any"], environment)
    return run(["apt-get", "install", "-q", "-y", option, *names], environment)


def _as_if_installed(name: str, architecture: str) -> str:
    provides = f"Provides: {PROVIDED[name]}\n" if name in PROVIDED else ""
    return (
        f"Package: {name}\nStatus: install ok installed\nArchitecture: {architecture}\nMulti-Arch: foreign\n"
        f"Version: 9999\nMaintainer: nobody\nDescription: left out\n{provides}"
    )


def field(stanza: str, name: str) -> str:
    """The first line of a field in a package's description; empty without."""
    found = re.search(rf"^{name}: *(.*)$", stanza, re.M)
    return found[1] if found else ""


def is_left_out(path: str) -> bool:
    """Whether a package's file stays out of the image; `path` is absolute."""
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in KEPT):
        return False
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in LEFT_OUT)


def unpack(package: Path, stanza: str, root: Path) -> None:
    """Unpack what is wanted of one package, and list it as dpkg would."""
    listed: list[str] = []
    wanted: list[tarfile.TarInfo] = []
    with tempfile.TemporaryFile() as data:
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=data, stderr=subprocess.PIPE)
        if done.returncode != 0:
            raise BuildError(f"{package.name} cannot be unpacked: {done.stderr.decode(errors='replace')}")
        data.seek(0)
        with tarfile.open(fileobj=data) as tar:
            for member in tar:
                path = "/" + member.name.removeprefix(".").strip("/")
                folder_of_another = member.issym() and path.startswith(_DOCUMENTS) and path.count("/") == 4
                if not member.isdir() and (folder_of_another or not is_left_out(path)):
                    listed.append(path)
                    wanted.append(member)
            extract(tar, root, wanted)
    info = root / "var/lib/dpkg/info"
    info.mkdir(parents=True, exist_ok=True)
    name = field(stanza, "Package")
    if field(stanza, "Multi-Arch") == "same":
        name += f":{field(stanza, 'Architecture')}"
    (info / f"{name}.list").write_text("".join(f"{path}\n" for path in sorted(listed)))


def finish(root: Path, stanzas: Mapping[str, str], architecture: str) -> None:
    """What the packages' scripts would have done, as far as the program needs it."""
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for place, target in LINKS.items():
        link = root / place.format(triplet=TRIPLETS[architecture])
        if (link.parent / target).exists():
            link.symlink_to(target)
    status = [f"{stanzas[name].strip()}\nStatus: install ok installed\n" for name in sorted(stanzas)]
    (root / "var/lib/dpkg/status").write_text("\n".join(status))


def missing_libraries(root: Path) -> list[str]:
    """Programs and libraries in `root` that need a library which is not there, with its name."""
    missing = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.name.startswith("ld-linux"):
            continue
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                continue
        command = [str(word) for word in (*loader_of(root), "--list", path)]
        said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
        for line in said.splitlines():
            name, needed, found = line.strip().partition(" => ")
            if needed and not found.startswith(f"{root}/"):
                missing.append(f"/{path.relative_to(root)}: {name}")
    return missing
