"""Compile the C source for machines without a compiler: `python -m memtier_engine.trackers.bpf.build [--check]`.

The object is kept beside the source, with the source's digest in a file: `--check` tells whether they belong together
(no compiler needed); without it the object is compiled anew where clang is at hand.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from memtier_engine.trackers.bpf.loaders import OBJECT, SOURCE

DIGEST = "access.bpf.sha256"
_HERE = Path(__file__).parent
_CLANGS = ("clang", *(f"clang-{version}" for version in range(22, 10, -1)))
_FLAGS = ("-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror")


def digest(folder: Path = _HERE) -> str:
    """One line: sha256 of source and object."""
    both = (hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (SOURCE, OBJECT))
    return " ".join(both) + "\n"


def is_fresh(folder: Path = _HERE) -> bool:
    """Whether the object was compiled from this source."""
    path = folder / DIGEST
    return path.exists() and (folder / OBJECT).exists() and path.read_text() == digest(folder)


def compile_object(folder: Path = _HERE) -> None:
    """Compile and note the digest.

    Raises:
        FileNotFoundError: no clang.
        subprocess.CalledProcessError: the source is wrong; clang has said where.
    """
    clang = next((found for name in _CLANGS if (found := shutil.which(name))), None)
    if clang is None:
        raise FileNotFoundError("clang is not installed (apt install clang)")
    # Relative names only: the object must not depend on where the checkout is.
    subprocess.run(
        [clang, *_FLAGS, f"-fdebug-prefix-map={folder}=.", "-c", SOURCE, "-o", OBJECT], cwd=folder, check=True
    )
    strip = next(
        (
            found
            for name in ("llvm-strip", *(f"llvm-strip-{v}" for v in range(22, 10, -1)))
            if (found := shutil.which(name))
        ),
        None,
    )
    if strip is not None:
        subprocess.run([strip, "-g", OBJECT], cwd=folder, check=True)  # drops DWARF, keeps BTF
    (folder / DIGEST).write_text(digest(folder))


def main(arguments: list[str]) -> int:
    """0: fresh; 1: not, and it could not be compiled."""
    if is_fresh():
        return 0
    if "--check" in arguments:
        print(f"{OBJECT} was not compiled from this {SOURCE}: run `make bpf`", file=sys.stderr)
        return 1
    try:
        compile_object()
    except FileNotFoundError as error:
        print(f"{SOURCE}: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:
        return 1
    print(f"compiled {OBJECT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
